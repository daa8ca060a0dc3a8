"""Copies share the shards: they join, leave, die and freeze, and shards are split, merged, drained and expire.

A copy that joins or leaves gracefully and a shard that moves cost no log and repeat none. A copy that is killed or
frozen repeats at most the batch in flight on each of its shards. No copy ever sets a checkpoint back: the fixture
`copies` watches that in every test.
"""

import os
import random
import signal
import time

import pytest
from assertions import arrived_in_targets, assert_all_delivered_once, assert_nothing_lost, logs_in_flight, verdict
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
    pulled_at_once,
    wait_until_delivered,
    wait_until_forgotten,
    wait_until_shared,
)
from local_log_service.verdict import compare


def test_sharing_joining_and_leaving_loses_and_repeats_nothing(service, copies):
    make_group(service, 6)
    flow = SteadyFeed(service)
    first, second = copies.start(), copies.start()
    flow.wait_until_shared(first, second)
    third = copies.start()
    flow.wait_until_shared(first, second, third)
    assert second.stop() == 0
    flow.wait_until_shared(first, third)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def slow_to_see_shards(program):
    import os
    import time

    get_held_shards = program.Heartbeat.get_held_shards

    def wait_first(self):
        while not os.path.exists("go on"):
            time.sleep(0.01)
        return get_held_shards(self)

    program.Heartbeat.get_held_shards = wait_first
    program.Consumer.revoke = lambda *_: open("revoked", "w").close()


def test_a_shard_that_is_revoked_before_the_sdk_has_seen_it_moves_all_the_same(service, copies):
    """Else it would be told to the service as held for ever, and nobody get it."""
    make_group(service, 8)
    flow = SteadyFeed(service)
    first = copies.start()
    flow.wait_until_shared(first)
    slow = copies.start(patch=slow_to_see_shards)
    flow.wait_until_shared(first, slow)
    others = copies.start(), copies.start()
    flow.wait_for((slow.directory / "revoked").exists, "a shard that is to leave it")
    (slow.directory / "go on").touch()
    flow.wait_until_shared(first, slow, *others)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.slow
def test_a_minute_of_copies_joining_and_leaving_at_random(service, copies):
    """One to six copies on four shards under load, joining and leaving gracefully: nothing is lost or repeated.

    SEED=<number> in the environment repeats a schedule; when its processes get to work is the machine's affair.
    """
    seed = int(os.environ.get("SEED", "7"))
    print("SEED=%d" % seed)
    chance = random.Random(seed)
    make_group(service, 8)
    flow = SteadyFeed(service)
    running = [copies.start()]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pause = time.monotonic() + chance.uniform(0.2, 4)
        flow.wait_for(lambda pause=pause: time.monotonic() > pause, "the next event")
        if chance.random() < (6 - len(running)) / 5:
            running.append(copies.start())
        else:
            leaving = running.pop(chance.randrange(len(running)))
            flow.wait_for(lambda leaving=leaving: "consumer " in leaving.log(), "a copy that has joined")
            leaving.send(chance.choice([signal.SIGTERM, signal.SIGINT]))
    if not running:
        running.append(copies.start())
    wait_until_delivered(service)
    for copy in copies.started:
        assert copy in running or copy.process.wait(LIMIT) == 0, "SEED=%d: a copy ended badly" % seed
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 0, 0), "SEED=%d: %s" % (seed, outcome)


def test_more_copies_than_shards(service, copies):
    make_group(service, 8)
    flow = SteadyFeed(service)
    started = [copies.start() for _ in range(6)]

    def each_shard_has_one_copy():
        return sorted(len(copy.held_shards(service)) for copy in started) == [0, 0, 1, 1, 1, 1]

    flow.wait_for(each_shard_has_one_copy, "four copies with a shard, two that wait")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert [copy.stop() for copy in started] == [0] * 6


# ---- killed and frozen ------------------------------------------------------------------------------------------


def wait_until_handled(service):
    """By then the service has handled what has reached it before: its one thread takes turns with all connections."""
    for _ in range(3):
        service.client().list_shards(PROJECT, SOURCE)


@pytest.mark.parametrize("killed_count", [1, 3], ids=["one in three", "all three"])
def test_kill_9_loses_nothing_and_repeats_what_was_in_flight(service, copies, killed_count):
    make_group(service, 6)
    flow = SteadyFeed(service)
    started = [copies.start() for _ in range(3)]
    flow.wait_until_shared(*started)
    killed, left = started[:killed_count], started[killed_count:]
    for copy in killed:
        copy.send(signal.SIGKILL)
    for copy in killed:
        copy.process.wait()
    wait_until_handled(service)
    if not left:
        wait_until_forgotten(service)
    most = logs_in_flight(service)
    left += [copies.start() for _ in range(killed_count - 1)]
    flow.wait_until_shared(*left)
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=most)


