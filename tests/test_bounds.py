"""What a copy needs is bounded: memory, open files, threads, and time on slow lines and with far targets.

Each test runs real copies against the local service, and looks at what the kernel says of the process.
"""

import functools
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from aliyun.log.proto import LogGroup as LogGroupMessage
from assertions import assert_all_delivered_once, assert_nothing_lost, logs_in_flight, puts_arrived
from conftest import logstore_config
from harness import (
    LIMIT,
    PROGRAM,
    PROJECT,
    SOURCE,
    TARGETS,
    feed,
    is_delivered,
    is_shared,
    make_log_group,
    pulled_at_once,
    wait_until_begun,
    wait_until_delivered,
    wait_until_joined,
)
from relays import Relay

from dispatch_data import REJECTION_CODES, DeadLetterDirectory, LogGroup, __version__

IS_PYPY = platform.python_implementation() == "PyPy"

LONG = 3 * LIMIT  # seconds that what takes a minute of a processor may take on a slow machine

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc here to look at")


def kernel_says(copy, name):
    """The number that /proc/<pid>/status has under a name."""
    text = Path("/proc/%d/status" % copy.process.pid).read_text(encoding="utf-8")
    return int(re.search(r"^%s:\s*(\d+)" % name, text, re.MULTILINE).group(1))


def open_files(copy):
    return len(os.listdir("/proc/%d/fd" % copy.process.pid))


def put_separately(service, topics, count, log_size=0, **options):
    """Puts LogGroups of one log into the source that can't be joined, so that each is a put of its own.

    A log has `log_size` bytes more, which can't be compressed.
    """
    padding = secrets.token_hex(log_size // 2)
    log_groups = []
    for number in range(count):
        data = make_log_group(topics[number % len(topics)], 1, Source="10.0.%d.%d" % divmod(number, 250))
        log_group = LogGroupMessage.FromString(data)
        log_group.Logs[0].Contents.add(Key="padding", Value=padding)
        log_groups.append(log_group.SerializeToString())
    service.put(PROJECT, SOURCE, log_groups, **options)


def retries(copy):
    """Puts that failed, by the last summary."""
    return sum(int(count) for count in re.findall(r" retries=(\d+) ", copy.log())[-len(set(TARGETS.values())) :])


# ---- memory -----------------------------------------------------------------------------------------------------


def test_a_backlog_of_large_log_groups_on_many_shards_fits_into_little_memory(service, copies):
    """The kind that once needed 880 MB: 100 KB each, and 64 shards that all begin with a pull at once."""
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, 64)
    for shard in range(64):
        put_separately(service, ["nginx", "sql_audit", "click"], 24, 100 * 1000, shard=shard)
    copy = copies.start()
    wait_until_delivered(service, LONG)
    assert kernel_says(copy, "VmHWM") <= (450 if IS_PYPY else 200) * 1000  # KB
    assert_all_delivered_once(service)
    assert copy.stop() == 0


class CountsLogGroups:
    """Of answers to pulls: the LogGroups that they bring."""

    def __init__(self):
        self.count = 0

    def __call__(self, answer, _):
        self.count += int(answer.headers["x-log-count"])
        return answer


@pytest.mark.slow
def test_no_pull_of_a_backlog_is_thrown_away_for_want_of_memory(service, copies):
    """Else one in five was: what it brings, compressed and not, is more than the share that a pull is asked for."""
    topics, size = ["nginx", "sql_audit", "click"], 15 * 1000
    # On a slow machine a batch would be cut, or wanted back, and then pulled again.
    constants = {"ShardConsumer.TARGET_BATCH_SECONDS": 60.0, "LONGEST_BATCH": 60.0}
    copy = copies.start(constants=constants, SLS_HEARTBEAT_INTERVAL="20")
    put_separately(service, topics, 400, size)  # so that their size is known
    wait_until_delivered(service)
    pulled = CountsLogGroups()
    with service.add_fault("PullLogs", mangle=pulled):
        with pulled_at_once(service):
            put_separately(service, topics, 3000, size)
        wait_until_delivered(service)
    assert pulled.count == 3000
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def put_huge(service, topics, shards):
    """Puts a LogGroup of 9.6 MB, which can't be compressed, into each of these shards."""
    padding = secrets.token_hex(4800 * 1000)
    for number, shard in enumerate(shards):
        log_group = LogGroupMessage.FromString(make_log_group(topics[number % len(topics)], 1))
        log_group.Logs[0].Contents.add(Key="padding", Value=padding)
        service.put(PROJECT, SOURCE, [log_group.SerializeToString()], shard=shard)


