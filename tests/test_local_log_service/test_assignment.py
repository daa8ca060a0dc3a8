"""The state machine that assigns shards to the consumers of a group, without HTTP and with a clock of its own."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from local_log_service.consumer_groups import (
    ALREADY_ALLOC,
    NOT_ALLOC,
    OVER,
    TRANSFER,
    WAIT,
    ConsumerGroup,
    ConsumerUnknown,
    ShardView,
)

pytestmark = pytest.mark.quick

TIMEOUT = 40.0
# One round to join anew, one to mark the surplus, one to let go of it, one to take it, one for who came first; and the
# three in between once more, for a shard that was on its way when something changed.
SETTLING_ROUNDS = 8


class Consumer:
    """Does what the SDK's consumer does: works on what it is told, and lists what it still works on."""

    def __init__(self, name):
        self.name = name
        self.held = set()  # what the service told it last
        self.listed = set()  # what it has not let go of yet
        self.lost = set()  # listed still, but lost by silence: others may hold it
        self.last_heartbeat = 0.0

    def heartbeat(self, group, shards, now):
        if now - self.last_heartbeat > TIMEOUT:
            self.lost |= self.listed
        self.last_heartbeat = now
        try:
            self.held = set(group.heartbeat(self.name, self.listed, shards, now))
        except ConsumerUnknown:  # it is told nothing until it has let go of everything
            assert self.name not in group.consumers and self.listed
            self.held = set()
            return
        self.listed |= self.held
        self.lost -= self.held

    def let_go(self, shard):
        self.listed.discard(shard)
        self.lost.discard(shard)

    def let_go_of_all_that_is_not_held(self):
        for shard in self.listed - self.held:
            self.let_go(shard)

    def working_on(self, now):
        """The shards it may rightfully work on."""
        return self.listed - self.lost if now - self.last_heartbeat <= TIMEOUT else set()


class Assignment(RuleBasedStateMachine):
    """Consumers come, go, freeze and come back while shards are split and finished."""

    @initialize(shard_count=st.integers(1, 7), in_order=st.booleans())
    def begin(self, shard_count, in_order):
        self.now = 1000.0
        self.group = ConsumerGroup("group", TIMEOUT, in_order)
        self.shards = {shard: ShardView() for shard in range(shard_count)}
        self.readonly = set()
        self.consumers = []
        self.joined = 0

    @precondition(lambda self: len(self.consumers) < 6)
    @rule()
    def join(self):
        self.joined += 1  # a name is never used again
        consumer = Consumer("consumer-{}".format(self.joined))
        self.consumers.append(consumer)
        consumer.heartbeat(self.group, self.shards, self.now)

    @precondition(lambda self: self.consumers)
    @rule(data=st.data())
    def heartbeat(self, data):
        data.draw(st.sampled_from(self.consumers)).heartbeat(self.group, self.shards, self.now)

    @precondition(lambda self: any(consumer.listed - consumer.held for consumer in self.consumers))
    @rule(data=st.data())
    def let_go(self, data):
        consumer = data.draw(
            st.sampled_from([consumer for consumer in self.consumers if consumer.listed - consumer.held])
        )
        consumer.let_go(data.draw(st.sampled_from(sorted(consumer.listed - consumer.held))))

    @precondition(lambda self: self.consumers)
    @rule(data=st.data())
    def die(self, data):
        self.consumers.remove(data.draw(st.sampled_from(self.consumers)))

    @rule(seconds=st.sampled_from([1.0, 15.0, 30.0, TIMEOUT + 1]))
    def time_passes(self, seconds):
        self.now += seconds

    @precondition(lambda self: len(self.shards) < 12)
    @rule(data=st.data())
    def split(self, data):
        parent = data.draw(st.sampled_from(sorted(set(self.shards) - self.readonly)))
        self.readonly.add(parent)
        for _ in range(2):
            self.shards[len(self.shards)] = ShardView(parents=(parent,))

    @precondition(lambda self: self.readonly)
    @rule(data=st.data())
    def finish(self, data):
        shard = data.draw(st.sampled_from(sorted(self.readonly)))
        self.shards[shard] = self.shards[shard]._replace(finished=True)
        for consumer in self.consumers:  # whoever consumed it to its end has let go of it
            if shard in consumer.listed - consumer.lost:
                consumer.let_go(shard)

    @precondition(lambda self: self.consumers)
    @rule()
    def settle(self):
        self.now += TIMEOUT + 1  # the dead are gone
        for _ in range(SETTLING_ROUNDS):
            self.everybody_heartbeats()
        held = self.held_shards()
        open_shards = {shard for shard, view in self.shards.items() if not view.finished}
        if self.group.in_order:
            open_shards = {
                shard for shard in open_shards if all(self.shards[p].finished for p in self.ancestors(shard))
            }
        assert sorted(shard for shards in held.values() for shard in shards) == sorted(open_shards)
        counts = [len(shards) for shards in held.values()]
        assert max(counts) - min(counts) <= 1
        for _ in range(2):  # and then nothing moves any more
            self.everybody_heartbeats()
            assert self.held_shards() == held

    def everybody_heartbeats(self):
        for consumer in self.consumers:
            consumer.heartbeat(self.group, self.shards, self.now)
            consumer.let_go_of_all_that_is_not_held()

    def held_shards(self):
        return {consumer.name: set(consumer.held) for consumer in self.consumers}

    def ancestors(self, shard):
        found = set()
        for parent in self.shards[shard].parents:
            found |= {parent} | self.ancestors(parent)
        return found

    @invariant()
    def nobody_works_on_the_shard_of_another(self):
        workers = [shard for consumer in self.consumers for shard in consumer.working_on(self.now)]
        assert len(workers) == len(set(workers))

    @invariant()
    def who_holds_a_shard_is_a_consumer_of_the_group(self):
        for assignment in self.group.assignments.values():
            if assignment.state in (ALREADY_ALLOC, TRANSFER):
                assert assignment.consumer in self.group.consumers
            else:
                assert assignment.state in (NOT_ALLOC, WAIT, OVER) and assignment.consumer == ""

    @invariant()
    def who_is_to_get_a_shard_is_a_consumer_of_the_group_and_not_its_holder(self):
        for assignment in self.group.assignments.values():
            assert (assignment.state == TRANSFER) <= bool(assignment.next_consumer)
            if assignment.next_consumer:
                assert assignment.state in (TRANSFER, NOT_ALLOC)
                assert assignment.next_consumer in set(self.group.consumers) - {assignment.consumer}


