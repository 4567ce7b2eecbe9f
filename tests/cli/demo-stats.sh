#!/bin/sh
# SPDX-License-Identifier: MIT
# hmm demo --stats shows every number of struct hmm_stats, by its name in the header, in both forms, and the report without it is as
# ever; the numbers agree with those of the phases; HMM_LIMIT holds for the demo's device.
HMM=${1:-${HMM:?path of hmm}}
: "${SOURCE_ROOT:?}"
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

"$HMM" demo --repeat 200 --json >"$dir/json" || fail "demo --json: exit status $?"
"$HMM" demo --repeat 200 --stats >"$dir/text" || fail "demo --stats: exit status $?"
"$HMM" demo --repeat 200 >"$dir/plain" || fail "demo: exit status $?"
grep -q invalidation_ns "$dir/plain" && fail "statistics are shown without --stats"
HMM_LIMIT=1M "$HMM" demo --repeat 200 --memory 8M --json >"$dir/limited" || fail "demo with a limit: exit status $?"
HMM_LIMIT=much "$HMM" demo >"$dir/out" 2>"$dir/err" && fail "a limit that is no size is taken"
grep -q "HMM_LIMIT='much'" "$dir/err" || fail "the message does not quote the limit: $(cat "$dir/err")"

python3 - "$dir" "$SOURCE_ROOT/include/hmm/hmm.h" <<'PYTHON' || exit 1
import json, os, re, sys
d, header = sys.argv[1:]
body = re.search(r"struct hmm_stats \{(.*?)\n\};", open(header).read(), re.S).group(1)
body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
names = [n.strip() for line in re.findall(r"uint64_t ([^;]*);", body) for n in line.split(",")]
assert len(names) > 40, names
r = json.load(open(f"{d}/json"))
stats = r["statistics"]
assert sorted(stats) == sorted(names), set(stats) ^ set(names)
text = open(f"{d}/text").read()
for name in names:
    assert re.search(rf"^  {name} +\d+  \S", text, re.M), f"--stats does not show {name}"
for name in "cpu_faults", "device_faults", "pages_to_device", "pages_to_system":
    phases = sum(p[name] for p in r["phases"])
    assert phases <= stats[name] <= phases + 64, (name, phases, stats[name])
assert stats["pages_to_device"] > 0 and stats["invalidations"] > 0 and stats["invalidation_ns"] > 0
assert stats["transit_pages"] == 0 and stats["poisoned"] == 0 and stats["limit_bytes"] == 0
on_device = stats["pages_to_device"] - stats["pages_to_system"] - stats["dropped"]
assert stats["device_pages"] == on_device, (stats["device_pages"], on_device)
limited = json.load(open(f"{d}/limited"))["statistics"]
assert limited["limit_bytes"] == 1 << 20 and limited["device_pages"] <= (1 << 20) // os.sysconf("SC_PAGE_SIZE"), limited
assert limited["evicted"] > stats["evicted"] or limited["evicted"] > 256, limited
PYTHON