@pytest.mark.slow
def test_the_largest_log_groups_on_many_shards_fit_into_a_container(service, copies):
    """Also while a target is down, and where a shard has several, which a pull would bring together: each is pulled
    when there is room for it, and a batch that no target takes makes room for others."""
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, 40)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    feed(service, 160)
    wait_until_delivered(service)
    arrived = puts_arrived(service)
    with service.add_fault("PutLogs", logstore="click", code="ServerBusy", status=503) as fault:
        with pulled_at_once(service):
            put_huge(service, ["nginx", "click"], [*range(40), 0, 0, 0, 0])
        service.wait_for(lambda: fault.hits >= 4, LONG, "puts refused")
        service.wait_for(lambda: puts_arrived(service) >= arrived + 6, LONG, "others accepted")
    service.wait_for(lambda: puts_arrived(service) >= arrived + 24, LONG, "most of them accepted")
    wait_until_delivered(service, LONG)
    assert kernel_says(copy, "VmHWM") <= (450 if IS_PYPY else 300) * 1000  # KB
    assert_all_delivered_once(service)
    assert copy.stop() == 0


@pytest.mark.slow
def test_shards_whose_target_is_down_leave_memory_to_others(service, copies):
    """Twelve shards hold more than there is, of logs for a target that takes none; those of twelve others arrive."""
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, 24)
    copy = copies.start(constants={"Consumer.MAX_BYTES": 2000 * 1000}, SLS_HEARTBEAT_INTERVAL="20")
    feed(service, 96)
    wait_until_delivered(service)
    before = len(service.ledger(PROJECT, "nginx"))
    with service.add_fault("PutLogs", logstore="click", code="ServerBusy", status=503):
        for shard in range(24):
            topic = ["click", "nginx"][shard % 2]
            put_separately(service, [topic], 40, 20 * 1000, shard=shard)
        count = before + 12 * 40
        service.wait_for(lambda: len(service.ledger(PROJECT, "nginx")) == count, LIMIT, "those of the other target")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


@pytest.mark.skipif(not IS_PYPY, reason="CPython takes memory as it needs it")
@pytest.mark.parametrize("wanted, given", [(None, "16MB"), ("8MB", "8MB")])
def test_memory_does_not_follow_the_processors_cache(service, copies, wanted, given):
    """PyPy takes half of the cache for new objects: 1,300 MB were seen where it is 480 MB."""
    copy = copies.start(PYPY_GC_NURSERY=wanted, PYTHONHASHSEED="0")  # which no fork could be given: see forked.py
    wait_until_joined(service, copy)
    environment = Path("/proc/%d/environ" % copy.process.pid).read_bytes().split(b"\0")
    assert b"PYPY_GC_NURSERY=" + given.encode() in environment
    assert (b"PYPY_GC_MAX_DELTA=48MB" in environment) == (wanted is None), "who chooses for himself chooses both"
    assert copy.stop() == 0


def test_a_program_that_is_no_file_starts_too():
    text = PROGRAM.read_text(encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-", "--version"], input=text, stdout=subprocess.PIPE, text=True, timeout=LIMIT
    )
    assert (answer.returncode, answer.stdout) == (0, "dispatch_data.py %s\n" % __version__)


# ---- processes --------------------------------------------------------------------------------------------------


