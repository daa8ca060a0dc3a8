"""What a copy tells, and that telling holds up nothing: neither a shard, nor a heartbeat, nor a signal, nor the end."""

import contextlib
import functools
import os
import signal

import pytest
from assertions import assert_all_delivered_once
from harness import LIMIT, feed, feed_separately, wait_until_begun, wait_until_delivered, wait_until_joined

IN_TIME = 10.0  # seconds that supervisors give before they kill
OFTEN = {"MAX_BACKOFF": 0.1}  # seconds, between tries of a target that takes nothing
TELL_ALL = dict(OFTEN, **{"LogThrottle.FIRST": 0.0, "LogThrottle.LONGEST": 0.0})  # a line for each failure


def writes_to_a_full_pipe(program, path):
    """The copy's stderr is the pipe at this path, and nothing more goes into it."""
    import os

    pipe = os.open(path, os.O_WRONLY)
    os.set_blocking(pipe, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(pipe, b"." * size)
        except BlockingIOError:
            pass
    os.set_blocking(pipe, True)
    os.dup2(pipe, 2)


def has_a_hanging_file_system(program, path):
    """The log file's takes nothing while there is something at this path."""
    import os
    import time

    def emit(self, record, before=program.QuietLogFile.emit):
        while os.path.exists(path):
            time.sleep(0.01)
        before(self, record)

    program.QuietLogFile.emit = emit


def has_a_slow_file_system(program):
    import time

    def emit(self, record, before=program.QuietLogFile.emit):
        time.sleep(0.02)
        before(self, record)

    program.QuietLogFile.emit = emit


def has_a_thread_that_dies(program):
    """With what its exception says and a warning: all that Python itself would write to stderr."""
    import threading
    import warnings

    def die():
        warnings.warn("a warning with local-secret", stacklevel=1)
        raise ValueError("an exception with local-secret")

    def tune_process(before=program.tune_process):
        thread = threading.Thread(target=die)
        thread.start()
        thread.join()
        before()

    program.tune_process = tune_process


class UnreadPipe:
    """A named pipe that somebody has open for reading, and reads when told to."""

    def __init__(self, path):
        os.mkfifo(str(path))
        self.patch = functools.partial(writes_to_a_full_pipe, str(path))
        self.reader = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK)
        self.text = b""

    def read(self):
        """All that has come through it, without what filled it."""
        with contextlib.suppress(BlockingIOError):
            self.text += os.read(self.reader, 1 << 20)
        return self.text.decode().lstrip(".")

    def close(self):
        os.close(self.reader)


@pytest.fixture
def unread_pipe(tmp_path):
    with contextlib.closing(UnreadPipe(tmp_path / "pipe")) as pipe:
        yield pipe


