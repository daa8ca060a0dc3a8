"""What lapses on the way and must cost nothing: the group's terms, the clock, cursors, heartbeats, batches.

A consumer that may no longer be who the service thinks it is ends, and another joins; a batch that may not be whole is
given up, and tried again. Each test runs real copies against the local service.
"""

import contextlib
import functools
import re
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from assertions import (
    arrived_in_targets,
    assert_all_delivered_once,
    assert_delivered_once,
    assert_nothing_lost,
    logs_in,
    puts_arrived,
    verdict,
)
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    SteadyFeed,
    feed,
    feed_separately,
    group_shards,
    make_group,
    make_log_group,
    pulled_at_once,
    run_program,
    settings_for,
    wait_until_begun,
    wait_until_delivered,
    wait_until_forgotten,
    wait_until_joined,
)
from local_log_service import mangling
from local_log_service.faults import ForeignAnswer
from local_log_service.verdict import compare

from dispatch_data import (
    Batch,
    ConnectionFactory,
    Heartbeat,
    PutClient,
    PutInFlight,
    PutLoop,
    ShardCheckpoint,
    ShardConsumer,
    Target,
)

pytestmark = pytest.mark.slow


def terms_of_group(service):
    """The group's timeout and order, as the service lists them."""
    (group,) = service.client().list_consumer_group(PROJECT, SOURCE).get_consumer_groups()
    return group.get_timeout(), group.is_in_order()


def pass_calls(service, action, count):
    before = service.calls(action)
    service.wait_for(lambda: service.calls(action) >= before + count, LIMIT, "%d calls of %s" % (count, action))


# ---- the group's terms, which are the service's -----------------------------------------------------------------


def test_a_group_that_exists_keeps_its_timeout_and_its_order(service, copies):
    """Somebody set them, who may not be this program; each is remarked upon once, at the start."""
    make_group(service, 300, in_order=True)
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert terms_of_group(service) == (300, True)
    assert_all_delivered_once(service)
    lines = [line for line in copy.stderr().splitlines() if " WARNING source test-project/source: " in line]
    assert len([line for line in lines if "consumer group dispatch keeps its timeout of 300 s" in line]) == 1
    assert len([line for line in lines if "consumer group dispatch consumes in order" in line]) == 1


def test_a_group_with_the_terms_that_it_would_get_is_not_remarked_upon(service, copies):
    make_group(service, 20)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="10")
    wait_until_joined(service, copy)
    feed(service, 20)
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert "consumer group" not in copy.stderr()


def test_in_order_the_children_of_a_split_wait_for_their_parent(service, copies):
    make_group(service, 300, in_order=True)
    with service.add_fault("PutLogs", code="WriteQuotaExceed") as fault:
        of_parent = feed(service, 20, shard=0)
        copy = copies.start()
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a batch of the parent in flight")
        children = service.split_shard(PROJECT, SOURCE, 0)
        of_children = [log_group for child in children for log_group in feed(service, 10, shard=child)]
        pass_calls(service, "HeartBeat", 2)
        assert {group_shards(service)[child]["state"] for child in children} == {"wait"}
    service.wait_for(lambda: compare(of_parent, arrived_in_targets(service)).lost == 0, LIMIT, "the parent delivered")
    wait_until_delivered(service)
    arrived = sorted(
        (entry for logstore in ("nginx", "sql-audit", "click") for entry in service.ledger(PROJECT, logstore)),
        key=lambda entry: entry.sequence,
    )
    at_the_end_of_the_parent = next(
        count
        for count in range(len(arrived) + 1)
        if compare(of_parent, [entry.log_group for entry in arrived[:count]]).lost == 0
    )
    first = [entry.log_group for entry in arrived[:at_the_end_of_the_parent]]
    assert compare(of_children, first).lost == len(of_children) * 5, "a child was delivered before its parent's end"
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_the_last_checkpoint_of_a_shard_that_has_ended_may_lose_its_answer(service, copies):
    """Nobody holds such a shard from then on, so saving it again is refused: no reason to let go of all others."""
    make_group(service, 20)
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("PutLogs", hold=True) as held:
        feed(service, 10, shard=0)
        service.wait_for(lambda: held.hits > 0, LIMIT, "the shard's last batch in flight")
        service.split_shard(PROJECT, SOURCE, 0)
        lost = service.add_fault("UpdateCheckPoint", cut="after")
    service.wait_for(lambda: lost.hits > 0, LIMIT, "an answer lost")
    lost.remove()
    service.wait_for(lambda: group_shards(service)[0]["checkpoint"] == end_of(service, 0), LIMIT, "its end")
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "is lost, another joins" not in copy.stderr() and copy.stop() == 0


@pytest.mark.parametrize("intervals", [("20", "1"), ("4", "20")], ids=["20 s first", "4 s first"])
def test_copies_of_different_heartbeat_intervals_share_a_group(service, copies, intervals):
    """As while a setting is rolled out host by host: the slower one goes by the group's timeout, or is forgotten."""
    flow = SteadyFeed(service)
    first = copies.start(SLS_HEARTBEAT_INTERVAL=intervals[0])
    flow.wait_for(lambda: len(first.held_shards(service)) == 4, "the first copy with all shards")
    timeout = terms_of_group(service)[0]
    assert timeout == 2 * int(intervals[0])
    second = copies.start(SLS_HEARTBEAT_INTERVAL=intervals[1])
    flow.wait_until_shared(first, second)
    heartbeats = service.calls("HeartBeat")
    flow.wait_for(lambda: service.calls("HeartBeat") >= heartbeats + 8, "eight heartbeats")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert terms_of_group(service)[0] == timeout
    assert "keeps its timeout of %d s, where SLS_HEARTBEAT_INTERVAL=%s would" % (timeout, intervals[1]) in (
        second.stderr()
    )
    assert [copy.stop() for copy in (first, second)] == [0, 0]
    assert "is lost" not in first.stderr() + second.stderr()


