"""What a shard's consumer saves, of what, and when: each of its steps alone, with lists in the service's place."""

import base64
import contextlib
import types

import pytest

import dispatch_data
from dispatch_data import CallError, Cancelled, CancelToken, LogGroup, PullResult, ShardConsumer

pytestmark = pytest.mark.quick

LOG_GROUPS = [LogGroup("click", 1, b"log %d" % number, b"") for number in range(40)]  # those of the shard, in order
REFUSED = CallError("ConsumerNotMatch", "", 400)


def cursor(position):
    return base64.b64encode(b"%d" % position).decode()


class Source:
    """The shard and its checkpoint; `entries` is what LogstoreApi.checkpoints returns."""

    def __init__(self):
        self.entries, self.saved, self.failures, self.pulls, self.lost = {}, [], [], [], 0

    def set(self, checkpoint, by, update_time=1):
        self.entries[0] = {"checkpoint": checkpoint, "consumer": by, "updateTime": update_time}

    def checkpoints(self, *_):
        self.on_look()
        return self.entries

    def on_look(self):
        pass

    def save_checkpoint(self, _, consumer, __, checkpoint):
        if self.failures:
            raise self.failures.pop(0)
        self.saved.append(checkpoint)
        self.set(checkpoint, consumer, len(self.saved) + 1)

    def pull_logs(self, _, begin, count, *__):
        self.pulls.append((begin, count))
        position = dispatch_data.cursor_position(begin)
        found = LOG_GROUPS[position + self.lost : position + self.lost + min(count, 15)]
        return PullResult(found, 1, cursor(position + len(found)), 0)


class Retries:
    """In the place of a RetryLog: tries again at once, as often as twice."""

    def retry(self, _, call, token):
        for _ in range(3):
            token.check()
            with contextlib.suppress(CallError):
                return call()
        raise Cancelled


class World:
    def __init__(self):
        self.source, self.submitted, self.memory = Source(), [], []
        self.member = types.SimpleNamespace(
            source=self.source, soft_stop=CancelToken(), group="group", group_start=1, former={}, subject="source",
            settings=types.SimpleNamespace(fetch_interval=1.0, cursor_start="begin"), expired_tokens=list,
            pull_retries=Retries(), checkpoint_retries=Retries(), begin_retries=Retries(),
            checkpoints_since=lambda _: dict(self.source.entries), take_older_start=lambda _: None,
            first_cursor=lambda _: cursor(self.member.group_start),
            tasks=types.SimpleNamespace(submit=lambda task: self.submitted.append(task) or object()),
        )  # fmt: skip
        self.consumer = types.SimpleNamespace(
            member=self.member, lease=CancelToken(), unanswered={}, name_in_group="me", memory_share=lambda: 1e6,
            on_buffered=self.memory.append, take_memory=lambda *_: False,
            heartbeat=types.SimpleNamespace(assigned=0.0, interval=1.0, owned={0}),
        )  # fmt: skip

    def shard_consumer(self, delivered=0, batches=()):
        """One that has delivered and saved so much, and holds these batches."""
        made = ShardConsumer(self.consumer, 0)
        made.checkpoint = made.delivered = made.cursor = cursor(delivered)
        made.batches.extend(batches)
        self.source.set(made.checkpoint, "me")
        made.note_entry(self.source.entries[0])
        return made


@pytest.fixture
def world():
    return World()


def batch_of(begin, end, size=100):
    return PullResult(LOG_GROUPS[begin:end], size, cursor(end), 0)


# ---- where a batch was cut


def test_a_batch_that_is_done_with_is_saved_whole(world):
    batch = batch_of(0, 30)
    shard = world.shard_consumer(0, [batch])
    assert shard.cut_batch(batch, 30, 0, CancelToken()) is batch
    assert (list(shard.batches), world.source.pulls) == ([batch], [])


def test_of_a_batch_that_was_cut_the_first_part_is_saved_and_the_rest_comes_next(world):
    batch = batch_of(5, 30)
    shard = world.shard_consumer(5, [batch, batch_of(30, 40)])
    first = shard.cut_batch(batch, 20, 3, CancelToken())
    assert (first.log_groups, first.next_cursor) == (LOG_GROUPS[5:25], cursor(25))
    assert list(shard.batches) == [first, batch_of(25, 30), batch_of(30, 40)]
    assert first.size + shard.batches[1].size == batch.size
    assert world.source.pulls == [(cursor(5), 20), (cursor(20), 5)]


