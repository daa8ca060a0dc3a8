"""Whatever fails for a while, at the targets, at the source or on the way to them, costs no log and repeats none.

Where an answer was lost after a put took effect, exactly that put is repeated. Each test but the quick one runs real
copies against the local service and compares the whole ledger, log by log.
"""

import functools
import random
import re
import time
import types
from collections import Counter

import pytest
from assertions import assert_all_delivered_once, assert_nothing_lost, logs_in, puts_arrived, verdict
from conftest import create_logstores, logstore_config
from disruptions import (
    changed_key,
    deleted_logstore,
    names_switched_by,
    outage,
    unknown_names,
    untrusted_certificate,
    wrong_clock,
)
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    TARGET_LOGSTORES,
    Copies,
    SteadyFeed,
    feed,
    make_group,
    make_log_group,
    pulled_at_once,
    wait_until_begun,
    wait_until_delivered,
    wait_until_forgotten,
    wait_until_joined,
    wait_until_shared,
)
from local_log_service import LocalLogService
from local_log_service.verdict import split_log_group

import dispatch_data

# ---- puts that fail ---------------------------------------------------------------------------------------------

REFUSALS = [
    dict(status=403, code="ShardWriteQuotaExceed"),
    dict(status=403, code="WriteQuotaExceed"),
    dict(status=404, code="LogStoreNotExist"),
    dict(status=401, code="Unauthorized"),
    dict(status=500, code="InternalServerError"),
    dict(status=503, code="ServerBusy"),
    dict(status=400, code="PostBodyInvalid"),
    dict(cut="before"),
]


def name_of(failure):
    return failure.get("code") or (failure.get("cut") and "cut " + failure["cut"]) or "hold"


@pytest.mark.parametrize("failure", REFUSALS, ids=name_of)
def test_puts_that_all_fail_are_tried_until_they_are_taken(service, copies, failure):
    """Nothing is checkpointed meanwhile, and nothing repeated after."""
    with service.add_fault("PutLogs", **failure) as fault:
        feed(service, 40)
        copy = copies.start()
        service.wait_for(lambda: fault.hits >= 6, LIMIT, "puts that fail")
        assert puts_arrived(service) == 0
        assert service.lag(PROJECT, SOURCE, GROUP) == 40
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    assert "a put failed and is tried again until it is taken" in copy.stderr()


def test_a_target_that_takes_nothing_is_asked_ever_more_seldom(service, copies):
    """Between six tries of one put lies at least the least of five growing pauses; equal ones would be over in a
    third of that."""
    copies.start()
    wait_until_begun(service)
    with service.add_fault("PutLogs", status=503, code="ServerBusy") as fault:
        began = time.monotonic()
        feed(service, 1, topics=["nginx"])
        service.wait_for(lambda: fault.hits >= 6, LIMIT, "puts that fail")
        assert time.monotonic() - began > 0.5 * (0.1 + 0.2 + 0.4 + 0.8 + 1.6)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_put_that_fails_when_its_batch_is_given_up_already_is_failing_no_more(service, copies):
    """Else it would be counted as failing for as long as the copy lives, and be cause for alarm."""
    make_group(service, 8)
    copy = copies.start(constants={"GRACE": 0.2})
    feed(service, 100)
    wait_until_delivered(service)  # so that each target has more writers than the first
    with service.add_fault("PutLogs", hold=True, status=500, code="InternalServerError") as fault:
        feed(service, 16)
        service.wait_for(lambda: fault.hits >= 12, LIMIT, "a put in the air of each shard for each target")
        other = copies.start()
        wait_until_shared(service, copy, other)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    assert "a put failed" in copy.stderr()
    assert re.findall(r"failing=(\d+)", copy.log())[-len(TARGET_LOGSTORES) :] == ["0"] * len(TARGET_LOGSTORES)


