"""What lapses on the way and must cost nothing: the group's terms, the clock, cursors, heartbeats, batches.

A consumer that may no longer be who the service thinks it is ends, and another joins; a batch that may not be whole is
given up, and fetched again. Each test runs real copies against the local service.
"""

import time

import pytest
from copies import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    SteadyFeed,
    feed,
    group_shards,
    wait_until_delivered,
    wait_until_joined,
)
from ledgers import arrived_in_targets, assert_all_delivered_once, assert_delivered_once
from local_log_service.verdict import compare


def made_group(service, timeout, in_order=False):
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, timeout, in_order)


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
    made_group(service, 300, in_order=True)
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
    made_group(service, 20)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="10")
    wait_until_joined(service, copy)
    feed(service, 20)
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert "consumer group" not in copy.stderr()


def test_in_order_the_children_of_a_split_wait_for_their_parent(service, copies):
    made_group(service, 300, in_order=True)
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


@pytest.mark.parametrize("intervals", [("20", "1"), ("1", "20")], ids=["20 s first", "1 s first"])
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
    made_group(service, 4)
    flow = SteadyFeed(service)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    flow.wait_for(lambda: service.calls("HeartBeat") >= 4, "heartbeats")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "is lost" not in copy.stderr()
    assert "keeps its timeout of 4 s" in copy.stderr() and "heartbeats every 2 s" in copy.stderr()
    assert copy.stop() == 0


def test_a_timeout_that_is_changed_under_running_copies_is_heeded_by_the_next_consumer(service, copies):
    """The service forgets both, whose heartbeats are too far apart by then; each joins again, by the new timeout."""
    flow = SteadyFeed(service)
    started = [copies.start(SLS_HEARTBEAT_INTERVAL="8") for _ in range(2)]
    flow.wait_until_shared(*started)
    wait_until_delivered(service)
    service.client().update_consumer_group(PROJECT, SOURCE, GROUP, in_order=False, timeout=3)
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


@pytest.mark.parametrize("code", ["SLSInvalidCursor", "InvalidCursor", "InvalidCursorSomehow"])
def test_a_refusal_of_a_cursor_that_is_fine_skips_and_replays_nothing(service, copies, code):
    """The SDK would go on at the newest log; a cursor that had expired would be replaced by the oldest."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("PullLogs", status=400, code=code) as fault:
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
