"""Stops and moves of shards while targets take some puts, or take them slowly: hardly anything is delivered twice."""

import contextlib
import random
import threading
import time

import pytest
from assertions import assert_all_delivered_once, logs_arrived, verdict
from disruptions import deleted_logstore
from harness import LIMIT, PROJECT, SteadyFeed, feed, feed_separately, wait_until_delivered, wait_until_shared


def start(copies, **options):
    """A copy that a machine with much else to do takes no lease from: what is in the air then is repeated, too."""
    return copies.start(SLS_HEARTBEAT_INTERVAL="4", **options)


class Tokens:
    """Accepts so many calls a second, without bursts."""

    def __init__(self, rate):
        self.pause, self.next = 1.0 / rate, {}
        self.lock = threading.Lock()

    def refuses(self, logstore):
        with self.lock:
            now = time.monotonic()
            if now < self.next.get(logstore, 0.0):
                return True
            self.next[logstore] = now + self.pause
            return False


@contextlib.contextmanager
def refusing(service, refuses):
    """Puts for which `refuses` says so, of the name of their logstore, are refused with 403."""
    fault = service.add_fault("PutLogs", status=403, code="ShardWriteQuotaExceed")
    strikes = fault.strikes
    fault.strikes = lambda action, project, logstore: (
        action == "PutLogs" and refuses(logstore) and strikes(action, project, logstore)
    )
    with fault:
        yield


def steady(service):
    return refusing(service, Tokens(40).refuses)


def at_random(service):
    chance = random.Random(1)
    return refusing(service, lambda _: chance.random() < 0.9)


def repeated_share(service):
    """Of the logs that the ledgers hold."""
    outcome = verdict(service)
    assert (outcome.lost, outcome.foreign) == (0, 0), str(outcome)
    return outcome.duplicated / outcome.sent


@pytest.mark.parametrize("taking", [steady, at_random])
@pytest.mark.parametrize("event", ["stop", "move"])
def test_where_a_target_takes_a_share_of_the_puts_hardly_any_is_repeated(service, copies, taking, event):
    copy = start(copies)
    feed_separately(service, 200)
    wait_until_delivered(service)
    with taking(service):
        feed_separately(service, 3000)
        before = logs_arrived(service)
        service.wait_for(lambda: logs_arrived(service) > before + 100, LIMIT, "some puts taken")
        other = start(copies)
        if event == "stop":
            assert copy.stop() == 0
        else:
            wait_until_shared(service, copy, other)
    wait_until_delivered(service)
    assert repeated_share(service) <= 0.01


@pytest.mark.parametrize("event", ["stop", "move"])
def test_where_puts_come_to_take_long_none_is_repeated(service, copies, event):
    copy = start(copies)
    with service.add_fault("PutLogs", delay=0.005):
        feed_separately(service, 200)
        wait_until_delivered(service)
        feed_separately(service, 4000)
        service.wait_for(lambda: logs_arrived(service) > 2000, LIMIT, "a copy at full speed")
        with service.add_fault("PutLogs", delay=1.0) as slow:
            service.wait_for(lambda: slow.hits > 10, LIMIT, "slow puts")
            other = start(copies)
            if event == "stop":
                assert copy.stop() == 0
            else:
                wait_until_shared(service, copy, other)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["stop", "move"])
def test_where_every_put_takes_long_none_is_repeated(service, copies, event):
    """Longer than half of the grace that a batch has, so that what begins after another put would be given up."""
    constants = {"GRACE": 7.5, "SHUTDOWN_TIMEOUT": 8.5, "SLOW_PUT_SECONDS": 2.0, "LONGEST_BATCH": 10.0}
    with service.add_fault("PutLogs", delay=4.0) as slow:
        copy = start(copies, constants=constants)
        feed_separately(service, 40)
        service.wait_for(lambda: logs_arrived(service) > 10, LIMIT, "some puts taken")
        service.wait_for(lambda: slow.hits > 8, LIMIT, "others in flight")
        other = start(copies, constants=constants)
        if event == "stop":
            assert copy.stop() == 0
        else:
            wait_until_shared(service, copy, other)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_while_a_target_is_missing_copies_come_and_go_and_hardly_any_is_repeated(service, copies):
    """Each begins with few LogGroups, and the one that knows of the target tries that first."""
    copy = start(copies, constants={"DOUBT_SECONDS": 0.5})
    flow = SteadyFeed(service)
    flow.wait_for(lambda: logs_arrived(service) > 1000, "a copy at work")
    wait_until_delivered(service)  # else what is in the air then is repeated, once
    gone = []
    with deleted_logstore(service, "click", gone):
        flow.wait_for(lambda: "LogStoreNotExist" in copy.stderr(), "puts to no logstore")
        puts = service.calls_by_logstore["PutLogs", PROJECT, "click"]
        flow.wait_for(lambda: service.calls_by_logstore["PutLogs", PROJECT, "click"] > puts + 8, "some more")
        feed(service, 1500)
        for _ in range(2):
            other = start(copies)
            flow.wait_until_shared(copy, other)
            assert other.stop() == 0
            flow.wait_for(lambda: len(copy.held_shards(service)) == 4, "its shards with the first")
    wait_until_delivered(service)
    outcome = verdict(service, delivered_before=gone)
    assert (outcome.lost, outcome.foreign) == (0, 0), str(outcome)
    assert outcome.duplicated <= 0.01 * outcome.sent, str(outcome)