def test_heartbeats_follow_a_timeout_that_somebody_else_has_set(service, copies):
    """Else the service would forget this copy between two of them."""
    make_group(service, 8)
    flow = SteadyFeed(service)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    flow.wait_for(lambda: service.calls("HeartBeat") >= 4, "heartbeats")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "is lost" not in copy.stderr()
    assert "keeps its timeout of 8 s" in copy.stderr() and "heartbeats every 4 s" in copy.stderr()
    assert copy.stop() == 0


def test_a_timeout_that_is_changed_under_running_copies_is_heeded_by_the_next_consumer(service, copies):
    """The service forgets both, whose heartbeats are too far apart by then; each joins again, by the new timeout."""
    flow = SteadyFeed(service)
    started = [copies.start(SLS_HEARTBEAT_INTERVAL="8") for _ in range(2)]
    flow.wait_until_shared(*started)
    wait_until_delivered(service)
    service.client().update_consumer_group(PROJECT, SOURCE, GROUP, in_order=False, timeout=6)
    for copy in started:
        service.wait_for(lambda copy=copy: "is lost, another joins" in copy.stderr(), LIMIT, "a consumer lost")
    flow.wait_until_shared(*started)
    lost = [copy.stderr().count("is lost") for copy in started]
    heartbeats = service.calls("HeartBeat")
    flow.wait_for(lambda: service.calls("HeartBeat") >= heartbeats + 8, "eight heartbeats")
    assert [copy.stderr().count("is lost") for copy in started] == lost
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert [copy.stop() for copy in started] == [0, 0]


# ---- which cursor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("code", ["SLSInvalidCursor", "InvalidCursor", "InvalidCursorSomehow"])
def test_a_refusal_of_a_cursor_that_is_fine_skips_and_replays_nothing(service, copies, code, share):
    """The SDK would go on at the newest log; a cursor that had expired would be replaced by the oldest."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("PullLogs", status=400, code=code, share=share) as fault:
        service.wait_for(lambda: fault.hits >= 4, LIMIT, "pulls refused")
        feed(service, 40)
        hits = fault.hits
        service.wait_for(lambda: fault.hits >= hits + 4, LIMIT, "more pulls refused")
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    assert "SKIPPED" not in copy.stderr() and "%s: " % code in copy.stderr()


def wait_until_older(service, entries):
    """Waits until these entries are older than a start now, by clocks that tell whole seconds."""
    service.wait_for(lambda: time.time() > max(entry.received_at for entry in entries) + 2.5, LIMIT, "seconds to pass")


def is_begun(service, count):
    return len([shard for shard in group_shards(service).values() if shard["checkpoint"]]) == count


def test_a_first_start_at_the_end_that_is_killed_half_way_decides_for_all_shards(service, copies):
    """Some shards have a checkpoint, the others are read from when the first start was, not from their first log."""
    feed(service, 40)
    wait_until_older(service, service.ledger(PROJECT, SOURCE))
    old_count = len(service.ledger(PROJECT, SOURCE))
    with service.add_fault("UpdateCheckPoint", hold=True, share=0.5):
        first = copies.start(SLS_CURSOR_START="end")
        service.wait_for(lambda: is_begun(service, 2), LIMIT, "two shards begun")
        first.process.kill()
        first.process.wait()
    assert is_begun(service, 2)
    since = feed(service, 40)
    wait_until_older(service, service.ledger(PROJECT, SOURCE)[old_count:])
    copies.start(SLS_CURSOR_START="end")
    wait_until_delivered(service)
    assert_delivered_once(since, arrived_in_targets(service))


DELAYS = {
    "": {},
    "ends": dict(GetCursor=0.7),
    "the group": dict(CreateConsumerGroup=1.5),
    "checkpoints": dict(UpdateCheckPoint=2.0),
    "heartbeats": dict(HeartBeat=1.0),
    "all of them": dict(GetCursor=0.3, CreateConsumerGroup=0.7, UpdateCheckPoint=1.0, HeartBeat=0.5, GetCheckPoint=0.3),
}


def feed_until_begun(service, counts):
    """Feeds a little at a time until all shards have a checkpoint; what was fed since `counts()` became true."""
    since = []

    def feed_and_look():
        is_counted = counts()
        fed = feed(service, 4)
        since.extend(fed if is_counted else [])
        time.sleep(0.02)
        return is_begun(service, 4)

    service.wait_for(feed_and_look, LIMIT, "all shards begun")
    return since


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("delays", DELAYS.values(), ids=list(DELAYS))
def test_copies_that_start_at_the_end_together_lose_nothing_since_the_group_was_made(service, copies, delays, share):
    """Whichever looks at the ends, makes the group, gets a shard and writes its checkpoint first."""
    feed(service, 40)
    wait_until_older(service, service.ledger(PROJECT, SOURCE))
    since = []
    with contextlib.ExitStack() as faults:
        for action, delay in delays.items():
            faults.enter_context(service.add_fault(action, project=PROJECT, logstore=SOURCE, share=share, delay=delay))
        for _ in range(4):
            copies.start(SLS_CURSOR_START="end", SLS_HEARTBEAT_INTERVAL="5")

        since += feed_until_begun(service, lambda: bool(group_shards(service)))
    since += feed(service, 40)
    wait_until_delivered(service)
    outcome = compare(since, arrived_in_targets(service))
    assert (outcome.lost, outcome.duplicated) == (0, 0), str(outcome)


def test_who_finds_a_group_without_checkpoints_waits_for_the_first(service, copies):
    """A start at the end: the second copy's look is later than the group, and may not decide for the shards it gets."""
    with service.add_fault("UpdateCheckPoint", hold=True) as fault:
        copies.start(SLS_CURSOR_START="end", SLS_HEARTBEAT_INTERVAL="5")
        service.wait_for(lambda: fault.hits >= 4, LIMIT, "a copy that begins all shards")
        since = feed(service, 40)
        second = copies.start(SLS_CURSOR_START="end", SLS_HEARTBEAT_INTERVAL="5")
        service.wait_for(lambda: "has no checkpoint yet" in second.log(), LIMIT, "a copy that waits")
    flow = SteadyFeed(service)
    flow.wait_until_shared(*copies.started)
    wait_until_delivered(service)
    assert compare(since, arrived_in_targets(service)).lost == 0
    assert_all_delivered_once(service)


