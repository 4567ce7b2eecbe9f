#!/bin/sh
# SPDX-License-Identifier: MIT
# Without permission for userfaultfd the demo says so, with a remedy, at once and with status 2. A filter takes the permission
# away: both the system call and the ioctl of /dev/userfaultfd answer EPERM.
HMM=${1:-${HMM:?path of hmm}}
dir=$(mktemp -d) || exit 99
trap 'rm -rf "$dir"' EXIT

fail() { echo "FAIL: $*" >&2; exit 1; }

cat >"$dir/without.py" <<'PYTHON'
import ctypes, os, platform, struct, sys
numbers = {"x86_64": (323, 16, 0xC000003E), "aarch64": (282, 29, 0xC00000B7)}
if platform.machine() not in numbers:
    sys.exit(77)
uffd, ioctl, arch = numbers[platform.machine()]
EPERM, ALLOW, NEW = 0x00050001, 0x7FFF0000, 0xAA00 # USERFAULTFD_IOC_NEW
def op(code, k, jt=0, jf=0):
    return struct.pack("HBBI", code, jt, jf, k)
code = [op(0x20, 4), op(0x15, arch, 0, 5),           # other architectures: allowed
        op(0x20, 0), op(0x15, uffd, 4, 0),           # userfaultfd(): refused
        op(0x15, ioctl, 0, 2), op(0x20, 24), op(0x15, NEW, 1, 0),
        op(0x06, ALLOW), op(0x06, EPERM)]
program = ctypes.create_string_buffer(b"".join(code))
libc = ctypes.CDLL(None, use_errno=True)
fprog = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(fprog), 0, 0):
    sys.exit(77)
os.execv(sys.argv[1], sys.argv[1:])
PYTHON

timeout 20 python3 "$dir/without.py" "$HMM" demo >"$dir/out" 2>"$dir/err"
status=$?
if [ $status -eq 77 ]; then
    echo "SKIP: no system call filter can be set here"
    exit 77
fi
cat "$dir/err"
[ $status -eq 2 ] || fail "exit status $status, not 2"
[ -s "$dir/out" ] && fail "wrote to stdout"
grep -q 'userfaultfd' "$dir/err" || fail "the message does not name what is missing"
grep -q 'sysctl\|CAP_SYS_PTRACE\|chmod\|root' "$dir/err" || fail "the message has no remedy"
exit 0
