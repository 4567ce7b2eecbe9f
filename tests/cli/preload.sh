#!/bin/bash
# SPDX-License-Identifier: MIT
# Programs that know nothing of libhmm run under libhmm-preload.so as they do without it: true, shells, python3 where it is
# there, and the demo, whose results are checked by itself. PRELOAD is the library.
set -euo pipefail
failed=0

check() { # NAME COMMAND...: the same output and exit status with and without
    local name=$1 plain status=0 loaded loaded_status=0
    shift
    plain=$("$@" 2>&1) || status=$?
    loaded=$(LD_PRELOAD=$PRELOAD timeout -s KILL 60 "$@" 2>&1) || loaded_status=$?
    if [ "$plain" != "$loaded" ] || [ "$status" != "$loaded_status" ]; then
        echo "$name: $status, '$plain' without; $loaded_status, '$loaded' with"
        failed=1
    fi
}

check true /bin/true
check false /bin/false
check subshells sh -c '(echo a; exit 3); echo $?; echo b | cat | cat; exec sh -c "echo c; exit 4"'
check killed bash -c '(sleep 10 & kill -9 $!; wait $!; echo $?) 2>/dev/null'
check sort bash -c 'seq 1 200000 | sort -rn | head -3' # big allocations, threads, pipes
if command -v python3 >/dev/null; then
    check python python3 -c '
import mmap, os, subprocess, threading
maps = [mmap.mmap(-1, 1 << 20) for _ in range(50)]
for m in maps:
    m[:5] = b"hello"
    m.resize(2 << 20)
    assert m[:5] == b"hello" and m[1 << 20] == 0
    m.close()
threads = [threading.Thread(target=lambda: [bytearray(1 << 22) for _ in range(20)]) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(subprocess.run(["echo", "child"], capture_output=True).stdout)
pid = os.fork()
if pid == 0:
    os.execvp("sh", ["sh", "-c", "exit 5"])
print(os.waitpid(pid, 0)[1])
os._exit(6)'
    # A library that is loaded later, by a program of which nobody was asked, finds it.
    LD_PRELOAD=$PRELOAD timeout -s KILL 60 python3 - "$LIBHMM" <<'PY' || failed=1
import ctypes, mmap, sys
hmm = ctypes.CDLL(sys.argv[1])
device = ctypes.c_int32()
assert hmm.hmm_device_open(b"soft:memory=8M,engines=1", ctypes.byref(device)) == 0
m = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m[:] = b"x" * len(m)
address = ctypes.addressof(ctypes.c_char.from_buffer(m))
assert hmm.hmm_migrate_to_device(device, ctypes.c_void_p(address), ctypes.c_size_t(len(m)), None) == 0
m.madvise(mmap.MADV_DONTNEED, 0, 2 << 20)
assert m[0] == 0 and m[3 << 20] == ord("x")
try: # guards raise no event: that the content is gone with them shows that the call was announced
    m.madvise(102, 3 << 20, 1 << 20)
except OSError:
    print("no guards in this kernel: not checked that the call is announced")
else:
    m.madvise(103, 3 << 20, 1 << 20)
    assert m[(4 << 20) - 1] == 0 and m[2 << 20] == ord("x")
assert hmm.hmm_audit() == 0
assert hmm.hmm_device_close(device) == 0
PY
fi
if ! LD_PRELOAD=$PRELOAD timeout -s KILL 120 "$HMM" demo --repeat 1 | grep -q '^verified: '; then
    echo "the demo does not verify its results under the preloaded library"
    failed=1
fi
exit $failed
