#!/usr/bin/env bash
# One expects: a writer that takes seconds refuses a time in milliseconds, or takes it for milliseconds.
# What happens: four writers for Python raise. @alicloud/log for Node, where Date.now() is the clock at hand, sends it:
# the field is a uint32 of protobuf, and protobuf.js keeps the lowest 32 bits. 1700000000000 is a log of July 2080,
# 1795900000000 one of February 1989; what a clock gives moves on by a millisecond each, through 136 years in 50 days. The
# put succeeds.
# Why it matters: nothing looks wrong, for logs arrive, and a query by time finds none; in some weeks they are beyond any
# retention, in others in a future that a target may refuse, so that whoever tests it on one day sees something else on
# another.
# Needs python3 with venv, node 18 or newer, npm; installs what it runs into a temporary folder.
set -euo pipefail
for tool in python3 node npm; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool here"; exit 77; }
done
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check aliyun-log-python-sdk==0.9.52 protobuf==5.29.6 \
    aliyun-log-producer==0.1.2 aliyun-log-fastpb==0.3.0 alibabacloud-gateway-sls-util==0.4.1 >pip.log 2>&1 ||
    { cat pip.log; exit 1; }
echo '{"private": true, "overrides": {"protobufjs": "6.11.6"}}' >package.json
npm install --no-audit --no-fund @alicloud/log@1.2.6 >npm.log 2>&1 || { cat npm.log; exit 1; }

cat >put.js <<'JS'
// Puts one log for each time through the SDK, keeps the bodies that it sent, and prints the outcomes.
const fs = require("fs");
const http = require("http");
const Client = require("@alicloud/log");

setTimeout(() => { console.log("took too long"); process.exit(1); }, 60000).unref();
let number = 0;
const server = http.createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part)).on("end", () => {
    fs.writeFileSync(`log_group.${number}`, Buffer.concat(parts));
    response.writeHead(200, { connection: "close" });
    response.end();
  });
});
server.listen(0, "127.0.0.1", async () => {
  const lookup = (_, options, done) =>
    options.all ? done(null, [{ address: "127.0.0.1", family: 4 }]) : done(null, "127.0.0.1", 4);
  const client = new Client({
    accessKeyId: "id", accessKeySecret: "key", endpoint: `sls.test:${server.address().port}`,
  });
  for (const timestamp of [1700000000, 1700000000000, 1795900000000]) {
    const group = { logs: [{ timestamp, content: { a: "b" } }] };
    await client.postLogStoreLogs("project", "logstore", group, { agent: new http.Agent({ lookup }) });
    number += 1;
  }
  process.exit(0);
});
JS

cat >compare.py <<'PY'
import sys
import time

import aliyun_log_fastpb
from alibabacloud_gateway_sls_util.log_group_serializer import serialize_log_group_to_pb
from aliyun.log.proto import LogGroup
from aliyun_log_producer import Log

MILLISECONDS = 1700000000000
GROUP = {
    "LogItems": [{"Time": MILLISECONDS, "Contents": [{"Key": "a", "Value": "b"}]}],
    "LogTags": [], "Topic": "", "Source": "",
}
WRITERS = {
    "aliyun-log-python-sdk": lambda: LogGroup().Logs.add(Time=MILLISECONDS),
    "aliyun-log-producer": lambda: Log([("a", "b")], time=MILLISECONDS),
    "aliyun-log-fastpb": lambda: aliyun_log_fastpb.serialize_log_group(GROUP),
    "alibabacloud-gateway-sls-util": lambda: serialize_log_group_to_pb(GROUP),
}
refused = 0
for name, write in WRITERS.items():
    try:
        write()
        print("  %-30s takes it" % name)
    except Exception as error:
        refused += 1
        print("  %-30s %s: %s" % (name, type(error).__name__, error))
months = []
for number, given in enumerate((1700000000, MILLISECONDS, 1795900000000)):
    with open("log_group.%d" % number, "rb") as file:
        (log,) = LogGroup.FromString(file.read()).Logs
    months.append(time.strftime("%Y-%m", time.gmtime(log.Time)))
    print("  %-30s put of %d succeeds, as %s" % ("@alicloud/log", given, time.strftime("%F", time.gmtime(log.Time))))
sys.exit(0 if refused == 4 and months == ["2023-11", "2080-07", "1989-02"] else 1)
PY

echo "@alicloud/log 1.2.6, aliyun-log-python-sdk 0.9.52, aliyun-log-producer 0.1.2, aliyun-log-fastpb 0.3.0,"
echo "alibabacloud-gateway-sls-util 0.4.1, protobufjs 6.11.6"
echo "expected: each refuses a time of 1700000000000"
echo "seen:"
if node put.js && venv/bin/python compare.py; then
    echo "so it is still: Node's SDK sends another year"
else
    echo "no longer as described"
    exit 1
fi
