"""What a shard's consumer saves, of what, and when: each of its steps alone, with lists in the service's place."""

import base64
import collections
import contextlib
import threading
import time
import types

import pytest

import dispatch_data
from dispatch_data import (
    CallError,
    Cancelled,
    CancelToken,
    Consumer,
    GroupMember,
    Heartbeat,
    Lease,
    LogGroup,
    PullResult,
    ShardConsumer,
)

pytestmark = pytest.mark.quick

LOG_GROUPS = [LogGroup("click", 1, b"log %d" % number, b"") for number in range(40)]  # those of the shard, in order
REFUSED = CallError("ConsumerNotMatch", "", 400)


def cursor(position):
    return base64.b64encode(b"%d" % position).decode()


class Source:
    """The shard and its checkpoint; `entries` is what LogstoreApi.get_checkpoints returns."""

    def __init__(self):
        self.entries, self.saved, self.failures, self.pulls, self.lost = {}, [], [], [], 0

    def set(self, checkpoint, by, update_time=1):
        self.entries[0] = {"checkpoint": checkpoint, "consumer": by, "updateTime": update_time}

    def get_checkpoints(self, *_):
        self.on_look()
        return self.entries

    def on_look(self):
        pass

    def on_save(self):
        pass

    def save_checkpoint(self, _, consumer, __, checkpoint):
        if self.failures:
            raise self.failures.pop(0)
        self.saved.append(checkpoint)
        self.on_save()
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
        self.source, self.submitted, self.held = Source(), [], []
        self.member = types.SimpleNamespace(
            source=self.source, soft_stop=CancelToken(), group="group", group_start=1, former={}, drain=None,
            settings=types.SimpleNamespace(fetch_interval=1.0, cursor_start="begin"), expired_sts_tokens=list,
            subject="source", begun_shards=set(),
            pull_retries=Retries(), checkpoint_retries=Retries(), begin_retries=Retries(),
            entries_since=lambda *_, **__: dict(self.source.entries), take_older_start=lambda _: None,
            first_cursor=lambda _: cursor(self.member.group_start),
            tasks=types.SimpleNamespace(submit=lambda *task: self.submitted.append(task)),
        )  # fmt: skip
        self.consumer = types.SimpleNamespace(
            member=self.member, lease=Lease(60), may_come_late={}, name_in_group="me", memory_share=lambda: 1e6,
            set_held=lambda _, held: self.held.append(held), take_memory=lambda *_: False,
            heart_beat=types.SimpleNamespace(assigned_at=0.0, interval=1.0, owned={0}),
        )  # fmt: skip

    def shard_consumer(self, delivered=0, batches=()):
        """One that has delivered and saved so much, and holds these batches."""
        made = ShardConsumer(self.consumer, 0)
        made.checkpoint.saved = made.checkpoint.delivered = made.cursor = cursor(delivered)
        made.batches.extend(batches)
        self.source.set(cursor(delivered), "me")
        made.checkpoint.seen = 1, cursor(delivered)
        return made

    def perform(self):
        """Does the tasks that were begun, and those that these begin."""
        while self.submitted:
            task, *arguments = self.submitted.pop(0)
            task(*arguments)


@pytest.fixture
def world():
    return World()


def batch_of(begin, end, size=100):
    return PullResult(LOG_GROUPS[begin:end], size, cursor(end), 0)


# ---- where a batch was cut


def test_of_a_batch_that_was_cut_the_first_part_is_saved_and_the_rest_comes_next(world):
    batch = batch_of(5, 30)
    shard = world.shard_consumer(5, [batch, batch_of(30, 40)])
    first = shard.cut_batch(batch, 20)
    assert (first.log_groups, first.next_cursor) == (LOG_GROUPS[5:25], cursor(25))
    assert list(shard.batches) == [first, batch_of(25, 30), batch_of(30, 40)]
    assert first.size + shard.batches[1].size == batch.size
    assert world.source.pulls == [(cursor(5), 20), (cursor(20), 5)]


def test_where_nothing_is_done_with_a_few_are_made_a_batch_of_their_own_and_nothing_is_saved(world):
    batch = batch_of(5, 30)
    shard = world.shard_consumer(5, [batch])
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 0)
    few = 5 + dispatch_data.FEW_LOG_GROUPS
    assert [one.log_groups for one in shard.batches] == [LOG_GROUPS[5:few], LOG_GROUPS[few:30]]
    assert [one.next_cursor for one in shard.batches] == [cursor(few), cursor(30)]


