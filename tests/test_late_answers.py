"""Answers that come late, or never, while the service has done what it was asked: checkpoints, pulls, puts, heartbeats.

Each test runs real copies against the local service.
"""

import functools
import signal
import threading
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from assertions import assert_all_delivered_once, checkpoints_watched, verdict
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    Copies,
    SteadyFeed,
    feed,
    group_shards,
    make_group,
    wait_until_begun,
    wait_until_delivered,
    wait_until_forgotten,
)

from dispatch_data import Heartbeat, Lease

pytestmark = pytest.mark.slow


# ---- checkpoints ------------------------------------------------------------------------------------------------


def without_looks(program):
    """An idle shard doesn't look at its checkpoint by itself."""
    look = program.ShardCheckpoint.look

    def look_once(self, is_fresh=True):
        try:
            return look(self, is_fresh)
        finally:
            self.next_look = float("inf")

    program.ShardCheckpoint.look = look_once


def patient_with_puts(program):
    """These have 30 s, whatever RESPONSE_TIMEOUT is: one that a machine is slow to take would be repeated."""
    init = program.PutClient.__init__

    def init_with_patience(self, *arguments):
        init(self, *arguments)
        self.response_timeout = 30.0

    program.PutClient.__init__ = init_with_patience


@pytest.fixture
def copies_set_back(service, tmp_path):
    """As `copies`, where a checkpoint is set back on purpose."""
    with Copies(service, tmp_path) as started:
        yield started


@pytest.mark.parametrize("event", ["idle", "let go", "stop", "lapse"])
def test_a_checkpoint_that_is_applied_long_after_it_was_given_up_is_saved_over(service, copies_set_back, event):
    """Else it sets the shard back for as long as that is idle, and whoever takes it next begins there."""
    copies = copies_set_back
    if event == "let go":
        make_group(service, 8)
    patch = [patient_with_puts] if event == "idle" else [patient_with_puts, without_looks]
    copy = copies.start(patch=patch, constants={"RESPONSE_TIMEOUT": 1})
    feed(service, 40)
    wait_until_delivered(service)
    with checkpoints_watched() as set_back:
        while not set_back:  # on a machine that is busy it may be applied before the next one is saved
            with service.add_fault("UpdateCheckPoint", delay=4, share=0.01) as fault:
                feed(service, 40)
                service.wait_for(lambda: fault.hits == 1, LIMIT, "a checkpoint that the service takes its time for")
                end = time.monotonic() + 5
                wait_until_delivered(service)
                feed(service, 40)
                service.wait_for(lambda end=end: set_back or time.monotonic() > end, LIMIT, "that checkpoint applied")
    if event == "let go":
        second = copies.start()
        service.wait_for(lambda: len(second.held_shards(service)) == 2, LIMIT, "two shards let go")
        assert second.stop() == 0
    elif event == "lapse":
        with service.add_fault("HeartBeat", code="ConsumerNotExist", status=404) as fault:
            service.wait_for(lambda: "is lost, another joins" in copy.stderr(), LIMIT, "a lapse")
        wait_until_delivered(service)
    if event != "idle":
        assert copy.stop() == 0
        copy = copies.start()
    wait_until_delivered(service)
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "by hand" not in copies.started[0].stderr()
    assert copy.stop() == 0


def test_what_a_lost_consumer_has_delivered_is_not_skipped_where_somebody_sets_its_checkpoint_again(service, copies):
    """By hand, to the very cursor that it had saved last, after another copy had gone on."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    checkpoint = group_shards(service)[0]["checkpoint"]
    with service.add_fault("UpdateCheckPoint", hold=True) as fault:
        feed(service, 40)
        service.wait_for(lambda: fault.hits >= 4, LIMIT, "batches delivered whose checkpoints are not saved")
        copy.send(signal.SIGSTOP)
        wait_until_forgotten(service)
    other = copies.start()
    wait_until_delivered(service)
    assert other.stop() == 0
    wait_until_forgotten(service)
    service.set_checkpoint(PROJECT, SOURCE, GROUP, 0, checkpoint)
    copy.send(signal.SIGCONT)
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated) == (0, 40 * 5 + 10 * 5), str(outcome)
    assert copy.stop() == 0


# ---- answers that take longer than a call has -------------------------------------------------------------------


@pytest.mark.parametrize("action", ["PullLogs", "UpdateCheckPoint"])
def test_a_call_that_ran_out_of_time_gets_more_the_next_time(service, copies, action):
    """Else what is always answered late would fail for ever."""
    copy = copies.start(patch=patient_with_puts, constants={"RESPONSE_TIMEOUT": 0.5})
    wait_until_begun(service)
    with service.add_fault(action, project=PROJECT, logstore=SOURCE, delay=1.5):
        for _ in range(2):
            feed(service, 40)
            wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_a_target_that_always_answers_late_is_given_the_time(service, copies):
    """What was put before that is known is put once more, and nothing after that."""
    copy = copies.start(constants={"RESPONSE_TIMEOUT": 1.5})
    wait_until_begun(service)
    with service.add_fault("PutLogs", logstore="click", delay=3.5):  # so that the third try has 6 s
        feed(service, 2, topics=["click"], shard=0)
        wait_until_delivered(service)
        repeated = verdict(service).duplicated
        feed(service, 2, topics=["click"], shard=0)
        wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated) == (0, repeated) and repeated <= 2 * 2 * 5, str(outcome)
    assert copy.stop() == 0


# ---- heartbeats -------------------------------------------------------------------------------------------------

INTERVAL = 4  # seconds
NEARLY = 0.8 * INTERVAL  # which leaves 0.7 of an interval to a machine that stands still for a while


def slow_names(program, seconds):
    import socket
    import time

    resolve = socket.getaddrinfo

    def resolve_slowly(*arguments, **named):
        time.sleep(seconds)
        return resolve(*arguments, **named)

    socket.getaddrinfo = resolve_slowly


def seconds_between(*times):
    """Of two times as the log has them."""
    first, last = [datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f") for text in times]
    return (last - first).total_seconds()


def feed_for_heartbeats(service, count):
    before, flow = service.calls("HeartBeat"), SteadyFeed(service)
    flow.wait_for(lambda: service.calls("HeartBeat") >= before + count, "%d heartbeats" % count)


def test_heartbeats_that_are_answered_nearly_an_interval_late_keep_the_membership(service, copies):
    """The service has heard each, so it counts from when it was sent; and the next one doesn't wait."""
    with service.add_fault("HeartBeat", delay=NEARLY):
        copy = copies.start(SLS_HEARTBEAT_INTERVAL=str(INTERVAL))
        feed_for_heartbeats(service, 10)
        wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "is lost" not in copy.stderr()
    assert copy.stop() == 0