def test_a_copy_is_one_process_and_shares_nothing(service, copies):
    """The SDK's locks are made for several: each is a file in /dev/shm, and Python 3.14 adds a process to clean up."""
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    wait_until_begun(service)
    process = Path("/proc/%d" % copy.process.pid)
    assert "/dev/shm/" not in (process / "maps").read_text()
    assert [path.read_text() for path in process.glob("task/*/children") if path.read_text()] == []
    assert copy.stop() == 0
    assert copy.stderr() == ""


def without_shared_memory(program):
    import _multiprocessing
    import errno

    def no_lock(*_, **__):
        raise OSError(errno.ENOSYS, "no /dev/shm")

    _multiprocessing.SemLock = no_lock


def test_without_shared_memory_it_works_too(service, copies):
    """As in a container or a chroot that has no /dev/shm."""
    copy = copies.start(patch=without_shared_memory)
    feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


# ---- open files -------------------------------------------------------------------------------------------------


def many_targets(service, count):
    """Makes target logstores; the topics that they take, and the settings that say so."""
    names = ["target-%d" % number for number in range(1, count + 1)]
    settings = {}
    for number, name in enumerate(names, 1):
        service.create_logstore(PROJECT, name)
        settings.update({"SLS_LOGSTORE_TO%d" % number: name, "SLS_TOPIC_TO%d" % number: name})
    return names, settings


def few_files(program, limit):
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


@pytest.mark.parametrize("limit, most", [(1024, 450), (64, 64)])
def test_two_hundred_targets_need_few_files(service, copies, limit, most):
    """Eight writers for each would be 1,600 connections; the targets take their time, so that many are wanted."""
    names, settings = many_targets(service, 200)
    put_separately(service, names, 3000 if limit > 64 else 1000)
    seen = []
    with service.add_fault("PutLogs", delay=0.3 if limit > 64 else 0.01):
        copy = copies.start(patch=functools.partial(few_files, limit), SLS_HEARTBEAT_INTERVAL="20", **settings)

        def has_delivered():
            seen.append(open_files(copy))
            return is_delivered(service)

        service.wait_for(has_delivered, LONG, "everything delivered")
    assert max(seen) <= most
    assert_all_delivered_once(service, {name: name for name in names})
    assert copy.stop() == 0
    assert "TooManyOpenFiles" not in copy.stderr()
    assert not [line for line in copy.stderr().splitlines() if " failed" in line]


def no_file_while_it_exists(program, full):
    import contextlib
    import os
    import threading
    import time

    def leave_no_file():
        while not os.path.exists(full):
            time.sleep(0.01)
        taken = []
        while os.path.exists(full):
            with contextlib.suppress(OSError):
                taken.append(os.open("/dev/null", os.O_RDONLY))
            time.sleep(0.0001)
        for number in taken:
            os.close(number)

    threading.Thread(target=leave_no_file, daemon=True).start()


def test_where_no_file_may_be_opened_the_limit_is_named_and_all_goes_on_later(service, copies, tmp_path):
    full = tmp_path / "full"
    copy = copies.start(patch=[functools.partial(few_files, 64), functools.partial(no_file_while_it_exists, str(full))])
    wait_until_begun(service)
    wait_until_joined(service, copy)
    full.touch()
    service.wait_for(lambda: open_files(copy) == 64, LIMIT, "the limit reached")
    feed(service, 40)
    service.wait_for(lambda: "TooManyOpenFiles" in copy.stderr(), LIMIT, "a word about it")
    full.unlink()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    (line, *_) = [line for line in copy.stderr().splitlines() if "TooManyOpenFiles" in line]
    assert "raise `ulimit -n`" in line and "SLS_ENDPOINT" not in line
    assert copy.stop() == 0


# ---- threads ----------------------------------------------------------------------------------------------------


def enter_cgroup(program, processes):
    import os

    with open(processes, "w") as file:
        file.write(str(os.getpid()))


