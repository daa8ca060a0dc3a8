"""What dispatch_data.py relies on in the SDK, and in the standard library, beyond what they document.

The rest of its tests would notice too when a new release changes that, each in its own way and late; these say what.
"""

import concurrent.futures
import logging
import threading
import time

import pytest
from aliyun.log import LogException
from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, LogHubConfig, shard_worker, worker
from local_log_service import LocalLogService

from dispatch_data import PullResult, ThreadPool

pytestmark = pytest.mark.quick

LIMIT = 20.0  # seconds


class Client:
    """Stands in the place of Consumer: a shard of pulls that number themselves."""

    mproject = mlogstore = mconsumer_group = mconsumer = "x"

    def __init__(self):
        self.calls = []
        self.failure = None

    def ensure_consumer_group_created(self, *arguments):
        self.calls.append(("ensure_consumer_group_created", *arguments))

    def get_check_point(self, *_):
        return {"checkpoint": "0"}

    def update_check_point(self, *arguments):
        self.calls.append(("update_check_point", *arguments))

    def get_end_cursor(self, *arguments):
        self.calls.append(("get_end_cursor", *arguments))
        return "1000000"

    def pull_logs(self, shard, cursor, *_, **__):
        self.calls.append(("pull_logs", shard, cursor))
        time.sleep(0.001)
        if self.failure:
            raise self.failure
        return PullResult([b"log group"], 10, str(int(cursor) + 1))

    def pulled(self):
        return [call[2] for call in self.calls if call[0] == "pull_logs"]


def begin_of(pull):
    return str(int(pull.next_cursor) - 1)


class Heartbeat:
    def __init__(self):
        self.owned, self.calls = [0], []

    def start(self):
        self.calls.append("start")

    def get_held_shards(self):
        self.calls.append("get_held_shards")
        time.sleep(0.001)
        return self.owned[:]

    def remove_heart_shard(self, shard):
        self.calls.append(("remove_heart_shard", shard))

    def shutdown(self):
        self.calls.append("shutdown")


class Processor(ConsumerProcessorBase):
    def __init__(self, made):
        super().__init__()
        made.append(self)
        self.calls, self.batches = [], []
        self.outcomes = {}  # cursor of a batch -> checkpoint to fetch again from, or what to raise; each once
        self._preprocessor = lambda pull: ("preprocessed", pull)

    def initialize(self, shard):
        super().initialize(shard)
        self.calls.append(("initialize", shard))

    def process(self, batch, *_):
        self.batches.append(batch)
        outcome = self.outcomes.pop(begin_of(batch[1]), None)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def shutdown(self, *_):
        self.calls.append("shutdown")

    def cursors(self):
        return [begin_of(batch[1]) for batch in self.batches]


class Clock:
    """In the place of the module `time`: it stands still, or goes back."""

    def __init__(self, step=0.0):
        self.now, self.step, self.sleeps = 1e9, step, []

    def time(self):
        self.now += self.step
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        time.sleep(0.001)


class Worker(ConsumerWorker):
    """As Consumer is made."""

    def __init__(self, tasks):
        self.ours, self.made, self.set_by_the_sdk = Client(), [], []
        config = LogHubConfig(
            "endpoint.test", "id", "key", "project", "logstore", "group", "consumer",
            data_fetch_interval=float("-inf"), max_fetch_log_group_size=-1, shared_executor=tasks,
        )  # fmt: skip
        super().__init__(Processor, config, args=(self.made,))
        self.daemon = True
        self.heart_beat = Heartbeat()

    @property
    def consumer_client(self):
        return self.ours

    @consumer_client.setter
    def consumer_client(self, made_by_the_sdk):
        self.set_by_the_sdk.append(made_by_the_sdk)


@pytest.fixture
def running():
    """A worker at work, whose first batch was processed."""
    with concurrent.futures.ThreadPoolExecutor(8) as tasks:
        one = Worker(tasks)
        one.start()
        wait_for(lambda: one.made and one.made[0].batches)
        yield one
        one.shut_down_flag = True
        one.join(LIMIT)


def wait_for(condition):
    LocalLogService().wait_for(condition, LIMIT, "what the SDK should do")


def test_the_worker_makes_its_client_and_its_group_through_what_we_override(running):
    """If not, it writes its own timeout and order over those of the group."""
    assert len(running.set_by_the_sdk) == 1
    assert running.ours.calls[0][0] == "ensure_consumer_group_created"
    assert running.ours.pulled()[0] == "0"


def test_each_turn_of_the_loop_asks_once_what_is_held_and_never_sleeps(monkeypatch, running):
    """Heartbeat.get_held_shards paces the loop; the wall clock must not."""
    clock = Clock(step=-600.0)
    monkeypatch.setattr(worker, "time", clock)
    turns = len(running.heart_beat.calls)
    wait_for(lambda: len(running.heart_beat.calls) > turns + 50)
    assert clock.sleeps == []
    assert running.heart_beat.calls[0] == "start"
    assert set(running.heart_beat.calls[1:]) == {"get_held_shards"}