def test_where_nobody_can_tell_where_the_first_part_ends_the_rest_stands_for_both(world):
    world.source.lost = 1  # others are there now
    batch = batch_of(5, 30)
    shard = world.shard_consumer(5, [batch])
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 20)
    assert list(shard.batches) == [batch_of(25, 30)]
    with pytest.raises(Cancelled):
        shard.cut_batch(shard.batches[0], 0)
    assert list(shard.batches) == [batch_of(25, 30)], "nothing of it is done with"


def test_at_a_stop_nothing_is_asked_for_what_is_not_done_with(world):
    batch = batch_of(0, 30)
    shard = world.shard_consumer(0, [batch])
    world.member.soft_stop.cancel()
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 0)
    assert (list(shard.batches), world.source.pulls) == ([batch], [])


def test_of_a_shard_that_was_let_go_of_meanwhile_nothing_is_kept_or_saved(world):
    batch = batch_of(0, 30)
    shard = world.shard_consumer(0)
    with pytest.raises(Cancelled):
        shard.cut_batch(batch, 20)
    assert not shard.batches


# ---- delivering, then saving


def delivering(world, done=30):
    """Has batches delivered as far as that, beginning now; a list of how much was saved before each."""
    calls = []
    world.member.delivery = types.SimpleNamespace(deliver=lambda *_: calls.append(len(world.source.saved)) or (done, 0))
    return calls


def test_a_shard_may_be_let_go_of_while_its_batch_is_saved(world):
    """As where the lease is lost and the answer takes longer than anybody waits for it."""
    shard = world.shard_consumer(0, [batch_of(0, 30)])
    delivering(world)
    world.source.on_save = shard.hand_over
    shard.deliver()
    assert (world.source.saved, list(shard.batches)) == ([cursor(30)], [])


@pytest.mark.parametrize("entry", [{}, {"updateTime": None}, {"updateTime": 1e6}])
def test_logs_that_retention_took_are_told_whether_or_not_it_is_known_when_the_checkpoint_was_saved(
    world, caplog, entry
):
    shard = world.shard_consumer(10)
    pull_logs = world.source.pull_logs
    expired = CallError("InvalidCursor", "", 400)

    def pull_what_is_left(shard_number, begin, *rest):
        if begin == cursor(10):
            raise expired
        return pull_logs(shard_number, begin, *rest)

    world.source.pull_logs = pull_what_is_left
    world.source.get_cursor = lambda _, where: cursor({"begin": 20, "end": 40}[where])
    world.source.arrival_time = lambda *_: 0
    world.source.entries[0].pop("updateTime")
    world.source.entries[0].update(entry)
    assert shard.pull_once(5).log_groups == LOG_GROUPS[20:25]
    assert "SKIPPED" in caplog.text
    assert ("an unknown time" in caplog.text) == (not entry.get("updateTime"))


def test_a_cursor_beyond_the_end_is_believed_to_be_of_another_logstore_only_after_a_while(world, caplog, monkeypatch):
    """An answer may be of a moment ago; and nothing has expired where a logstore was made anew."""
    shard = world.shard_consumer(30)
    pull_logs, ends = world.source.pull_logs, {"begin": 0, "end": 29}

    def pull_what_is_there(shard_number, begin, *rest):
        if begin == cursor(30):
            raise CallError("InvalidCursor", "", 400)
        return pull_logs(shard_number, begin, *rest)

    world.source.pull_logs = pull_what_is_there
    world.source.get_cursor = lambda _, where: cursor(ends[where])
    now = time.monotonic()
    monkeypatch.setattr(dispatch_data.time, "monotonic", lambda: now)
    for seconds, end in ((0, 29), (59, 29), (61, 30), (62, 29), (121, 29)):  # it is fine between
        monkeypatch.setattr(dispatch_data.time, "monotonic", lambda seconds=seconds: now + seconds)
        ends["end"] = end
        with pytest.raises(CallError):
            shard.pull_once(5)
    assert world.source.pulls == [] and caplog.text == ""
    shard.cursor = cursor(20)  # a pull that succeeds
    assert shard.pull_once(5).log_groups == LOG_GROUPS[20:25]
    shard.cursor, ends["end"] = cursor(30), 29
    monkeypatch.setattr(dispatch_data.time, "monotonic", lambda: now + 3600)
    with pytest.raises(CallError):
        shard.pull_once(5)
    world.source.pulls.clear()
    monkeypatch.setattr(dispatch_data.time, "monotonic", lambda: now + 3661)
    assert shard.pull_once(5).log_groups == LOG_GROUPS[:5]
    assert "made anew" in caplog.text and "SKIPPED" not in caplog.text


