#!/bin/sh
# SPDX-License-Identifier: MIT
# What the hmm command says about itself, what it refuses, and that output which cannot be written is not success.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

# run STATUS ARGUMENT...: the exit status must be that; output is in $dir/out and $dir/err.
run()
{
    want=$1
    shift
    timeout 60 "$HMM" "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    [ $got -eq "$want" ] || fail "hmm $*: exit status $got, not $want: $(cat "$dir/out" "$dir/err")"
}

for command in '' check devices demo bench; do
    run 0 $command --help
    grep -q '^Usage: hmm' "$dir/out" || fail "hmm $command --help: no usage"
    run 0 $command --version
    grep -qx 'hmm [0-9]*\.[0-9]*\.[0-9]*' "$dir/out" || fail "hmm $command --version: $(cat "$dir/out")"
    run 2 $command --no-such-option
    [ -s "$dir/out" ] && fail "hmm $command --no-such-option: wrote to stdout"
    grep -q -- '--no-such-option' "$dir/err" || fail "hmm $command: the message does not name the option"
done
for command in check devices demo bench; do
    run 0 --help
    grep -q "^  $command " "$dir/out" || fail "hmm --help does not name $command"
done

run 2
grep -q 'a command is missing' "$dir/err" || fail "no command: $(cat "$dir/err")"
run 2 nonsense
grep -q "no command 'nonsense'" "$dir/err" || fail "unknown command: $(cat "$dir/err")"
run 2 check surplus
grep -q "'surplus'" "$dir/err" || fail "surplus argument of check: $(cat "$dir/err")"
run 2 devices surplus
grep -q "'surplus'" "$dir/err" || fail "surplus argument of devices: $(cat "$dir/err")"
run 2 bench nonsense
grep -q "'nonsense'" "$dir/err" || fail "unknown benchmark: $(cat "$dir/err")"
for bad in '--size=0' '--size=1' '--size=-4M' '--size=4X' '--size=' '--size=99999999999999999999G' '--runs=0' '--runs=x' \
    '--runs=1001'; do
    run 2 bench "$bad"
    grep -q -- "${bad%%=*} '${bad#*=}'" "$dir/err" || fail "bench $bad: $(cat "$dir/err")"
done

# Where output cannot go: a full disk and a closed descriptor are errors with a message, a reader that left is one without.
for arguments in --help --version devices 'devices --json' 'bench --list' 'check --help'; do
    "$HMM" $arguments >/dev/full 2>"$dir/err" && fail "hmm $arguments to a full device: success"
    grep -q 'No space left' "$dir/err" || fail "hmm $arguments to a full device: no message"
    "$HMM" $arguments >&- 2>"$dir/err" && fail "hmm $arguments without stdout: success"
    [ -s "$dir/err" ] || fail "hmm $arguments without stdout: no message"
    python3 - "$HMM" $arguments <<'PYTHON' || exit 1
import os, subprocess, sys
r, w = os.pipe()
os.close(r)
p = subprocess.run(sys.argv[1:], stdout=w, stderr=subprocess.PIPE, timeout=30)
if p.returncode != 1 or p.stderr:
    sys.exit(f"FAIL: closed pipe, {sys.argv[2:]}: exit status {p.returncode}, stderr {p.stderr}")
PYTHON
done
