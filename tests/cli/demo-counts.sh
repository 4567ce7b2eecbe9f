#!/bin/sh
# SPDX-License-Identifier: MIT
# What the device counts is what other tools count: the words of several inputs against tr, sort and uniq, with words and long
# runs across the borders of the pieces that the demo works in (1 MiB).
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT
export LC_ALL=C

fail() { echo "FAIL: $*" >&2; exit 1; }

# Prints occurrences, different words, and the ten most frequent with their counts, as the demo defines a word.
reference() {
    tr -cs 'A-Za-z0-9' '\n' <"$1" | tr '[:upper:]' '[:lower:]' | cut -c 1-31 | grep . | sort | uniq -c >"$dir/words"
    awk '{ n += $1 } END { print n + 0, NR }' "$dir/words"
    sort -k 1,1nr -k 2,2 "$dir/words" | head -n 10 | awk '{ print $2, $1 }'
}

found() {
    "$HMM" demo --json --repeat 1 "$1" >"$dir/json" || fail "demo $1: exit status $?"
    python3 -c '
import json, sys
r = json.load(open(sys.argv[1]))["before"]
print(r["occurrences"], r["words"])
for w in r["most_frequent"]: print(w["word"], w["count"])' "$dir/json" || fail "demo $1: no good JSON"
}

compare() {
    echo "counts of $1"
    reference "$1" >"$dir/expected"
    found "$1" >"$dir/found" || exit 1
    diff "$dir/expected" "$dir/found" || fail "the words of $1 are counted differently"
}

python3 - "$dir" <<'PYTHON' || exit 99
import random, sys
d, M = sys.argv[1], 1 << 20
def write(name, data):
    with open(f"{d}/{name}", "wb") as f:
        f.write(data)
b = bytearray(b" " * (3 * M + 100))
b[M - 3:M + 4] = b"Crossed"
b[2 * M - 40:2 * M + 40] = b"x" * 80
b[3 * M - 1:3 * M + 1] = b"a."
write("borders", b)
b = bytearray(b"." * (2 * M + 31))
b[M:M + 31] = b"y" * 31
b[2 * M:] = b"z" * 31
write("starts", b)
write("run", b"a" * (3 * M + 5) + b" " + b"B9" * M)
write("one", b"a")
write("nothing", bytes(70000))
write("random", random.Random(3).randbytes(3 * M + 77))
PYTHON

compare /usr/share/common-licenses/GPL-3
for name in borders starts run one nothing random; do
    compare "$dir/$name"
done
