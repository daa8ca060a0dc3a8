#!/usr/bin/env bash
# One expects: text that an SDK sent as a protobuf string is UTF-8, and reads alike wherever Python runs.
# What happens: JavaScript cuts text between UTF-16 units, so `slice` can leave half an emoji. Node's own encoder
# writes U+FFFD for it; the protobuf.js within @alicloud/log writes the half itself, three bytes that are no UTF-8.
# Where the Python SDK flattens a pull with such a log, protobuf's C runtime gives bytes for this one value; its pure
# Python runtime (for platforms without a wheel) gives bytes for every value of the pull, or, where the list of
# LogGroups was read first, text for every one, from which the half has gone without a word.
# Why it matters: one log cut at a length in Node ends the JSON of a consumer in Python, of one log here and of a
# whole pull there; and a call that only reads changes what is stored.
# Needs python3 with venv, node 18 or newer, npm; installs what it runs into a temporary folder.
set -euo pipefail
for tool in python3 node npm; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool here"; exit 77; }
done
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check aliyun-log-python-sdk==0.9.52 protobuf==5.29.6 >pip.log 2>&1 ||
    { cat pip.log; exit 1; }
echo '{"private": true, "overrides": {"protobufjs": "6.11.6"}}' >package.json
npm install --no-audit --no-fund @alicloud/log@1.2.6 >npm.log 2>&1 || { cat npm.log; exit 1; }

cat >put.js <<'JS'
// Puts one log through the SDK and keeps the body that it sent.
const fs = require("fs");
const http = require("http");
const Client = require("@alicloud/log");

setTimeout(() => { console.log("took too long"); process.exit(1); }, 30000).unref();
const message = "order placed \u{1F600} by a guest".slice(0, 14);
const server = http.createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part)).on("end", () => {
    fs.writeFileSync("log_group", Buffer.concat(parts));
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
  const group = { topic: "orders", logs: [{ timestamp: 1700000000, content: { message } }] };
  await client.postLogStoreLogs("project", "logstore", group, { agent: new http.Agent({ lookup }) });
  const sent = fs.readFileSync("log_group").toString("hex");
  console.log("  the half, by Node's encoder: " + Buffer.from(message).subarray(13).toString("hex"));
  console.log("  the half, as it was sent:    " + (sent.match(/eda0bd|efbfbd/) || ["neither"])[0]);
  process.exit(sent.includes("eda0bd") && Buffer.from(message).toString("hex").endsWith("efbfbd") ? 0 : 1);
});
JS

cat >read.py <<'PY'
import sys

from aliyun.log.log_logs_pb2 import LogGroup
from aliyun.log.pulllog_response import PullLogResponse
from google.protobuf.internal import api_implementation

with open("log_group", "rb") as file:
    log_groups = [file.read()]
healthy = LogGroup(Topic="orders")
healthy.Logs.add(Time=1700000000).Contents.add(Key="message", Value="fine")
log_groups.append(healthy.SerializeToString())
assert max(map(len, log_groups)) < 128  # so that the length of each is one byte
pull = b"".join(b"\x0a" + bytes([len(log_group)]) + log_group for log_group in log_groups)
header = {"x-log-count": "2", "x-log-bodyrawsize": str(len(pull)), "x-log-cursor": "MQ=="}


def messages(read_first):
    response = PullLogResponse(pull, header)
    if read_first:
        response.get_loggroup_list()
    return [log["message"] for log in response.get_flatten_logs_json()]


runtime = api_implementation.Type()
seen = [messages(False), messages(True)]
print("  read by %-6s  flattened at once: %r" % (runtime, seen[0]))
print("  read by %-6s  LogGroups first:   %r" % (runtime, seen[1]))
half = b"order placed \xed\xa0\xbd"
expected = {"upb": [[half, "fine"]] * 2, "python": [[half, b"fine"], ["order placed ", "fine"]]}
sys.exit(0 if seen == expected[runtime] else 1)
PY

echo "@alicloud/log 1.2.6, protobufjs 6.11.6, aliyun-log-python-sdk 0.9.52, protobuf 5.29.6"
echo "expected: the half is sent as efbfbd, U+FFFD, and four times the same two texts are read"
echo "seen:"
if node put.js && venv/bin/python read.py && PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python venv/bin/python read.py; then
    echo "so it is still: three readings of one pull"
else
    echo "no longer as described"
    exit 1
fi