def test_no_pause_is_left_between_two_pulls(monkeypatch, running):
    """Pulls that bring little are half a second of wall time apart otherwise: here that stands still."""
    monkeypatch.setattr(shard_worker, "time", Clock())
    pulls = len(running.ours.pulled())
    wait_for(lambda: len(running.ours.pulled()) > pulls + 10)


def test_batches_come_in_order_through_our_preprocessor(running):
    wait_for(lambda: len(running.made[0].batches) >= 5)
    assert running.made[0].cursors()[:5] == ["0", "1", "2", "3", "4"]
    assert {batch[0] for batch in running.made[0].batches} == {"preprocessed"}
    assert running.made[0].calls == [("initialize", 0)]
    assert list(running.shard_consumers) == [0]


def test_a_checkpoint_that_a_batch_returns_is_where_the_next_one_begins(running):
    """What was pulled beyond it is dropped."""
    again = str(len(running.made[0].batches) + 20)
    running.made[0].outcomes[again] = again
    wait_for(lambda: running.made[0].cursors().count(again) == 2)
    wait_for(lambda: str(int(again) + 3) in running.made[0].cursors())
    cursors = running.made[0].cursors()
    first = cursors.index(again)
    assert cursors[first : first + 4] == [again, again, str(int(again) + 1), str(int(again) + 2)]


def test_the_tracker_never_saves_anything(monkeypatch, running):
    """It would save beyond what is delivered: neither after a batch, nor when pulls bring nothing, nor at the end."""
    tracker = running.shard_consumers[0].checkpoint_tracker
    for _ in range(3):
        tracker.last_check_time = 0
        batches = len(running.made[0].batches)
        wait_for(lambda batches=batches: len(running.made[0].batches) > batches + 3)
    monkeypatch.setattr(PullResult, "get_loggroup_count", lambda _: 0)
    pulls = len(running.ours.pulled())
    wait_for(lambda: len(running.ours.pulled()) > pulls + 10)
    running.shard_consumers[0].last_success_fetch_time_with_data = 1
    pulls = len(running.ours.pulled())
    wait_for(lambda: len(running.ours.pulled()) > pulls + 10)
    running.heart_beat.owned = []
    wait_for(lambda: not running.shard_consumers)
    assert "update_check_point" not in [call[0] for call in running.ours.calls]


def test_a_log_exception_of_a_pull_is_passed_over_and_the_cursor_pulled_again(caplog, running):
    """That is how ShardConsumer.pull says that nothing is wanted: no batch, no jump to the end, no line."""
    with caplog.at_level(logging.CRITICAL):
        running.ours.failure = LogException("Cancelled", "the shard is not wanted any more")
        wait_for(lambda: len(set(running.ours.pulled()[-5:])) == 1)
        batches = len(running.made[0].batches)
        pulls = len(running.ours.pulled())
        wait_for(lambda: len(running.ours.pulled()) > pulls + 5)
        assert len(running.made[0].batches) <= batches + 2  # those that had been pulled
        running.ours.failure = None
        wait_for(lambda: len(running.made[0].batches) > batches + 5)
    assert running.made[0].cursors() == [str(number) for number in range(len(running.made[0].batches))]
    assert "get_end_cursor" not in [call[0] for call in running.ours.calls]


def test_a_shard_that_is_no_longer_held_is_shut_down_then_let_go_of(running):
    """remove_heart_shard is what lets it move; by then no task of it is left."""
    running.heart_beat.owned = []
    wait_for(lambda: ("remove_heart_shard", 0) in running.heart_beat.calls)
    assert running.made[0].calls == [("initialize", 0), "shutdown"]
    wait_for(lambda: not running.shard_consumers)
    pulls = running.ours.pulled()
    running.heart_beat.owned = [0]
    wait_for(lambda: len(running.made) == 2 and running.made[1].batches)
    assert len(running.ours.pulled()) > len(pulls)


def test_the_flag_ends_the_loop_and_leaves_the_threads_to_others(running):
    running.shut_down_flag = True
    running.join(LIMIT)
    assert not running.is_alive()
    assert running.made[0].calls == [("initialize", 0), "shutdown"]
    assert running.executor.submit(lambda: 7).result(LIMIT) == 7


def test_tasks_wait_for_the_threads_that_there_are(monkeypatch):
    """The standard library's executor has queued a task when it asks for a thread by the method that we override."""
    tasks = ThreadPool(8)
    assert tasks.submit(lambda: 7).result(LIMIT) == 7
    assert len(tasks._threads) == 1
    asked = []

    def no_thread(self):
        asked.append(self)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "_adjust_thread_count", no_thread)
    assert [tasks.submit(lambda: 8).result(LIMIT) for _ in range(3)] == [8] * 3
    assert asked == [tasks] * 3


def test_tasks_tell_when_one_has_ended():
    """Else the SDK's loop would see it a turn later."""
    tasks, ended = ThreadPool(8), threading.Event()
    tasks.on_task_done = ended.set
    tasks.submit(lambda: None)
    assert ended.wait(LIMIT)