def logs_behind(service):
    """Number of logs beyond the checkpoints: what may be in flight, and so be repeated, is among them."""
    return service.lag(PROJECT, SOURCE, GROUP) * 5


ZOMBIES = {
    "idle": None,
    "with puts in the air": dict(hold=True),
    "with puts refused": dict(status=403, code="WriteQuotaExceed"),
}


def freeze(service, copy, failure):
    """Stops a copy's clock, in mid-batch if puts are to fail; returns how many logs its batches have at most."""
    if failure is None:
        copy.send(signal.SIGSTOP)
        return 0
    with service.add_fault("PutLogs", **failure) as fault:
        with pulled_at_once(service):
            feed_separately(service, 160)
        service.wait_for(lambda: fault.hits >= 8, LIMIT, "a batch in flight")
        copy.send(signal.SIGSTOP)
        return logs_behind(service)


@pytest.mark.parametrize("failure", ZOMBIES.values(), ids=list(ZOMBIES))
def test_a_zombie_does_not_disturb_the_copy_that_took_over(service, copies, failure):
    """SIGSTOP until its shards are another's, which delivers from them, then SIGCONT: its checkpoints come too late."""
    if failure is None:
        make_group(service, 6)
    zombie = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    most = freeze(service, zombie, failure)
    feed(service, 40)
    other = copies.start()
    service.wait_for(lambda: len(other.held_shards(service)) == 4, LIMIT, "all shards taken over")
    wait_until_delivered(service)
    zombie.send(signal.SIGCONT)
    flow = SteadyFeed(service)
    flow.wait_until_shared(zombie, other)
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=most)


@pytest.mark.parametrize("failure", ZOMBIES.values(), ids=list(ZOMBIES))
def test_a_zombie_that_gets_its_shards_back_goes_on_where_the_other_copy_ended(service, copies, failure):
    """The other one has delivered much more and is gone by then: nothing of that may be repeated."""
    zombie = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    most = freeze(service, zombie, failure)
    other = copies.start()
    service.wait_for(lambda: len(other.held_shards(service)) == 4, LIMIT, "all shards taken over")
    for _ in range(5):
        feed(service, 40)
        wait_until_delivered(service)
    assert other.stop() == 0
    feed(service, 40)
    service.wait_for(lambda: not other.held_shards(service), LIMIT, "shards that nobody holds")
    zombie.send(signal.SIGCONT)
    service.wait_for(lambda: len(zombie.held_shards(service)) == 4, LIMIT, "all shards given back")
    wait_until_delivered(service)
    feed(service, 40)
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=most)


def test_a_copy_that_the_service_has_forgotten_joins_again(service, copies):
    """Its group was deleted and made again: the service no longer knows the consumer, nor the shards it lists."""
    make_group(service, 10)
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    client = service.client()
    checkpoints = {shard: state["checkpoint"] for shard, state in group_shards(service).items()}
    with service.add_fault("GetCheckPoint", hold=True):  # lest it begins a shard before that has its checkpoint again
        client.delete_consumer_group(PROJECT, SOURCE, GROUP)
        make_group(service, 10)
        for shard, checkpoint in checkpoints.items():
            client.update_check_point(PROJECT, SOURCE, GROUP, shard, checkpoint)
    service.wait_for(lambda: "is lost, another joins" in copy.stderr(), LIMIT, "a new beginning")
    assert "another joins: not heard of" not in copy.stderr(), "it has waited for longer than it needed to"
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def noting_revocations(program):
    revoke = program.Consumer.revoke

    def note(self, shard):
        open("revoked", "w").close()
        revoke(self, shard)

    program.Consumer.revoke = note


def test_a_shard_that_comes_back_before_it_was_let_go_is_served_on(service, copies):
    """The copy that it was to move to dies, while its batch is still in flight here."""
    first = copies.start(patch=noting_revocations, constants={"GRACE": 1000.0})
    with service.add_fault("PutLogs", hold=True) as fault:
        feed(service, 40)
        service.wait_for(lambda: fault.hits > 0, LIMIT, "puts that hang")
        second = copies.start()
        service.wait_for((first.directory / "revoked").exists, LIMIT, "a shard that is to move")
        second.process.kill()
        wait_until_shared(service, first)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    feed(service, 40)
    wait_until_delivered(service)
    assert first.stop() == 0