TestAssignment = Assignment.TestCase
TestAssignment.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def group_of(shard_count, *names, in_order=False):
    """A settled group with these consumers, joined one after the other."""
    group = ConsumerGroup("group", TIMEOUT, in_order)
    shards = {shard: ShardView() for shard in range(shard_count)}
    consumers = []
    for name in names:
        consumers.append(Consumer(name))
        settle(group, shards, consumers)
    return group, shards, consumers


def settle(group, shards, consumers, now=1000.0):
    for _ in range(SETTLING_ROUNDS):
        for consumer in consumers:
            consumer.heartbeat(group, shards, now)
            consumer.let_go_of_all_that_is_not_held()


def test_the_first_heartbeat_of_a_newcomer_starts_the_move():
    group, shards, (first,) = group_of(4, "first")
    newcomer = Consumer("newcomer")
    newcomer.heartbeat(group, shards, 1000.0)
    assert newcomer.held == set()
    assert [group.assignments[shard].state for shard in range(4)] == [ALREADY_ALLOC] * 2 + [TRANSFER] * 2

    first.heartbeat(group, shards, 1000.0)
    assert (first.held, first.listed) == ({0, 1}, {0, 1, 2, 3})
    newcomer.heartbeat(group, shards, 1000.0)
    assert newcomer.held == set()  # the first one has not let go yet

    first.let_go(3)
    first.heartbeat(group, shards, 1000.0)
    newcomer.heartbeat(group, shards, 1000.0)
    assert newcomer.held == {3}
    first.let_go(2)
    first.heartbeat(group, shards, 1000.0)
    newcomer.heartbeat(group, shards, 1000.0)
    assert newcomer.held == {2, 3}


def test_no_more_shards_move_than_a_newcomer_gets():
    group, shards, consumers = group_of(8, "a", "b", "c")
    before = {consumer.name: set(consumer.held) for consumer in consumers}
    settle(group, shards, consumers + [Consumer("d")])
    moved = [shard for consumer in consumers for shard in before[consumer.name] - consumer.held]
    assert len(moved) == 2
    assert all(consumer.held <= before[consumer.name] for consumer in consumers)


def test_a_consumer_more_than_there_are_shards_gets_none_and_disturbs_nobody():
    group, shards, consumers = group_of(2, "a", "b")
    before = [set(consumer.held) for consumer in consumers]
    surplus = Consumer("0-first-by-name")
    settle(group, shards, consumers + [surplus])
    assert surplus.held == set()
    assert [consumer.held for consumer in consumers] == before


def test_silence_up_to_the_timeout_is_forgiven_and_no_longer():
    group, shards, _ = group_of(2, "first")
    second = Consumer("second")
    second.heartbeat(group, shards, 1000.0 + TIMEOUT)
    assert (second.held, list(group.consumers)) == (set(), ["first", "second"])

    second.heartbeat(group, shards, 1000.1 + TIMEOUT)  # the first one has not been heard of since 1000.0
    assert (second.held, list(group.consumers)) == ({0, 1}, ["second"])


