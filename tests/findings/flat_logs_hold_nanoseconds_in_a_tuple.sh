#!/usr/bin/env bash
# One expects: the nanoseconds of a pulled log are a number, as its seconds are.
# What happens: in the flattened logs of aliyun-log-python-sdk, `__time_ns_part__` is a tuple of one number (its line
# ends with a comma), which JSON turns into a list. The other JSON of the same pull has the plain number under
# `@time_ns`. The key is missing where the number is 0. It is so in 0.9.12 as well as in 0.9.52.
# Why it matters: a consumer that writes flattened logs to another store has there a list for most logs and nothing
# for the rest, in a field that is declared a number; adding it to the seconds raises.
# Needs python3 with venv; installs what it runs into a temporary folder.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: no python3 here"; exit 77; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat >flatten.py <<'PY'
import json
import sys

from aliyun.log.log_logs_pb2 import LogGroupList
from aliyun.log.pulllog_response import PullLogResponse
from aliyun.log.version import __version__

print("aliyun-log-python-sdk %s, protobuf 5.29.6" % __version__)
print("expected: 123456789, also as JSON, or the same in quotes, and 0 where it is 0")
print("seen:")

pull = LogGroupList()
log_group = pull.LogGroups.add(Topic="t", Source="s")
for nanoseconds in (123456789, 0):
    log_group.Logs.add(Time=1700000000, Time_ns=nanoseconds).Contents.add(Key="a", Value="b")
data = pull.SerializeToString()
header = {"x-log-count": "1", "x-log-bodyrawsize": str(len(data)), "x-log-cursor": "MQ=="}

first, second = PullLogResponse(data, header).get_flatten_logs_json()
text = PullLogResponse(data, header).get_flatten_logs_json(time_as_str=True)[0]
grouped = PullLogResponse(data, header).get_loggroup_json_list()[0]["logs"][0]
print("  flattened:           %r" % (first["__time_ns_part__"],))
print("  the same as JSON:    " + json.dumps(first["__time_ns_part__"]))
print("  times as text:       %r" % (text["__time_ns_part__"],))
print("  where it is 0:       %r" % (second.get("__time_ns_part__", "no such key"),))
print("  by groups, @time_ns: %r" % (grouped["@time_ns"],))
sys.exit(
    0
    if first["__time_ns_part__"] == (123456789,)
    and text["__time_ns_part__"] == ("123456789",)
    and "__time_ns_part__" not in second
    and grouped["@time_ns"] == 123456789
    else 1
)
PY

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check aliyun-log-python-sdk==0.9.52 protobuf==5.29.6 >pip.log 2>&1 ||
    { cat pip.log; exit 1; }
venv/bin/pip install --disable-pip-version-check --no-deps --target older aliyun-log-python-sdk==0.9.12 \
    >pip.log 2>&1 || { cat pip.log; exit 1; }

status=0
for path in older ""; do
    PYTHONPATH="$path" venv/bin/python flatten.py || status=1
done
if [ "$status" = 0 ]; then
    echo "so it is still: a tuple of one"
else
    echo "no longer as described"
    exit 1
fi