def test_of_copies_that_find_a_group_made_by_hand_the_first_to_write_decides(service, copies):
    """Nobody knows when it was made; from the first checkpoint on nothing is lost, whoever gets the other shards."""
    make_group(service, 10)
    feed(service, 40)
    wait_until_older(service, service.ledger(PROJECT, SOURCE))
    since = []
    with service.add_fault("UpdateCheckPoint", delay=1.0, share=0.5):
        for _ in range(4):
            copies.start(
                constants={"GroupMember.FIRST_CHECKPOINT_TIMEOUT": 1.0},
                SLS_CURSOR_START="end",
                SLS_HEARTBEAT_INTERVAL="5",
            )

        since += feed_until_begun(service, lambda: any(shard["checkpoint"] for shard in group_shards(service).values()))
    since += feed(service, 40)
    wait_until_delivered(service)
    outcome = compare(since, arrived_in_targets(service))
    assert (outcome.lost, outcome.duplicated) == (0, 0), str(outcome)


def test_an_answer_without_the_checkpoints_that_were_there_begins_no_shard_anew(service, copies):
    """It would deliver everything again; whoever has made the group anew is told what comes of that."""
    first = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert first.stop() == 0
    with service.add_fault("HeartBeat", hold=True) as held:
        copy = copies.start(constants={"ShardCheckpoint.GONE_PATIENCE": LIMIT})
        service.wait_for(lambda: held.hits > 0, LIMIT, "a copy that has seen the checkpoints")
        with service.add_fault("GetCheckPoint", mangle=lambda answer, _: answer._replace(body=b"[]")):
            held.remove()
            service.wait_for(lambda: "MissingCheckPoint" in copy.stderr(), LIMIT, "a word about it")
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_a_group_that_was_made_anew_under_a_copy_begins_anew_and_that_is_said(service, copies):
    copy = copies.start(constants={"ShardCheckpoint.GONE_PATIENCE": 0.5})
    feed(service, 40)
    wait_until_delivered(service)
    service.client().delete_consumer_group(PROJECT, SOURCE, GROUP)
    make_group(service, 10)
    service.wait_for(lambda: copy.stderr().count("its checkpoint is gone") == 4, LIMIT, "a word of each shard")
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated) == (0, 200)
    assert copy.stop() == 0


# ---- checkpoints that somebody sets by hand ---------------------------------------------------------------------


def set_checkpoint(service, shard, cursor, consumer=""):
    service.set_checkpoint(PROJECT, SOURCE, GROUP, shard, cursor, consumer)


def begin_of(service, shard):
    return service.client().get_begin_cursor(PROJECT, SOURCE, shard).get_cursor()


SETTERS = {"nobody": lambda _: "", "a tool": lambda _: "console", "the holder": lambda holder: holder}


@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "busy"])
@pytest.mark.parametrize("setter", SETTERS.values(), ids=list(SETTERS))
def test_a_checkpoint_set_back_by_hand_is_told_and_obeyed(service, copies, setter, is_idle):
    """What was delivered since is delivered again, once; an idle shard looks now and then, a busy one at each save."""
    copy = copies.start(constants={"ShardConsumer.TARGET_BATCH_SECONDS": 1000.0})  # a batch may be all of a pull
    feed(service, 40)
    wait_until_delivered(service)
    before = group_shards(service)[0]
    if is_idle:
        set_checkpoint(service, 0, begin_of(service, 0), setter(before["consumer"]))
    else:
        with service.add_fault("PutLogs", hold=True) as fault:
            with pulled_at_once(service):
                feed(service, 10, shard=0)
            service.wait_for(lambda: fault.hits > 0, LIMIT, "a batch in flight")
            set_checkpoint(service, 0, begin_of(service, 0), setter(before["consumer"]))
    service.wait_for(lambda: "was set by hand" in copy.stderr(), LIMIT, "a word about it")
    wait_until_delivered(service)
    feed(service, 40)
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.foreign, outcome.duplicated) == (0, 0, (10 if is_idle else 20) * 5), str(outcome)
    (line,) = [line for line in copy.stderr().splitlines() if "was set by hand" in line]
    assert " WARNING " in line and "shard 0" in line and before["checkpoint"] in line and begin_of(service, 0) in line
    assert "delivered again" in line and copy.stop() == 0


def test_a_checkpoint_set_forward_by_hand_is_told_and_obeyed(service, copies):
    """The batch in flight is delivered, what was pulled behind it is dropped."""
    copy = copies.start(constants={"ShardConsumer.INITIAL_COUNT": 5, "ShardConsumer.TARGET_BATCH_SECONDS": 0.0})
    wait_until_begun(service)
    with service.add_fault("PutLogs", hold=True) as fault:
        in_flight = feed(service, 4, topics=["click"], shard=0)
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a batch in flight")
        feed(service, 400, topics=["nginx"], shard=0)
        set_checkpoint(service, 0, end_of(service, 0), "console")
    service.wait_for(lambda: "SKIPPED" in copy.stderr(), LIMIT, "a word about it")
    later = feed(service, 20, topics=["sql_audit"], shard=0)
    wait_until_delivered(service)
    arrived = [[entry.log_group for entry in service.ledger(PROJECT, name)] for name in ("click", "sql-audit")]
    assert compare(in_flight, arrived[0]).duplicated == compare(later, arrived[1]).duplicated == 0
    assert compare(later, arrived[1]).lost == 0 and logs_in(service, "nginx") == 0
    assert "was set by hand" in copy.stderr() and copy.stop() == 0


