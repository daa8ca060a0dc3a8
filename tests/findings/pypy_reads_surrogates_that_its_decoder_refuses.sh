#!/usr/bin/env bash
# One expects: `str(data, "utf-8")` and `data.decode("utf-8")` agree, and agree on PyPy with CPython.
# What happens: PyPy's `str` lets encoded surrogates (half an emoji, as writers in JavaScript leave it) pass for
# UTF-8, its `decode` refuses them, CPython refuses them in both. The pure Python runtime of protobuf, the only one
# for PyPy, reads with `str`: a message that CPython refuses is read on PyPy, and then can't be serialised again.
# Why it matters: a relay on PyPy takes in logs that it can't send on. It fails at its output, over and over, for what
# should have been refused, or replaced, at its input; tests on CPython never show it.
# Needs python3 with venv, and pypy3; installs what it runs into a temporary folder.
set -euo pipefail
for tool in python3 pypy3; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool here"; exit 77; }
done
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# One wheel without compiled parts, for both interpreters.
python3 -m venv venv
venv/bin/pip install --disable-pip-version-check --target pure --no-deps --only-binary :all: --platform any \
    --implementation py --abi none --python-version 3.9 protobuf==5.29.6 >pip.log 2>&1 || { cat pip.log; exit 1; }

cat >read.py <<'PY'
import platform
import sys

from google.protobuf.internal import api_implementation
from google.protobuf.wrappers_pb2 import StringValue

HALF = b"ok \xed\xa0\xbd"  # "ok " and the first half of an emoji


def outcome(call):
    try:
        return ascii(call())
    except Exception as error:
        return type(error).__name__


def read():
    return StringValue.FromString(b"\x0a" + bytes([len(HALF)]) + HALF)


assert api_implementation.Type() == "python"
seen = {
    "data.decode": outcome(lambda: HALF.decode("utf-8")),
    "str(data)": outcome(lambda: str(HALF, "utf-8")),
    "protobuf reads": outcome(lambda: read().value),
}
print("  %s %s: %s" % (platform.python_implementation(), platform.python_version(), seen))
if platform.python_implementation() == "PyPy":
    written = outcome(lambda: read().SerializeToString())
    print("  and writes it again: " + written)
    expected = ["UnicodeDecodeError", "'ok \\ud83d'", "'ok \\ud83d'"]
    sys.exit(0 if list(seen.values()) == expected and written in ("UnicodeEncodeError", "ValueError") else 1)
sys.exit(0 if set(seen.values()) == {"UnicodeDecodeError"} else 1)
PY

echo "protobuf 5.29.6; $(pypy3 --version | tail -n 1)"
echo "expected: UnicodeDecodeError six times"
echo "seen:"
if PYTHONPATH=pure venv/bin/python read.py && PYTHONPATH=pure pypy3 read.py; then
    echo "so it is still: PyPy's str reads what its decode refuses"
else
    echo "no longer as described"
    exit 1
fi
