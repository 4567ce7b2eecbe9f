#!/bin/sh
# SPDX-License-Identifier: MIT
# hmm check and hmm devices: text and JSON say the same, the exit status agrees with the items, and nobody is left without a
# remedy, privileged or not.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

# hold WHO COMMAND...: the check as run by COMMAND.
hold()
{
    who=$1
    shift
    "$@" check >"$dir/text"
    text=$?
    "$@" check --json >"$dir/json"
    [ $? -eq $text ] || fail "$who: text and JSON end with different statuses"
    python3 - "$dir/json" "$dir/text" $text <<'PYTHON' || fail "$who: $(cat "$dir/text")"
import json, sys
found = json.load(open(sys.argv[1]))
text = open(sys.argv[2]).read()
status = int(sys.argv[3])
worst = max(["ok", "degraded", "missing"].index(i["status"]) for i in found["items"])
assert found["items"], "no items"
assert status == worst, f"exit status {status}, worst item {worst}"
assert found["status"] == ["ok", "degraded", "missing"][status], found["status"]
for item in found["items"]:
    assert item["detail"], item
    assert bool(item["remedy"]) == (item["status"] != "ok"), item
    assert item["name"] in text, item
counts = {s: sum(i["status"] == s for i in found["items"]) for s in ("ok", "degraded", "missing")}
summary = text.rstrip().split("\n")[-1]
assert summary.endswith(f': {counts["ok"]} ok, {counts["degraded"]} degraded, {counts["missing"]} missing'), summary
PYTHON
}

hold "this user" "$HMM"
if [ "$(id -u)" -eq 0 ] && command -v setpriv >/dev/null; then
    # Reachable for a user who may not enter our folders.
    cp "$HMM" "$dir/hmm" && cp "$(dirname "$HMM")"/libhmm.so.0 "$(dirname "$HMM")"/libhmm_demo.so "$dir" && chmod 755 "$dir" || exit 99
    hold "nobody" env LD_LIBRARY_PATH="$dir" setpriv --reuid=65534 --regid=65534 --clear-groups "$dir/hmm"
fi

"$HMM" devices >"$dir/text" || fail "hmm devices: exit status $?"
"$HMM" devices --json >"$dir/json" || fail "hmm devices --json: exit status $?"
python3 - "$dir/json" "$dir/text" <<'PYTHON' || exit 1
import json, sys
drivers = json.load(open(sys.argv[1]))["drivers"]
text = open(sys.argv[2]).read()
soft = next(d for d in drivers if d["name"] == "soft")
assert "memory" in [o["name"] for o in soft["options"]], soft
for d in drivers:
    assert d["name"] in text and d["description"], d
    for o in d["options"]:
        assert f'  {o["name"]} ' in text and o["help"] and o["values"] and "default" in o, o
        assert o["default"] is None or f'{o["default"]} unless given' in " ".join(text.split()), o
    assert d["origin"] == "built in", d
faulty = next(d for d in drivers if d["name"] == "faulty")
over = next(o for o in faulty["options"] if o["name"] == "over")
assert over["default"] is None and over["values"] == "a device spec", over
PYTHON