def test_a_checkpoint_that_is_set_twice_to_the_same_place_is_obeyed_twice(service, copies):
    copy = copies.start()
    feed(service, 40)
    for number in (1, 2):
        wait_until_delivered(service)
        set_checkpoint(service, 0, begin_of(service, 0))
        service.wait_for(lambda number=number: copy.stderr().count("was set by hand") == number, LIMIT, "a word")
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated) == (0, 2 * 10 * 5), str(outcome)


def test_late_checkpoints_of_copies_are_not_taken_for_set_by_hand(service, copies):
    """Nor the copy's own that were taken and not answered, nor that of the holder before it, forced as by the SDK."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    holder = group_shards(service)[0]["consumer"]
    set_checkpoint(service, 0, begin_of(service, 0), holder[:-12] + "0123456789ab")
    pass_calls(service, "GetCheckPoint", 8)
    with service.add_fault("UpdateCheckPoint", cut="after", share=0.5) as fault:
        for _ in range(5):
            feed(service, 40)
            service.wait_for(lambda: group_shards(service)[1]["checkpoint"] == end_of(service, 1), LIMIT, "delivered")
        assert fault.hits > 4
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "by hand" not in copy.stderr() and copy.stop() == 0


# ---- batches in which the program itself fails ------------------------------------------------------------------


def full_disk(program):
    """No file takes more than a few bytes, neither the log nor what stderr was sent to.

    The SDK's locks are files of 32 bytes, in memory.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))


def nothing_can_be_told(program):
    """Who tries gets an exception."""
    import errno

    def cannot_tell(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    program.log.log = program.log.warning = program.log.error = program.log.exception = cannot_tell


@pytest.mark.parametrize("patch", [full_disk, nothing_can_be_told], ids=["full disk", "telling raises"])
def test_a_failure_that_cannot_be_told_loses_nothing(service, copies, patch):
    """One target refuses for a while, another is slow: the batch must not be left for the next one by that."""
    with service.add_fault("PutLogs", logstore="click", delay=0.3):
        with service.add_fault("PutLogs", logstore="nginx", code="ServerBusy", status=503) as fault:
            copy = copies.start(patch=patch)
            feed_separately(service, 40)
            service.wait_for(lambda: fault.hits >= 6, LIMIT, "puts refused")
            feed(service, 40)
        feed_separately(service, 40)
        wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    if patch is full_disk:
        assert len(copy.stderr()) <= 64 and len(copy.log()) <= 64


def test_a_checkpoint_whose_failure_cannot_be_told_repeats_at_most_its_batches(service, copies):
    copies.start(patch=nothing_can_be_told, constants={"MAX_BACKOFF": 0.1})
    feed(service, 40)
    with service.add_fault("UpdateCheckPoint", code="ServerBusy", status=503, share=0.5) as fault:
        wait_until_delivered(service)
        feed(service, 40)
        wait_until_delivered(service)
        assert fault.hits > 2
    feed(service, 40)
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=fault.hits * 40 * 5)


