#!/usr/bin/env bash
# One expects: a .zst file to which a log writer appended after its restart is read whole, by any binding that reads
# several frames in a row.
# What happens: the binding `zstd` does so only where every frame states the size of its content, as one-shot
# compressors write it. A stream states none; of two streams, `zstd.decompress` returns the first and says nothing of
# the second. A stream after a frame of known size raises. pyzstd and the reader of zstandard return everything.
# Why it matters: a test with compress() + compress() passes, and in production everything after the first restart of
# the writer is missing from each rotated file, without an error.
# Needs python3 with venv; installs what it runs into a temporary folder.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: no python3 here"; exit 77; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check zstd==1.5.7.2 zstandard==0.25.0 pyzstd==0.18.0 >pip.log 2>&1 ||
    { cat pip.log; exit 1; }

cat >frames.py <<'PY'
import io
import sys

import pyzstd
import zstandard
import zstd

RUNS = [b"".join(b"run %d, line %d\n" % (run, line) for line in range(100)) for run in (1, 2)]


def streamed(data):
    file = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as writer:
        writer.write(data)
    return file.getvalue()


def lines(read, data):
    try:
        return len(bytes(read(data)).splitlines())
    except Exception as error:
        return type(error).__name__


def read_stream(data):
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()


FILES = {
    "two frames of known size": zstd.compress(RUNS[0]) + zstd.compress(RUNS[1]),
    "two streams": streamed(RUNS[0]) + streamed(RUNS[1]),
    "a known size, a stream": zstd.compress(RUNS[0]) + streamed(RUNS[1]),
}
seen = {}
for name, data in FILES.items():
    seen[name] = [lines(read, data) for read in (zstd.decompress, pyzstd.decompress, read_stream)]
    print("  %-25s zstd: %s, pyzstd: %s, zstandard: %s lines" % (name, *seen[name]))
sys.exit(0 if list(seen.values()) == [[200, 200, 200], [100, 200, 200], ["Error", 200, 200]] else 1)
PY

echo "zstd 1.5.7.2, pyzstd 0.18.0, zstandard 0.25.0"
echo "expected: 200 lines everywhere"
echo "seen:"
if venv/bin/python frames.py; then
    echo "so it is still: the second stream is lost without an error"
else
    echo "no longer as described"
    exit 1
fi