def test_a_target_that_takes_nothing_is_not_asked_for_each_put_there_is(service, copies):
    """Else one that is over its quota would get a batch's hundreds of puts, again and again."""
    log_groups = [make_log_group("nginx", Source="10.0.%d.%d" % divmod(number, 250)) for number in range(400)]
    copy = copies.start(constants={"ShardConsumer.TARGET_BATCH_SECONDS": 1000.0})  # a batch may be all of a pull
    service.put(PROJECT, SOURCE, log_groups, shard=0)
    wait_until_delivered(service)
    with service.add_fault("PutLogs", status=503, code="ServerBusy") as fault:
        with pulled_at_once(service):
            service.put(PROJECT, SOURCE, log_groups, shard=0)
        service.wait_for(lambda: fault.hits >= 10, LIMIT, "puts that fail")
        assert copy.stop() == 0
    assert fault.hits < len(log_groups) / 2


def no_key_for_puts_while_it_exists(program, switch):
    import os

    begin = program.PutClient.put_log_raw

    def begin_with_a_key(self, *arguments):
        try:
            tries = os.open(switch, os.O_WRONLY | os.O_APPEND)  # which does not make it anew
        except FileNotFoundError:
            return begin(self, *arguments)
        os.write(tries, b"x")
        os.close(tries)
        raise program.CallError("NoKey", "another is on its way")

    program.PutClient.put_log_raw = begin_with_a_key


def test_puts_that_fail_before_they_are_sent_end_what_waits_behind_them(service, copies, tmp_path):
    """What waits for a target is taken from it while that is next in turn."""
    switch = tmp_path / "no_key"
    log_groups = [make_log_group("nginx", Source="10.0.0.%d" % number) for number in range(100)]
    copy = copies.start(
        patch=functools.partial(no_key_for_puts_while_it_exists, str(switch)),
        constants={"ShardConsumer.TARGET_BATCH_SECONDS": 1000.0},  # a batch may be all of a pull
    )
    service.put(PROJECT, SOURCE, log_groups, shard=0)
    wait_until_delivered(service)
    switch.touch()
    with pulled_at_once(service):
        service.put(PROJECT, SOURCE, log_groups, shard=0)
    service.wait_for(lambda: switch.stat().st_size > 8, LIMIT, "puts that fail, and more after what waits was taken")
    switch.unlink()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    assert "Traceback" not in copy.log()


