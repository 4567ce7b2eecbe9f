#!/bin/sh
# SPDX-License-Identifier: MIT
# The demo ends with `verified`, on the default text and on binary input, and did what it claims on the way: the device faulted,
# pages went to it and were evicted, the CPU's changes hit pages in device memory, and pages came home.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

for args in '' '--seed 77' '/usr/bin/gcc' '--memory 2M' '--repeat 1' '--device soft:memory=6M,engines=1 --repeat 200' '--limit 0'; do
    echo "hmm demo $args"
    # shellcheck disable=SC2086
    "$HMM" demo $args >"$dir/out" 2>"$dir/err"
    status=$?
    [ $status -eq 0 ] || { cat "$dir/out" "$dir/err"; fail "demo $args: exit status $status"; }
    tail -n 1 "$dir/out" | grep -q '^verified: ' || fail "demo $args: the last line is not the verdict"
    [ -s "$dir/err" ] && fail "demo $args: wrote to stderr: $(cat "$dir/err")"
    [ "$(awk 'length > 100' "$dir/out" | grep -vc '^text')" -eq 0 ] || fail "demo $args: lines longer than 100 columns"
    case $args in
    '') grep -q '^text    /usr/share/common-licenses/GPL-3' "$dir/out" || fail "the default text is not named" ;;
    '--limit 0') grep -q '^device counted words in the first 1 MiB only' "$dir/out" || fail "a cut-short count is not said" ;;
    esac
    for word in 'pages to' evicted GiB/s 'never touched' 'most frequent'; do
        grep -q "$word" "$dir/out" || fail "demo $args: '$word' is missing in the report"
    done
done

"$HMM" demo --json >"$dir/json" || fail "demo --json: exit status $?"
python3 - "$dir/json" <<'PYTHON' || exit 1
import json, sys
r = json.load(open(sys.argv[1]))
def need(what, ok):
    if not ok:
        sys.exit(f"FAIL: {what}")
sums = {key: sum(p[key] for p in r["phases"]) for key in r["phases"][0] if key.startswith(("pages", "cpu", "dev"))}
phase = {p["name"]: p for p in r["phases"]}
page = 4096
need("device memory is not too small for everything", r["device_memory_bytes"] < r["text_bytes"] + r["table_bytes"])
need("no device faults", sums["device_faults"] > 0)
need("no CPU faults", sums["cpu_faults"] > 0)
need("nothing was evicted", sums["pages_evicted"] > 0)
need("less than the text went to the device", sums["pages_to_device"] * page >= r["text_bytes"])
need("nothing came home", sums["pages_to_system"] > 0)
need("no change hit device memory", r["changed_on_device"] > 0)
need("the CPU's changes did not fault", phase["CPU changes words"]["cpu_faults"] > 0)
need("the changes are not seen", r["before"]["words"] != r["after"]["words"])
first, ran = r["pictures"][0], r["pictures"][1]
need("pages on the device before it ran", first["text"]["device_pages"] == 0 and "#" not in first["text"]["cells"])
need("no pages on the device after it ran", ran["text"]["device_pages"] > 0 and set("#+") & set(ran["text"]["cells"]))
for p in r["pictures"]:
    pages = sum(p["text"][k] for k in ("system_pages", "device_pages", "absent_pages"))
    need("the picture leaves pages out", pages * page >= r["text_bytes"])
    need("more on the device than it holds",
         (p["text"]["device_pages"] + p["table"]["device_pages"]) * page <= r["device_memory_bytes"])
need("not verified", r["verified"] is True and r["audit_violations"] == 0 and all(c["equal"] for c in r["checks"]))
PYTHON
