#!/usr/bin/env bash
# One expects: a logging handler that is set up before worker processes are forked sends what the workers log, or says
# that it can't.
# What happens: the SDK's QueuedLogHandler starts its sending thread when it is made, and a fork copies the handler, its
# queue and the thread object, but not the thread. What a worker logs stays in its copy of the queue; close() finds a
# thread that has ended, waits for nothing, raises nothing, and leaves the logs there. The handler of python-logging-loki,
# whose listener is the standard library's, is as silent. In the parent both go on.
# Why it matters: gunicorn with preload, Celery and multiprocessing on Linux fork after the application was loaded: then
# what the parent logs at its start arrives, which looks like success, and nothing that any request logs ever does.
# Needs python3 with venv, on a system that forks; installs what it runs into a temporary folder.
set -euo pipefail
command -v python3 >/dev/null || { echo "skipped: no python3 here"; exit 77; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --disable-pip-version-check aliyun-log-python-sdk==0.9.52 python-logging-loki==0.3.1 \
    >pip.log 2>&1 || { cat pip.log; exit 1; }

cat >fork.py <<'PY'
import json
import logging
import multiprocessing
import queue
import sys
import time
import warnings

import logging_loki
from aliyun.log import QueuedLogHandler

warnings.simplefilter("ignore", DeprecationWarning)  # newer versions of Python have one about forks
context = multiprocessing.get_context("fork")
sls, loki = context.Queue(), context.Queue()  # what would be put, by whichever process


class Handler(QueuedLogHandler):
    def send(self, req):
        for item in req.get_log_items():
            sls.put(dict(item.get_contents())["message"])


class Emitter(logging_loki.LokiHandler):
    def emit(self, record):
        loki.put(record.getMessage())


handler = Handler("sls.test", "id", "key", "project", "logstore", fields=[], extra=False, put_wait=0.1, close_wait=5)
loki_handler = logging_loki.LokiQueueHandler(queue.Queue(-1), url="http://loki.test/", version="1")
loki_handler.listener.handlers = (Emitter(url="http://loki.test/", version="1"),)
logger = logging.getLogger("app")
logger.propagate = False
logger.setLevel("INFO")
logger.addHandler(handler)
logger.addHandler(loki_handler)


def work(outcomes):
    logger.info("of a worker")
    began = time.monotonic()
    handler.close()
    outcomes.put((handler.queue.qsize(), loki_handler.queue.qsize(), time.monotonic() - began < 4))


def arrived(messages, count):
    """The first messages, and those that come within a second after them."""
    taken = [messages.get(timeout=30) for _ in range(count)]
    while True:
        try:
            taken.append(messages.get(timeout=1))
        except queue.Empty:
            return taken


logger.info("of the parent, before")
before = arrived(sls, 1), arrived(loki, 1)
outcomes = context.Queue()
worker = context.Process(target=work, args=(outcomes,))
worker.start()
left, loki_left, closed_at_once = outcomes.get(timeout=30)
worker.join()
logger.info("of the parent, after")
after = arrived(sls, 1), arrived(loki, 1)
print("  sent by SLS's handler:   %s" % json.dumps(before[0] + after[0]))
print("  sent by Loki's handler:  %s" % json.dumps(before[1] + after[1]))
print("  left in the worker:      %d by SLS's, %d by Loki's; exit status %d" % (left, loki_left, worker.exitcode))
of_parent = [["of the parent, before"]] * 2, [["of the parent, after"]] * 2
silent = (list(before), list(after)) == of_parent and (left, loki_left, worker.exitcode) == (1, 1, 0)
sys.exit(0 if silent and closed_at_once else 1)
PY

echo "aliyun-log-python-sdk 0.9.52, python-logging-loki 0.3.1"
echo "expected: what the worker logs is sent, too, or close() raises"
echo "seen:"
if venv/bin/python fork.py; then
    echo "so it is still: no log of a forked worker is sent, and nothing says so"
else
    echo "no longer as described"
    exit 1
fi