def test_a_checkpoint_that_was_there_is_missed_for_a_while_each_time_it_is_gone(world, caplog, monkeypatch):
    """By three answers at the least; from whoever has saved it."""
    now = time.monotonic()
    shard, entries = world.shard_consumer(9), dict(world.source.entries)
    checkpoint = shard.checkpoint
    world.member.begun_shards.add(0)
    for seconds in (0, 1, 9.9):
        monkeypatch.setattr(dispatch_data.time, "monotonic", lambda seconds=seconds: now + seconds)
        world.source.entries.clear()
        with pytest.raises(CallError, match="MissingCheckPoint"):
            checkpoint.find()
    world.source.entries.update(entries)
    checkpoint.find()
    assert checkpoint.saved == cursor(9) and world.source.saved == []
    world.source.entries.clear()
    for seconds in (11, 31):
        monkeypatch.setattr(dispatch_data.time, "monotonic", lambda seconds=seconds: now + seconds)
        with pytest.raises(CallError, match="MissingCheckPoint"):
            checkpoint.find()
    assert caplog.text == ""
    checkpoint.find()
    assert world.source.saved == [cursor(1)] and "its checkpoint is gone" in caplog.text


def test_a_batch_is_delivered_saved_and_forgotten(world):
    shard, calls = world.shard_consumer(0, [batch_of(0, 30)]), delivering(world)
    shard.deliver()
    assert calls == [0]
    assert (world.source.saved, list(shard.batches), world.held) == ([cursor(30)], [], [0])
    assert (shard.checkpoint.delivered, shard.checkpoint.saved) == (cursor(30), cursor(30))
    assert world.source.pulls == [], "nobody has to ask where it ends"


def test_what_moves_the_cursor_without_log_groups_is_saved_and_delivered_to_nobody(world):
    shard, calls = world.shard_consumer(0, [PullResult([], 0, cursor(9), 0)]), delivering(world)
    shard.deliver()
    assert (calls, world.source.saved, list(shard.batches)) == ([], [cursor(9)], [])


def test_a_batch_that_was_delivered_and_could_not_be_saved_is_saved_and_not_delivered_again(world):
    batch = batch_of(0, 30)
    shard, calls = world.shard_consumer(0, [batch]), delivering(world)
    world.source.failures = [CallError("ServerBusy", "", 503)] * 3
    with pytest.raises(Cancelled):
        shard.deliver()
    assert (calls, world.source.saved, list(shard.batches)) == ([0], [], [batch])
    assert shard.checkpoint.delivered == cursor(30) != shard.checkpoint.saved
    shard.deliver()
    assert (calls, world.source.saved, list(shard.batches)) == ([0], [cursor(30)], [])


# ---- saving


def save(shard, position, token=None):
    shard.checkpoint.delivered = cursor(position)
    shard.checkpoint.save(token or CancelToken())


def test_the_service_is_looked_at_before_each_save(world):
    shard, looks = world.shard_consumer(10), []
    world.source.on_look = lambda: looks.append(len(world.source.saved))
    save(shard, 11)
    save(shard, 12)
    assert looks == [0, 1]
    assert (world.source.saved, shard.checkpoint.saved) == ([cursor(11), cursor(12)], cursor(12))


def test_an_idle_shard_looks_at_an_entry_that_was_asked_for_since_it_saved(world):
    """It shares that with others; one from before would look like a checkpoint that somebody has set back."""
    shard, since = world.shard_consumer(10), []
    before = time.monotonic()
    save(shard, 11)
    world.member.entries_since = lambda moment, is_look: since.append(moment) or dict(world.source.entries)
    shard.save_again()
    world.consumer.heart_beat.interval = 1e-9
    shard.save_again()
    assert before < since[0] < since[1] <= time.monotonic()
    assert since[0] == shard.checkpoint.entry_since