def test_a_shard_is_given_up_when_it_moves_and_its_batch_cannot_be_delivered(service, copies):
    """A copy whose target connection hangs must not keep shards that another copy could serve."""
    make_group(service, 8)
    with service.add_fault("PutLogs", hold=True) as fault:
        feed(service, 40)
        copies.start()
        service.wait_for(lambda: fault.hits > 0, LIMIT, "puts that hang")
        second = copies.start()
        service.wait_for(lambda: len(second.held_shards(service)) == 2, LIMIT, "two shards handed over")
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=2 * 10 * 5)


# ---- shards that come and go ------------------------------------------------------------------------------------


def test_splits_and_merges_under_load_lose_and_repeat_nothing(service, copies):
    """Parents are read to their end, children from their first log, and the copies share what there is."""
    make_group(service, 8)
    flow = SteadyFeed(service)
    sharing = [copies.start(), copies.start()]
    flow.wait_until_shared(*sharing)
    service.split_shard(PROJECT, SOURCE, 0)
    service.merge_shards(PROJECT, SOURCE, 1)
    flow.wait_for(lambda: {states(service)[shard] for shard in (0, 1, 2)} == {"over"}, "the parents read to their end")
    flow.wait_for(lambda: is_held(service, (3, 4, 5, 6)), "the children held")
    service.split_shard(PROJECT, SOURCE, 6)
    flow.wait_for(lambda: states(service)[6] == "over" and is_held(service, (3, 4, 5, 7, 8)), "another generation")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert [copy.stop() for copy in sharing] == [0, 0]


def states(service):
    return {shard: state["state"] for shard, state in group_shards(service).items()}


def is_held(service, shards):
    return all(states(service).get(shard) == "already_alloc" for shard in shards)


def test_a_readonly_shard_is_drained_to_its_end_and_then_over(service, copies):
    """One with logs and one that never had any; the copy lets go of both."""
    feed(service, 20, shard=0)
    for shard in (0, 1):
        service.split_shard(PROJECT, SOURCE, shard)
    copy = copies.start()
    service.wait_for(lambda: [states(service).get(shard) for shard in (0, 1)] == ["over"] * 2, LIMIT, "both drained")
    assert group_shards(service)[0]["next"] == 20
    feed(service, 40)
    wait_until_delivered(service)
    service.wait_for(lambda: copy.held_shards(service) == [2, 3, 4, 5, 6, 7], LIMIT, "the rest of the shards")
    assert_all_delivered_once(service)
    heartbeats = service.calls("HeartBeat")
    service.wait_for(lambda: service.calls("HeartBeat") >= heartbeats + 2, LIMIT, "the copy told of it")
    assert copy.stop() == 0
    assert " shards=2,3,4,5,6,7 " in copy.log().splitlines()[-1]


def test_a_readonly_shard_is_handed_over_and_drained_by_the_next_copy(service, copies):
    with service.add_fault("PutLogs", code="WriteQuotaExceed") as fault:
        feed(service, 40)
        first = copies.start()
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a batch in flight")
        service.split_shard(PROJECT, SOURCE, 0)
        assert first.stop() == 0
    copies.start()
    service.wait_for(lambda: states(service)[0] == "over", LIMIT, "the shard drained")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


# ---- logs that expire -------------------------------------------------------------------------------------------


def test_logs_that_expire_while_a_target_takes_nothing_are_skipped_loudly(service, copies):
    """The batch in memory is delivered all the same; reading goes on at the oldest log there is, not at the newest."""
    with service.add_fault("PutLogs", code="WriteQuotaExceed") as refusal:
        feed(service, 20, shard=0)  # which is one pull
        copy = copies.start()
        service.wait_for(lambda: refusal.hits >= 3, LIMIT, "a batch in flight")
        with service.add_fault("PullLogs", hold=True) as held:
            service.wait_for(lambda: held.hits >= 4, LIMIT, "the next pull of each shard")
            expired = feed(service, 60, shard=0)
            feed(service, 40, shard=0)
            service.expire(PROJECT, SOURCE, 0, 20 + 60)
    wait_until_delivered(service)
    assert compare(expired, arrived_in_targets(service)).lost == 60 * 5
    outcome = verdict(service)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (60 * 5, 0, 0), str(outcome)
    assert "shard 0" in copy.stderr() and "no longer knows" in copy.stderr()