def test_a_shard_in_transfer_is_freed_when_its_holder_dies():
    group, shards, _ = group_of(2, "first")
    second = Consumer("second")
    second.heartbeat(group, shards, 1001.0)
    assert group.assignments[1].state == TRANSFER
    second.heartbeat(group, shards, 1000.5 + TIMEOUT)
    assert second.held == {0, 1}


def test_a_shard_in_transfer_goes_to_the_one_it_was_meant_for():
    group, shards, (first,) = group_of(2, "first")
    second, third = Consumer("second"), Consumer("third")
    second.heartbeat(group, shards, 1000.0)
    third.heartbeat(group, shards, 1000.0)
    assert (group.assignments[1].state, group.assignments[1].next_consumer) == (TRANSFER, "second")
    first.heartbeat(group, shards, 1000.0)
    first.let_go(1)
    first.heartbeat(group, shards, 1000.0)
    third.heartbeat(group, shards, 1000.0)  # it asks first, and does not get it
    assert (third.held, group.assignments[1].state) == (set(), NOT_ALLOC)
    second.heartbeat(group, shards, 1000.0)
    assert second.held == {1}


def test_a_shard_in_transfer_stays_with_its_holder_when_the_next_one_dies():
    group, shards, (first,) = group_of(4, "first")
    newcomer = Consumer("newcomer")
    newcomer.heartbeat(group, shards, 1000.0)
    first.heartbeat(group, shards, 1000.0)
    assert first.held == {0, 1}
    first.let_go(3)
    first.heartbeat(group, shards, 1000.0 + TIMEOUT)
    assert [group.assignments[shard].state for shard in (2, 3)] == [TRANSFER, NOT_ALLOC]
    group.refresh(shards, 1001.0 + TIMEOUT)  # the newcomer is removed
    assert [group.assignments[shard].state for shard in (2, 3)] == [ALREADY_ALLOC, NOT_ALLOC]
    assert group.assignments[2].consumer == "first"
    first.heartbeat(group, shards, 1001.0 + TIMEOUT)
    assert first.held == {0, 1, 2, 3}


def test_a_consumer_back_from_the_dead_is_not_given_what_others_hold_now():
    group, shards, (frozen,) = group_of(4, "frozen")
    heir = Consumer("heir")
    later = 1001.0 + TIMEOUT
    heir.heartbeat(group, shards, later)
    assert heir.held == {0, 1, 2, 3}
    frozen.heartbeat(group, shards, later)
    assert frozen.held == set()
    assert list(group.consumers) == ["heir"]  # it is no member until it has let go of what it had
    settle(group, shards, [frozen, heir], later)
    assert (heir.held, frozen.held) == ({0, 1}, {2, 3})


def test_a_finished_shard_is_over_and_held_by_nobody():
    group, shards, (only,) = group_of(2, "only")
    shards[0] = ShardView(finished=True)
    only.heartbeat(group, shards, 1000.0)
    assert only.held == {1}
    assert (group.assignments[0].state, group.assignments[0].consumer) == (OVER, "")


def test_a_finished_shard_whose_checkpoint_is_set_back_is_consumed_again():
    group, shards, (only,) = group_of(1, "only")
    shards[0] = ShardView(finished=True)
    settle(group, shards, [only])
    assert only.held == set()
    shards[0] = ShardView()
    settle(group, shards, [only])
    assert only.held == {0}


def test_in_order_grandchildren_wait_for_every_ancestor():
    group, shards, (only,) = group_of(1, "only", in_order=True)
    shards[1] = ShardView(parents=(0,))
    shards[2] = ShardView(parents=(1,))
    settle(group, shards, [only])
    assert [group.assignments[shard].state for shard in range(3)] == [ALREADY_ALLOC, WAIT, WAIT]
    shards[1] = ShardView(parents=(0,), finished=True)
    settle(group, shards, [only])
    assert [group.assignments[shard].state for shard in range(3)] == [ALREADY_ALLOC, OVER, WAIT]
    shards[0] = ShardView(finished=True)
    settle(group, shards, [only])
    assert [group.assignments[shard].state for shard in range(3)] == [OVER, OVER, ALREADY_ALLOC]


def test_shards_that_wait_do_not_count_for_the_balance():
    group, shards, (first,) = group_of(2, "first", in_order=True)
    for shard in (2, 3, 4, 5):
        shards[shard] = ShardView(parents=(0,))
    second = Consumer("second")
    settle(group, shards, [first, second])
    assert (first.held, second.held) == ({0}, {1})