def test_an_idle_shard_waits_for_no_look_of_another(world):
    """That may take as long as a call may; meanwhile it delivers, and lets the shard go."""
    shard = world.shard_consumer(10)
    shard.checkpoint.next_look = 0.0
    world.member.entries_since = lambda *_, **__: None
    shard.next_pull = time.monotonic() + 60
    shard.begin_tasks()
    began = time.monotonic()
    world.perform()
    assert not shard.running and 0.5 < shard.checkpoint.next_look - began < 2.0
    assert world.source.saved == []


def member_that_asks(get_checkpoints):
    member = GroupMember.__new__(GroupMember)
    member.entries, member.group = (-1.0, {}), "group"
    member.begin_lock, member.look_lock = threading.Lock(), threading.Lock()
    member.source = types.SimpleNamespace(get_checkpoints=get_checkpoints)
    member.begun_shards = set()
    return member


def test_whoever_looks_or_begins_waits_for_no_look_that_is_not_answered():
    is_asked, is_answered, asked = threading.Event(), threading.Event(), []

    def get_checkpoints(_):
        asked.append(len(asked))
        if len(asked) == 1:
            is_asked.set()
            is_answered.wait(30)
        return {asked[-1]: {"checkpoint": cursor(1) if asked[-1] else ""}}

    member = member_that_asks(get_checkpoints)
    now, found = time.monotonic(), []
    thread = threading.Thread(target=lambda: found.append(member.entries_since(now, is_look=True)), daemon=True)
    thread.start()
    assert is_asked.wait(10)
    assert member.entries_since(now, is_look=True) is None
    assert list(member.entries_since(now)) == [1]
    is_answered.set()
    thread.join()
    assert len(asked) == 2
    assert member.entries_since(now, is_look=True) is not None
    assert len(asked) == 2, "those that are there will do"
    assert member.begun_shards == {1}, "whoever has saved their checkpoints"


def test_whether_others_have_other_routes_is_unknown_where_the_service_does_not_tell():
    def get_checkpoints(_):
        raise REFUSED

    member = member_that_asks(get_checkpoints)
    member.consumer = types.SimpleNamespace(lease=Lease(60), heart_beat=types.SimpleNamespace(owned={0}))
    (metric,) = [metric for metric in dispatch_data.METRICS if metric.name == "routes_differ"]
    member.differing = ["another"]
    assert metric.read(member) == 1
    with pytest.raises(CallError):
        member.compare_routes()
    assert metric.read(member) is None


def test_a_failed_look_stands_in_the_way_of_none():
    def get_checkpoints(_):
        raise REFUSED

    member = member_that_asks(get_checkpoints)
    for is_look in (True, False) * 2:
        with pytest.raises(CallError):
            member.entries_since(time.monotonic(), is_look)


@pytest.mark.parametrize(
    "what, longest",
    [("nothing", 2.0), ("a batch", Heartbeat.LOOP_INTERVAL), ("a wait for memory", Heartbeat.LOOP_INTERVAL)],
)
def test_only_a_copy_that_is_idle_visits_many_shards_less_often(world, what, longest):
    """Whoever waits for memory asks again in each turn."""
    consumer, heartbeat = consumer_that_holds(2 * Heartbeat.MAX_VISITS)
    consumer.shard_consumers = {0: world.shard_consumer(0, [batch_of(0, 30)] * (what == "a batch"))}
    consumer.waiting.extend([types.SimpleNamespace(shard=0)] * (what == "a wait for memory"))
    assert set(heartbeat.get_held_shards()) == heartbeat.owned
    assert heartbeat.waits == [longest]


def consumer_that_holds(shard_count):
    consumer, heartbeat = Consumer.__new__(Consumer), Heartbeat.__new__(Heartbeat)
    consumer.shard_consumers, consumer.waiting = {}, collections.deque()
    consumer.lock, consumer.lease, consumer.heart_beat = threading.Lock(), Lease(60), heartbeat
    heartbeat.consumer, heartbeat.lock, heartbeat.reported = consumer, threading.Lock(), set()
    heartbeat.let_go, heartbeat.owned, heartbeat.waits = {}, set(range(shard_count)), []
    heartbeat.wake_up = types.SimpleNamespace(wait=heartbeat.waits.append, clear=lambda: None)
    return consumer, heartbeat


