#!/usr/bin/env bash
# One expects: a put that a gateway answers with 413 or 502 fails in every SDK of the service.
# What happens: @alicloud/log never looks at the HTTP status. It rejects an answer for the errorCode in its JSON, and
# so resolves whatever a load balancer or proxy says in HTML, or in no words at all. The Python SDK raises for such an
# answer.
# Why it matters: a service in Node behind a gateway that is down, or too small for its puts, loses every log, and its
# own metrics of failed puts stay at zero. Check at the other end what arrived.
# Needs python3 with venv, node 18 or newer, npm; installs what it runs into a temporary folder.
set -euo pipefail
for tool in python3 node npm; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool here"; exit 77; }
done
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check aliyun-log-python-sdk==0.9.52 >pip.log 2>&1 || { cat pip.log; exit 1; }
echo '{"private": true}' >package.json
npm install --no-audit --no-fund @alicloud/log@1.2.6 >npm.log 2>&1 || { cat npm.log; exit 1; }

cat >gateway.js <<'JS'
// Answers the puts of whichever client it starts. Prints, for the Node SDK, the outcome of each.
const http = require("http");
const { spawn } = require("child_process");
const Client = require("@alicloud/log");

setTimeout(() => { console.log("took too long"); process.exit(1); }, 60000).unref();
const HTML = { "content-type": "text/html" };
const JSON_TYPE = { "content-type": "application/json", "x-log-requestid": "1" };
const ANSWERS = [
  [413, HTML, "<html><h1>413 Request Entity Too Large</h1></html>", "resolved"],
  [502, HTML, "<html><h1>502 Bad Gateway</h1></html>", "resolved"],
  [503, {}, "", "resolved"],
  [407, HTML, "<html><h1>Proxy Authentication Required</h1></html>", "resolved"],
  [500, JSON_TYPE, '{"message": "upstream"}', "resolved"],
  [403, JSON_TYPE, '{"errorCode": "WriteQuotaExceed", "errorMessage": "later"}', "rejected"],
];

let answer, puts;
const server = http.createServer((request, response) => {
  request.resume().on("end", () => {
    puts += 1;
    response.writeHead(answer[0], { ...answer[1], connection: "close" });
    response.end(answer[2]);
  });
});

server.listen(0, "127.0.0.1", async () => {
  const port = server.address().port;
  // Every name leads to this server.
  const lookup = (_, options, done) =>
    options.all ? done(null, [{ address: "127.0.0.1", family: 4 }]) : done(null, "127.0.0.1", 4);
  const client = new Client({ accessKeyId: "id", accessKeySecret: "key", endpoint: `sls.test:${port}` });
  let asDescribed = true;
  for (answer of ANSWERS) {
    puts = 0;
    const group = { topic: "t", logs: [{ timestamp: 1700000000, content: { a: "b" } }] };
    const outcome = await client
      .postLogStoreLogs("project", "logstore", group, { agent: new http.Agent({ lookup }) })
      .then(() => "resolved", () => "rejected");
    console.log(`  @alicloud/log  ${answer[0]} ${answer[1]["content-type"] || "-"}: ${outcome} after ${puts} put`);
    asDescribed = asDescribed && outcome === answer[3] && puts === 1;
  }
  answer = ANSWERS[0];
  const python = spawn("venv/bin/python", ["put.py", String(port)], { stdio: "inherit" });
  python.on("exit", (status) => process.exit(asDescribed && status === 0 ? 0 : 1));
});
JS

cat >put.py <<'PY'
import os
import sys

for name in ("no_proxy", "NO_PROXY"):
    os.environ.pop(name, None)
os.environ["http_proxy"] = os.environ["HTTP_PROXY"] = "http://127.0.0.1:" + sys.argv[1]  # every name leads there
from aliyun.log import LogClient, LogException, LogItem, PutLogsRequest

try:
    LogClient("http://sls.test", "id", "key").put_logs(
        PutLogsRequest("project", "logstore", "t", source="s", logitems=[LogItem(1700000000, [("a", "b")])])
    )
    outcome = "returned"
except LogException as error:
    outcome = "raised " + error.get_error_code()
print("  aliyun-log-python-sdk  413 text/html: " + outcome)
sys.exit(0 if outcome.startswith("raised") else 1)
PY

echo "@alicloud/log 1.2.6, aliyun-log-python-sdk 0.9.52, node $(node --version)"
echo "expected: a put answered with 413, 502, 503, 407 or 500 is rejected by both"
echo "seen:"
if node gateway.js; then
    echo "so it is still: the Node SDK takes them for success"
else
    echo "no longer as described"
    exit 1
fi