def failing_at_times(program, method, done="nothing", error=""):
    """A third of the calls of this method fail, with nothing, half or all of it done: for want of memory or `error`.

    The first of them, and others by chance: what is called for each of three targets in turn must not fail for the same
    one of them each time.
    """
    import random

    class_name, name = method.split(".")
    owner, chance, first = getattr(program, class_name), random.Random(1), [True]
    original = getattr(owner, name)

    def failing(self, *arguments):
        if (first and first.pop()) or chance.random() < 1 / 3:
            if done == "half":
                original(self, arguments[0][: len(arguments[0]) // 2], *arguments[1:])
            elif done == "all":
                original(self, *arguments)
            raise RuntimeError(error) if error else MemoryError
        return original(self, *arguments)

    setattr(owner, name, failing)


FAILURES_WITHIN = {
    "nothing handed out": (PutLoop.submit,),
    "what begins next": (PutLoop.queue_next,),
    "what begins next, once it is queued": (PutLoop.queue_next, "all", "can't start new thread"),
    "a put's turn": (PutLoop.make_ready,),
    "a put failed": (Target.adapt, "all"),
    "a put is settled": (PutLoop.end_if_over,),
    "handed out, and then": (PutLoop.submit, "all"),
    "before a put": (PutClient.put_log_raw,),
    "after a put was begun": (PutClient.put_log_raw, "all"),
    "before its answer": (PutInFlight.receive,),
    "after its answer": (PutInFlight.receive, "all"),
    "a connection is opened": (ConnectionFactory.connect,),
    "waiting for answers begins": (PutLoop.wait_for_answer,),
    "after a put": (Target.on_result, "all"),
    "what to do after a failure": (Target.split_or_reject,),
    "the outcome": (Batch.delivered,),
    "the checkpoint": (ShardCheckpoint.save,),
    "a pull": (ShardConsumer.pull_once,),
    "a heartbeat": (Heartbeat.send,),
}


@pytest.mark.parametrize("failure", FAILURES_WITHIN.values(), ids=list(FAILURES_WITHIN))
def test_whatever_fails_within_a_batch_loses_nothing(service, copies, failure):
    """It is given up whole and tried again, or carried on: at most the batch is repeated for each failure."""
    with service.add_fault("PutLogs", code="ServerBusy", status=503, share=0.2):
        method, *how = failure
        patch = functools.partial(failing_at_times, method.__qualname__, *how)
        copy = copies.start(patch=patch, constants={"MAX_BACKOFF": 0.1})
        for _ in range(6):
            feed_separately(service, 20)
            wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=10 * 120 * 5)
    assert "Traceback" not in copy.stderr() or "a batch failed and is tried again" in copy.stderr()
    assert copy.stop() == 0
    assert re.findall(r"failing=(\d+)", copy.log())[-3:] == ["0"] * 3, "puts of a batch given up count as failing"


def test_a_batch_that_is_given_up_calls_its_other_puts_off(service, copies):
    """Those in the air may be repeated; those that had not begun must not, for they are tried again."""
    once_handed_out = functools.partial(failing_at_times, PutLoop.submit.__qualname__, "all")
    with service.add_fault("PutLogs", hold=True) as fault:
        copy = copies.start(patch=once_handed_out, constants={"MAX_BACKOFF": 5.0}, SLS_WRITERS="1")
        with pulled_at_once(service):
            feed_separately(service, 40, shard=0)
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a put in the air")
        service.wait_for(lambda: "a batch failed and is tried again" in copy.stderr(), LIMIT, "a batch given up")
    wait_until_delivered(service)
    # One in the air each time that the batch was given up: on a slow machine that may be more than once by then.
    assert_nothing_lost(service, most_repeated=5 * fault.hits)


def no_threads_while_it_exists(program, switch):
    import os
    import threading

    start = threading.Thread.start

    def start_if_there_may_be_more(self):
        if os.path.exists(switch):
            raise RuntimeError("can't start new thread")
        start(self)

    threading.Thread.start = start_if_there_may_be_more


def test_puts_go_on_where_no_thread_can_be_started(service, copies, tmp_path):
    """None of the writers', and none for further shards: with the threads that there are, then all goes on."""
    switch = tmp_path / "no threads"
    copy = copies.start(patch=functools.partial(no_threads_while_it_exists, str(switch)))
    service.wait_for(lambda: is_begun(service, 4), LIMIT, "a copy that has begun")
    switch.touch()
    for _ in range(3):
        feed_separately(service, 40)
        wait_until_delivered(service)
    switch.unlink()
    feed_separately(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "can't start new thread" in copy.stderr() and "Traceback" not in copy.stderr()
    assert copy.stop() == 0


# ---- the clock --------------------------------------------------------------------------------------------------


def clock_of_its_own(program, offset):
    """It is wrong by the seconds that stand in the file `offset`."""
    import time

    right_time = time.time

    def time_that_steps():
        try:
            with open(offset) as file:
                return right_time() + float(file.read() or 0)
        except FileNotFoundError:
            return right_time()

    time.time = time_that_steps


@pytest.mark.parametrize("seconds", ["-600", "600"])
def test_a_wall_clock_that_steps_stops_and_hurries_nothing(service, copies, tmp_path, seconds):
    """Ten minutes, within which the service believes the time of a call; the SDK's loops would stand still as long."""
    offset = tmp_path / "offset"
    clock = functools.partial(clock_of_its_own, str(offset))
    make_group(service, 8)
    started = [copies.start(patch=clock) for _ in range(2)]
    flow = SteadyFeed(service)
    flow.wait_until_shared(*started)
    for text in (seconds, "0", seconds):
        offset.write_text(text)
        arrived = puts_arrived(service)
        flow.wait_for(lambda arrived=arrived: puts_arrived(service) >= arrived + 40, "logs delivered on")
        pass_calls(service, "HeartBeat", 4)
    third = copies.start(patch=clock)
    flow.wait_until_shared(*started, third)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert [copy.stop() for copy in (*started, third)] == [0, 0, 0]
    assert all("is lost" not in copy.stderr() for copy in started)


@pytest.mark.parametrize("seconds", ["-600", "600"])
def test_the_lag_is_told_by_the_clock_of_the_service(service, copies, tmp_path, seconds):
    """By a clock that is slow, what waits would not have arrived yet; by a fast one, all would be late."""
    offset = tmp_path / "offset"
    clock = functools.partial(clock_of_its_own, str(offset))
    offset.write_text(seconds)
    with service.add_fault("PutLogs", code="WriteQuotaExceed"):
        copy = copies.start(patch=clock, constants={"SUMMARY_INTERVAL": 0.5})
        wait_until_joined(service, copy)
        feed(service, 20)
        service.wait_for(lambda: re.search(r"lag_seconds=[1-9]", copy.log()), LIMIT, "a lag")
    wait_until_delivered(service)
    lags = [int(lag) for lag in re.findall(r"lag_seconds=(\d+)", copy.log())]
    assert max(lags) < 500


# ---- heartbeats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [dict(hold=True), dict(cut="before"), dict(cut="after")], ids=str)
def test_one_heartbeat_without_an_answer_is_no_lapse(service, copies, failure):
    """As on a connection that a NAT has forgotten: another try, on a connection of its own, comes in time."""
    flow = SteadyFeed(service)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="8" if "hold" in failure else "3")  # of which half is left for that try
    flow.wait_for(lambda: len(copy.held_shards(service)) == 4, "a copy with all shards")
    with service.add_fault("HeartBeat", share=0.01, **failure) as fault:
        flow.wait_for(lambda: fault.hits == 1, "a heartbeat without an answer")
        heartbeats = service.calls("HeartBeat")
        flow.wait_for(lambda: service.calls("HeartBeat") >= heartbeats + 3, "three more")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "is lost" not in copy.stderr()
    assert copy.stop() == 0


def two_addresses_for_heartbeats(program):
    import socket
    import threading

    real = socket.getaddrinfo

    def both(host, port, *rest, **named):
        is_for_heartbeat = threading.current_thread().name.startswith("sends heartbeats")
        first = real("127.0.0.2", port, *rest, **named) if is_for_heartbeat else []
        return first + real(host, port, *rest, **named)

    socket.getaddrinfo = both


def test_a_host_with_a_dead_address_costs_no_membership(service, copies):
    """Of two addresses, as load balancers have them, the first drops what it is sent: a heartbeat must leave time for
    the second. On Linux a listener drops connections beyond its backlog."""
    make_group(service, 10)
    port = urlsplit(service.environment()["http_proxy"]).port
    with contextlib.ExitStack() as sockets:
        dead = sockets.enter_context(socket.socket())
        dead.bind(("127.0.0.2", port))
        dead.listen(0)
        for _ in range(2):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(dead.getsockname())
        # Hardly any connection is used twice, so that most heartbeats open one.
        copy = copies.start(patch=two_addresses_for_heartbeats, constants={"CONNECT_TIMEOUT": 30, "MAX_AGE": 0.5})
        wait_until_begun(service)
        heartbeats = service.calls("HeartBeat")
        feed(service, 40)
        service.wait_for(lambda: service.calls("HeartBeat") > heartbeats + 8, LIMIT, "heartbeats")
        wait_until_delivered(service)
        assert_all_delivered_once(service)
        assert " is lost, another joins" not in copy.log()
        assert copy.stop() == 0


# ---- puts that are refused, and targets that are missing --------------------------------------------------------


def test_log_groups_refused_for_good_hold_up_their_shard_and_not_the_target(service, copies):
    """More of them than the target has writers, as after a long backlog, when logs are too old."""
    poisons = [make_log_group("click", Source="10.0.0.%d" % number) + b"\x28\x01" for number in range(20)]
    service.put(PROJECT, SOURCE, poisons, shard=0)
    copy = copies.start()
    service.wait_for(lambda: "PostBodyInvalid" in copy.stderr(), LIMIT, "a word about the refusal")
    puts = service.calls_by_logstore["PutLogs", PROJECT, "click"]
    service.wait_for(
        lambda: service.calls_by_logstore["PutLogs", PROJECT, "click"] >= puts + 20, LIMIT, "all of them refused again"
    )
    for shard in (1, 2, 3):
        others = feed(service, 20, topics=["click"], shard=shard)
        service.wait_for(
            lambda others=others: compare(others, arrived_in_targets(service)).lost == 0, LIMIT, "the others delivered"
        )
    assert group_shards(service)[0]["next"] in (None, 0)
    assert copy.stop() == 0


def test_a_target_that_is_missing_at_a_first_start_is_said_and_nothing_starts(service):
    """It may be a typo."""
    service.delete_logstore(PROJECT, "click")
    ended = run_program(settings_for(service, SLS_LOG_DIR=""))
    assert ended.returncode == 1
    assert "TO3 test-project/click" in ended.stderr and "LogStoreNotExist" in ended.stderr
    assert service.calls("HeartBeat") == 0


def test_a_target_that_is_missing_at_a_restart_holds_up_its_own_logs_alone(service, copies):
    first = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert first.stop() == 0
    gone = [entry.log_group for entry in service.delete_logstore(PROJECT, "click")]
    copy = copies.start(constants={"HOLD_SECONDS": 1.0, "LONGEST_BATCH": 60.0})
    service.wait_for(lambda: "ERROR TO3 test-project/click: " in copy.stderr(), LIMIT, "a word about the target")
    feed(service, 20, topics=["click"], shard=2)
    for shard in (0, 1):
        feed(service, 20, topics=["nginx", "sql_audit"], shard=shard)
    feed(service, 20, shard=3)  # for all targets, in one batch
    service.wait_for(
        lambda: logs_in(service, "nginx") == (20 + 20 + 10) * 5 and logs_in(service, "sql-audit") == (10 + 20 + 5) * 5,
        LIMIT,
        "the others' logs",
    )
    service.wait_for(
        lambda: [group_shards(service)[shard]["next"] for shard in range(4)] == [30, 30, 10, 10],
        LIMIT,
        "the checkpoints of shards that have nothing for the missing target",
    )
    (line,) = [line for line in copy.stderr().splitlines() if "its logs wait until that is mended" in line]
    assert "ERROR TO3 test-project/click: " in line and "LogStoreNotExist" in line and "TO1" not in line
    service.create_logstore(PROJECT, "click", 2)
    wait_until_delivered(service)
    outcome = verdict(service, delivered_before=gone)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 0, 0), str(outcome)
    assert copy.stop() == 0