@pytest.mark.parametrize(
    "failure, logstore",
    [
        (dict(status=403, code="ShardWriteQuotaExceed"), None),
        (dict(status=403, code="ShardWriteQuotaExceed"), "click"),
        (dict(status=403, code="WriteQuotaExceed"), "nginx"),
        (dict(status=503, code="ServerBusy"), None),
        (dict(status=500, code="InternalServerError"), "sql-audit"),
        (dict(cut="before"), None),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else value or "all targets",
)
def test_a_share_of_failing_puts_costs_and_repeats_no_log(service, copies, failure, logstore):
    """30 % of the puts fail while logs flow in."""
    copies.start()
    flow = SteadyFeed(service)
    with service.add_fault("PutLogs", logstore=logstore, share=0.3, **failure) as fault:
        flow.wait_for(lambda: fault.hits >= (4 if logstore else 10), "puts that fail")
        wait_until_delivered(service)
    flow.go_on()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_put_whose_answer_is_cut_off_is_repeated_and_nothing_else_is(service, copies):
    """The service has taken it, the copy can't know: of every such put there are two, of every other one."""
    flow = SteadyFeed(service)
    copies.start()
    with service.add_fault("PutLogs", cut="after", share=0.3) as fault:
        flow.wait_for(lambda: fault.hits >= 5, "answers cut off")
        wait_until_delivered(service)
    bodies = Counter(entry.log_group for logstore in TARGET_LOGSTORES for entry in service.ledger(PROJECT, logstore))
    assert sum(count - 1 for count in bodies.values()) == fault.hits
    outcome = verdict(service)
    assert (outcome.lost, outcome.foreign) == (0, 0), str(outcome)
    more = [log_group for log_group, count in bodies.items() for _ in range(count - 1)]
    assert outcome.duplicated == sum(count_logs(log_group) for log_group in more), str(outcome)


def count_logs(log_group):
    return len(split_log_group(log_group)[0])


@pytest.mark.slow
def test_a_put_that_is_never_answered_is_tried_again(service, copies):
    """After RESPONSE_TIMEOUT. What the service held without an answer it has not taken, so nothing is repeated."""
    copies.start(constants={"RESPONSE_TIMEOUT": 4, "MAX_RESPONSE_TIMEOUT": 4, "LONGEST_BATCH": 60.0})
    feed(service, 40)
    wait_until_delivered(service)  # so that a target has more than one put in the air
    with service.add_fault("PutLogs", hold=True, share=0.5) as fault:
        feed(service, 40)
        wait_until_delivered(service)
        assert fault.hits >= 3
    assert_all_delivered_once(service)


@pytest.mark.parametrize("action, pause", [("PutLogs", 0.003), ("PullLogs", 0.0005), ("UpdateCheckPoint", 0.003)])
def test_an_answer_that_trickles_in_byte_by_byte_counts_once(service, copies, action, pause):
    with service.add_fault(action, trickle=pause, share=0.5) as fault:
        feed(service, 40)
        copies.start()
        service.wait_for(lambda: fault.hits >= 2, LIMIT, "answers that trickle in")
        wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_target_that_does_not_answer_holds_back_no_other(service, copies):
    with service.add_fault("PutLogs", logstore="click", hold=True) as fault:
        feed(service, 40)
        copies.start(constants={"HOLD_SECONDS": 1.0, "LONGEST_BATCH": 60.0})
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a put that hangs")
        service.wait_for(
            lambda: logs_in(service, "nginx") == 20 * 5 and logs_in(service, "sql-audit") == 10 * 5,
            LIMIT,
            "all that goes elsewhere",
        )
        assert 10 <= service.lag(PROJECT, SOURCE, GROUP) <= 40
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_as_many_puts_are_in_the_air_for_a_target_as_its_writers_and_no_more(service, copies):
    def log_groups(topic):
        return [make_log_group(topic, Source="10.0.0.%d" % number) for number in range(20)]

    copy = copies.start(constants={"RESPONSE_TIMEOUT": LIMIT}, SLS_WRITERS="2")  # else one may come again meanwhile
    service.put(PROJECT, SOURCE, log_groups("nginx"), shard=0)  # more puts at once come with those that were taken
    wait_until_delivered(service)
    with service.add_fault("PutLogs", logstore="nginx", hold=True) as fault:
        service.put(PROJECT, SOURCE, log_groups("nginx"), shard=0)
        service.wait_for(lambda: fault.hits >= 2, LIMIT, "two puts in the air")
        for _ in range(5):  # another target has its own
            service.put(PROJECT, SOURCE, log_groups("click"), shard=1)
            service.wait_for(lambda: service.lag(PROJECT, SOURCE, GROUP) == 20, LIMIT, "the other shard delivered")
        assert fault.hits == 2
        assert "a put failed" not in copy.log()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_what_failed_is_tried_again_while_another_put_of_its_batch_has_no_answer_yet(service, copies):
    with service.add_fault("PutLogs", logstore="click", hold=True) as unanswered:
        with service.add_fault("PutLogs", logstore="nginx", status=503, code="ServerBusy") as failing:
            service.put(PROJECT, SOURCE, [make_log_group("nginx"), make_log_group("click")], shard=0)
            copy = copies.start(constants={"HOLD_SECONDS": 0.5})
            service.wait_for(lambda: failing.hits and unanswered.hits, LIMIT, "one that fails, one without an answer")
        service.wait_for(lambda: puts_arrived(service) == 1, LIMIT, "what failed before")
        assert unanswered.hits == 1 and len(re.findall("a put failed", copy.log())) == 1
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_a_missing_target_holds_everything_back_until_it_is_there(service, copies):
    copy = copies.start()
    wait_until_joined(service, copy)
    service.delete_logstore(PROJECT, "click")
    feed(service, 40)
    service.wait_for(lambda: "LogStoreNotExist" in copy.stderr(), LIMIT, "a word about the missing logstore")
    service.create_logstore(PROJECT, "click")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_target_deleted_on_the_way_gets_what_it_had_not_taken_once_it_is_there_again(service, copies):
    copies.start()
    flow = SteadyFeed(service)
    flow.wait_for(lambda: logs_in(service, "click") > 0, "a copy at work")
    gone = []
    with deleted_logstore(service, "click", gone):
        puts = service.calls_by_logstore["PutLogs", PROJECT, "click"]
        flow.wait_for(lambda: service.calls_by_logstore["PutLogs", PROJECT, "click"] >= puts + 2, "puts to no logstore")
    wait_until_delivered(service)
    outcome = verdict(service, delivered_before=gone)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 0, 0), str(outcome)
    assert gone and service.ledger(PROJECT, "click")