def test_shards_that_wait_for_memory_are_visited_first_in_the_order_in_which_they_began_to():
    """Only the first of them is given any: else the loop may turn as often as there are shards."""
    consumer, heartbeat = consumer_that_holds(6)
    consumer.waiting.extend(types.SimpleNamespace(shard=shard) for shard in (4, 9, 2))  # 9 is let go of
    assert list(heartbeat.get_held_shards()) == [4, 2, 0, 1, 3, 5]


@pytest.mark.parametrize("share, count", [(1000, 20), (1000 * 1000, 40), (50 * 1000 * 1000, 160)])
def test_a_pull_is_worth_its_calls_however_many_shards_share_the_memory(world, share, count):
    shard = world.shard_consumer(10)
    world.consumer.memory_share = lambda: share
    world.consumer.take_memory = lambda *_: True
    shard.mean_log_group_size, shard.count_for_target_time = 25 * 1000, 1000
    shard.checkpoint.next_look = float("inf")
    shard.begin_tasks()
    shard.pull()
    assert world.source.pulls == [(cursor(10), count)]


def test_where_there_is_no_memory_for_long_a_pull_brings_what_fits_into_the_share(world):
    """Shards whose targets take nothing may hold all the rest."""
    asked, shard = [], world.shard_consumer(10)
    world.consumer.memory_share = lambda: 100 * 1000
    world.consumer.take_memory = lambda _, size: asked.append(size) or size <= 100 * 1000
    shard.checkpoint.next_look = float("inf")
    shard.mean_log_group_size, shard.count_for_target_time, shard.needed = 10 * 1000, 1000, 900 * 1000
    shard.begin_tasks()
    assert (asked, world.submitted) == ([900 * 1000], [])
    shard.denied_since -= ShardConsumer.SHORT_AFTER
    shard.begin_tasks()
    assert asked[1:] == [900 * 1000, 100 * 1000]
    shard.pull()
    assert world.source.pulls == [(cursor(10), 5)]
    assert shard.needed == 900 * 1000, "the next one needs as much again"
    shard.batches.clear()
    shard.running.clear()
    shard.begin_tasks()
    assert asked[3:] == [900 * 1000, 100 * 1000], "but doesn't wait as long again"
    shard.running.clear()
    shard.denied_since -= 10 * ShardConsumer.SHORT_AFTER
    shard.begin_tasks()
    assert asked[5:] == [900 * 1000], "until it waits for its full turn once more"
    world.consumer.take_memory = lambda *_: True
    shard.begin_tasks()
    assert shard.running and shard.denied_since == float("inf") and not shard.is_short


def test_who_is_short_of_memory_asks_for_what_one_log_group_takes(world):
    """Also where that is more than the shard's share: compressed and not."""
    asked, shard = [], world.shard_consumer(10)
    world.consumer.memory_share = lambda: 100 * 1000
    world.consumer.take_memory = lambda _, size: asked.append(size)
    shard.mean_log_group_size, shard.needed = 80 * 1000, 900 * 1000
    now = time.monotonic()
    shard.denied_since = now - ShardConsumer.SHORT_AFTER
    shard.reserve_for_pull(now)
    assert asked == [900 * 1000, 160 * 1000]


@pytest.mark.parametrize(
    "share, size, count, needed",
    [
        (100 * 1000, 700 * 1000, 10, 700 * 1000),
        (100 * 1000, 7000 * 1000, 100, 1000 * 1000),  # twice MIN_PULL_BYTES
        (2000 * 1000, 7000 * 1000, 100, 4000 * 1000),  # twice the share
        (100 * 1000, 19000 * 1000, 1, 19000 * 1000),  # a LogGroup can't be divided
    ],
)
def test_what_is_reserved_for_a_pull_is_what_the_last_took_within_bounds(world, share, size, count, needed):
    shard = world.shard_consumer(10)
    world.consumer.memory_share = lambda: share
    shard.expect(size, count)
    assert shard.needed == needed