def test_where_nothing_is_done_with_a_few_are_made_a_batch_of_their_own_and_nothing_is_saved(world):
    batch = batch_of(5, 30)
    shard = world.shard_consumer(5, [batch])
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 0, 0, CancelToken())
    few = 5 + dispatch_data.FEW_LOG_GROUPS
    assert [one.log_groups for one in shard.batches] == [LOG_GROUPS[5:few], LOG_GROUPS[few:30]]
    assert [one.next_cursor for one in shard.batches] == [cursor(few), cursor(30)]


def test_where_nobody_can_tell_where_the_first_part_ends_the_rest_stands_for_both(world):
    world.source.lost = 1  # others are there now
    batch = batch_of(5, 30)
    shard = world.shard_consumer(5, [batch])
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 20, 0, CancelToken())
    assert list(shard.batches) == [batch_of(25, 30)]
    with pytest.raises(Cancelled):
        shard.cut_batch(shard.batches[0], 0, 0, CancelToken())
    assert list(shard.batches) == [batch_of(25, 30)], "nothing of it is done with"


def test_at_a_stop_nothing_is_asked_for_what_is_not_done_with(world):
    batch = batch_of(0, 30)
    shard = world.shard_consumer(0, [batch])
    world.member.soft_stop.cancel()
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 0, 0, CancelToken())
    assert (list(shard.batches), world.source.pulls) == ([batch], [])


def test_of_a_shard_that_was_let_go_of_meanwhile_nothing_is_kept_or_saved(world):
    batch = batch_of(0, 30)
    shard = world.shard_consumer(0)
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 20, 0, CancelToken())
    assert not shard.batches


# ---- delivering, then saving


def test_a_batch_is_delivered_saved_and_forgotten(world):
    batch, calls = batch_of(0, 30), []
    shard = world.shard_consumer(0, [batch])
    shard.is_busy = True
    world.member.delivery = types.SimpleNamespace(deliver=lambda *_: calls.append(list(world.source.saved)) or (30, 0))
    shard.deliver()
    assert calls == [[]]
    assert (world.source.saved, list(shard.batches), world.memory) == ([cursor(30)], [], [-100])
    assert (shard.unsaved, shard.is_busy, shard.delivered, shard.checkpoint) == (None, False, cursor(30), cursor(30))


def test_a_batch_that_was_delivered_and_could_not_be_saved_is_saved_and_not_delivered_again(world):
    batch, calls = batch_of(0, 30), []
    shard = world.shard_consumer(0, [batch])
    world.member.delivery = types.SimpleNamespace(deliver=lambda *_: calls.append(1) or (30, 0))
    world.source.failures = [CallError("ServerBusy", "", 503)] * 3
    shard.deliver()
    assert (calls, world.source.saved, list(shard.batches)) == ([1], [], [batch])
    assert shard.delivered == cursor(30) != shard.checkpoint
    shard.deliver()
    assert (calls, world.source.saved, list(shard.batches)) == ([1], [cursor(30)], [])


# ---- saving


def test_the_service_is_looked_at_before_each_save(world):
    shard, looks = world.shard_consumer(10), []
    world.source.on_look = lambda: looks.append(len(world.source.saved))
    shard.save(cursor(11), CancelToken())
    shard.save(cursor(12), CancelToken())
    assert looks == [0, 1]
    assert (world.source.saved, shard.checkpoint) == ([cursor(11), cursor(12)], cursor(12))


def test_a_checkpoint_set_by_hand_is_not_saved_over(world):
    shard = world.shard_consumer(10, [batch_of(10, 20)])
    world.source.set(cursor(3), "", 5)
    with pytest.raises(Cancelled):
        shard.save(cursor(20), CancelToken())
    assert world.source.saved == []
    assert (shard.cursor, shard.checkpoint, list(shard.batches)) == (cursor(3), cursor(3), [])


@pytest.mark.parametrize("who", ["the lease", "the shard"])
@pytest.mark.parametrize("when", ["before", "during the look"])
def test_without_the_lease_or_the_shard_nothing_is_saved(world, who, when):
    shard, token = world.shard_consumer(10), CancelToken()
    cancel = token.cancel if who == "the shard" else world.consumer.lease.cancel
    if when == "before":
        cancel()
    else:
        world.source.on_look = cancel
    with pytest.raises(Cancelled):
        shard.save(cursor(20), token)
    assert world.source.saved == []


def test_a_checkpoint_whose_saving_failed_is_remembered_for_it_may_come_late(world):
    shard = world.shard_consumer(10)
    world.source.failures = [CallError("NoAnswer", "")] * 2
    shard.save(cursor(20), CancelToken())
    assert (world.source.saved, list(shard.unanswered)) == ([cursor(20)], [cursor(20)])
    assert world.consumer.unanswered[0] is shard.unanswered


