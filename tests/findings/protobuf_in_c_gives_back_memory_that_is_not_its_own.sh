#!/usr/bin/env bash
# One expects: to read a small protobuf message takes memory for that message and frees it; what the rest of the process
# has freed, and the C library keeps for the next time, is nobody else's business.
# What happens: protobuf in C (upb), after every ten thousand blocks that it has freed, has glibc give all free memory of
# the whole process back to the system, by malloc_trim. Some two thousand LogGroups come to so many blocks. The settings
# of glibc that keep freed memory, its trim and mmap thresholds, change nothing about it.
# Why it matters: a consumer that decompresses megabytes and reads the LogGroups in them gets fresh pages for its buffers
# again and again: a hundred thousand page faults in a few seconds, told by no profile of Python code.
# Needs python3 with venv, on Linux with glibc; installs what it runs into a temporary folder.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: no python3 here"; exit 77; }
python3 -c 'import platform, sys; sys.exit(platform.libc_ver()[0] != "glibc")' || { echo "skipped: no glibc"; exit 77; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check protobuf==5.29.6 >pip.log 2>&1 || { cat pip.log; exit 1; }

cat >freed.py <<'PY'
import ctypes
import os
import sys

from google.protobuf import descriptor_pb2
from google.protobuf.internal import api_implementation

BLOCKS, SIZE = 2000, 64000


def resident():
    """MB of memory that the process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if api_implementation.Type() != "upb":
    print("skipped: protobuf is not in C here")
    sys.exit(77)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(SIZE) for _ in range(BLOCKS)]
for block in blocks:
    ctypes.memset(block, 1, SIZE)
libc.malloc(SIZE)  # stays in use behind them, so that glibc by itself gives nothing back
for block in blocks:
    libc.free(block)
before = resident()
message = descriptor_pb2.FileDescriptorProto(dependency=["x" * 200] * 60).SerializeToString()
for _ in range(int(sys.argv[1])):
    descriptor_pb2.FileDescriptorProto.FromString(message)
given_back = max(0.0, before - resident())
print("  after %5s messages: %3.0f MB of %.0f given back" % (sys.argv[1], given_back, BLOCKS * SIZE / 1e6))
sys.exit(0 if (given_back > 64) == (sys.argv[1] != "0") else 1)
PY

echo "protobuf 5.29.6"
echo "expected: 0 MB, however many messages are read"
echo "seen:"
status=0
venv/bin/python freed.py 0 && venv/bin/python freed.py 20000 || status=$?
if [ "$status" = 0 ]; then
    echo "so it is still: reading messages gives back what others have freed"
elif [ "$status" = 77 ]; then
    exit 77
else
    echo "no longer as described"
    exit 1
fi