def test_names_that_take_an_interval_to_be_found_cost_no_membership(service, copies):
    """A connection is kept, the next one is opened before it is too old, and nobody is silent before it was heard."""
    interval = 3  # seconds
    patch = functools.partial(slow_names, interval)
    copy = copies.start(patch=patch, constants={"MAX_AGE": 4 * interval}, SLS_HEARTBEAT_INTERVAL=str(interval))
    feed_for_heartbeats(service, 10)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "is lost" not in copy.stderr()
    assert copy.stop() == 0


def test_a_consumer_that_is_forgotten_at_each_heartbeat_joins_ever_less_often(service, copies):
    """Something on the way, or a service in confusion: without a pause there were 8 a second, with 34 lines."""
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault("HeartBeat", code="ConsumerNotExist", status=404):
        service.wait_for(lambda: copy.stderr().count("is lost, another joins") >= 6, LIMIT, "lapses")
    feed(service, 40)
    wait_until_delivered(service)
    times = [line[:23] for line in copy.log().splitlines() if "is lost, another joins" in line]
    assert seconds_between(times[0], times[5]) > 1.5  # 0.05 and 0.1, and so on up to 0.8, at least
    assert_all_delivered_once(service)
    assert copy.stop() == 0


@pytest.fixture
def heartbeat():
    """One of a consumer without a group, whose answers are handed to it."""
    consumer = SimpleNamespace(
        lease=Lease(10.0), member=SimpleNamespace(last_heartbeat=None), shard_consumers={}, revoke=lambda _: None
    )
    it = Heartbeat.__new__(Heartbeat)
    it.consumer, it.lock, it.wake_up = consumer, threading.Lock(), threading.Event()
    it.owned, it.reported, it.let_go, it.answered, it.assigned_at = set(), set(), {}, 0.0, 0.0
    return it


@pytest.mark.quick
def test_of_answers_that_overtake_each_other_the_one_to_the_last_heartbeat_counts(heartbeat):
    now = Lease.now()
    heartbeat.take_in([0, 1], now - 2)
    heartbeat.take_in([0], now)
    heartbeat.take_in([0, 1, 2], now - 1)
    assert (heartbeat.owned, heartbeat.consumer.lease.expires) == ({0}, now + 10.0)


@pytest.mark.quick
def test_an_answer_gives_back_no_shard_that_was_let_go_of_since_its_heartbeat_was_sent(heartbeat):
    """The service may have given it to another since."""
    heartbeat.take_in([0, 1], Lease.now() - 11.0)
    assert heartbeat.owned == set(), "an answer that took longer than the group's timeout"
    heartbeat.take_in([0, 1], Lease.now())
    sent = Lease.now()
    heartbeat.take_in([0], sent)
    with heartbeat.lock:
        heartbeat.let_go_of({1})
    heartbeat.take_in([0, 1], sent)
    assert (heartbeat.owned, heartbeat.reported) == ({0}, {0})
    heartbeat.take_in([0, 1], Lease.now() + 0.001)
    assert heartbeat.owned == {0, 1}


@pytest.mark.quick
def test_an_answer_that_took_longer_than_the_timeout_renews_no_lease():
    lease = Lease(10.0)
    assert not lease.is_cancelled(), "before it holds anything"
    lease.renew(Lease.now() - 11.0)
    assert lease.expires == float("inf")
    lease.renew(Lease.now() - 9.0)
    end = time.monotonic() + LIMIT
    while not lease.is_cancelled():
        assert time.monotonic() < end
        time.sleep(0.01)
    lease.renew(Lease.now())
    assert lease.is_cancelled()


# ---- names ------------------------------------------------------------------------------------------------------


def one_slow_name(program, name):
    import socket
    import time

    resolve = socket.getaddrinfo

    def resolve_slowly(host, *arguments, **named):
        if host == name:
            time.sleep(1000)
        return resolve(host, *arguments, **named)

    socket.getaddrinfo = resolve_slowly


def test_a_start_does_not_wait_for_the_name_of_a_target(service, copies):
    """Copies that run don't either: the others' logs go on."""
    copy = copies.start(
        patch=functools.partial(one_slow_name, "test-project.slow.test"),
        constants={"START_PATIENCE": 5.0},
        SLS_ENDPOINT_TO3="slow.test",
        no_proxy="slow.test",
    )
    feed(service, 40, topics=["nginx", "sql_audit"])
    wait_until_delivered(service)
    (line,) = [line for line in copy.stderr().splitlines() if "not reachable now" in line]
    assert "TO3 test-project/click: not reachable now: nothing is known of it after 5 s" in line
    assert_all_delivered_once(service)
    assert copy.stop() == 0