@pytest.mark.parametrize("is_revoked", [False, True])
def test_who_is_told_that_another_holds_the_shard_has_lost_the_lease_unless_the_shard_is_to_move(world, is_revoked):
    shard = world.shard_consumer(10)
    if is_revoked:
        shard.revoked.cancel()
    world.source.failures = [REFUSED]
    with pytest.raises(CallError):
        shard.send_checkpoint(cursor(20))
    assert world.consumer.lease.is_cancelled() != is_revoked
    assert shard.checkpoint == cursor(10)


def test_the_last_checkpoint_is_saved_again_where_one_has_failed_once_nothing_is_in_flight(world):
    shard = world.shard_consumer(10)
    shard.begin_last_save()
    assert world.submitted == [], "none has failed"
    shard.unanswered.append(cursor(15))
    shard.is_busy = True
    shard.begin_last_save()
    assert world.submitted == [], "a batch is in flight"
    shard.is_busy = False
    shard.revoked.cancel()
    shard.begin_last_save()
    assert len(world.submitted) == 1 and not shard.is_shutdown()
    shard.delivered = cursor(15)  # and that was not saved in time
    world.submitted[0]()
    assert world.source.saved == [cursor(15)] and shard.is_shutdown()
    shard.begin_last_save()
    assert len(world.submitted) == 1, "once is enough"


def test_without_the_lease_no_last_checkpoint_is_saved(world):
    shard = world.shard_consumer(10)
    shard.unanswered.append(cursor(15))
    world.consumer.lease.cancel()
    shard.begin_last_save()
    assert world.submitted == []


def test_however_long_a_batch_took_its_checkpoint_has_the_grace_from_its_end_on(world, monkeypatch):
    shard, clock = world.shard_consumer(10), [1000.0]
    fake = types.SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None)
    monkeypatch.setattr(dispatch_data, "time", fake)
    assert not shard.saving().is_cancelled()
    shard.revoked.cancel()
    clock[0] += 100
    token = shard.saving()
    clock[0] += dispatch_data.GRACE - 1
    assert not token.is_cancelled()
    clock[0] += 2
    assert token.is_cancelled()


# ---- where a shard begins


def test_a_shard_begins_at_its_checkpoint(world):
    shard = ShardConsumer(world.consumer, 0)
    world.source.set(cursor(7), "another")
    shard.find_checkpoint()
    assert (shard.checkpoint, shard.delivered, world.source.saved) == (cursor(7), cursor(7), [])


def test_a_shard_without_a_checkpoint_gets_one_before_anything_is_read(world):
    shard = ShardConsumer(world.consumer, 0)
    shard.find_checkpoint()
    assert (world.source.saved, shard.checkpoint, shard.delivered) == ([cursor(1)], cursor(1), cursor(1))


def test_a_checkpoint_made_for_another_start_than_the_groups_is_made_once_more(world):
    """Of copies that start at "end" the first decides, and that shows only after this one has made its own."""

    def take_older_start(_):
        if world.source.saved:
            world.member.group_start = 3

    world.member.settings.cursor_start, world.member.group_start = "end", 5
    world.member.take_older_start = take_older_start
    shard = ShardConsumer(world.consumer, 0)
    shard.find_checkpoint()
    assert world.source.saved == [cursor(5), cursor(3)]
    assert shard.checkpoint == shard.delivered == cursor(3)


def test_a_checkpoint_that_is_no_cursor_is_an_error(world):
    world.source.set("no cursor", "another")
    with pytest.raises(CallError, match="UnreadableCheckPoint"):
        ShardConsumer(world.consumer, 0).find_checkpoint()


@pytest.mark.parametrize("saved_by", ["nobody since", "another since"])
@pytest.mark.parametrize("delivered", [5, 20])
def test_what_the_consumer_before_has_delivered_is_saved_unless_somebody_has_been_there_since(
    world, saved_by, delivered
):
    former = world.shard_consumer(10)
    former.delivered = cursor(delivered)
    world.member.former[0] = former
    if saved_by == "another since":
        world.source.set(cursor(12), "another", 9)
    shard = ShardConsumer(world.consumer, 0)
    shard.find_checkpoint()
    expected = 12 if saved_by == "another since" else max(10, delivered)
    assert shard.checkpoint == shard.delivered == cursor(expected)
    assert world.source.saved == ([] if saved_by == "another since" else [cursor(expected)])
    assert world.member.former == {}
