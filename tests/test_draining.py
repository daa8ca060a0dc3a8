"""--drain: a copy that ends by itself, once the group has nothing left of what was there at the start."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from assertions import arrived_in_targets, assert_all_delivered_once, assert_delivered_once
from harness import (
    GROUP,
    LIMIT,
    PROGRAM,
    PROJECT,
    SOURCE,
    SteadyFeed,
    feed,
    group_shards,
    make_log_group,
    run_program,
    settings_for,
    wait_until_joined,
)
from local_log_service.verdict import compare

HEARTBEAT_INTERVAL = "3"  # seconds: a busy machine is to cost no lease


def drain(copies, *arguments, **options):
    constants = {"Drain.LOOK_INTERVAL": 0.1, "SUMMARY_INTERVAL": 0.3, **options.pop("constants", {})}
    options = {"SLS_HEARTBEAT_INTERVAL": HEARTBEAT_INTERVAL, **options}
    return copies.start(arguments=["--drain", *arguments], constants=constants, **options)


def end_of(service, shard):
    return service.client().get_end_cursor(PROJECT, SOURCE, shard).get_cursor()


@pytest.mark.parametrize("in_order", [False, True])
def test_a_drain_ends_when_every_shard_has_saved_what_was_there_at_the_start(service, copies, in_order):
    """Shards that are read-only, that never had a log, or none any more, hold up nothing; nor does what comes later."""
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 2 * int(HEARTBEAT_INTERVAL), in_order)
    service.split_shard(PROJECT, SOURCE, 0)  # it never had a log
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=1)
    service.split_shard(PROJECT, SOURCE, 1)
    service.expire(PROJECT, SOURCE, 1, 1)  # it has none any more
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.split_shard(PROJECT, SOURCE, 2)  # it has one, and is read-only
    sent = feed(service, 40)
    with service.add_fault("PutLogs", logstore="nginx", hold=True):
        copy = drain(copies)
        service.wait_for(lambda: "LogGroups left, " in copy.log(), LIMIT, "a word about its progress")
        service.split_shard(PROJECT, SOURCE, 3)
    later = SteadyFeed(service)
    later.wait_for(lambda: copy.process.poll() is not None, "its end")
    assert copy.process.returncode == 0
    assert re.search(r" INFO drain: \d+ % done, \d+ LogGroups left, \d+/s.*, in shards [\d,]+\n", copy.log())
    assert " INFO ends with status 0: nothing is left to drain\n" in copy.log()
    assert compare(sent, arrived_in_targets(service)).lost == 0
    # And a copy that goes on repeats nothing.
    assert drain(copies).process.wait(LIMIT) == 0
    expired = service.ledger(PROJECT, SOURCE)[0].log_group
    kept = [entry.log_group for entry in service.ledger(PROJECT, SOURCE) if entry.log_group != expired]
    assert_delivered_once(kept, arrived_in_targets(service))


def test_a_drain_waits_for_a_target_that_takes_nothing(service, copies):
    """However long: nothing is skipped. Told to stop meanwhile, it has not done what it was for."""
    feed(service, 40, topics=("click",))
    with service.add_fault("PutLogs", logstore="click", status=403, code="Unauthorized") as fault:
        first = drain(copies)
        service.wait_for(lambda: fault.hits > 3 and " in shards " in first.log(), LIMIT, "puts that are refused")
        assert first.stop() == 1
        assert "ends with status 1: told to stop before all was drained" in first.log()
        hits, second = fault.hits, drain(copies)
        service.wait_for(lambda: fault.hits > hits + 3 and " in shards " in second.log(), LIMIT, "refusals again")
        assert second.process.poll() is None
    assert second.process.wait(LIMIT) == 0
    assert_all_delivered_once(service)


def test_of_several_copies_each_ends_when_all_shards_are_done(service, copies):
    """Whoever has drained them; one that holds no shard, too; and what can't be seen for a while is no end."""
    feed(service, 80)
    with service.add_fault("PutLogs", hold=True):
        started = [drain(copies) for _ in range(2)]
        wait_until_joined(service, *started)
        looks = service.add_fault("GetCheckPoint", status=403, code="ReadQuotaExceed")
        service.wait_for(
            lambda: any("can't tell what is left" in copy.stderr() for copy in started), LIMIT, "a look that failed"
        )
        looks.remove()
    assert [copy.process.wait(LIMIT) for copy in started] == [0, 0]
    assert_all_delivered_once(service)