# ---- cursors that move over nothing -----------------------------------------------------------------------------


def end_of(service, shard):
    return service.client().get_end_cursor(PROJECT, SOURCE, shard).get_cursor()


def failing_first(program):
    import threading

    deliver, tried = program.Delivery.deliver, set()

    def fail_first(*arguments):
        if threading.get_ident() not in tried and len(tried) < 4:
            tried.add(threading.get_ident())
            raise MemoryError
        return deliver(*arguments)

    program.Delivery.deliver = fail_first


@pytest.mark.parametrize("patch", [(), failing_first], ids=["", "batches tried again"])
def test_a_cursor_that_moved_over_nothing_is_checkpointed(service, copies, patch):
    """Else --max-lag would alarm for ever, and a readonly shard never be over."""
    feed(service, 40)
    copy = copies.start(patch=patch, constants={"MAX_BACKOFF": 0.1} if patch else {})
    wait_until_delivered(service)
    assert ("a batch failed and is tried again" in copy.stderr()) == bool(patch)
    for shard in (0, 1):
        service.leave_gap(PROJECT, SOURCE, shard, 50)
    service.split_shard(PROJECT, SOURCE, 1)
    service.wait_for(
        lambda: group_shards(service)[0]["checkpoint"] == end_of(service, 0), LIMIT, "a checkpoint beyond the gap"
    )
    service.wait_for(lambda: group_shards(service)[1]["state"] == "over", LIMIT, "the readonly shard over")
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert run_program(settings_for(service), "--status", "--max-lag", "60").returncode == 0
    assert copy.stop() == 0


def test_a_cursor_that_moved_over_nothing_waits_for_what_is_before_it(service, copies):
    """Killed while that is in flight, it would be lost."""
    copy = copies.start()
    service.wait_for(lambda: is_begun(service, 4), LIMIT, "a copy that has begun")
    with service.add_fault("PutLogs", hold=True) as fault:
        feed(service, 10, shard=0)
        service.leave_gap(PROJECT, SOURCE, 0, 600)
        end = end_of(service, 0)
        service.wait_for(lambda: fault.hits > 0, LIMIT, "puts in the air")
        pass_calls(service, "PullLogs", 20)
        assert group_shards(service)[0]["next"] == 0
        copy.process.kill()
        copy.process.wait()
    copies.start()
    wait_until_delivered(service)
    service.wait_for(lambda: group_shards(service)[0]["checkpoint"] == end, LIMIT, "a checkpoint beyond the gap")
    assert_nothing_lost(service, most_repeated=50)


