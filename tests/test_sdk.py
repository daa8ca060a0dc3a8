"""What dispatch_data.py relies on in the SDK, and in the standard library, beyond what they document.

The rest of its tests would notice too when a new release changes that, each in its own way and late; these say what.
The table at the head of dispatch_data.py names them.
"""

import concurrent.futures
import logging
import re
import time
from pathlib import Path

import pytest
from aliyun.log import QueuedLogHandler
from aliyun.log.consumer import ConsumerWorker, LogHubConfig, worker
from local_log_service import LocalLogService

import dispatch_data
from dispatch_data import ThreadPool

pytestmark = pytest.mark.quick

LIMIT = 20.0  # seconds


def test_the_queued_handler_puts_all_that_waits_under_the_topic_that_was_set_last():
    """Not relied on, but said in the README: what was mixed up before it arrived can't be told apart."""
    handler = QueuedLogHandler("localhost", "id", "key", "project", "logstore", close_wait=0.1)
    handler.stop()  # its thread, so that both records wait
    for topic in ("nginx", "click"):
        handler.set_topic(topic)
        handler.emit(logging.makeLogRecord({"msg": "of " + topic}))
    request = handler._get_batch_requests(timeout=LIMIT)
    assert request.get_topic() == "click" and len(request.get_log_items()) == 2


class Client:
    """Stands in the place of the SDK's client, as Consumer itself does."""

    def __init__(self):
        self.calls = []

    def ensure_consumer_group_created(self, *arguments):
        self.calls.append(("ensure_consumer_group_created", *arguments))


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


class Shard:
    """Stands in the place of ShardConsumer."""

    def __init__(self):
        self.calls = []
        self.is_busy = False

    def consume(self):
        self.calls.append("consume")

    def shut_down(self):
        self.calls.append("shut_down")

    def is_shutdown(self):
        return "shut_down" in self.calls and not self.is_busy


class Clock:
    """In the place of the module `time`: it goes back."""

    def __init__(self, step):
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
        self.ours, self.set_by_the_sdk, self.made, self.ended = Client(), [], [], []
        config = LogHubConfig(
            "endpoint.test", "id", "key", "project", "logstore", "group", "consumer",
            data_fetch_interval=float("-inf"), shared_executor=tasks,
        )  # fmt: skip
        super().__init__(None, config)
        self.daemon = True
        self.heart_beat = Heartbeat()

    @property
    def consumer_client(self):
        return self.ours

    @consumer_client.setter
    def consumer_client(self, made_by_the_sdk):
        self.set_by_the_sdk.append(made_by_the_sdk)

    def _get_shard_consumer(self, shard):
        if shard not in self.shard_consumers:
            self.shard_consumers[shard] = Shard()
            self.made.append(self.shard_consumers[shard])
        return self.shard_consumers[shard]

    def shutdown_and_wait(self):
        self.ended.append(list(self.shard_consumers))


@pytest.fixture
def running():
    """A worker at work, whose shard has been consumed."""
    with concurrent.futures.ThreadPoolExecutor(8) as tasks:
        one = Worker(tasks)
        one.start()
        wait_for(lambda: one.made and one.made[0].calls)
        yield one
        one.shut_down_flag = True
        one.join(LIMIT)


def wait_for(condition):
    LocalLogService().wait_for(condition, LIMIT, "what the SDK should do")


def test_the_worker_makes_its_client_and_its_group_through_what_we_override(running):
    """If not, it writes its own timeout and order over those of the group."""
    assert len(running.set_by_the_sdk) == 1
    assert [call[0] for call in running.ours.calls] == ["ensure_consumer_group_created"]


def test_each_turn_of_the_loop_asks_once_what_is_held_and_never_sleeps(monkeypatch, running):
    """Heartbeat.get_held_shards paces the loop; the wall clock must not."""
    clock = Clock(step=-600.0)
    monkeypatch.setattr(worker, "time", clock)
    turns = len(running.heart_beat.calls)
    wait_for(lambda: len(running.heart_beat.calls) > turns + 50)
    assert clock.sleeps == []
    assert running.heart_beat.calls[0] == "start"
    assert set(running.heart_beat.calls[1:]) == {"get_held_shards"}


def test_each_shard_that_is_held_is_consumed_in_each_turn_by_what_we_make(running):
    """Not by the SDK's ShardConsumerWorker, which goes on with the next batch where one fails."""
    running.heart_beat.owned = [0, 1]
    wait_for(lambda: len(running.made) == 2 and running.made[1].calls)

    def counts():
        """Turns that have begun, how often each shard was consumed meanwhile, and turns again."""
        turns = len(running.heart_beat.calls)
        return turns, [len(shard.calls) for shard in running.made], len(running.heart_beat.calls)

    least_before, before, most_before = counts()
    wait_for(lambda: len(running.heart_beat.calls) > most_before + 20)
    least_now, now, most_now = counts()
    for shard, consumed_before, consumed_now in zip(running.made, before, now):
        # The turn that has begun last may have come to the shard, or not.
        assert least_now - most_before - 1 <= consumed_now - consumed_before <= most_now - least_before + 1
        assert set(shard.calls) == {"consume"}
    assert list(running.shard_consumers) == [0, 1] and len(running.made) == 2


def test_a_shard_that_is_no_longer_held_is_shut_down_then_let_go_of(running):
    """remove_heart_shard is what lets it move; by then no task of it is left."""
    running.made[0].is_busy = True
    running.heart_beat.owned = []
    wait_for(lambda: running.made[0].calls.count("shut_down") > 2)
    assert ("remove_heart_shard", 0) not in running.heart_beat.calls
    running.made[0].is_busy = False
    wait_for(lambda: ("remove_heart_shard", 0) in running.heart_beat.calls)
    wait_for(lambda: not running.shard_consumers)
    running.heart_beat.owned = [0]
    wait_for(lambda: len(running.made) == 2 and running.made[1].calls)


def test_the_flag_ends_the_loop_and_leaves_shards_and_threads_to_others(running):
    running.shut_down_flag = True
    running.join(LIMIT)
    assert not running.is_alive()
    assert running.ended == [[0]] and "shut_down" not in running.made[0].calls
    assert running.executor.submit(lambda: 7).result(LIMIT) == 7


def test_tasks_wait_for_the_threads_that_there_are(monkeypatch):
    """The standard library's executor has queued a task when it asks for a thread by the method that we override."""
    tasks = ThreadPool(8, "task")
    assert tasks.submit(lambda: 7).result(LIMIT) == 7
    assert len(tasks._threads) == 1
    asked = []

    def no_thread(self):
        asked.append(self)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "_adjust_thread_count", no_thread)
    assert [tasks.submit(lambda: 8).result(LIMIT) for _ in range(3)] == [8] * 3
    assert asked == [tasks] * 3


def test_the_table_of_what_is_private_to_others_names_tests_that_exist():
    """Each row of it has one, in a file of its own or of that name."""
    tests = Path(__file__).parent
    defined = set(re.findall(r"^def (test_\w+)\(", "".join(path.read_text() for path in tests.glob("test_*.py")), re.M))
    table = dispatch_data.__doc__.partition("of other packages' internals")[2]
    named = set(re.findall(r"\btest_\w+(?:\.py)?", table))
    assert len(named) >= 8
    assert {name for name in named if name not in defined and not (tests / name).exists()} == set()