@contextmanager
def few_tasks(count):
    """A patch that puts a copy where the kernel gives no more than so many tasks, threads or processes.

    RLIMIT_NPROC is nothing to root, and counts all of a user's else, so it is a cgroup of its own.
    """
    for parent in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        group = parent / ("dispatch-%s" % secrets.token_hex(8))
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / "pids.max").exists():
                (group / "pids.max").write_text(str(count), encoding="ascii")
                yield functools.partial(enter_cgroup, str(group / "cgroup.procs"))
                return
        finally:
            end = time.monotonic() + LIMIT
            while group.exists() and time.monotonic() < end:
                try:
                    group.rmdir()
                except OSError:  # whoever was killed is still on the way out
                    time.sleep(0.01)
    pytest.skip("no cgroup with a limit of tasks can be made here")


@pytest.mark.parametrize("shards, target_count", [(16, 3), (4, 50)], ids=["many shards", "many targets"])
def test_where_few_threads_may_be_started_the_limit_is_told_and_all_is_delivered_once(
    service, copies, shards, target_count
):
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, shards)
    names, settings = many_targets(service, target_count)
    with few_tasks(16) as patch:
        copy = copies.start(patch=patch, **settings)
        with service.add_fault("PutLogs", delay=0.02):
            put_separately(service, names, 200)
            service.wait_for(lambda: "can't start new thread" in copy.stderr(), LIMIT, "a word about the limit")
            wait_until_delivered(service)
        assert kernel_says(copy, "Threads") <= 16
        assert_all_delivered_once(service, {name: name for name in names})
        assert copy.stop() == 0
    lines = [line for line in copy.stderr().splitlines() if "can't start new thread" in line]
    assert all("the limit is `ulimit -u`, or the container's" in line for line in lines)
    assert "Traceback" not in copy.stderr()


def test_shards_that_wait_for_memory_wait_without_a_thread(service, copies):
    """There are so few that each one that waited would keep others from delivering, and so from giving memory back."""
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, 24)
    padding = secrets.token_hex(2500 * 1000)
    with few_tasks(20) as patch:  # with fewer it may not start: a thread that has ended counts for a moment
        for shard in range(24):
            log_group = LogGroupMessage.FromString(make_log_group("click", 1))
            log_group.Logs[0].Contents.add(Key="padding", Value=padding)
            service.put(PROJECT, SOURCE, [log_group.SerializeToString()], shard=shard)
        copy = copies.start(patch=patch, SLS_HEARTBEAT_INTERVAL="20")
        service.wait_for(lambda: puts_arrived(service) >= 12, LIMIT, "half of it")
        wait_until_delivered(service)
        assert_all_delivered_once(service)
        assert copy.stop() == 0


# ---- slow lines -------------------------------------------------------------------------------------------------

# What a shard has is one batch, however slow the machine is.
ONE_BATCH = {"ShardConsumer.TARGET_BATCH_SECONDS": 1000.0, "LONGEST_BATCH": LIMIT}
# A tenth of the time, for a tenth of the bytes.
TENTH = {"RESPONSE_TIMEOUT": 3.0, "SLOW_PUT_SECONDS": 0.5, **ONE_BATCH}


def warm_up(service, relay):
    """Until a target has as many writers as it may have: eight puts at once, on a line as fast as can be."""
    with service.add_fault("PutLogs", delay=0.05):
        while relay.puts_at_once < 8:
            put_separately(service, ["click"], 100, shard=0)
            wait_until_delivered(service)


def test_puts_that_a_slow_line_takes_long_to_carry_are_not_cut_off(service, copies):
    """Eight at once, which take longer than an answer may: cut off, they would arrive all the same, and again."""
    with Relay(service) as relay:
        copy = copies.start(constants=TENTH, SLS_HEARTBEAT_INTERVAL="20", **relay.settings())
        warm_up(service, relay)
        relay.rate, relay.puts_at_once = 125 * 1000, 0
        with pulled_at_once(service):
            put_separately(service, ["click"], 8, 70 * 1000, shard=0)
        wait_until_delivered(service)
        assert relay.puts_at_once > 4
        assert_all_delivered_once(service)
        assert copy.stop() == 0
    assert retries(copy) == 0