def test_a_shard_that_has_batches_is_not_short_of_memory(world):
    """Delivering these makes room."""
    asked, shard = [], world.shard_consumer(10, [batch_of(10, 30)])
    world.consumer.take_memory = lambda _, size: asked.append(size)
    for _ in range(2):
        assert not shard.reserve_for_pull(time.monotonic())
        shard.denied_since -= 2 * ShardConsumer.SHORT_AFTER
    assert asked == [1, 1]


def test_whoever_has_not_found_its_checkpoint_leaves_that_of_the_holder_before_to_the_next(world):
    world.member.former[0] = former = world.shard_consumer(10).checkpoint
    ShardConsumer(world.consumer, 0).hand_over()
    assert world.member.former[0] is former
    shard = world.shard_consumer(20)
    shard.hand_over()
    assert world.member.former[0] is shard.checkpoint


def test_the_last_look_is_a_fresh_one(world):
    shard = world.shard_consumer(10)
    shard.checkpoint.may_come_late.append(cursor(5))
    world.member.entries_since = None
    shard.revoked.cancel()
    shard.begin_tasks()
    world.source.set(cursor(5), "me", 7)
    world.perform()
    assert world.source.saved == [cursor(10)]


@pytest.mark.parametrize("task", ["deliver", "save_again"])
def test_a_checkpoint_set_by_hand_is_not_saved_over(world, task):
    shard = world.shard_consumer(10, [batch_of(10, 20)])
    delivering(world, 10)
    world.source.set(cursor(3), "", 5)
    shard.run(getattr(shard, task), "a task")
    assert world.source.saved == []
    assert (shard.cursor, shard.checkpoint.saved, shard.checkpoint.delivered) == (cursor(3),) * 3
    assert (list(shard.batches), world.held) == ([], [0])


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
        save(shard, 20, token)
    assert world.source.saved == []


def test_a_checkpoint_whose_saving_failed_is_remembered_for_it_may_come_late(world):
    shard = world.shard_consumer(10)
    world.source.failures = [CallError("NoAnswer", "")] * 2
    save(shard, 20)
    assert (world.source.saved, list(shard.checkpoint.may_come_late)) == ([cursor(20)], [cursor(20)])
    assert world.consumer.may_come_late[0] is shard.checkpoint.may_come_late


@pytest.mark.parametrize("is_revoked", [False, True])
def test_who_is_told_that_another_holds_the_shard_has_lost_the_lease_unless_the_shard_is_to_move(world, is_revoked):
    shard = world.shard_consumer(10)
    if is_revoked:
        shard.revoked.cancel()
    world.source.failures = [REFUSED]
    with pytest.raises(CallError):
        shard.checkpoint.send(cursor(20))
    assert world.consumer.lease.is_cancelled() != is_revoked
    assert shard.checkpoint.saved == cursor(10)


@pytest.mark.parametrize("found, by", [(20, "me"), (20, "another"), (10, "me")])
def test_a_refusal_after_an_answer_was_lost_is_none_where_the_service_has_what_was_saved(world, found, by):
    """A shard that has ended is nobody's any more once its last checkpoint is saved."""
    shard = world.shard_consumer(10)
    world.source.set(cursor(found), by, 2)
    world.source.failures = [REFUSED]
    is_saved = (found, by) == (20, "me")
    with contextlib.nullcontext() if is_saved else pytest.raises(CallError):
        shard.checkpoint.send(cursor(20))
    assert world.consumer.lease.is_cancelled() != is_saved
    assert shard.checkpoint.saved == cursor(20 if is_saved else 10)


def test_the_last_checkpoint_is_saved_again_where_one_has_failed_once_nothing_is_in_flight(world):
    shard = world.shard_consumer(10)
    world.member.soft_stop.cancel()
    shard.begin_tasks()
    assert world.submitted == [], "none has failed"
    shard.checkpoint.may_come_late.append(cursor(15))
    shard.running.add(shard.deliver)
    shard.begin_tasks()
    assert world.submitted == [], "a batch is in flight"
    shard.running.clear()
    shard.revoked.cancel()
    assert not shard.is_shutdown()
    shard.begin_tasks()
    assert len(world.submitted) == 1 and not shard.is_shutdown()
    shard.checkpoint.delivered = cursor(15)  # and that was not saved in time
    world.perform()
    assert world.source.saved == [cursor(15)] and shard.is_shutdown()
    shard.begin_tasks()
    assert world.submitted == [], "once is enough"


