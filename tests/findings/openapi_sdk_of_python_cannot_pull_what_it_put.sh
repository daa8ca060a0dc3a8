#!/usr/bin/env bash
# One expects: an SDK that puts logs reads them back with its call for that.
# What happens: in the vendor's OpenAPI SDK for Python, alibabacloud-sls20201230, pull_logs decompresses the answer and
# decodes it as UTF-8 for JSON. The answer is protobuf, its times are varints of bytes above 127, so any pull that
# brings a log raises, whatever its texts are; without logs the body is empty, and that raises as well. The put before
# it is fine, in protobuf, too; aliyun-log-python-sdk reads the same answer.
# Why it matters: the SDK's page lists both calls, types and all; a consumer written with it can't read one log, and the
# error, of text encoding or of JSON, sends one looking for bad characters in the logs.
# Needs python3 with venv; installs what it runs into a temporary folder.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: no python3 here"; exit 77; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check alibabacloud-sls20201230==5.15.1 alibabacloud-gateway-sls==0.4.2 \
    alibabacloud-gateway-sls-util==0.4.1 alibabacloud-tea-openapi==0.4.6 alibabacloud-tea-util==0.3.15 \
    aliyun-log-fastpb==0.3.0 aliyun-log-python-sdk==0.9.52 >pip.log 2>&1 || { cat pip.log; exit 1; }

cat >pull.py <<'PY'
import http.server
import os
import sys
import threading

for name in ("no_proxy", "NO_PROXY"):
    os.environ.pop(name, None)
import lz4.block
from alibabacloud_sls20201230 import models
from alibabacloud_sls20201230.client import Client
from alibabacloud_tea_openapi.models import Config
from alibabacloud_tea_util.models import RuntimeOptions
from aliyun.log import LogClient

log_groups = []


class Service(http.server.BaseHTTPRequestHandler):
    """Takes puts, and answers a pull with all that was put."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        size = int(self.headers["x-log-bodyrawsize"])
        log_groups.append(lz4.block.decompress(body, uncompressed_size=size))
        self.answer(b"", {})

    def do_GET(self):
        assert all(len(log_group) < 128 for log_group in log_groups)  # so that the length of each is one byte
        body = b"".join(b"\x0a" + bytes([len(log_group)]) + log_group for log_group in log_groups)
        headers = {"x-log-count": len(log_groups), "x-log-bodyrawsize": len(body), "x-log-cursor": "MQ=="}
        if body:
            headers["x-log-compresstype"] = "lz4"
            body = lz4.block.compress(body, store_size=False)
        self.answer(body, {"Content-Type": "application/x-protobuf", **headers})

    def answer(self, body, headers):
        self.send_response(200)
        for name, value in {"x-log-requestid": "1", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["http_proxy"] = proxy = "http://127.0.0.1:%d" % server.server_port  # every name leads there
config = Config(
    access_key_id="id", access_key_secret="key", endpoint="sls.test", protocol="http", region_id="r", http_proxy=proxy
)
client = Client(config)


def pull():
    try:
        client.pull_logs("project", "logstore", "0", models.PullLogsRequest(cursor="MA==", count=10))
        return "returns"
    except Exception as error:
        return "raises: %s" % error


nothing = pull()
content = models.LogContent(key="message", value="plain ASCII")
group = models.LogGroup(topic="t", source="s", log_items=[models.LogItem(time=1700000000, contents=[content])])
headers = models.PutLogsHeaders(x_log_compresstype="lz4")
client.put_logs_with_options("project", "logstore", models.PutLogsRequest(body=group), headers, RuntimeOptions())
brought = pull()
other = LogClient("http://sls.test", "id", "key").pull_logs("project", "logstore", 0, "MA==", 10)
texts = [log["message"] for log in other.get_flatten_logs_json()]
print("  alibabacloud-sls20201230 puts a log of ASCII: %d LogGroup arrives" % len(log_groups))
print("  alibabacloud-sls20201230 pulls it: %s" % brought)
print("  alibabacloud-sls20201230 pulls when there is none: %s" % nothing)
print("  aliyun-log-python-sdk pulls it: %r" % texts)
sys.exit(0 if "codec can't decode" in brought and nothing.startswith("raises") and texts == ["plain ASCII"] else 1)
PY

echo "alibabacloud-sls20201230 5.15.1, alibabacloud-gateway-sls 0.4.2, aliyun-log-python-sdk 0.9.52"
echo "expected: both SDKs read the log that was put"
echo "seen:"
if venv/bin/python pull.py; then
    echo "so it is still: it can't pull what it put"
else
    echo "no longer as described"
    exit 1
fi