def assert_goes_on(service):
    """While puts fail, and each is told: other targets' logs flow, heartbeats go on, and none is blocked for good."""
    with service.add_fault("PutLogs", logstore="click", code="WriteQuotaExceed") as fault:
        feed_separately(service, 40)
        heartbeats = service.calls("HeartBeat")
        service.wait_for(lambda: fault.hits >= 40, LIMIT, "puts that fail and are tried again")
        service.wait_for(lambda: service.calls("HeartBeat") > heartbeats + 1, LIMIT, "heartbeats")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.parametrize("log_dir", ["", "."], ids=["alone", "beside a log file"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stderr_that_nobody_reads_holds_up_nothing(service, copies, unread_pipe, log_dir, number):
    copy = copies.start(patch=unread_pipe.patch, constants=TELL_ALL, SLS_LOG_DIR=log_dir)
    wait_until_begun(service)
    assert_goes_on(service)
    assert copy.stop(number, IN_TIME) == 0
    if log_dir:
        assert "a put failed and is tried again until it is taken: 403 WriteQuotaExceed" in copy.log()
        assert " INFO summary source=test-project/source " in copy.log()


def test_a_stop_in_the_middle_of_a_batch_that_is_told_to_nobody_is_in_time(service, copies, unread_pipe):
    with service.add_fault("PutLogs", code="WriteQuotaExceed") as fault:
        feed(service, 40)
        copy = copies.start(patch=unread_pipe.patch, constants=TELL_ALL, SLS_LOG_DIR="")
        service.wait_for(lambda: fault.hits >= 8, LIMIT, "puts that fail")
        assert copy.stop(signal.SIGTERM, IN_TIME) == 0
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_start_that_fails_and_can_tell_nobody_ends(service, copies, unread_pipe):
    copy = copies.start(patch=unread_pipe.patch, SLS_LOGSTORE="nowhere", SLS_LOG_DIR="")
    assert copy.process.wait(LIMIT) == 1


def test_lines_that_nobody_takes_are_dropped_counted_and_told_of_once_somebody_reads(service, copies, unread_pipe):
    constants = dict(TELL_ALL, **{"LogWriter.MAX_LINES": 5})
    copy = copies.start(patch=unread_pipe.patch, constants=constants, SLS_LOG_DIR="")
    wait_until_begun(service)
    with service.add_fault("PutLogs", code="WriteQuotaExceed") as fault:
        feed_separately(service, 40)
        service.wait_for(lambda: fault.hits >= 40, LIMIT, "failures, each told")
        service.wait_for(lambda: " lines are missing here" in unread_pipe.read(), LIMIT, "a word about those dropped")
        told = unread_pipe.read().count("a put failed")
        service.wait_for(lambda: unread_pipe.read().count("a put failed") > told + 5, LIMIT, "lines that go on")
    wait_until_delivered(service)
    assert copy.stop(signal.SIGTERM, IN_TIME) == 0
    assert " INFO summary source=test-project/source " in unread_pipe.read()
    assert_all_delivered_once(service)


def test_a_log_file_on_a_file_system_that_hangs_holds_up_nothing_and_not_stderr(service, copies, tmp_path):
    hangs = tmp_path / "hangs"
    copy = copies.start(patch=functools.partial(has_a_hanging_file_system, str(hangs)), constants=TELL_ALL)
    wait_until_joined(service, copy)
    hangs.touch()
    assert_goes_on(service)
    assert "a put failed and is tried again until it is taken: 403 WriteQuotaExceed" in copy.stderr()
    assert "a put failed" not in copy.log()
    assert copy.stop(signal.SIGTERM, IN_TIME) == 0


def test_a_log_file_gets_what_came_while_its_file_system_was_hanging(service, copies, tmp_path):
    hangs = tmp_path / "hangs"
    copy = copies.start(patch=functools.partial(has_a_hanging_file_system, str(hangs)), constants=TELL_ALL)
    wait_until_joined(service, copy)
    hangs.touch()
    assert_goes_on(service)
    hangs.unlink()
    service.wait_for(lambda: copy.log().count("a put failed") >= 40, LIMIT, "the lines of meanwhile")
    assert copy.stop() == 0
    assert "missing" not in copy.log()


def test_the_last_lines_are_waited_for(service, copies):
    copy = copies.start(patch=has_a_slow_file_system, constants={"LAST_LINES_TIMEOUT": 10.0})
    wait_until_joined(service, copy)
    feed(service, 20)
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert [line.partition(" INFO ")[2].split()[1] for line in copy.log().splitlines()[-4:]] == [
        "target=1", "target=2", "target=3", "source=test-project/source",
    ]  # fmt: skip


def test_what_python_itself_would_say_goes_the_same_way(service, copies, unread_pipe):
    patches = [has_a_thread_that_dies, unread_pipe.patch]
    copy = copies.start(patch=patches)
    wait_until_begun(service)
    feed(service, 20)
    wait_until_delivered(service)
    assert copy.stop(signal.SIGTERM, IN_TIME) == 0
    for words in ("UserWarning: a warning with ***", "ERROR a defect of this program\n", "an exception with ***"):
        assert words in copy.log()
    assert "local-secret" not in copy.log()
    assert_all_delivered_once(service)


def refuses_with_new_codes(program):
    """Each refusal of a put has another code."""
    import itertools

    numbers = itertools.count()

    def from_response(status, headers, body, before=program.CallError.from_response):
        error = before(status, headers, body)
        if error.code == "Odd":
            return program.CallError("Odd%d" % next(numbers), error.message, status)
        return error

    program.CallError.from_response = from_response


def test_new_codes_each_time_are_no_flood(service, copies):
    copy = copies.start(patch=refuses_with_new_codes, constants=OFTEN)
    wait_until_begun(service)
    with service.add_fault("PutLogs", logstore="click", status=403, code="Odd") as fault:
        feed_separately(service, 40)
        service.wait_for(lambda: fault.hits >= 40, LIMIT, "refusals")
    with service.add_fault("PutLogs", logstore="click", status=403, code="WriteQuotaExceed"):
        feed_separately(service, 40)
        service.wait_for(lambda: "WriteQuotaExceed" in copy.stderr(), LIMIT, "a word about what is known and new")
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert len([line for line in copy.stderr().splitlines() if "Odd" in line]) <= 3, "a flood"
    assert_all_delivered_once(service)


def has_a_file_system_that_is_slow_in_the_end(program):
    import time

    def emit(self, record, before=program.QuietLogFile.emit):
        time.sleep(1.0 if "ends with status" in record.getMessage() else 0.0)
        before(self, record)

    program.QuietLogFile.emit = emit


def test_after_the_last_summary_nothing_more_is_told(service, copies):
    """Programs that read the log take the last lines for the sums of the run."""
    often = {"SUMMARY_INTERVAL": 0.1, "REPORT_LOOP_INTERVAL": 0.01, "LAST_LINES_TIMEOUT": 10.0}
    copy = copies.start(patch=has_a_file_system_that_is_slow_in_the_end, constants=often)
    feed(service, 20)
    wait_until_delivered(service)
    service.wait_for(lambda: copy.log().count(" INFO summary source=") > 2, LIMIT, "summaries")
    assert copy.stop() == 0
    _, _, after_the_end = copy.log().partition(" INFO ends with status 0: ")
    starts = [" INFO summary " + start for start in ("target=1 ", "target=2 ", "target=3 ", "source=")]
    last_lines = after_the_end.splitlines()[1:]
    assert [start in line for start, line in zip(starts, last_lines)] == [True] * 4
    assert len(last_lines) == 4