# ---- outages ----------------------------------------------------------------------------------------------------


def test_an_outage_after_which_half_of_the_calls_fail_for_a_while_ends_no_copy(service, copies):
    """Pulls recover before checkpoints do, and the other way round, for longer than the group's timeout."""
    started = [copies.start() for _ in range(3)]
    flow = SteadyFeed(service)
    flow.wait_until_shared(*started)
    wait_until_delivered(service)
    with service.add_fault("*", status=503, code="ServerBusy"):
        feed(service, 40)
        wait_until_forgotten(service)
    with service.add_fault("*", status=503, code="ServerBusy", share=0.5) as fault:
        feed(service, 40)
        flow.wait_for(lambda: fault.hits >= 400, "calls that fail")
        heartbeats = service.calls("HeartBeat")
        flow.wait_for(lambda: service.calls("HeartBeat") >= heartbeats + 24, "heartbeats beyond the group's timeout")
    assert [copy.process.poll() for copy in started] == [None] * 3
    flow.wait_until_shared(*started)
    wait_until_delivered(service)
    lapses = sum(copy.stderr().count("is lost, another joins") for copy in started)
    assert_nothing_lost(service, most_repeated=lapses * 1000)
    assert all("Traceback" not in copy.stderr() for copy in started)
    assert [copy.stop() for copy in started] == [0, 0, 0]


# ---- batches that are given up ----------------------------------------------------------------------------------


def test_a_batch_that_is_given_up_with_its_shard_begins_no_further_put(service, copies):
    """Whoever takes the shard next delivers it: of the first copy's, only what was in the air may arrive."""
    constants = {"HOLD_SECONDS": 0.5}
    first = copies.start(constants=constants, SLS_WRITERS="2")
    service.wait_for(lambda: is_begun(service, 4), LIMIT, "a copy that has begun")
    with service.add_fault("PutLogs", hold=True) as fault:
        with pulled_at_once(service):
            feed_separately(service, 40, shard=3)
        service.wait_for(lambda: fault.hits >= 3, LIMIT, "a put for each target in the air")
        second = copies.start(SLS_WRITERS="2")
        service.wait_for(lambda: second.held_shards(service) == [2, 3], LIMIT, "two shards handed over")
    wait_until_delivered(service)
    assert [first.stop(), second.stop()] == [0, 0]
    assert_nothing_lost(service, most_repeated=3 * 2 * 5)


def refusing(program, refusals):
    write, refused = program.PutClient.put_log_raw, []

    def refuse_at_first(self, project, logstore, put, *arguments, **named):
        if logstore == "click" and len(put.log_groups) == 1 and put.log_count == 5 and len(refused) < refusals:
            refused.append(put)
            raise program.CallError("PostBodyInvalid", "refused", 400)
        return write(self, project, logstore, put, *arguments, **named)

    program.PutClient.put_log_raw = refuse_at_first


@pytest.mark.parametrize("refusals", [1, 2, 3])
def test_three_refusals_set_a_log_group_aside_and_fewer_do_not(service, copies, tmp_path, refusals):
    """What the service refuses once it may take the next time; three times, from a target that takes others, is why."""
    directory = tmp_path / "rejected"
    directory.mkdir()
    service.put(PROJECT, SOURCE, [make_log_group("click"), make_log_group("click", 1, Source="10.0.0.1")], shard=0)
    copy = copies.start(patch=functools.partial(refusing, refusals), SLS_REJECTED_DIR=str(directory))
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert (len(list(directory.iterdir())), logs_in(service, "click")) == ((1, 1) if refusals == 3 else (0, 6))


# ---- answers that nobody can read -------------------------------------------------------------------------------

UNREADABLE = {
    "not the lz4 that it says": ("PullLogs", dict(mangle=mangling.undecodable)),
    "a compression that nobody asked for": ("PullLogs", dict(mangle=mangling.unknown_compression)),
    "no next cursor": ("PullLogs", dict(mangle=mangling.without("x-log-cursor"))),
    "null for a list of shards": ("HeartBeat", dict(answer=ForeignAnswer(200, body=b"null", request_id=True))),
    "strings for shards": ("HeartBeat", dict(answer=ForeignAnswer(200, body=b'["0", "1"]', request_id=True))),
    "a number for a list": ("HeartBeat", dict(answer=ForeignAnswer(200, body=b"7", request_id=True))),
    "nothing at all": ("HeartBeat", dict(answer=ForeignAnswer(200, body=b"", request_id=True))),
}


def full_stderr(program):
    import os

    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


@pytest.mark.parametrize("patches", [[], [full_disk, full_stderr]], ids=["told", "stderr on a full disk"])
@pytest.mark.parametrize("action, effects", UNREADABLE.values(), ids=list(UNREADABLE))
def test_an_answer_that_nobody_can_read_is_one_line_and_a_growing_pause(service, copies, action, effects, patches):
    """Whatever reading it raises: no traceback, no end, and fewer calls than a loop without a pause would make."""
    if patches and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    copy = copies.start(patch=patches)
    feed(service, 40)
    wait_until_delivered(service)
    heartbeats = service.calls("HeartBeat")
    with service.add_fault(action, **effects) as fault:
        feed(service, 40)
        if action == "HeartBeat":
            wait_until_forgotten(service)
        else:
            service.wait_for(lambda: service.calls("HeartBeat") >= heartbeats + 5, LIMIT, "heartbeats")
        service.wait_for(lambda: fault.hits >= 2, LIMIT, "another try")
        # A second of pauses that double, for each shard and consumer, is five calls; without them it is hundreds.
        assert 2 <= fault.hits < 100
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    if not patches:
        assert "Traceback" not in copy.stderr()
        told = [line for line in copy.stderr().splitlines() if "tried again: " in line]
        assert 1 <= len(told) <= 3, told