# ---- the source failing -----------------------------------------------------------------------------------------

SOURCE_FAILURES = [
    ("PullLogs", dict(status=403, code="ReadQuotaExceed")),
    ("PullLogs", dict(status=503, code="ServerBusy")),
    ("PullLogs", dict(cut="before")),
    ("UpdateCheckPoint", dict(status=400, code="ParameterInvalid")),
    ("UpdateCheckPoint", dict(status=503, code="ServerBusy")),
    ("UpdateCheckPoint", dict(cut="before")),
    ("UpdateCheckPoint", dict(hold=True)),
]


@pytest.mark.parametrize(
    "action, failure",
    SOURCE_FAILURES,
    ids=["%s-%s" % (action, name_of(failure)) for action, failure in SOURCE_FAILURES],
)
def test_the_source_failing_under_load_costs_and_repeats_nothing(service, copies, action, failure):
    """For longer than the group's timeout; the copy's heartbeats go on, so its shards stay its own."""
    copy = copies.start()
    flow = SteadyFeed(service)
    flow.wait_for(lambda: puts_arrived(service) > 5, "a copy at work")
    with service.add_fault(action, **failure) as fault:
        flow.wait_for(lambda: fault.hits >= 2, "%s failing" % action)
        pass_heartbeats(flow, 3)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def pass_heartbeats(flow, count):
    before = flow.service.calls("HeartBeat")
    flow.wait_for(lambda: flow.service.calls("HeartBeat") >= before + count, "%d heartbeats" % count)


def test_a_checkpoint_whose_answer_is_lost_is_saved_all_the_same(service, copies):
    copies.start()
    flow = SteadyFeed(service)
    with service.add_fault("UpdateCheckPoint", cut="after", share=0.5) as fault:
        flow.wait_for(lambda: fault.hits >= 10, "answers cut off")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.parametrize(
    "failure", [dict(status=400, code="ParameterInvalid"), dict(status=503), dict(hold=True)], ids=str
)
def test_heartbeats_failing_for_longer_than_the_timeout_let_no_batch_begin(service, copies, failure):
    """The service gives the shards to others by then: a copy must wait until it knows that they are its own."""
    copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("HeartBeat", **failure):
        wait_until_forgotten(service)
        before = puts_arrived(service)
        feed(service, 40)
        calls = service.calls()
        service.wait_for(
            lambda: (
                service.calls("PullLogs") >= calls["PullLogs"] + 8
                or service.calls("HeartBeat") >= calls["HeartBeat"] + 3
            ),
            LIMIT,
            "new logs pulled, or the shards given up",
        )
        assert puts_arrived(service) == before
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def no_heartbeat_while_it_exists(program, late):
    import os
    import time

    send = program.Heartbeat.send

    def send_when_there_is_time(self):
        while os.path.exists(late):
            time.sleep(0.01)
        return send(self)

    program.Heartbeat.send = send_when_there_is_time


def test_no_batch_begins_while_the_heartbeat_is_overdue(service, copies, tmp_path):
    """Not even before a heartbeat fails: its thread may be the last to wake up in a copy that was frozen."""
    late = tmp_path / "late"
    copy = copies.start(patch=functools.partial(no_heartbeat_while_it_exists, str(late)))
    feed(service, 40)
    wait_until_delivered(service)
    late.touch()
    wait_until_forgotten(service)
    before = puts_arrived(service)
    feed(service, 40)
    service.wait_for(lambda: copy.log().count("INFO consumer ") >= 2, LIMIT, "a consumer lost to silence, and another")
    service.wait_for(lambda: "is lost, another joins" in copy.stderr(), LIMIT, "a word about it")
    assert copy.stderr().count("is lost, another joins") == 1  # that has no shards to lose
    assert puts_arrived(service) == before
    late.unlink()
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_batch_delivered_while_heartbeats_failed_is_not_repeated(service, copies):
    """Its checkpoint is refused, as the group has forgotten the copy; but nobody else has been there since."""
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    with service.add_fault("HeartBeat", status=503):
        with service.add_fault("PutLogs", hold=True) as fault:
            feed(service, 40)
            service.wait_for(lambda: fault.hits >= 3, LIMIT, "puts in the air")
            wait_until_forgotten(service)
        service.wait_for(lambda: "is lost, another joins" in copy.stderr(), LIMIT, "the consumer lost")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


