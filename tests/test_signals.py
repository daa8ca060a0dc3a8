"""What ends a copy, or freezes it: SIGTERM, SIGINT, SIGHUP, kill -9 and SIGSTOP, at the worst of moments.

A graceful stop ends with status 0 within the 10 s that supervisors give and repeats nothing. After kill -9 at most the
batch in flight on each shard is delivered again. Nothing is ever lost.
"""

import signal
import socket

import pytest
from assertions import assert_all_delivered_once, assert_nothing_lost, logs_in, logs_in_flight, puts_arrived, verdict
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    SteadyFeed,
    feed,
    make_group,
    pulled_at_once,
    wait_until_delivered,
    wait_until_forgotten,
)

import dispatch_data

GRACEFUL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
IN_TIME = 10.0  # seconds that supervisors give before they kill

# Where a batch can't end, a stop takes what the program gives it: less here, so that a slow machine is in time as well.
SHORT_STOP = {"GRACE": 4.0, "SHUTDOWN_TIMEOUT": 5.0}
ONE_PULL = {"ShardConsumer.TARGET_BATCH_SECONDS": 1000.0}  # is a batch, however long the one before has taken

each_graceful_signal = pytest.mark.parametrize("number", GRACEFUL, ids=lambda number: number.name)


def test_resumes_from_the_checkpoint_after_a_graceful_stop(service, copies):
    """Stopped under load, twice; what came while nobody ran is delivered by the next."""
    flow = SteadyFeed(service)
    for _ in range(2):
        copy = copies.start()
        before = puts_arrived(service)
        flow.wait_for(lambda before=before: puts_arrived(service) > before + 5, "a copy at work")
        assert copy.stop(signal.SIGTERM, IN_TIME) == 0
        feed(service, 40)
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.quick
def test_a_stop_may_take_less_than_supervisors_give():
    assert dispatch_data.GRACE < dispatch_data.SHUTDOWN_TIMEOUT
    assert dispatch_data.SHUTDOWN_TIMEOUT + dispatch_data.LAST_LINES_TIMEOUT < IN_TIME


@each_graceful_signal
def test_stop_waits_for_the_batch_in_flight(service, copies, number):
    """A put that is in the air when the signal comes is seen to its end and checkpointed, whatever comes after it."""
    make_group(service, 5)
    with service.add_fault("PutLogs", hold=True) as fault:
        feed(service, 40)
        copy = copies.start(constants={"GRACE": 60.0, "SHUTDOWN_TIMEOUT": 61.0}, SLS_HEARTBEAT_INTERVAL="1")
        service.wait_for(lambda: fault.hits >= 3, LIMIT, "puts in the air")
        copy.send(number)
        pulls = service.calls("PullLogs")
        for again in GRACEFUL:
            copy.send(again)
        # It lives on: an impatient second signal must not break the stop off. The SDK still pulls meanwhile.
        heartbeats = service.calls("HeartBeat")
        service.wait_for(
            lambda: service.calls("HeartBeat") > heartbeats + 1 or service.calls("PullLogs") > pulls + 8,
            LIMIT,
            "a copy that goes on",
        )
        assert copy.process.poll() is None
    assert copy.process.wait(IN_TIME) == 0
    assert logs_in_flight(service) == 0
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


FAILING_PUTS = [
    (signal.SIGTERM, dict(hold=True)),
    (signal.SIGINT, dict(status=403, code="WriteQuotaExceed")),
    (signal.SIGHUP, dict(cut="before")),
]