# ---- copies that lapse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_in_flight", [False, True], ids=["idle", "in mid-batch"])
def test_a_lapse_while_nobody_else_was_there_repeats_nothing(service, copies, is_in_flight):
    """What was delivered by then and not saved is saved by the copy's next consumer, which nobody has overtaken."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("UpdateCheckPoint", hold=True) as fault:
        if is_in_flight:
            feed(service, 40)
            service.wait_for(lambda: fault.hits >= 4, LIMIT, "batches delivered whose checkpoints are not saved")
        copy.send(signal.SIGSTOP)
        wait_until_forgotten(service)
        checkpoints = [shard["next"] for shard in group_shards(service).values()]
    copy.send(signal.SIGCONT)
    service.wait_for(lambda: "is lost, another joins" in copy.stderr(), LIMIT, "a lapse")
    feed(service, 40)
    wait_until_delivered(service)
    assert checkpoints == [10] * 4
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_what_was_delivered_before_a_lapse_is_not_saved_over_what_another_copy_has_saved(service, copies):
    """The other one has repeated it, and gone on."""
    make_group(service, 5)
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("UpdateCheckPoint", hold=True) as fault:
        feed(service, 40)
        service.wait_for(lambda: fault.hits >= 4, LIMIT, "batches delivered whose checkpoints are not saved")
        copy.send(signal.SIGSTOP)
        wait_until_forgotten(service)
    other = copies.start()
    service.wait_for(lambda: len(other.held_shards(service)) == 4, LIMIT, "all shards taken over")
    feed(service, 40)
    wait_until_delivered(service)
    copy.send(signal.SIGCONT)
    flow = SteadyFeed(service)
    flow.wait_until_shared(copy, other)
    assert other.stop() == 0
    flow.wait_for(lambda: len(copy.held_shards(service)) == 4, "all shards given back")
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=40 * 5)


def slow_to_begin(program, switch):
    """The end of shard 3 is not known while the switch exists, and shard 0 is not begun at all."""
    import os
    import time

    get_cursor, find = program.LogstoreApi.get_cursor, program.ShardCheckpoint.find

    def take_time(self, shard, start):
        found = get_cursor(self, shard, start)
        while start == "end" and shard == 3 and os.path.exists(switch):
            time.sleep(0.01)
        return found

    def begin_but_for_one(self):
        if self.shard == 0:
            raise program.CallError("ServerBusy", "not yet", 503)
        find(self)

    program.LogstoreApi.get_cursor, program.ShardCheckpoint.find = take_time, begin_but_for_one


def test_the_first_start_at_the_end_is_not_decided_later_than_its_shards(service, copies, tmp_path):
    """What arrives while the ends are being asked for belongs to the group, also for the shard that is begun last."""
    switch = tmp_path / "asking"
    switch.touch()
    feed(service, 40)
    wait_until_older(service, service.ledger(PROJECT, SOURCE))
    asked = service.calls("GetCursor")
    first = copies.start(patch=functools.partial(slow_to_begin, str(switch)), SLS_CURSOR_START="end")
    service.wait_for(lambda: service.calls("GetCursor") >= asked + 4, LIMIT, "all ends asked for")
    since = feed(service, 10, shard=0)
    wait_until_older(service, service.ledger(PROJECT, SOURCE)[40:])
    switch.unlink()
    service.wait_for(lambda: is_begun(service, 3), LIMIT, "three shards begun")
    first.process.kill()
    first.process.wait()
    copies.start(SLS_CURSOR_START="end")
    wait_until_delivered(service)
    assert_delivered_once(since, arrived_in_targets(service))


# ---- many shards that begin -------------------------------------------------------------------------------------


def counting_readings(program, readings):
    """Without those for shards that were idle for a while, see the next test."""
    import threading

    checkpoints, entries_since = program.LogstoreApi.get_checkpoints, program.GroupMember.entries_since
    of_thread = threading.local()

    def noting_looks(self, moment, is_look=False):
        of_thread.is_look = is_look
        try:
            return entries_since(self, moment, is_look)
        finally:
            of_thread.is_look = False

    program.GroupMember.entries_since = noting_looks

    def counted(self, group, shard=-1):
        if shard == -1 and not getattr(of_thread, "is_look", False):
            with open(readings, "a") as file:
                file.write(".")
        return checkpoints(self, group, shard)

    program.LogstoreApi.get_checkpoints = counted


@pytest.mark.parametrize("start", ["begin", "end"])
def test_shards_that_begin_together_read_the_checkpoints_of_all_together(service, copies, tmp_path, start):
    """Not each for itself, which is quadratic."""
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, 48)
    readings = tmp_path / "readings"
    patch = functools.partial(counting_readings, str(readings))
    for _ in range(2):
        copy = copies.start(patch=patch, SLS_CURSOR_START=start)
        wait_until_joined(service, copy)
        feed(service, 96)
        service.wait_for(lambda: is_begun(service, 48), LIMIT, "all shards begun")
        if start == "begin":
            wait_until_delivered(service)
        assert copy.stop() == 0
        wait_until_forgotten(service)
    # The start's own looks, those of the shards, and of those again that made their first checkpoint meanwhile.
    assert len(readings.read_text()) <= 48
    if start == "begin":
        assert_all_delivered_once(service)


def test_idle_shards_look_at_their_checkpoints_together(service, copies):
    """A small call for each of them, each heartbeat interval, is what the service's limit of such calls counts."""
    service.delete_logstore(PROJECT, SOURCE)
    service.create_logstore(PROJECT, SOURCE, 48)
    make_group(service, 10)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="1")
    wait_until_joined(service, copy)
    service.wait_for(lambda: is_begun(service, 48), LIMIT, "all shards begun")
    before = service.calls()
    service.wait_for(lambda: service.calls("HeartBeat") >= before["HeartBeat"] + 5, LIMIT, "five heartbeats")
    looks, heartbeats = (service.calls(name) - before[name] for name in ("GetCheckPoint", "HeartBeat"))
    assert 1 <= looks <= 4 * heartbeats
    assert copy.stop() == 0
