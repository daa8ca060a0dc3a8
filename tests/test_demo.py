"""The demonstration, run as users run it: as a process of its own."""

import contextlib
import functools
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import is_running, program_with

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "tests.local_log_service", "demo", "--seconds", "2"]
LIMIT = 300.0  # seconds, for slow machines


def demo_with(change):
    """The command of a demonstration with a line of Python run before."""
    lines = [
        "import pathlib, sys",
        "from tests.local_log_service import __main__, demo",
        change,
        "sys.exit(__main__.main(['demo', '--seconds', '2']))",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


class Demo:
    """A running demonstration and what it has printed so far."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command,
            cwd=str(REPOSITORY),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            # Whoever runs the tests in the background of a shell has it ignored.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.lines = []

    def read_until(self, text):
        """Reads up to the line that contains a text."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return
        raise AssertionError("%r was not printed:\n%s" % (text, "\n".join(self.lines)))

    def read_all(self):
        """Reads to the end and returns the exit status."""
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(LIMIT)

    def copy_process_ids(self):
        return [int(number) for line in self.lines for number in re.findall(r"[ABC] \(process (\d+)\)", line)]


@pytest.fixture
def start_demo():
    """Starts demonstrations; ends what still runs after the test."""
    started = []

    def start(command):
        started.append(Demo(command))
        return started[-1]

    yield start
    for demo in started:
        if demo.process.poll() is None:
            demo.process.terminate()
            demo.process.wait(LIMIT)
        demo.process.stdout.close()


def test_every_log_is_accounted_for(start_demo):
    demo = start_demo(COMMAND)
    status = demo.read_all()
    output = "\n".join(demo.lines)
    assert status == 0, output
    outcome = re.fullmatch(r"OK: (\d+) logs sent, (\d+) delivered: 0 lost, (\d+) duplicated, 0 foreign", demo.lines[-1])
    assert outcome, output
    sent, delivered, duplicated = map(int, outcome.groups())
    assert sent > 0 and delivered == sent + duplicated

    (header,) = [line.split() for line in demo.lines if line.split()[:1] == ["time"]]
    assert header == ["time", "source", "nginx", "sql-audit", "click", "unmatched", "lag", "A", "B", "C"]
    rows = [line.split() for line in demo.lines if re.match(r" *\d+ s ", line)]
    source, nginx, sql_audit, click, unmatched, lag = map(int, rows[-1][2:8])
    assert lag == 0
    assert source == sent + unmatched
    assert nginx + sql_audit + click == delivered
    assert any(line.startswith("-- copy B killed with kill -9") for line in demo.lines)
    assert "- (killed)" in [line for line in demo.lines if re.match(r" *\d+ s ", line)][-1]

    results = {line.split()[0]: line.split()[1:] for line in demo.lines if line}
    assert results["unmatched"] == [str(unmatched), "0", str(unmatched), "0", "0", "0"]
    assert results["all"] == [str(source), str(delivered), str(unmatched), "0", str(duplicated), "0"]
    assert len(demo.copy_process_ids()) == 3
    assert not any(map(is_running, demo.copy_process_ids()))


def test_a_machine_too_slow_to_feed_every_target_within_the_seconds(start_demo):
    demo = start_demo(demo_with("demo.RATE = 1"))  # the first LogGroup of clicks is the ninth
    assert demo.read_all() == 0, "\n".join(demo.lines)
    results = {line.split()[0]: line.split()[1:] for line in demo.lines if line}
    assert all(int(results[target][0]) > 0 for target in ("nginx", "sql-audit", "click"))


def test_a_terminal_shows_bars_and_the_same_end():
    ours, its = pty.openpty()
    environment = dict(os.environ, TERM="xterm", COLUMNS="120")
    demo = subprocess.Popen(COMMAND, cwd=str(REPOSITORY), env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # which is how a terminal ends
        for some in iter(lambda: terminal.read(10000), b""):
            shown += some
    assert demo.wait(LIMIT) == 0, shown.decode()
    lines = shown.decode().split("\r\n")
    for target in ("nginx", "sql-audit", "click"):
        counts = re.findall(r"%s .*?\u2501.*? (\d+) of (\d+) logs delivered" % target, shown.decode())
        assert counts and int(counts[-1][0]) >= int(counts[-1][1]) > 0
        assert any(re.fullmatch(target + r"( +\d+){6}", line) for line in lines)
    assert "B: - (killed)" in shown.decode()
    assert not any(line.split()[:1] == ["time"] for line in lines)
    assert re.fullmatch(r"OK: \d+ logs sent, \d+ delivered: 0 lost, \d+ duplicated, 0 foreign", lines[-2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demonstration_leaves_no_process_behind(start_demo, number):
    demo = start_demo(COMMAND[:-1] + ["60"])  # so that it isn't over before
    demo.read_until("the copies have shared the shards")
    demo.process.send_signal(number)
    assert demo.read_all() == 1
    assert demo.lines[-1] == "NOT OK: interrupted"
    assert "Traceback" not in "\n".join(demo.lines)
    assert len(demo.copy_process_ids()) == 3
    assert not any(map(is_running, demo.copy_process_ids()))


@pytest.fixture
def start_demo_of(start_demo, tmp_path):
    """Starts a demonstration whose copies run the program with a patch."""

    def start(patch):
        return start_demo(demo_with("demo.PROGRAM = pathlib.Path(%r)" % str(program_with(tmp_path, patch))))

    return start


def losing_logs(program):
    import itertools

    route, numbers = program.Delivery.route, itertools.count()
    program.Delivery.route = lambda *arguments: [put for put in route(*arguments) if next(numbers) % 5]


def test_a_dispatcher_that_loses_logs_is_not_ok(start_demo_of):
    demo = start_demo_of(losing_logs)
    assert demo.read_all() == 1
    assert re.fullmatch(
        r"NOT OK: \d+ logs sent, \d+ delivered: [1-9]\d* lost, \d+ duplicated, 0 foreign", demo.lines[-1]
    ), "\n".join(demo.lines)


def ending_at_once(program):
    import sys

    sys.exit("the reason why")


def test_a_copy_that_fails_is_shown_with_its_stderr(start_demo_of):
    demo = start_demo_of(ending_at_once)
    assert demo.read_all() == 1
    assert "the reason why" in demo.lines
    assert re.fullmatch("NOT OK: copy [ABC] ended with exit status 1", demo.lines[-1])
    assert not any(map(is_running, demo.copy_process_ids()))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_senseless_seconds_are_refused(start_demo, seconds):
    demo = start_demo(COMMAND[:-1] + [seconds])
    assert demo.read_all() == 2
    assert "--seconds" in demo.lines[-1]
