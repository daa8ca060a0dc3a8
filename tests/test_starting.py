"""Who starts a copy, and what it is left: locale, standard streams, signals, options of the interpreter.

Shells, cron, supervisors and containers differ in all of them, and none asks the program.
"""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from assertions import assert_all_delivered_once
from harness import LIMIT, PROGRAM, feed, run_program, settings_for, wait_until_begun, wait_until_delivered

# As cron's jobs and small containers have it, with nothing of Python's to make up for it.
NO_LOCALE = {
    "LC_ALL": "C", "LANG": None, "LC_CTYPE": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": None,
}  # fmt: skip


def started_again(program, closed=0, blocked=()):
    """By one that has closed its first so many files, and blocked these signals."""
    import os
    import signal
    import sys

    if "STARTED" not in os.environ:
        os.environ["STARTED"] = "yes"
        os.closerange(0, closed)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606


def assert_works(service, copy):
    wait_until_begun(service)
    feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop(signal.SIGTERM) == 0


def test_topics_are_utf_8_whatever_the_locale(service, copies):
    copies.start(SLS_TOPIC_TO1="日志,访问_*".encode(), SLS_TOPIC_TO2="sql_audit", SLS_TOPIC_TO3="click", **NO_LOCALE)
    feed(service, 24, ["日志", "访问_1", "click"])
    wait_until_delivered(service)
    assert_all_delivered_once(service, {"日志": "nginx", "访问_1": "nginx", "click": "click"})


def test_full_width_characters_are_told_whatever_the_locale(service):
    answer = run_program(settings_for(service, SLS_TOPIC_TO1="nginx\uff0cclick".encode(), **NO_LOCALE))
    assert answer.returncode == 2
    assert r"'\uff0c' is a full-width character, type ',' instead" in answer.stderr


@pytest.mark.parametrize("topic", ["日志".encode("gbk"), "nginx\u200b".encode(), b"\xff"], ids=repr)
def test_topics_that_nobody_could_mean_are_told(service, topic):
    answer = run_program(settings_for(service, SLS_TOPIC_TO1=topic, **NO_LOCALE))
    assert answer.returncode == 2
    assert "SLS_TOPIC_TO1: " in answer.stderr
    assert "right would be topics in UTF-8, of characters that can be seen" in answer.stderr


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc here to look at")
def test_closed_streams_are_no_sockets(service, copies):
    """Else what the interpreter says as it dies might go into a put."""
    copy = copies.start(patch=functools.partial(started_again, closed=3))
    wait_until_begun(service)
    streams = {os.readlink("/proc/%d/fd/%d" % (copy.process.pid, number)) for number in range(3)}
    assert streams == {os.devnull}
    assert_works(service, copy)


def test_blocked_signals_still_stop_it(service, copies):
    blocked = [int(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert_works(service, copies.start(patch=functools.partial(started_again, blocked=blocked)))


def test_without_docstrings(service, copies):
    assert run_program(settings_for(service, PYTHONOPTIMIZE="2"), "--help").returncode == 0
    assert_works(service, copies.start(PYTHONOPTIMIZE="2"))


def test_what_stdout_cannot_encode_is_escaped(service):
    with service.add_fault("ListShards", status=401, code="Unauthorized", message="没有权限"):
        answer = run_program(settings_for(service, PYTHONIOENCODING="ascii"), "--check")
    assert answer.returncode == 1
    assert r"401 Unauthorized: \u6ca1\u6709\u6743\u9650" in answer.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_that_nobody_can_take_is_told_in_one_line(service):
    answer = run_program(settings_for(service), "--check", stdout="/dev/full")
    assert answer.returncode == 1
    assert answer.stderr == "dispatch_data.py: [Errno 28] No space left on device\n"


def catches(process_id, number):
    """Whether a process has a handler for a signal; for Ctrl-C every Python has, until somebody does away with it."""
    status = Path("/proc/%d/status" % process_id).read_text(encoding="latin-1")
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status).group(1), 16) >> (number - 1) & 1)


def wait_for_first_line(copy):
    """Waits until the interpreter has come to what the program does first, or further."""
    end = time.monotonic() + LIMIT
    for is_there in (True, False):
        while catches(copy.process.pid, signal.SIGINT) != is_there and not catches(copy.process.pid, signal.SIGTERM):
            assert time.monotonic() < end


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here to look at")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_at_any_moment_of_the_start_is_a_plain_end(service, copies, number):
    """From the program's first line on, through its imports, and on PyPy through its second start: by the signal or,
    once the settings are read, as asked. What comes before that line is the interpreter's."""
    statuses = set()

    def start_and_stop(moment):
        copy = copies.start()
        wait_for_first_line(copy)
        time.sleep(moment * 0.04)
        statuses.add(copy.stop(number))
        assert copy.stderr() == ""

    for moment in range(20):
        start_and_stop(moment)
    end = time.monotonic() + LIMIT
    while -number not in statuses and time.monotonic() < end:  # a busy machine may be late with the first, too
        start_and_stop(0)
    assert -number in statuses <= {-number, 0}


def in_a_namespace(*command):
    return ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]


def skip_where_there_are_no_namespaces():
    with contextlib.suppress(OSError):
        if subprocess.run(in_a_namespace("true"), capture_output=True).returncode == 0:
            return
    pytest.skip("no namespace of process ids can be made here")


def children_of(process_id):
    """From /proc alone: its lists of children are an option of the kernel."""
    stats = [path.read_text(encoding="latin-1") for path in Path("/proc").glob("[0-9]*/stat")]
    return [int(stat.split()[0]) for stat in stats if int(stat.rpartition(")")[2].split()[1]) == process_id]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_as_the_first_process_of_a_container_it_ends_when_told_to(service, tmp_path, number):
    """For such a process the kernel drops a signal that it has no handler for: it would be killed some time later."""
    skip_where_there_are_no_namespaces()
    with service.add_fault("ListShards", hold=True) as fault:
        command = in_a_namespace(sys.executable, str(PROGRAM), "--check")
        outer = subprocess.Popen(command, env=settings_for(service), cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            service.wait_for(lambda: fault.hits > 0, LIMIT, "a check under way")
            (inner,) = children_of(outer.pid)
            os.kill(inner, number)
            assert outer.wait(LIMIT) == 128 + number
        finally:
            outer.kill()


@pytest.mark.slow
def test_ctrl_c_during_the_imports_is_no_traceback_of_theirs(service, copies):
    """Before the program's first line it is the interpreter's, which has no business with any other line."""
    before = PROGRAM.read_text(encoding="utf-8").partition("    _signal.signal(")[0].count("\n")
    for moment in range(40):
        copy = copies.start()
        time.sleep(moment * 0.005)
        end = time.monotonic() + LIMIT
        while copy.process.poll() is None:  # PyPy's start may swallow one
            assert time.monotonic() < end
            copy.send(signal.SIGINT)
            time.sleep(0.1)
        lines = [int(line) for line in re.findall(r'dispatch_data\.py", line (\d+)', copy.stderr())]
        assert all(line <= before for line in lines), copy.stderr()