def test_a_line_that_is_slow_from_the_start_gets_no_company_for_its_puts(service, copies):
    """One for each target, and each is given its time: 30 KB/s, shared by three, is as slow as may be."""
    topics = ["nginx", "sql_audit", "click"]
    put_separately(service, topics, 3, 60 * 1000, shard=0)  # they take 6 s
    put_separately(service, topics, 6, 15 * 1000, shard=0)
    with Relay(service) as relay:
        relay.rate = 30 * 1000
        constants = {"RESPONSE_TIMEOUT": 4.0, "SLOW_PUT_SECONDS": 0.1, **ONE_BATCH}
        copy = copies.start(constants=constants, SLS_HEARTBEAT_INTERVAL="20", **relay.settings())
        wait_until_delivered(service)
        assert relay.puts_at_once == 3
        assert_all_delivered_once(service)
        assert copy.stop() == 0
    assert retries(copy) == 0


def test_a_line_that_becomes_too_slow_for_many_puts_gets_fewer(service, copies):
    """Eight of them take longer than any may, so they fail; then it is one at a time, and none is repeated."""
    with Relay(service) as relay:
        constants = {"RESPONSE_TIMEOUT": 2.0, "SLOW_PUT_SECONDS": 0.1, **ONE_BATCH}
        copy = copies.start(constants=constants, SLS_HEARTBEAT_INTERVAL="20", **relay.settings())
        warm_up(service, relay)
        relay.rate, relay.puts_at_once = 20 * 1000, 0
        with pulled_at_once(service):
            put_separately(service, ["click"], 8, 12 * 1000, shard=0)
        wait_until_delivered(service)
        assert relay.puts_at_once > 4
        arrived, relay.puts_at_once = puts_arrived(service), 0
        with pulled_at_once(service):
            put_separately(service, ["click"], 4, 12 * 1000, shard=0)
        wait_until_delivered(service)
        assert (puts_arrived(service) - arrived, relay.puts_at_once) == (4, 1)
        assert copy.stop() == 0
        assert_nothing_lost(service, most_repeated=retries(copy))


