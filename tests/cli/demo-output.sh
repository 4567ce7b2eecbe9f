#!/bin/sh
# SPDX-License-Identifier: MIT
# Where the demo's output goes: a closed pipe ends it quietly with an error status, a full disk with a message; JSON is one
# object; the progress bar appears on terminals only, at most ten times a second, and is gone at the end.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

# The reader is gone before the demo starts.
for args in '' --json; do
    python3 - "$HMM" $args <<'PYTHON' >"$dir/out" 2>"$dir/err" || fail "closed pipe, demo $args: $(cat "$dir/out" "$dir/err")"
import os, subprocess, sys
r, w = os.pipe()
os.close(r)
p = subprocess.run([sys.argv[1], "demo", "--repeat", "9"] + sys.argv[2:], stdout=w, stderr=subprocess.PIPE, timeout=30)
if p.returncode == 0 or p.stderr:
    sys.exit(f"exit status {p.returncode}, stderr {p.stderr}")
PYTHON
done

"$HMM" demo --repeat 9 >/dev/full 2>"$dir/err" && fail "output to a full device is not an error"
grep -q 'No space left' "$dir/err" || fail "output to a full device: no message"

# A file name that is not text must not make bad JSON.
name=$(printf '%s/odd"name\\\377\n' "$dir")
cp /usr/share/common-licenses/GPL-3 "$name"
"$HMM" demo --repeat 9 --json "$name" >"$dir/json" || fail "demo --json: exit status $?"
python3 - "$dir/json" <<'PYTHON' || exit 1
import json, sys
text = open(sys.argv[1], encoding="utf-8").read()
r = json.loads(text)
fields = ("file file_bytes repeat text_bytes table_bytes table_words device device_memory_bytes seed changed_words "
          "changed_on_device phases before after pictures checks values_compared audit_violations verified")
for field in fields.split():
    if field not in r:
        sys.exit(f"FAIL: JSON has no field {field}")
for field in ("name bytes seconds gib_per_second cpu_faults device_faults pages_to_device pages_to_system "
              "pages_evicted").split():
    if any(field not in p for p in r["phases"]):
        sys.exit(f"FAIL: a phase has no field {field}")
PYTHON

# The same seed gives the same changes; another gives others.
result() { "$HMM" demo --json --repeat 20 --seed "$1" | python3 -c 'import json,sys; print(json.load(sys.stdin)["after"])'; }
[ "$(result 5)" = "$(result 5)" ] || fail "the same seed gives different changes"
[ "$(result 5)" != "$(result 6)" ] || fail "different seeds give the same changes"

python3 - "$HMM" "$dir/big" <<'PYTHON' || exit 1
import os, pty, subprocess, sys, time
hmm, big = sys.argv[1:]
def run(term):
    master, slave = pty.openpty()
    began = time.monotonic()
    p = subprocess.Popen([hmm, "demo", "--repeat", "3000", "/usr/share/common-licenses/GPL-3"], stdout=subprocess.DEVNULL,
                         stderr=slave, env={"TERM": term, "PATH": "/usr/bin:/bin"})
    os.close(slave)
    seen = b""
    try:
        while part := os.read(master, 65536):
            seen += part
    except OSError:
        pass
    if p.wait() != 0:
        sys.exit(f"FAIL: exit status {p.returncode} on a terminal: {seen!r}")
    return seen, time.monotonic() - began
seen, seconds = run("xterm")
frames = seen.count(b"%")
if frames == 0:
    sys.exit("FAIL: no progress bar on a terminal")
if frames > 10 * seconds + 10:
    sys.exit(f"FAIL: {frames} frames in {seconds:.1f} seconds")
if not seen.endswith(b"\r\x1b[K"):
    sys.exit("FAIL: the bar is left behind")
if run("dumb")[0]:
    sys.exit("FAIL: a progress bar on a dumb terminal")
PYTHON