# ---- the way to the service, the key, the clock -----------------------------------------------------------------


TROUBLES = {
    "the service is gone": outage,
    "the source's key is changed": lambda service: changed_key(service, "local-id", "another-secret"),
    "the source's key is deleted": lambda service: changed_key(service, "local-id", None),
    "the clock is slow": lambda service: wrong_clock(service, 1200),
    "the clock is fast": lambda service: wrong_clock(service, -1200),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=[name.replace(" ", "-") for name in TROUBLES])
def test_copies_outlast_a_source_out_of_reach(service, copies, trouble):
    """For longer than the group's timeout, with logs coming in: they go on by themselves, and nothing is repeated."""
    make_group(service, 5)
    started = [copies.start(), copies.start()]
    wait_until_joined(service, *started)
    feed(service, 40)
    wait_until_delivered(service)
    with trouble(service) as sign:
        feed(service, 40)
        wait_until_forgotten(service)
        service.wait_for(lambda: all(sign in copy.stderr() for copy in started), LIMIT, "a word about it")
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert [copy.stop() for copy in started] == [0, 0]


def test_a_service_gone_in_mid_batch_repeats_at_most_that_batch(service, copies):
    with service.add_fault("PutLogs", hold=True, share=0.5) as fault:
        feed(service, 40)
        copies.start()
        service.wait_for(lambda: fault.hits >= 3 and puts_arrived(service) >= 3, LIMIT, "puts in the air")
        service.stop()
    feed(service, 40)
    wait_until_forgotten(service)
    service.start()
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=40 * 5)


@pytest.mark.parametrize("secret", ["another-secret", None], ids=["changed", "deleted"])
def test_a_target_whose_key_is_refused_waits_for_the_right_one(service, copies, secret):
    service.access_keys["target-id"] = "target-secret"
    copy = copies.start(SLS_AK_ID_TO3="target-id", SLS_AK_KEY_TO3="target-secret")
    flow = SteadyFeed(service)
    flow.wait_for(lambda: logs_in(service, "click") > 0, "a copy at work")
    with changed_key(service, "target-id", secret) as code:
        flow.wait_for(lambda: code in copy.stderr(), "a word about the key")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert "target-secret" not in copy.stderr() + copy.log()


def test_copies_outlast_a_failing_name_resolution(service, copies, tmp_path):
    switch = tmp_path / "names are unknown"
    copy = copies.start(patch=names_switched_by(switch))
    feed(service, 40)
    wait_until_delivered(service)
    with unknown_names(service, switch) as sign:
        service.wait_for(lambda: sign in copy.stderr(), LIMIT, "a word about it")
        wait_until_forgotten(service)
        feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_copies_outlast_a_certificate_that_nobody_vouches_for(tmp_path):
    """And they deliver nothing to whoever presents it."""
    with LocalLogService(https=True) as service:
        create_logstores(service)
        with Copies(service, tmp_path) as copies:
            copy = copies.start()
            feed(service, 40)
            wait_until_delivered(service)
            with untrusted_certificate(service) as sign:
                service.wait_for(lambda: sign in copy.stderr(), LIMIT, "a word about it")
                feed(service, 40)
                calls = service.calls("*")
                wait_until_forgotten(service)
                assert service.calls("*") == calls
            wait_until_delivered(service)
            assert_all_delivered_once(service)
            assert copy.stop() == 0