def test_the_last_checkpoint_is_not_saved_again_where_the_service_has_it(world):
    shard = world.shard_consumer(10)
    shard.checkpoint.may_come_late.append(cursor(5))
    world.member.soft_stop.cancel()
    shard.begin_tasks()
    world.perform()
    assert world.source.saved == []
    shard.has_begun_last_save = False
    world.source.set(cursor(5), "me", 7)  # it has come late
    shard.begin_tasks()
    world.perform()
    assert world.source.saved == [cursor(10)]


@pytest.mark.parametrize("found, by", [(3, "dispatch-other-1-0123456789abcdef0123"), (3, "me"), (None, "")])
def test_a_checkpoint_that_nobody_here_has_tried_to_save_is_left_while_nothing_is_delivered(world, found, by):
    """Somebody has set it, whomever the service names; or has deleted it."""
    shard = world.shard_consumer(10)
    world.source.set(found and cursor(found), by, 0 if by == "me" else 5)  # with a clock that went back
    shard.save_again()
    assert world.source.saved == []
    shard.checkpoint.may_come_late.append(cursor(3))
    shard.save_again()
    assert world.source.saved == ([cursor(10)] if found else [])


def test_without_the_lease_no_last_checkpoint_is_saved(world):
    shard = world.shard_consumer(10)
    shard.checkpoint.may_come_late.append(cursor(5))
    world.source.set(cursor(5), "me", 7)
    world.consumer.lease.cancel()
    shard.begin_tasks()
    world.perform()
    assert world.source.saved == []


def test_however_long_a_batch_took_its_checkpoint_has_the_grace_from_its_end_on(world, monkeypatch):
    shard, clock = world.shard_consumer(10), [1000.0]
    fake = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0], "clock_gettime": lambda _: 0.0})
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
    shard.checkpoint.find()
    assert (shard.checkpoint.saved, shard.checkpoint.delivered, world.source.saved) == (cursor(7), cursor(7), [])


def test_a_shard_without_a_checkpoint_gets_one_before_anything_is_read(world):
    shard = ShardConsumer(world.consumer, 0)
    shard.checkpoint.find()
    assert world.source.saved == [cursor(1)]
    assert shard.checkpoint.saved == shard.checkpoint.delivered == cursor(1)


def test_a_checkpoint_made_for_another_start_than_the_groups_is_made_once_more(world):
    """Of copies that start at "end" the first decides, and that shows only after this one has made its own."""

    def take_older_start(_):
        if world.source.saved:
            world.member.group_start = 3

    world.member.settings.cursor_start, world.member.group_start = "end", 5
    world.member.take_older_start = take_older_start
    shard = ShardConsumer(world.consumer, 0)
    shard.checkpoint.find()
    assert world.source.saved == [cursor(5), cursor(3)]
    assert shard.checkpoint.saved == shard.checkpoint.delivered == cursor(3)


def test_a_checkpoint_that_is_no_cursor_is_an_error(world):
    world.source.set("no cursor", "another")
    with pytest.raises(CallError, match="UnreadableCheckPoint"):
        ShardConsumer(world.consumer, 0).checkpoint.find()


@pytest.mark.parametrize("saved_by", ["nobody since", "another since"])
@pytest.mark.parametrize("delivered", [5, 20])
def test_what_the_consumer_before_has_delivered_is_saved_unless_somebody_has_been_there_since(
    world, saved_by, delivered
):
    former = world.shard_consumer(10).checkpoint
    former.delivered = cursor(delivered)
    world.member.former[0] = former
    if saved_by == "another since":
        world.source.set(cursor(12), "another", 9)
    shard = ShardConsumer(world.consumer, 0)
    shard.checkpoint.find()
    expected = 12 if saved_by == "another since" else max(10, delivered)
    assert shard.checkpoint.saved == shard.checkpoint.delivered == cursor(expected)
    assert world.source.saved == ([] if saved_by == "another since" else [cursor(expected)])
    assert world.member.former == {}
