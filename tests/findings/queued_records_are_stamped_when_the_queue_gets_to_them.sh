#!/usr/bin/env bash
# One expects: a handler behind a queue sends the time at which a record was logged, its `created`.
# What happens: the SDK's handler takes the whole seconds from `created` and the nanoseconds from the clock of the
# moment at which it turns the record into a log, so a fraction of .9 may become .1. python-logging-loki stamps a
# record when it posts it, one post after the other; records logged at once lie as far apart as Loki takes to answer.
# Why it matters: within a second, logs sort in an order in which nothing happened; and with Loki slow, the logs of an
# incident lie after it.
# Needs python3 with venv; installs what it runs into a temporary folder.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: no python3 here"; exit 77; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check aliyun-log-python-sdk==0.9.52 python-logging-loki==0.3.1 \
    >pip.log 2>&1 || { cat pip.log; exit 1; }

cat >times.py <<'PY'
import http.server
import json
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"
import logging_loki
from aliyun.log import SimpleLogHandler

ANSWER_SECONDS = 0.4
posted, sent = [], []


class SlowLoki(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        posted.extend(int(value[0]) / 1e9 for stream in body["streams"] for value in stream["values"])
        time.sleep(ANSWER_SECONDS)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


class SlsHandler(SimpleLogHandler):
    """Keeps what it would put."""

    def send(self, req):
        sent.extend((item.get_time(), item.get_time_nano_part()) for item in req.get_log_items())


# The SDK's handler behind the standard library's queue, with records whose times are known.
records = queue.Queue()
listener = logging.handlers.QueueListener(
    records, SlsHandler("sls.test", "id", "key", "project", "logstore", fields=[], extra=False)
)
CREATED = [1700000000.25, 1700000000.5, 1700000000.75]
for created in CREATED:
    logging.handlers.QueueHandler(records).handle(logging.makeLogRecord({"msg": "m", "created": created}))
listener.start()
listener.stop()
print("  created:  %s" % CREATED)
print("  by SLS:   %s" % ["%d.%09d" % moment for moment in sent])
seconds_kept = [second for second, _ in sent] == [1700000000] * 3
fractions_kept = [nanoseconds for _, nanoseconds in sent] == [250000000, 500000000, 750000000]

# Loki's own queued handler, with three records logged at once.
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowLoki)
threading.Thread(target=server.serve_forever, daemon=True).start()
handler = logging_loki.LokiQueueHandler(
    queue.Queue(-1), url="http://127.0.0.1:%d/loki/api/v1/push" % server.server_port, version="1"
)
logged = []
for number in range(3):
    record = logging.makeLogRecord({"msg": "record %d" % number, "levelname": "INFO", "name": "app"})
    logged.append(record.created)
    handler.handle(record)
handler.listener.stop()
print("  created:  %s s after the first" % [round(moment - logged[0], 1) for moment in logged])
print("  by Loki:  %s s after the first" % [round(moment - logged[0], 1) for moment in posted])
apart = len(posted) == 3 and posted[2] - posted[0] >= 2 * ANSWER_SECONDS * 0.9 > logged[2] - logged[0]
sys.exit(0 if seconds_kept and not fractions_kept and apart else 1)
PY

echo "aliyun-log-python-sdk 0.9.52, python-logging-loki 0.3.1"
echo "expected: what was created is what is sent"
echo "seen:"
if venv/bin/python times.py; then
    echo "so it is still: fractions of another moment, times of posting"
else
    echo "no longer as described"
    exit 1
fi
