#!/bin/sh
# SPDX-License-Identifier: MIT
# hmm bench: every benchmark runs on little memory, its JSON lines have the agreed keys and sane values, and a device that cannot
# be opened is an error. Numbers themselves are not judged: the machine may be busy.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

"$HMM" bench --json --size 16M --runs 3 >"$dir/json" || fail "hmm bench: exit status $?"
"$HMM" bench --list >"$dir/list" || fail "hmm bench --list: exit status $?"
python3 - "$dir/json" "$dir/list" <<'PYTHON' || exit 1
import json, math, sys
keys = ["bench", "size", "page", "value", "unit", "reference", "ratio", "better", "runs", "spread"]
lines = [json.loads(line) for line in open(sys.argv[1])]
for line in lines:
    assert list(line) == keys, line
    assert line["page"] in ("4k", "thp") and line["better"] in ("higher", "lower"), line
    assert line["size"] > 0 or line["bench"].startswith("empty_job"), line
    for key in ("value", "reference", "ratio", "runs"):
        assert line[key] > 0 and math.isfinite(line[key]), line
    assert line["spread"] >= 0, line
    if not line["bench"].startswith("metadata"):
        assert line["runs"] == 3, line
named = {line["bench"] for line in lines}
for bench in ("migrate_to_device", "migrate_to_system", "cpu_fault_random", "cpu_touch_sequential", "unmanaged_touch",
              "metadata_bytes_per_page", "device_fault", "device_fault_isolated", "empty_job", "empty_job_isolated",
              "range_snapshot", "range_fault", "munmap_managed", "munmap_managed_event", "fork_device_resident"):
    assert bench in named, f"no line of {bench}"
    assert bench.removesuffix("_isolated").removesuffix("_event") in open(sys.argv[2]).read(), f"--list does not name {bench}"
for n in (1, 1000, 100000):
    assert f"notifier_lookup_{n}" in named, f"no line of {n} intervals"
PYTHON

"$HMM" bench --size 4M --runs 1 --json metadata_bytes_per_page >"$dir/one" || fail "one benchmark: exit status $?"
[ "$(grep -vc '"bench":"metadata' "$dir/one")" -eq 0 ] || fail "a benchmark ran that was not named: $(cat "$dir/one")"
"$HMM" bench --device nonsense migrate_to_device >"$dir/out" 2>"$dir/err" && fail "an unknown device is no error"
grep -q nonsense "$dir/err" || fail "the message does not name the device: $(cat "$dir/err")"