# ---- far targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["stop", "another copy"])
def test_with_far_targets_a_stop_or_another_copy_repeats_nothing(service, copies, event):
    """They take every put, but one at a time and slowly: a batch must still end within the time of a stop."""
    # Until another copy has joined, the first one must not have delivered all: on PyPy that takes a while.
    shards, puts = (1, 1000) if event == "stop" else (4, 3000)
    for shard in range(shards):
        put_separately(service, ["nginx", "sql_audit", "click"], puts // shards, shard=shard)
    with service.add_fault("PutLogs", delay=0.05):
        first = copies.start(SLS_WRITERS="1")
        service.wait_for(lambda: puts_arrived(service) >= 150, LIMIT, "a part delivered")
        second = copies.start(SLS_WRITERS="1") if event == "another copy" else None
        if second:
            service.wait_for(lambda: is_shared(service, [first, second]), LIMIT, "two shards handed over")
        assert first.stop() == 0
    assert puts_arrived(service) < puts
    if not second:
        assert logs_in_flight(service) == 0
        second = copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert second.stop() == 0
    assert "in the middle of a batch" not in first.stderr()


# ---- connections ------------------------------------------------------------------------------------------------

CLOSE_WAIT = "08"


def sockets_closed_from_the_other_side(copy):
    """How many sockets the process still has that the other side has closed."""
    inodes = set()
    for path in Path("/proc/%d/fd" % copy.process.pid).iterdir():
        try:
            inodes.add(os.readlink(str(path)))
        except OSError:
            continue  # it was closed just now
    rows = [row.split() for row in Path("/proc/%d/net/tcp" % copy.process.pid).read_text().splitlines()[1:]]
    return len([row for row in rows if row[3] == CLOSE_WAIT and "socket:[%s]" % row[9] in inodes])


def not_while_it_exists(program, switch):
    import os

    close_idle = program.PutLoop.close_idle
    program.PutLoop.close_idle = lambda *one: os.path.exists(switch) or close_idle(*one)


@pytest.mark.parametrize("event", ["after an answer", "all at once"])
def test_connections_that_the_service_has_closed_are_closed_here_too(service, copies, tmp_path, event):
    """Without being used again, and on PyPy without waiting for its collector of garbage."""
    switch = tmp_path / "not yet"  # so that they can be seen before
    switch.touch()
    copy = copies.start(patch=functools.partial(not_while_it_exists, str(switch)))
    with service.add_fault("PutLogs", close=event == "after an answer", delay=0.2):
        put_separately(service, ["nginx", "sql_audit", "click"], 60)
        wait_until_delivered(service)
    if event == "all at once":
        service.stop()
    service.wait_for(lambda: sockets_closed_from_the_other_side(copy) > 0, LIMIT, "sockets to close")
    switch.unlink()
    service.wait_for(lambda: sockets_closed_from_the_other_side(copy) == 0, LIMIT, "all of them closed")
    if event == "all at once":
        service.start()
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_rare_logs_do_not_meet_connections_that_a_nat_has_forgotten(service, copies):
    """What is sent on one gets lost without a word, and would be missed only when its time is over."""
    with Relay(service) as relay:
        relay.forgets_after = 5.0
        copy = copies.start(constants={"MAX_IDLE": 1.0}, SLS_HEARTBEAT_INTERVAL="20", **relay.settings())
        wait_until_begun(service)
        for _ in range(2):
            feed(service, 4, topics=["nginx"])
            wait_until_delivered(service)
            quiet_until = time.monotonic() + 1.2 * relay.forgets_after
            service.wait_for(lambda end=quiet_until: time.monotonic() > end, LIMIT, "time in which a NAT forgets")
        feed(service, 4, topics=["nginx"])
        wait_until_delivered(service)
        assert_all_delivered_once(service)
        assert copy.stop() == 0
        assert relay.forgotten == 0
    assert retries(copy) == 0 and "failed" not in copy.stderr()


# ---- LogGroups that are set aside -------------------------------------------------------------------------------


def counting_looks(program, looks):
    import os

    scandir = os.scandir

    def counted(directory):
        with open(looks, "a") as file:
            file.write("%s\n" % directory)
        return scandir(directory)

    os.scandir = counted


def test_a_directory_full_of_log_groups_set_aside_is_not_read_for_each(service, copies, tmp_path):
    directory, looks = tmp_path / "rejected", tmp_path / "looks"
    directory.mkdir()
    for number in range(50 * 1000):
        (directory / ("TO3-test-project-click-%032x.loggroup" % number)).touch()
    poisons = [make_log_group("click", Source="10.0.0.%d" % number) + b"\x28\x01" for number in range(20)]
    with pulled_at_once(service):
        service.put(PROJECT, SOURCE, poisons + [make_log_group("click") for _ in range(80)])
    copy = copies.start(
        patch=functools.partial(counting_looks, str(looks)),
        constants={"DeadLetterDirectory.RESCAN_INTERVAL": 1e9},
        SLS_REJECTED_DIR=str(directory),
        SLS_LOG_DIR="",  # where a start looks for old log files
    )
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert len(os.listdir(str(directory))) == 50 * 1000 + 20
    assert looks.read_text().splitlines() == [str(directory)]


@pytest.mark.quick
def test_a_log_group_is_set_aside_under_the_longest_names_that_settings_allow(tmp_path):
    place = logstore_config("p" * 63, "l" * 128)
    path = DeadLetterDirectory(str(tmp_path)).save(
        10**9 - 1,
        place,
        LogGroup("click", 1, b"", b"data", mergeable=False),
        "%d-%s" % (10**9, "f" * 20),
        max(REJECTION_CODES, key=len),
    )
    assert Path(path).read_bytes() == b"data"