@pytest.mark.parametrize("number, failure", FAILING_PUTS, ids=lambda value: getattr(value, "name", None) or str(value))
def test_a_stop_while_every_put_fails_is_in_time(service, copies, number, failure):
    """No put can be waited for then: it was not taken, so the next copy delivers it, once."""
    with service.add_fault("PutLogs", **failure) as fault:
        feed(service, 40)
        copy = copies.start(constants=SHORT_STOP)
        service.wait_for(lambda: fault.hits > 0, LIMIT, "puts that fail")
        assert copy.stop(number, IN_TIME) == 0
        assert service.lag(PROJECT, SOURCE, GROUP) == 40
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_stop_while_one_target_takes_nothing_repeats_at_most_the_batch_in_flight(service, copies):
    """What the others have taken of that batch is delivered again, as the batch can't be checkpointed."""
    feed(service, 100)
    copy = copies.start(constants={"HOLD_SECONDS": 1.0, "LONGEST_BATCH": 60.0, **SHORT_STOP, **ONE_PULL})
    wait_until_delivered(service)
    with service.add_fault("PutLogs", logstore="click", code="WriteQuotaExceed"):
        with pulled_at_once(service):
            feed(service, 40)
        service.wait_for(lambda: logs_in(service, "nginx") == 70 * 5, LIMIT, "all that goes elsewhere")
        service.wait_for(lambda: logs_in(service, "sql-audit") == 35 * 5, LIMIT, "all that goes elsewhere")
        assert copy.stop(signal.SIGTERM, IN_TIME) == 0
        in_flight = logs_in_flight(service)
    assert 0 < in_flight <= 30 * 5
    copies.start()
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, in_flight, 0), str(outcome)


CALLS_OF_A_START = [
    "ListConsumerGroup",
    "CreateConsumerGroup",
    "GetCheckPoint",
    "ListShards",
    "HeartBeat",
    "GetCursor",
    "UpdateCheckPoint",
    "PullLogs",
]