def test_bytes_that_nobody_can_read_are_neither_skipped_nor_checkpointed(service, copies):
    feed(service, 40)
    copy = copies.start()
    wait_until_delivered(service)
    service.put(PROJECT, SOURCE, [b"\x0a\x7fcut short"], shard=0)
    service.wait_for(lambda: "shard 0: a pull of 13 bytes is no LogGroupList" in copy.stderr(), LIMIT, "a loud refusal")
    behind = feed(service, 10, shard=0)
    service.wait_for(
        lambda: service.calls("PullLogs") > 0 and copy.stderr().count("shard 0: a pull of") >= 2, LIMIT, "another try"
    )
    assert service.lag(PROJECT, SOURCE, GROUP) == 1 + len(behind)
    assert copy.stop() == 0
    service.expire(PROJECT, SOURCE, 0, 11)  # the only way past it: its retention time ends
    copies.start()
    wait_until_delivered(service)
    assert logs_in(service, "nginx") + logs_in(service, "sql-audit") + logs_in(service, "click") == 50 * 5


def test_a_source_that_cannot_be_reached_yet_is_tried_until_it_can(service, copies):
    with service.add_fault("*", cut="before") as fault:
        copy = copies.start()
        service.wait_for(lambda: fault.hits > 1, LIMIT, "tries")
        feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def every_other_batch_fails(program):
    deliver, tries = program.Delivery.deliver, []

    def fail_at_first(*arguments):
        tries.append(arguments)
        if len(tries) % 2:
            raise MemoryError
        return deliver(*arguments)

    program.Delivery.deliver = fail_at_first


def test_a_batch_that_fails_within_the_program_is_tried_again(service, copies):
    """Such as for want of memory: were it passed over, the next batch's checkpoint would lose it."""
    copies.start(patch=every_other_batch_fails, constants={"MAX_BACKOFF": 0.1})
    flow = SteadyFeed(service)
    flow.wait_for(lambda: puts_arrived(service) > 20, "batches delivered at the second try")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.quick
@pytest.mark.parametrize("share, least", [(0.05, 100), (0.1, 600), (0.5, 5000), (0.0, 0)])
def test_pauses_stay_short_as_long_as_a_target_takes_some_puts(monkeypatch, share, least):
    """One put at a time, each tried as soon as the target lets it, for ten minutes of a clock of the test's own."""
    now = 100.0
    clock = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: now})
    monkeypatch.setattr(dispatch_data, "time", clock)
    settings = dispatch_data.TargetSettings(1, logstore_config(), ())
    target = dispatch_data.Target(settings, types.SimpleNamespace(put_log_raw=print), 1, None)
    put = dispatch_data.PutRequest(b"")
    chance, refusal = random.Random(1), dispatch_data.CallError("ServerBusy", "", 503)
    monkeypatch.setattr(dispatch_data, "random", chance)
    accepted = refused = 0
    target.last_accepted = now
    while now < 700.0:
        put.began = now = max(now, target.retry_at)
        now += 0.005
        error = None if chance.random() < share else refusal
        target.on_result(put, error)
        target.adapt(put, error)
        accepted, refused = accepted + (not error), refused + bool(error)
    assert accepted >= least
    assert share or refused < 400, "one that takes nothing is asked for nothing but whether that is over"


def something_that_always_fails(program, switch, source):
    """A put from this Source is answered with 500 while the file `switch` is there."""
    import contextlib
    import os

    write = program.PutClient.put_log_raw

    def fail(self, project, logstore, put):
        if source in put.SerializeToString():
            with contextlib.suppress(FileNotFoundError):
                file = os.open(switch, os.O_WRONLY | os.O_APPEND)  # which must not make it anew
                os.write(file, b".")
                os.close(file)
                raise program.CallError("InternalServerError", "", 500)
        return write(self, project, logstore, put)

    program.PutClient.put_log_raw = fail


def test_one_put_that_always_fails_bars_no_others_of_its_target(service, copies, tmp_path):
    """Of other shards; at the start, too, when nobody knows yet whether the target takes anything."""
    switch = tmp_path / "switch"
    switch.touch()
    service.put(PROJECT, SOURCE, [make_log_group("click", Source="10.9.9.9")], shard=0)
    copies.start(
        patch=functools.partial(something_that_always_fails, str(switch), b"10.9.9.9"),
        constants={"DOUBT_SECONDS": 0.5, "MAX_BACKOFF": 0.5},
    )
    service.wait_for(lambda: switch.stat().st_size >= 5, LIMIT, "puts that fail")
    feed(service, 10, topics=("click",), shard=1)
    service.wait_for(lambda: service.ledger(PROJECT, "click"), LIMIT, "what another shard has for it")
    switch.unlink()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