def test_a_drain_until_a_time_delivers_nothing_that_arrived_later(service, copies):
    before = feed(service, 40)
    (last,) = service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.wait_for(lambda: time.time() > int(last.received_at) + 1.1, LIMIT, "another second")
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(last.received_at) + 1))
    feed(service, 40)
    service.split_shard(PROJECT, SOURCE, 0)
    with service.add_fault("PutLogs", hold=True):
        copy = drain(copies, "--until", until)
        wait_until_joined(service, copy)
        for child in service.split_shard(PROJECT, SOURCE, 1):
            service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=child)
    assert copy.process.wait(LIMIT) == 0
    assert_delivered_once([*before, last.log_group], arrived_in_targets(service))


def test_a_first_drain_at_the_end_says_where_each_shard_begins(service, copies):
    """Else the next would begin later, and leave out what came between."""
    feed(service, 40)
    assert drain(copies, SLS_CURSOR_START="end").process.wait(LIMIT) == 0
    assert {shard: state["checkpoint"] for shard, state in group_shards(service).items()} == {
        shard: end_of(service, shard) for shard in range(4)
    }
    sent = feed(service, 40)
    assert drain(copies, SLS_CURSOR_START="end").process.wait(LIMIT) == 0
    assert_delivered_once(sent, arrived_in_targets(service))


def test_on_a_terminal_a_bar_shows_how_far_it_is(service, tmp_path):
    feed(service, 40)
    with service.add_fault("PutLogs", hold=True):
        ours, theirs = pty.openpty()
        command = [sys.executable, str(PROGRAM), "--drain"]
        process = subprocess.Popen(
            command, env=settings_for(service), cwd=str(tmp_path), stdin=subprocess.DEVNULL, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        try:
            while not re.search(rb"\x1b\[K\[#*\.*\] \d+ % done, 40 LogGroups left, 0/s\r", shown):
                shown += os.read(ours, 4096)
        finally:
            process.send_signal(signal.SIGTERM)
            service.clear_faults()
            os.set_blocking(ours, False)
            process.wait(LIMIT)
            os.close(ours)


def test_what_a_time_without_an_offset_has_come_to_is_told(service, copies):
    copy = drain(copies, "--until", "2018-12-26", TZ="CST-8")
    assert copy.process.wait(LIMIT) == 0
    (line,) = [line for line in copy.stderr().splitlines() if "no offset" in line]
    assert " WARNING --until: '2018-12-26' has no offset, and is taken for local time, +0800" in line
    assert "--until, before which a log must have arrived: 2018-12-26 00:00:00 +0800 (2018-12-25 16:" in copy.log()


@pytest.mark.parametrize("start", ["end", "2018-12-26T00:00:00Z"])
def test_what_a_new_group_would_begin_after_is_not_drained(service, copies, start):
    """As when two times are swapped: each shard would have a checkpoint there then, from which the next run goes on."""
    feed(service, 40)
    until = "--until", "2018-12-25T00:00:00Z"
    ended = drain(copies, *until, SLS_CURSOR_START=start)
    assert ended.process.wait(LIMIT) == 1
    (line,) = [line for line in ended.stderr().splitlines() if " ERROR " in line]
    assert "SLS_CURSOR_START: the group begins at " + start[:9] in line and "set an earlier time" in line
    assert not any(shard["checkpoint"] for shard in group_shards(service).values())
    assert drain(copies).process.wait(LIMIT) == 0
    assert_all_delivered_once(service)
    assert drain(copies, *until, SLS_CURSOR_START=start).process.wait(LIMIT) == 0, "it means nothing to this group"


@pytest.mark.parametrize(
    "arguments", [["--until", "2018-12-26"], ["--drain", "--until", "end"], ["--drain", "--check"]]
)
def test_options_of_a_drain_that_make_no_sense_are_refused(service, arguments):
    ended = run_program(settings_for(service), *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("dispatch_data.py: error: ")