def test_a_stop_during_any_call_of_the_start_is_in_time(service, copies):
    """Before it has joined, while it joins, and before its first batch: each call hangs once."""
    feed(service, 40)
    for action, number in zip(CALLS_OF_A_START, GRACEFUL * 3):
        with service.add_fault(action, hold=True) as fault:
            copy = copies.start()
            service.wait_for(lambda fault=fault: fault.hits > 0, LIMIT, "%s without an answer" % action)
            assert copy.stop(number, IN_TIME) == 0, (action, number)
    assert puts_arrived(service) == 0
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_stop_while_the_service_is_out_of_reach_is_in_time(service, copies):
    """At work and at start-up."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    service.stop()
    feed(service, 40)
    assert copy.stop(signal.SIGTERM, IN_TIME) == 0
    with socket.create_server(("127.0.0.1", service.port)) as nobody:
        late = copies.start()
        nobody.settimeout(LIMIT)
        nobody.accept()[0].close()
    assert late.stop(signal.SIGTERM, IN_TIME) == 0
    service.start()
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_sigint_stops_a_copy_whose_shell_had_it_ignored(service, copies):
    """Shells start `command &` in a script with SIGINT ignored."""
    copy = copies.start(ignored=[signal.SIGINT])
    feed(service, 20)
    wait_until_delivered(service)
    assert copy.stop(signal.SIGINT, IN_TIME) == 0
    assert_all_delivered_once(service)


def test_a_copy_started_with_nohup_outlives_its_terminal(service, copies):
    copy = copies.start(ignored=[signal.SIGHUP])
    feed(service, 20)
    wait_until_delivered(service)
    copy.send(signal.SIGHUP)
    feed(service, 20)
    wait_until_delivered(service)
    assert copy.process.poll() is None
    assert copy.stop(signal.SIGTERM, IN_TIME) == 0
    assert_all_delivered_once(service)


def test_kill_9_repeats_at_most_the_batch_in_flight(service, copies):
    """Each batch is checkpointed before the next begins, so a copy killed at any time repeats one batch a shard."""
    feed(service, 400)
    copy = copies.start(constants=ONE_PULL)
    wait_until_delivered(service)
    with service.add_fault("UpdateCheckPoint", cut="before"):
        with pulled_at_once(service):
            feed(service, 40, topics=("sql_audit",))
        service.wait_for(
            lambda: logs_in(service, "sql-audit") == 100 * 5 + 40 * 5,
            LIMIT,
            "a batch of each shard delivered, its checkpoint not saved",
        )
        feed(service, 40, topics=("click",))
        copy.stop(signal.SIGKILL)
        wait_until_forgotten(service)  # by then what it had still sent was refused as well
    assert logs_in_flight(service) == 40 * 5
    copies.start()
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 40 * 5, 0), str(outcome)


@pytest.mark.parametrize(
    "failure",
    [dict(hold=True), dict(hold=True, share=0.5), dict(status=403, code="WriteQuotaExceed"), dict(cut="after")],
    ids=str,
)
def test_kill_9_in_mid_batch_repeats_what_had_arrived_of_it(service, copies, failure):
    """All puts in the air, some of them, all refused, all taken but never acknowledged."""
    feed(service, 100)
    copy = copies.start()
    wait_until_delivered(service)
    with service.add_fault("PutLogs", **failure) as fault:
        with pulled_at_once(service):
            feed(service, 40)
        service.wait_for(lambda: fault.hits >= 3, LIMIT, "a batch in flight")
        copy.stop(signal.SIGKILL)
    wait_until_forgotten(service)
    before = verdict(service).duplicated
    in_flight = logs_in_flight(service)
    assert in_flight <= 40 * 5
    copies.start()
    wait_until_delivered(service)
    outcome = verdict(service)
    assert (outcome.lost, outcome.foreign) == (0, 0), str(outcome)
    assert outcome.duplicated == before + in_flight, str(outcome)


def test_kill_9_at_any_moment_of_a_run(service, copies):
    """Every copy is killed under load as soon as it is at work, again and again."""
    flow = SteadyFeed(service)
    most = 0
    for _ in range(3):
        copy = copies.start()
        before = puts_arrived(service)
        flow.wait_for(lambda before=before: puts_arrived(service) > before, "a copy at work")
        copy.stop(signal.SIGKILL)
        wait_until_forgotten(service)
        most += logs_in_flight(service)
    copies.start()
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=most)


@pytest.mark.parametrize("failure", [dict(hold=True), dict(status=403, code="WriteQuotaExceed")], ids=str)
def test_a_copy_frozen_past_the_timeout_in_mid_batch_goes_on_alone(service, copies, failure):
    """SIGSTOP until the group has forgotten it, then SIGCONT, and nobody else there: at most that batch twice."""
    copy = copies.start()
    feed(service, 100)
    wait_until_delivered(service)
    with service.add_fault("PutLogs", **failure) as fault:
        with pulled_at_once(service):
            feed(service, 40)
        service.wait_for(lambda: fault.hits >= 3, LIMIT, "a batch in flight")
        copy.send(signal.SIGSTOP)
        wait_until_forgotten(service)
    feed(service, 40)
    copy.send(signal.SIGCONT)
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=40 * 5)
    assert copy.stop(signal.SIGTERM, IN_TIME) == 0


def test_a_copy_frozen_for_less_than_the_timeout_repeats_nothing(service, copies):
    """Its shards stay its own: the service's clock, not the copy's, says when it has been silent for too long."""
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="30")
    flow = SteadyFeed(service)
    flow.wait_for(lambda: puts_arrived(service) > 5, "a copy at work")
    for _ in range(3):
        arrived = puts_arrived(service)
        with service.add_fault("PutLogs", hold=True) as fault:
            flow.wait_for(lambda fault=fault: fault.hits > 0, "a batch in flight")
            copy.send(signal.SIGSTOP)
        service.wait_for(lambda arrived=arrived: puts_arrived(service) > arrived, LIMIT, "the put taken")
        copy.send(signal.SIGCONT)
        flow.wait_for(lambda arrived=arrived: puts_arrived(service) > arrived + 5, "it goes on")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
