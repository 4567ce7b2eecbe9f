#!/bin/sh
# SPDX-License-Identifier: MIT
# Bad input to the demo: each ends with status 2, with a message that names the thing and the reason, and nothing on stdout.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT
failed=0

fail() { echo "FAIL: $*" >&2; failed=1; }

# refused PATTERN ARGUMENT...
refused() {
    pattern=$1
    shift
    # shellcheck disable=SC2086
    timeout 20 $as "$HMM" demo "$@" >"$dir/out" 2>"$dir/err"
    status=$?
    [ $status -eq 2 ] || fail "demo $*: exit status $status, not 2"
    [ -s "$dir/out" ] && fail "demo $*: wrote to stdout"
    grep -q '^hmm demo: ' "$dir/err" || fail "demo $*: the message does not say who speaks"
    grep -q -- "$pattern" "$dir/err" || fail "demo $*: '$(cat "$dir/err")' does not match '$pattern'"
}

as=
: >"$dir/empty"
echo word >"$dir/text"
mkfifo "$dir/fifo"

refused "$dir/missing': No such file" "$dir/missing"
refused "$dir/empty' is empty" "$dir/empty"
refused "$dir' is a directory" "$dir"
refused "/dev/zero' is a device" /dev/zero
refused "fifo' is a pipe" "$dir/fifo"
refused "'second' is one file too many" "$dir/text" second
refused "--memory '0'" --memory 0
refused "--memory '12Q' is not a size" --memory 12Q
refused "--memory '-5' is not a size" --memory -5
refused "--memory '64MM' is not a size" --memory 64MM
refused "--memory '99999999999999999999' is not a size" --memory 99999999999999999999
refused "--memory '900T' is more than this machine has" --memory 900T
refused "--seed 'x' is not a number" --seed x
refused "--repeat '0' is not a number" --repeat 0
refused "not enough memory" --repeat 99999999999 "$dir/text"
refused "give one of them" --memory 8M --device soft
refused "nosuchdevice" --device nosuchdevice
refused "colour" --device soft:colour=red
refused "memory" --device soft:memory=0
refused "memory" --device soft:memory=900T
refused "unrecognized option '--bogus'" --bogus

# root can read everything, so somebody else must try
chmod 0 "$dir/text"
if [ "$(id -u)" -ne 0 ]; then
    refused "text': Permission denied" "$dir/text"
elif command -v setpriv >/dev/null; then
    chmod 755 "$dir"
    cp "$HMM" "$dir/hmm"
    cp "$(dirname "$HMM")"/libhmm.so* "$dir" 2>/dev/null # the build folder may be out of reach for others
    as="setpriv --reuid 65534 --regid 65534 --clear-groups -- env LD_LIBRARY_PATH=$dir"
    HMM=$dir/hmm
    if $as "$HMM" demo --help >/dev/null 2>&1; then
        refused "text': Permission denied" "$dir/text"
    else
        echo "not tried: an unreadable file (other users cannot run $HMM)"
    fi
fi
exit $failed
