"""The loop that sends all puts, turned by hand: what it begins, in what order, and what it leaves behind."""

import collections
import contextlib
import functools
import http.client
import os
import selectors
import socket
import sys
import threading
import time
import types

import pytest
import urllib3
from conftest import logstore_config, speak_tls

import dispatch_data
from dispatch_data import Batch, CallError, LogGroup, PutClient, PutLoop, PutRequest, Target, TargetSettings

pytestmark = pytest.mark.quick

ANSWER = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nx-log-requestid: 1\r\n\r\n%s"
ERROR = b'{"errorCode": "%s", "errorMessage": "of the test"}'


def answer(status=b"200 OK", body=b""):
    return ANSWER % (status, len(body), body)


ACCEPTED = answer()
BUSY = answer(b"503 Busy", ERROR % b"ServerBusy")
INVALID = answer(b"400 Bad", ERROR % b"PostBodyInvalid")


def names_of(puts):
    return [put.log_groups[0].Topic for put in puts]


class Clock:
    """The program's monotonic clock, which stands still until a test moves it; each look at it may take time."""

    def __init__(self):
        self.now, self.look = time.monotonic(), 0.0

    def monotonic(self):
        self.now += self.look
        return self.now


class LoopTurnedByHand(PutLoop):
    """Without its thread. It never sleeps, but tells for how long it would have."""

    def start(self):
        select = self.selector.select
        self.selector.select = lambda seconds: (self.sleeps.append(seconds), self.on_select(), select(0))[2]
        self.sleeps, self.on_select = [], lambda: None


class Opener:
    """In the place of the threads that open connections: does it at once, or when told so."""

    def __init__(self):
        self.waiting, self.is_held = collections.deque(), False

    def submit(self, *work):
        self.waiting.append(work)
        if not self.is_held:
            self.go_on()

    def go_on(self):
        while self.waiting:
            method, *arguments = self.waiting.popleft()
            method(*arguments)


class World:
    """A loop and its targets. A put is called by the topic of its first LogGroup, whose first letter is its target."""

    def __init__(self, clock, names="ab", limit=4, max_in_flight=100):
        self.clock = clock
        self.begun = []  # the names of puts, as often as they were begun
        self.tries = collections.defaultdict(list)  # name of a put -> its PutInFlight
        self.other_ends, self.opened = {}, []  # of connections
        self.targets = {name: self.target(number, name, limit) for number, name in enumerate(names)}
        self.loop = LoopTurnedByHand(list(self.targets.values()), max_in_flight)
        self.threads, self.opener = self.loop.opener, Opener()
        self.loop.opener = self.opener

    def target(self, number, name, limit):
        config = logstore_config(logstore=name, endpoint="sls.test", access_key_id="id", access_key="secret")
        client = PutClient(config)
        client.factory.connect = self.connect

        def put_log_raw(project, logstore, put):
            self.begun += names_of([put])
            in_flight = PutClient.put_log_raw(client, project, logstore, put)
            self.tries[self.begun[-1]].append(in_flight)
            return in_flight

        client.put_log_raw = put_log_raw
        return Target(TargetSettings(number, config, ()), client, limit, None)

    def connect(self, _=None):
        connection = http.client.HTTPConnection("sls.test")
        connection.sock, there = socket.socketpair()
        for end in (connection.sock, there):
            end.settimeout(5)  # whoever blocks is red
        connection.opened = self.clock.monotonic()
        self.other_ends[connection.sock] = there
        self.opened.append(connection)
        return connection

    def put(self, target, envelope=b"", began=0.0):
        put = PutRequest(envelope)
        put.target, put.began = self.targets[target], began
        return put

    def batch(self, log_groups, puts=None):
        """Of the LogGroups of these topics, each in a put of its own unless `puts` are told, as "a0+a2 b1"."""
        by_topic = {topic: LogGroup(topic, 1, b"", b"x" * 10) for topic in log_groups.split()}
        requests = []
        for topics in (puts or log_groups).split():
            put = self.put(topics[0])
            for topic in topics.split("+"):
                put.add(by_topic[topic])
            requests.append(put)
        return Batch(list(by_topic.values()), requests)

    def submit(self, *arguments):
        return self.submit_batch(self.batch(*arguments))

    def submit_large(self, size):
        """A put a0 of so many bytes that don't get fewer by compression."""
        put = self.put("a", os.urandom(size)).add(LogGroup("a0", 1, b"", b""))
        return self.submit_batch(Batch(put.log_groups, [put]))

    def submit_batch(self, batch):
        self.loop.submit(batch)
        self.turn()
        return batch

    def call(self, method, *arguments):
        self.loop.call(method, *arguments)
        self.turn()

    def turn(self, seconds=0.0):
        """As often as there is something to do, then so many seconds later once more."""
        for later in (0.0, seconds) if seconds else (0.0,):
            self.clock.now += later
            for _ in range(12):
                self.loop.turn()

    def socket_of(self, name):
        return self.other_ends[self.tries[name][-1].sock]

    def answer(self, names, text=ACCEPTED):
        """To the last try of each."""
        for name in names.split():
            assert self.socket_of(name).recv(100000).startswith(b"POST /logstores/%s/" % name[:1].encode())
            self.socket_of(name).sendall(text)
            self.turn()

    def adapt(self, error=None, seconds=0.0, size=0):
        """Target a adapts to a put of so many bytes that has taken so long."""
        self.targets["a"].adapt(self.put("a", b"x" * size, self.clock.now - seconds), error)

    def in_flight(self):
        return sorted(names_of(put for put, _ in self.loop.flights.values()))

    def open(self):
        """The connections that wait to be opened."""
        self.opener.go_on()
        self.turn()

    def hang_up(self, name, seconds=0.0):
        """Closes the connection of its last try, then so much time goes by."""
        self.socket_of(name).close()
        self.turn(seconds)

    def put_of(self, batch, name):
        return next(put for put in batch.puts if names_of([put]) == [name])

    def warm_up(self, names="ab", count=1):
        """So many puts of each target are accepted, which makes its limit one more each, and then `begun` is empty."""
        for name in names:
            for number in range(count):
                self.submit("%swarm%d" % (name, number))
                self.answer("%swarm%d" % (name, number))
        self.begun.clear()

    def assert_at_rest(self):
        """Nothing is left of any batch."""
        assert not self.loop.flights
        assert not self.loop.batches
        assert not self.loop.by_file
        assert self.loop.bytes_in_flight == 0
        for target in self.targets.values():
            assert (target.in_flight, len(target.queue), len(target.failed)) == (0, 0, 0)
            assert not target.put_retries.failing
            assert target.client.opening == 0

    def assert_delivered(self, batch):
        assert batch.is_over and not batch.unfinished
        self.assert_at_rest()

    def close(self):
        for here, there in self.other_ends.items():
            here.close()
            there.close()
        self.loop.selector.close()
        self.loop.wake_receiver.close()
        self.loop.wake_sender.close()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    everything = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
    monkeypatch.setattr(dispatch_data, "time", types.SimpleNamespace(**{**everything, "monotonic": clock.monotonic}))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return clock


@pytest.fixture
def world_of(clock):
    """Makes worlds, and closes them."""
    made = []
    yield lambda *names, **options: made.append(World(clock, *names, **options)) or made[-1]
    for world in made:
        world.close()


@pytest.fixture
def world(world_of):
    return world_of()


# ---- what begins, and in what order


def test_puts_begin_in_order_one_more_at_a_time_after_each_that_is_accepted(world):
    batch = world.submit("a0 a1 a2 a3 a4 a5 a6 a7 a8 a9")
    assert world.begun == ["a0"]
    world.answer("a0")
    assert world.begun == ["a0", "a1", "a2"]
    world.answer("a1")
    assert world.in_flight() == ["a2", "a3", "a4"]
    world.answer("a2 a3 a4")
    assert world.in_flight() == ["a5", "a6", "a7", "a8"], "no more than its writers"
    assert world.loop.bytes_in_flight > 0
    assert not batch.change.is_set()
    world.answer("a5 a6 a7 a8 a9")
    assert world.begun == ["a%d" % number for number in range(10)]
    assert batch.change.is_set() and not batch.unfinished
    assert batch.delivered() == (10, 0)
    assert batch.accepted_at == world.clock.now
    assert (world.targets["a"].log_groups, world.targets["b"].log_groups) == (10, 0)
    world.assert_at_rest()


def test_batches_take_turns_at_a_target(world):
    world.submit("a0 a1 a3")
    world.submit("a2")
    world.answer("a0")
    assert world.begun == ["a0", "a1", "a2"]


def test_a_target_without_room_holds_up_what_comes_after_it_in_its_batch_alone(world):
    world.submit("a0 a1 b0")
    world.submit("b1")
    assert world.begun == ["a0", "b1"]
    world.answer("a0")
    assert world.begun == ["a0", "b1", "a1"]
    world.answer("b1")
    assert world.begun == ["a0", "b1", "a1", "b0"]


def test_no_more_are_in_flight_than_there_may_be_connections(world_of):
    world = world_of("abcd", max_in_flight=2)
    for name in "abcd":
        world.submit(name + "0")
    assert world.in_flight() == ["a0", "b0"]
    assert world.loop.sleeps[-1] > 0, "it waits for an answer, not busily"
    world.answer("a0")
    assert world.in_flight() == ["b0", "c0"], "whoever is ready first is the next"


def test_beyond_so_many_bytes_in_flight_a_target_has_one_put(world, monkeypatch):
    world.warm_up("a", 3)
    monkeypatch.setattr(PutLoop, "MAX_BYTES", 1)
    world.submit("a0 a1")
    assert world.in_flight() == ["a0"]
    world.submit("b0")
    assert world.in_flight() == ["a0", "b0"], "but never none"
    world.answer("a0")
    assert world.in_flight() == ["a1", "b0"]


def test_after_a_while_it_looks_for_answers_before_it_begins_the_rest(world_of, clock):
    world = world_of("abcdef")
    world.opener.is_held = True
    for name in "abcdef":
        world.loop.submit(world.batch(name + "0"))
    clock.look = PutLoop.TURN_SECONDS / 3
    world.loop.turn()
    assert 1 <= len(world.begun) < 6
    assert world.loop.sleeps == [0], "which takes no time"
    world.turn()
    assert len(world.begun) == 6


def test_a_target_whose_batch_is_given_up_before_its_turn_gets_another_turn(world_of):
    world = world_of("ab", max_in_flight=1)
    world.submit("a0")
    batch = world.submit("b0")
    world.call(world.loop.end, batch)
    world.answer("a0")
    world.submit("b1")
    assert world.begun == ["a0", "b1"]


def test_what_may_take_long_before_a_put_is_done_by_whoever_submits_the_batch(world):
    """The first key, the CAs: the loop waits for neither, and a batch is none the less submitted where they fail."""
    world.warm_up("a")
    prepared = []

    def prepare():
        prepared.append(list(world.begun))
        raise CallError("NoKey", "")

    world.targets["a"].client.prepare = prepare
    world.loop.submit(world.batch("a0 a1"))
    assert prepared == [[]]
    world.turn()
    assert world.begun == ["a0", "a1"]


# ---- its sleep


def test_it_sleeps_until_something_is_due_and_no_longer_than_until_the_next_look_at_deadlines(world):
    world.turn()
    assert world.loop.sleeps[-1] == PutLoop.HOUSEKEEPING_INTERVAL
    done = []
    world.loop.call_at(world.clock.now + 0.05, done.append, "first")
    world.loop.call_at(world.clock.now + 0.01, done.append, "before it")
    world.turn()
    assert world.loop.sleeps[-1] == pytest.approx(0.01)
    assert not done
    world.turn(0.05)
    assert done == ["before it", "first"]


def test_whoever_calls_between_its_last_look_and_its_sleep_wakes_it(world):
    """Else a batch would wait for the next look at deadlines; and what was there before the last look is seen by it."""
    done, woken = [], []
    world.turn()
    with selectors.DefaultSelector() as readable:
        readable.register(world.loop.wake_receiver, selectors.EVENT_READ)

        def call():
            world.loop.call(done.append, "called")
            woken.extend(readable.select(0))

        world.loop.on_select = call
        world.loop.turn()
        assert woken
        world.loop.on_select = lambda: None
        world.loop.turn()
        assert done == ["called"]
        world.turn()
        assert not readable.select(0), "what has woken it was read"
        world.loop.call(done.append, "awake")
        assert not readable.select(0), "one that is awake need not be woken"


def test_it_says_that_it_sleeps_before_it_looks_for_calls_for_the_last_time(world):
    """The other way round one that came between would wake nobody."""

    class Calls(collections.deque):
        def __bool__(self):
            looks.append(world.loop.is_asleep)
            return len(self) > 0

    looks = []
    world.loop.calls = Calls()
    world.loop.turn()
    assert looks == [False, True]


def test_calls_are_done_in_their_order(world):
    done = []
    for number in range(3):
        world.loop.call(done.append, number)
    world.turn()
    assert done == [0, 1, 2]


def test_what_fails_in_a_call_fails_its_batch_and_is_a_defect(world):
    def fail(_):
        raise MemoryError

    batch = world.batch("a0")
    world.loop.call(fail, batch)
    with pytest.raises(MemoryError):
        world.loop.turn()
    assert isinstance(batch.failure, MemoryError) and batch.change.is_set()


# ---- what fails


def test_what_failed_waits_for_the_pause_and_what_was_never_tried_only_from_the_second_on(world):
    world.warm_up("a", 3)
    world.clock.now += 1
    batch = world.submit("a0 a1 a2 a3 a4 a5")
    assert world.in_flight() == ["a0", "a1", "a2", "a3"]
    target = world.targets["a"]
    world.answer("a0", BUSY)
    assert (target.failures, batch.failing) == (1, {world.put_of(batch, "a0")})
    pause_ends = target.retry_at
    assert world.clock.now < pause_ends
    assert world.in_flight() == ["a1", "a2", "a3", "a4"], "what was never tried goes on after a first failure"
    world.answer("a1", BUSY)
    assert (target.failures, target.retry_at) == (1, pause_ends), "those that were in flight then don't count"
    world.turn(pause_ends - world.clock.now - 0.001)
    assert world.begun.count("a0") == 1
    world.answer("a2", BUSY)
    world.turn(0.002)
    assert world.begun.count("a0") == 2
    world.answer("a0", BUSY)
    assert target.failures == 2
    world.submit("a6")
    begun = len(world.begun)
    world.answer("a3 a4 a5", BUSY)
    assert len(world.begun) == begun, "nothing begins in the second pause"
    world.turn(1)
    assert len(world.begun) > begun


def test_an_accepted_put_ends_the_pause(world):
    world.warm_up("a", 2)
    world.clock.now += 1
    world.submit("a0 a1 a2")
    world.answer("a0", BUSY)
    world.answer("a1")
    assert (world.targets["a"].failures, world.targets["a"].retry_at) == (0, 0.0)
    assert world.begun.count("a0") == 2, "at once"


def test_the_pause_grows_with_failures_but_not_where_others_were_accepted_just_now(clock, world):
    target = world.targets["a"]
    pauses = []
    for _ in range(10):
        clock.now += 100
        world.adapt(CallError("ServerBusy", "", 503))
        pauses.append(target.retry_at - clock.now)
    assert target.failures == 10
    assert pauses[0] <= 0.1 < 2 < pauses[-1] <= dispatch_data.MAX_BACKOFF
    target.last_accepted = clock.now
    clock.now += 4
    target.retry_at = 0.0
    world.adapt(CallError("ServerBusy", "", 503))
    assert 0.1 < target.retry_at - clock.now <= 0.25, "a sixteenth of the time since"


def test_of_one_that_fails_every_other_try_is_one_that_was_never_tried(world):
    """One that always fails bars no others."""
    world.warm_up("a")
    world.clock.now += 1
    world.submit("a0 a1 a2")
    tried = []
    for _ in range(4):
        (name,) = world.in_flight()[:1]
        tried.append(name)
        if len(tried) < 2:
            world.answer("a1")
        world.answer(name, BUSY)
        world.turn(6)
    assert set(tried) >= {"a0", "a2"}, tried


@pytest.mark.parametrize("failures, limit", [(0, 8), (1, 8), (2, 2), (3, 2), (9, 2)])
def test_a_target_that_fails_again_gets_a_quarter_of_its_limit(world_of, failures, limit):
    world = world_of("a", limit=8)
    world.warm_up("a", 8)
    target = world.targets["a"]
    target.failures, target.last_accepted = failures, world.clock.now
    world.submit(" ".join("a%d" % number for number in range(10)))
    assert len(world.in_flight()) == limit


def test_a_target_in_doubt_gets_one_put(world):
    world.warm_up("a", 4)
    target = world.targets["a"]
    target.failures = 1
    world.clock.now += dispatch_data.DOUBT_SECONDS + 1
    assert target.is_doubtful()
    world.submit("a0 a1")
    assert world.in_flight() == ["a0"]


def test_when_a_target_is_in_doubt(world):
    target = world.targets["a"]
    assert target.is_doubtful(), "it has taken none so far"
    world.warm_up("a")
    world.clock.now += 1000
    assert not target.is_doubtful(), "nothing has failed since"
    target.failures = 1
    assert target.is_doubtful()
    target.last_accepted = world.clock.now
    assert not target.is_doubtful(), "not before a while without a success"
    world.clock.now += dispatch_data.DOUBT_SECONDS + 0.1
    assert target.is_doubtful()


def test_the_limit_follows_what_is_slow_for_its_size(clock, world):
    target, error = world.targets["a"], CallError("NoAnswer", "")
    slow = dispatch_data.SLOW_PUT_SECONDS + 1
    target.limit = 3
    world.adapt(None, slow, 100)
    assert target.limit == 3
    world.adapt(None, slow, int(2 * dispatch_data.SLOW_PUT_RATE))
    assert target.limit == 4, "not slow for one of this size"
    world.adapt(error)
    assert target.limit == 4, "a failure that comes at once says nothing of the line"
    world.adapt(error, slow)
    assert target.limit == 2
    for _ in range(3):
        world.adapt(error, slow)
    assert target.limit == 1
    world.adapt(CallError("PostBodyInvalid", "", 400), slow)
    failures, target.limit = target.failures, 4
    world.adapt(CallError("PostBodyInvalid", "", 400), slow)
    assert (target.failures, target.limit) == (failures, 4), "what blames the put says nothing of the target"


def test_a_target_that_takes_long_is_given_twice_as_long(clock, world):
    target = world.targets["a"]
    world.adapt(None, 40)
    assert target.timeout == 80
    world.adapt(None, 100)
    assert target.timeout == dispatch_data.MAX_RESPONSE_TIMEOUT
    world.submit("a0")
    assert world.tries["a0"][0].timeout == dispatch_data.MAX_RESPONSE_TIMEOUT
    world.clock.now += 1
    world.answer("a0")
    assert world.targets["a"].timeout == pytest.approx(2)
    world.submit("a1")
    assert world.tries["a1"][0].timeout == dispatch_data.RESPONSE_TIMEOUT, "but never less than this"


def test_a_put_that_ran_out_of_time_gets_twice_as_much_the_next_time(world):
    batch = world.submit("a0")
    for seconds in (30, 60, 120, 120):
        tried = world.tries["a0"][-1]
        assert tried.timeout == seconds
        world.turn(seconds - 1)
        assert world.in_flight() == ["a0"] and world.tries["a0"][-1] is tried
        world.turn(seconds)
        assert not world.in_flight() or world.tries["a0"][-1] is not tried
        assert world.socket_of("a0") not in world.loop.by_file
        world.turn(6)
    assert len(world.tries["a0"]) == 5
    world.answer("a0")
    world.assert_delivered(batch)


# ---- what waits for what fails


def test_what_is_far_behind_a_put_that_failed_waits_for_it(world):
    """Else, were the batch to end there, all that would be delivered once more."""
    world.warm_up("ab", 4)
    far = dispatch_data.FEW_LOG_GROUPS + 2
    batch = world.submit("a0 " + " ".join("b%d" % number for number in range(1, far + 1)))
    world.answer("a0", BUSY)
    for number in range(1, far - 1):
        world.answer("b%d" % number)
    assert world.in_flight() == [], "b%d has more than so many before it" % (far - 1)
    world.turn(1)
    assert world.in_flight() == ["a0"]
    assert batch.delivered() == (0, far - 2)
    world.answer("a0")
    assert world.in_flight() == ["b%d" % (far - 1), "b%d" % far]
    assert batch.delivered() == (far - 1, 0)


def test_a_put_is_as_far_as_its_last_log_group(world):
    world.warm_up("ab", 4)
    world.targets["b"].limit = 1
    topics = " ".join("b%d" % number for number in range(1, 30))
    world.submit("a0 " + topics, "a0 b1 b2 b3+b29 b4")
    world.answer("a0", BUSY)
    world.answer("b1 b2")
    assert world.in_flight() == []
    world.turn(1)
    world.answer("a0")
    assert world.in_flight() == ["b3", "b4"]


def test_behind_a_target_in_doubt_nothing_goes_on_for_a_while_then_a_little(world):
    """`a` has taken nothing so far: it may be one that is missing, and all else would be repeated at each start."""
    world.warm_up("b", 4)
    world.submit("a0 b0 b1")
    assert world.in_flight() == ["a0", "b0", "b1"], "nothing has failed yet"
    world.answer("a0", BUSY)
    world.answer("b0 b1")
    second = world.submit("b2 a2 b3")
    assert world.in_flight() == ["a2"], "before b2, though it comes after it"
    begun = world.clock.now
    while world.clock.now < begun + dispatch_data.HOLD_SECONDS - 15:
        world.turn(6)
        for name in world.in_flight():
            world.answer(name, BUSY)
    assert "b2" not in world.begun and "b3" not in world.begun
    world.turn(20)
    assert "b2" in world.begun, "little is lost by it, and b's shards would wait for ever"
    assert second.delivered() == (0, 0)


def test_of_each_target_that_fails_the_first_put_comes_first_and_is_waited_for(world):
    world.warm_up("ab", 4)
    world.targets["a"].failures = 1
    batch = world.batch("b0 b1 a0 a1")
    assert list(batch.failing) == [world.put_of(batch, "a0")]
    assert names_of(batch.waiting) == ["a0", "b0", "b1", "a1"]
    world.submit_batch(batch)
    assert world.in_flight() == ["a0", "a1", "b0", "b1"], "not in doubt, and nothing is far"
    world.targets["a"].failures = 1
    world.clock.now += dispatch_data.DOUBT_SECONDS + 1
    world.submit("b2 a2 a3 b3")
    assert world.in_flight() == ["a0", "a1", "b0", "b1"], "a2 waits for its turn, and all others for a2"


def test_what_is_accepted_or_blamed_is_waited_for_no_longer(world):
    world.warm_up("ab", 4)
    batch = world.submit("a0 a1 " + " ".join("b%d" % number for number in range(40)))
    world.answer("a0 a1", BUSY)
    assert len(batch.failing) == 2
    world.turn(1)
    world.answer("a0")
    assert names_of(batch.failing) == ["a1"]
    world.turn(1)
    world.answer("a1", INVALID)
    assert not batch.failing
    assert names_of(put for put, _ in batch.blamed) == ["a1"]
    assert batch.change.is_set()


def test_since_when_a_batch_waits_is_told_by_the_first_of_what_fails(world):
    world.warm_up("ab", 4)
    world.clock.now += 10
    batch = world.submit("a0 a1 b0")
    world.clock.now += 10
    world.answer("a0", BUSY)
    since = batch.failing_since
    assert since == pytest.approx(world.clock.now)
    world.clock.now += 10
    world.answer("a1", BUSY)
    assert batch.failing_since == since
    world.turn(6)
    world.answer("a0 a1")
    world.answer("b0", BUSY)
    assert batch.failing_since == pytest.approx(world.clock.now), "all before was accepted"


# ---- puts that are blamed


def test_what_comes_in_the_place_of_a_blamed_put_is_tried_after_a_pause(world):
    world.warm_up("ab", 4)
    batch = world.submit("a0 a1 b0", "a0+a1 b0")
    joined = world.put_of(batch, "a0")
    world.answer("a0", INVALID)
    world.answer("b0")
    target = world.targets["a"]
    put, error = batch.blamed.popleft()
    assert (put, error.code) == (joined, "PostBodyInvalid")
    assert error.__traceback__ is None, "its frames hold the request"
    assert world.targets["a"].failures == 0, "it says nothing of the target"
    assert not batch.change.is_set() or batch.unfinished
    singles = target.split_or_reject(put, error, None)
    world.call(world.loop.replace, batch, put, singles)
    assert set(batch.unfinished) == set(singles)
    assert world.in_flight() == []
    world.turn(dispatch_data.INITIAL_BACKOFF)
    assert world.in_flight() == ["a0", "a1"]
    world.answer("a0")
    world.answer("a1", INVALID)
    batch.blamed.popleft()
    pauses = []
    for _ in range(6):  # the same again
        world.call(world.loop.replace, batch, singles[1], [singles[1]])
        began = world.clock.now
        while not world.in_flight():
            world.turn(0.05)
        pauses.append(world.clock.now - began)
        world.answer("a1", INVALID)
        batch.blamed.popleft()
    assert pauses[0] < 0.2 < 1 < pauses[-1] < 6
    batch.change.clear()
    target.forget(singles[1])  # it is set aside
    world.call(world.loop.replace, batch, singles[1], [])
    assert not batch.unfinished and batch.change.is_set()
    world.assert_at_rest()


def test_of_a_batch_that_is_given_up_nothing_blamed_is_tried_again(world):
    world.warm_up("ab", 4)
    batch = world.submit("a0 a1")
    world.answer("a0", INVALID)
    world.answer("a1", INVALID)
    (first, _), (second, _) = batch.blamed
    world.call(world.loop.replace, batch, first, [first])
    world.call(world.loop.end, batch)
    world.targets["a"].dead_letter_retries.on_failure(second, OSError("as it ended, it could not be set aside"))
    world.call(world.loop.replace, batch, second, [second])
    world.turn(10)
    assert world.begun == ["a0", "a1"]
    assert not world.targets["a"].dead_letter_retries.failing
    world.assert_at_rest()


def test_a_put_that_waits_for_its_turn_is_held_when_one_before_it_fails(world):
    """By rule 2: nobody knows of target a whether it takes puts."""
    world.warm_up("b")
    world.targets["b"].limit = 1
    world.submit("b8")
    batch = world.submit("a0 b1")
    assert world.in_flight() == ["a0", "b8"] and batch in world.targets["b"].queue
    world.hang_up("a0")
    world.answer("b8")
    assert "b1" not in world.begun
    while "a0" not in world.in_flight():
        world.turn(1.0)
    world.answer("a0")
    world.answer("b1")
    world.assert_delivered(batch)


def test_what_a_cut_calls_off_holds_nothing(world_of):
    world = world_of("abc")
    for name in "ac":
        world.targets[name].failures = 1
    batch = world.batch("b0 c1 a2")
    begun = batch.waiting.popleft()
    assert (names_of([begun]), sorted(names_of(batch.failing))) == (["c1"], ["a2", "c1"])
    batch.cut()
    assert (names_of(batch.waiting), names_of(batch.failing)) == (["b0"], ["c1"])


# ---- the end of a batch


def test_a_batch_that_is_cut_ends_with_what_has_begun_and_what_stands_before_it(world):
    world.warm_up("ab", 1)
    world.targets["a"].limit = 1
    batch = world.submit("a0 a1 b0 a2")
    assert world.in_flight() == ["a0"], "a1 is the next, and waits for its turn"
    world.call(world.loop.cut, batch, 0)
    assert not batch.is_over
    world.answer("a0")
    assert world.begun == ["a0"]
    assert batch.is_over and batch.change.is_set()
    assert batch.delivered() == (1, 0)
    world.assert_at_rest()


def test_what_stands_before_a_put_that_has_begun_is_still_delivered(world):
    """A put that is joined of LogGroups of the whole batch leaves much beyond what is done with."""
    world.warm_up("ab", 4)
    batch = world.batch("b0 a1 b2 b3 a4 b5 a6 b7", "b0+b5 a1 b2+b7 b3 a4 a6")
    world.targets["a"].limit = 1
    world.submit_batch(batch)
    assert world.in_flight() == ["a1", "b0", "b2", "b3"], "a4 waits for its turn"
    world.call(world.loop.cut, batch, 0)
    world.answer("b0 b2 b3")
    assert batch.delivered() == (1, 4)
    assert not batch.is_over
    world.answer("a1")
    world.answer("a4")
    assert "a6" in world.begun, "it stands before b7, which has been delivered"
    assert not batch.is_over
    world.answer("a6")
    assert batch.delivered() == (8, 0) and batch.change.is_set()
    world.assert_at_rest()


def test_what_is_called_off_is_no_more_than_what_stands_behind_all_that_has_begun(world):
    world.warm_up("ab", 4)
    world.targets["a"].limit = 1
    batch = world.submit("b0 a1 a2 b3 a4")
    assert world.in_flight() == ["a1", "b0"]
    world.call(world.loop.cut, batch, 0)
    world.answer("b0")
    assert not batch.is_over, "a1 is in flight"
    world.answer("a1")
    assert batch.is_over and batch.delivered() == (2, 0)
    world.turn(10)
    assert world.in_flight() == [] and "a2" not in world.begun


def test_what_is_needed_may_need_more_in_its_turn(world):
    world.targets["a"].limit = 1
    batch = world.submit("b0 a1 a2 b3 a4 a5", "b0+b3 a1 a2+a5 a4")
    assert world.in_flight() == ["a1", "b0"]
    world.call(world.loop.cut, batch, 0)
    world.answer("b0 a1 a2")
    assert not batch.is_over, "a5 was delivered, and a4 stands before it"
    world.answer("a4")
    assert batch.delivered() == (6, 0)
    world.assert_at_rest()


def test_what_is_needed_is_known_in_whatever_order_it_waits(world_of):
    world = world_of("abc")
    batch = world.batch("b0 a1 a2 b3 c4 a5", "b0+b3 a1 a2+a5 c4")
    batch.waiting.popleft()  # b0 begins
    batch.defer(world.targets["a"])
    assert names_of(batch.waiting) == ["c4", "a1", "a2"]
    batch.cut()
    assert set(names_of(batch.waiting)) == {"a1", "a2", "c4"}


def test_what_a_cut_batch_does_not_need_does_not_begin_when_there_is_room(world):
    world.targets["a"].limit = 2
    world.submit("a9")
    batch = world.submit("a0 a1 a2")
    assert world.in_flight() == ["a0", "a9"]
    world.call(world.loop.cut, batch, 0)
    world.answer("a9")
    assert world.in_flight() == ["a0"]


def test_a_batch_that_is_cut_again_and_again_keeps_its_turn(world):
    world.targets["a"].limit = 1
    world.submit("a9")
    batch, other = world.submit("b1 a2 b3", "b1+b3 a2"), world.submit("a4")
    for _ in range(3):
        world.call(world.loop.cut, batch, 0)
    world.turn()
    assert world.in_flight() == ["a9", "b1"]
    world.targets["a"].max_in_flight = 1
    world.answer("a9")
    world.call(world.loop.cut, batch, 0)
    assert world.in_flight() == ["a4", "b1"], "cut once, it went to the end of the queue"
    third = world.submit("a5")
    for _ in range(3):
        world.call(world.loop.cut, batch, 0)
    world.answer("a4")
    assert world.in_flight() == ["a2", "b1"]
    assert other.change.is_set() and not third.change.is_set()


def test_a_batch_is_disputed_while_it_will_be_clear_soon_whose_fault_a_refusal_is(world):
    batch = world.batch("a0 a1")
    put = world.put_of(batch, "a1")
    assert not batch.is_disputed()
    put.rejections, put.first_rejection = 1, world.clock.now
    world.clock.now += 2 * dispatch_data.REJECTION_PATIENCE - 1
    assert batch.is_disputed()
    world.clock.now += 2
    assert not batch.is_disputed()
    put.first_rejection = world.clock.now
    batch.unfinished.remove(put)
    assert not batch.is_disputed(), "it is set aside"


def test_a_batch_is_not_cut_before_so_many_are_done_with(world):
    world.targets["a"].limit = 1
    batch = world.submit("a0 a1 a2")
    world.call(world.loop.cut, batch, 1)
    world.answer("a0")
    assert world.in_flight() == ["a1", "a2"], "nothing was done with, so that it went on"
    world.targets["a"].limit = 1
    world.call(world.loop.cut, batch, 1)
    assert batch.is_cut


def test_a_batch_that_is_cut_while_a_put_of_it_fails_goes_on_until_that_is_accepted(world):
    """As long as others behind it were delivered; else it ends at once."""
    world.warm_up("ab", 4)
    batch = world.submit("a0 b1")
    world.answer("a0", BUSY)
    world.answer("b1")
    world.call(world.loop.cut, batch, 0)
    assert not batch.is_over and batch.delivered() == (0, 1)
    world.turn(1)
    world.answer("a0")
    assert batch.delivered() == (2, 0)
    world.assert_at_rest()

    batch = world.submit("b2 a2")
    world.answer("b2")
    world.answer("a2", BUSY)
    world.call(world.loop.cut, batch, 0)
    assert batch.is_over and batch.delivered() == (1, 0)
    world.assert_at_rest()


def test_a_batch_with_nothing_to_put_is_over_at_once(world):
    world.loop.next_housekeeping = world.clock.now + 1
    batch = world.submit_batch(Batch([LogGroup("x0", 1, b"", b"")], []))
    assert batch.change.is_set() and batch.delivered() == (1, 0)
    world.assert_delivered(batch)


def test_one_that_is_not_cut_does_not_end_by_itself(world):
    batch = world.submit("a0")
    world.answer("a0", BUSY)
    assert not batch.is_over
    world.turn(1)
    assert world.in_flight() == ["a0"]


def test_of_a_batch_that_is_given_up_nothing_begins_and_others_go_on(world):
    world.warm_up("ab", 1)
    given_up, other = world.submit("a0 a1 a2 a3"), world.submit("a4 a5")
    world.answer("a0", BUSY)
    world.answer("a1", BUSY)
    assert world.targets["a"].put_retries.failing
    world.call(world.loop.end, given_up)
    assert given_up.is_over
    assert not set(given_up.unfinished) & world.targets["a"].put_retries.failing
    begun = list(world.begun)
    for _ in range(10):
        world.turn(1)
        for name in world.in_flight():
            world.answer(name)
    assert set(world.begun[len(begun) :]) <= {"a4", "a5", "a2"}
    assert world.begun.count("a0") == world.begun.count("a1") == 1 and "a3" not in world.begun
    assert not other.unfinished
    world.assert_at_rest()


def test_what_becomes_of_the_puts_in_flight_of_a_batch_that_is_given_up_is_nobodys(world):
    world.warm_up("ab", 4)
    batch = world.submit("a0 a1 a2 a3")
    world.call(world.loop.end, batch)
    batch.change.clear()
    world.answer("a0", BUSY)
    world.answer("a1", INVALID)
    world.answer("a2")
    assert not batch.blamed
    assert world.begun == ["a0", "a1", "a2", "a3"]
    world.answer("a3")
    world.turn(10)
    assert world.begun == ["a0", "a1", "a2", "a3"]
    world.assert_at_rest()


def test_other_batches_failed_puts_are_tried_on_where_one_is_given_up(world):
    world.warm_up("ab", 4)
    one, other = world.submit("a0"), world.submit("a1")
    world.answer("a0 a1", BUSY)
    world.call(world.loop.end, one)
    world.turn(1)
    assert world.in_flight() == ["a1"]
    world.answer("a1")
    assert not other.unfinished
    world.assert_at_rest()


# ---- a target that takes nothing


def test_behind_a_target_that_takes_nothing_for_long_a_little_of_the_rest_goes_on(world):
    """What its queue holds up is put behind what others take, but before what is too far behind to begin."""
    world.warm_up("b", 4)
    topics = ["a%d" % number for number in range(16)] + ["b%d" % number for number in range(16, 40)]
    batch = world.submit(" ".join(topics))

    def refuse_for(seconds):
        end = world.clock.now + seconds
        while world.clock.now < end:
            world.turn(2)
            for name in world.in_flight():
                world.answer(name, BUSY if name.startswith("a") else ACCEPTED)

    refuse_for(dispatch_data.HOLD_SECONDS - 5)
    assert "b16" not in world.begun
    refuse_for(10)
    assert "b16" in world.begun
    assert "a15" not in world.begun
    refuse_for(200)
    assert "a15" in world.begun
    assert batch.delivered() == (0, 5), "what is farther than so many waits on"
    assert "b39" not in world.begun


def test_behind_a_target_that_hangs_a_little_of_the_rest_goes_on(world):
    """None of its puts fails before its deadline, and that may be far away."""
    world.warm_up("ab", 4)
    world.targets["a"].limit, world.targets["a"].timeout = 1, 120
    batch = world.submit("a0 a1 b2 b3")
    world.turn(dispatch_data.HOLD_SECONDS - 1)
    assert world.in_flight() == ["a0"]
    world.turn(2)
    assert world.in_flight() == ["a0", "b2", "b3"]
    world.answer("b2 b3")
    world.answer("a0")
    world.answer("a1")
    assert batch.delivered() == (4, 0)
    world.assert_at_rest()


def test_a_batch_that_was_put_in_another_order_has_lost_its_turn_at_the_target_that_hangs(world):
    """Else that would be given what is for another."""
    world.warm_up("ab", 4)
    for target in world.targets.values():
        target.limit, target.timeout = 1, 120
    batch = world.submit("a0 a1 b2 b3")
    world.turn(dispatch_data.HOLD_SECONDS + 1)
    assert world.in_flight() == ["a0", "b2"]
    world.answer("a0")
    assert world.in_flight() == ["b2"], "b3 is the next"
    world.answer("b2")
    world.answer("a1 b3")
    world.assert_delivered(batch)


def test_a_batch_is_not_put_in_another_order_that_waits_for_less_long(world):
    world.warm_up("ab", 4)
    world.targets["a"].limit, world.targets["a"].timeout = 1, 120
    world.submit("a0")
    world.turn(dispatch_data.HOLD_SECONDS - 1)
    world.submit("a1 b2")
    world.turn(2)
    assert world.in_flight() == ["a0"]


def test_a_target_that_takes_puts_keeps_its_turn_however_long_one_of_them_takes(world):
    world.warm_up("ab", 4)
    target = world.targets["a"]
    target.limit, target.max_in_flight, target.timeout = 2, 2, 120
    world.submit("a0")
    world.submit("a9 a1 a3 b2")
    world.turn(dispatch_data.HOLD_SECONDS - 1)
    world.answer("a9")
    world.turn(2)
    assert world.in_flight() == ["a0", "a1"]


# ---- connections


def test_a_connection_is_opened_by_others_and_used_again(world):
    world.opener.is_held = True
    world.submit("a0")
    assert (world.in_flight(), world.opened) == (["a0"], [])
    world.open()
    world.answer("a0")
    world.submit("a1")
    assert len(world.opened) == 1
    assert not world.loop.idle, "else it would count among those that are too many"
    world.answer("a1")
    assert [one for one, _ in world.targets["a"].client.idle_connections] == world.opened
    world.assert_at_rest()


def test_a_connection_that_takes_long_to_open_is_waited_for(world):
    """Each address of a name has CONNECT_TIMEOUT."""
    world.opener.is_held = True
    world.submit("a0")
    world.turn(3 * dispatch_data.CONNECT_TIMEOUT - 1)
    world.open()
    world.answer("a0")
    assert world.begun == ["a0"]


def test_connections_that_do_not_open_hold_up_no_other_targets(world_of):
    """As where a name is not found for long: each is opened in a thread of its own."""
    world = world_of("ab", limit=20)
    world.loop.opener = world.threads
    go_on = threading.Event()

    def connect(_):
        go_on.wait()
        raise OSError("no such name")

    world.targets["a"].client.factory.connect = connect
    world.targets["a"].limit = 20
    world.submit(" ".join("a%d" % number for number in range(20)))
    world.submit("b0")
    end = time.monotonic() + 30
    while not world.tries["b0"][0].connection and time.monotonic() < end:
        world.loop.turn()
    go_on.set()
    world.answer("b0")


def test_few_connections_are_opened_at_once(world_of, monkeypatch):
    world = world_of("a", limit=10)
    monkeypatch.setattr(PutLoop, "MAX_OPENING", 3)
    world.targets["a"].limit = 5
    world.opener.is_held = True
    world.submit("a0 a1 a2 a3 a4")
    assert (len(world.in_flight()), len(world.opener.waiting)) == (5, 3)
    world.open()
    assert len(world.opener.waiting) == 2
    world.open()
    world.answer("a0 a1 a2 a3 a4")
    world.assert_at_rest()


def test_a_connection_that_is_opened_when_its_put_is_over_is_closed(world):
    world.opener.is_held = True
    world.submit("a0")
    world.turn(3 * dispatch_data.CONNECT_TIMEOUT + 1)
    world.turn(6)
    assert world.begun.count("a0") == 2
    for _ in range(2):
        world.open()
    first, second = world.opened
    assert first.sock is None
    assert second.sock
    world.answer("a0")
    world.assert_at_rest()


def test_none_is_opened_for_what_is_over_before_its_turn(world, monkeypatch):
    monkeypatch.setattr(PutLoop, "MAX_OPENING", 1)
    world.targets["a"].limit = 2
    world.opener.is_held = True
    batch = world.submit("a0 a1")
    world.turn(3 * dispatch_data.CONNECT_TIMEOUT + 1)
    world.call(world.loop.end, batch)
    world.open()
    world.open()
    assert len(world.opened) == 1
    world.turn(6)
    world.assert_at_rest()


def test_what_is_given_up_while_its_connection_is_opened_is_not_sent_and_says_nothing_of_the_target(world):
    world.opener.is_held = True
    batch = world.submit("a0")
    world.call(world.loop.end, batch)
    world.open()
    world.other_ends[world.opened[0].sock].setblocking(False)
    with pytest.raises(BlockingIOError):
        world.other_ends[world.opened[0].sock].recv(1)
    assert (world.targets["a"].failures, world.targets["a"].retries, world.targets["a"].log_groups) == (0, 0, 0)
    assert len(world.targets["a"].client.idle_connections) == 1
    world.assert_at_rest()


def in_tls(world):
    """A connection of the world in TLS 1.3, its tickets still unread."""
    connection = world.connect()
    connection.sock, there = speak_tls(connection.sock, world.other_ends.pop(connection.sock))
    world.other_ends[connection.sock] = there
    assert connection.sock.version() == "TLSv1.3"
    return connection


def test_an_idle_connection_is_not_closed_for_the_tickets_of_tls_but_for_anything_else(world):
    connection = in_tls(world)
    client = world.targets["a"].client
    client.factory.connect = lambda _: connection
    world.opener.is_held = True
    world.call(world.loop.end, world.submit("a0"))
    world.open()
    for _ in range(3):
        world.turn(0.5)
        assert [one for one, _ in client.idle_connections] == [connection]
    assert world.loop.sleeps[-1] > 0, "it is told of the tickets once"
    world.other_ends[connection.sock].sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    world.turn(0.5)
    assert not client.idle_connections and connection.sock is None


@pytest.mark.parametrize(
    "error, code", [(OSError("no route"), "NoAnswer"), (ValueError("odd"), "NoAnswer"), (MemoryError(), "MemoryError")]
)
def test_one_that_cannot_be_opened_fails_its_put(world, error, code):
    def connect(_):
        raise error

    factory = world.targets["a"].client.factory
    factory.connect = connect
    batch = world.submit("a0")
    assert (world.in_flight(), world.targets["a"].failures) == ([], 1)
    assert world.targets["a"].put_retries.codes == {code}
    factory.connect = world.connect
    world.turn(1)
    world.answer("a0")
    world.assert_delivered(batch)


def test_a_put_over_a_connection_that_was_closed_while_idle_is_sent_again_at_once_and_only_then(world):
    """`there` may have been closed when the put was on its way. One that was opened for the put has heard it."""
    world.warm_up("a")
    batch = world.submit("a0")
    assert len(world.opened) == 1
    world.clock.now += 20
    world.hang_up("a0")
    assert (len(world.opened), world.in_flight(), world.targets["a"].failures) == (2, ["a0"], 0)
    world.turn(25)
    assert world.in_flight() == ["a0"], "it has its whole time anew"
    world.hang_up("a0")
    assert (len(world.opened), world.in_flight(), world.targets["a"].failures) == (2, [], 1)
    world.turn(1)
    world.answer("a0")
    assert (world.begun, batch.unfinished) == (["a0", "a0"], set())
    world.assert_at_rest()


def test_the_time_to_open_a_connection_begins_anew_where_a_put_is_sent_again(world):
    world.warm_up("a")
    world.submit("a0")
    world.turn(25)
    world.opener.is_held = True
    world.hang_up("a0", 6)
    assert world.in_flight() == ["a0"] and len(world.opener.waiting) == 1
    world.open()
    world.answer("a0")
    assert world.begun == ["a0"]


def test_a_put_whose_answer_has_begun_is_not_sent_again_at_once(world):
    world.warm_up("a")
    world.submit("a0")
    world.socket_of("a0").sendall(ACCEPTED[:20])
    world.turn()
    world.hang_up("a0")
    assert (len(world.opened), world.in_flight(), world.targets["a"].failures) == (1, [], 1)


def test_the_time_for_an_answer_grows_by_what_moves(world):
    """A line that carries MIN_THROUGHPUT is not cut off, whatever the size of the put; one that is slower is."""
    world.warm_up("a")
    world.submit_large(600000)
    world.turn(dispatch_data.RESPONSE_TIMEOUT + 59)
    assert world.in_flight() == ["a0"]
    for _ in range(3):
        world.socket_of("a0").sendall(b"HTTP/1.1 100 Continue\r\nx: %s\r\n\r\n" % (b"x" * 9980))
        world.turn(0.9)
    assert world.in_flight() == ["a0"]
    world.turn(5)
    assert world.in_flight() == []


def test_a_put_that_ran_out_of_time_is_not_sent_again_at_once(world, monkeypatch):
    forgotten = []
    monkeypatch.setattr(dispatch_data, "forget_unsent", forgotten.append)
    world.warm_up("a")
    world.submit("a0")
    sock = world.opened[0].sock
    world.turn(31)
    assert forgotten == [sock], "the kernel might send the rest much later"
    assert (world.in_flight(), world.targets["a"].failures) == ([], 1)
    assert world.opened[0].sock is None, "its answer might come when another put waits for one"


def test_an_answer_with_a_body_has_accepted_nothing(world):
    """A captive portal's, say."""
    batch = world.submit("a0")
    world.answer("a0", answer(body=b"please log in"))
    assert (len(batch.unfinished), world.targets["a"].failures) == (1, 1)


def test_a_refused_token_is_the_one_that_the_put_was_signed_with(world):
    source, told = world.targets["a"].client.credential_source, []
    source.key = dispatch_data.AccessKey("id", "secret", "the first token")
    source.on_auth_failure = lambda failure, token: told.append(token) or failure
    world.submit("a0")
    source.key = dispatch_data.AccessKey("id", "secret", "the next token")
    world.answer("a0", answer(b"401 Unauthorized", ERROR % b"SecurityTokenExpired"))
    assert told == ["the first token"]


@pytest.mark.parametrize(
    "scheme, proxy, is_blocking",
    [("https", "https", True), ("https", "http", False), ("http", "https", False), ("https", None, False)],
)
def test_only_tls_inside_of_tls_blocks(clock, monkeypatch, scheme, proxy, is_blocking):
    if proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy + "://proxy.test:1")
    factory = dispatch_data.ConnectionFactory(scheme + "://project.sls.test")
    assert (factory.pool.proxy and factory.pool.proxy.scheme, factory.is_blocking) == (proxy, is_blocking)


def test_a_put_that_blocks_is_done_by_another_thread_or_ended_before_never_both(world):
    client, calls = world.targets["a"].client, []
    client.factory.is_blocking = True

    def round_trip(*_):
        calls.append(world.begun[-1])
        world.turn(3 * dispatch_data.CONNECT_TIMEOUT + 1)
        assert world.in_flight() == ["a0"], "it is under way, with deadlines of its own"
        return dispatch_data.PUT_ACCEPTED

    client.round_trip = round_trip
    world.opener.is_held = True
    client.idle_connections.append((world.connect(), world.clock.now))
    batch = world.submit("a0")
    assert world.tries["a0"][0].connection is None, "one that is idle is for the thread to use"
    world.turn(3 * dispatch_data.CONNECT_TIMEOUT + 1)
    assert (world.in_flight(), world.targets["a"].failures) == ([], 1)
    world.opener.go_on()
    assert calls == [], "its time was over before its turn"
    world.turn(6)
    assert world.in_flight() == ["a0"]
    world.open()
    assert (calls, batch.unfinished) == (["a0"], set())
    world.assert_at_rest()


def test_a_connection_that_is_to_be_closed_is_not_used_again(world):
    world.submit("a0")
    world.answer("a0", ACCEPTED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    assert world.opened[0].sock is None and not world.targets["a"].client.idle_connections
    world.submit("a1")
    world.answer("a1")
    assert len(world.opened) == 2
    world.assert_at_rest()


@pytest.mark.parametrize("event", ["it is closed", "something comes"])
def test_an_idle_connection_over_which_anything_happens_is_closed(world, event):
    world.targets["a"].limit = 2
    world.submit("a0 a1")
    world.answer("a0 a1")
    client = world.targets["a"].client
    (first, _), (second, _) = client.idle_connections
    there = world.other_ends[second.sock]
    if event == "it is closed":
        there.close()
    else:
        there.sendall(ACCEPTED)
    world.turn()
    assert (second.sock, [one for one, _ in client.idle_connections]) == (None, [first])
    world.submit("a2")
    assert world.tries["a2"][0].connection is first
    world.answer("a2")


def test_an_event_of_a_socket_that_is_nobodys_is_told_once(world):
    here, there = socket.socketpair()
    with here, there:
        world.loop.selector.register(here, selectors.EVENT_READ)
        there.sendall(b"x")
        world.turn()
        with pytest.raises(KeyError):
            world.loop.selector.get_key(here)


def test_idle_connections_are_closed_when_they_are_old_or_too_many_the_oldest_first(world, monkeypatch):
    world.targets["a"].limit = 3
    world.submit("a0 a1 a2")
    world.answer("a0")
    world.turn(10)
    world.answer("a1 a2")
    first, second, third = world.opened
    world.turn(dispatch_data.MAX_IDLE - 5)
    assert (first.sock, bool(second.sock), bool(third.sock)) == (None, True, True)
    monkeypatch.setattr(dispatch_data, "connection_budget", lambda: 1)
    world.turn(1)
    assert (second.sock, bool(third.sock)) == (None, True)
    assert len(world.loop.idle) == 1
    world.turn(dispatch_data.MAX_IDLE)
    assert third.sock is None
    assert not world.loop.idle


def test_sockets_of_closed_connections_are_watched_no_longer(world):
    """Their numbers are soon others'."""
    watched = len(world.loop.selector.get_map())
    world.submit("a0")
    world.answer("a0", ACCEPTED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    world.submit("a1")
    world.turn(31)
    world.turn(6)
    world.answer("a1")
    world.turn(dispatch_data.MAX_IDLE + 1)
    assert len(world.loop.selector.get_map()) == watched
    assert not world.loop.idle and not world.loop.by_file


def test_a_large_put_is_sent_as_the_other_side_takes_it_and_no_other_waits(world):
    batch = world.submit_large(3000000)
    flight = world.tries["a0"][0]
    assert 0 < flight.sent < len(flight.request)
    world.submit("b0")
    world.answer("b0")
    there, received = world.socket_of("a0"), b""
    while len(received) < len(flight.request):
        received += there.recv(10000000)
        world.loop.turn()
    assert received == flight.request
    key = world.loop.selector.get_key(flight.sock)
    world.turn()
    assert world.loop.selector.get_key(flight.sock).events == selectors.EVENT_READ, key
    there.sendall(ACCEPTED)
    world.turn()
    world.assert_delivered(batch)


def test_who_refuses_a_put_before_it_has_read_it_all_is_heard(world):
    """Gateways do so with 413, and close the connection: what the kernel says of that is not the reason."""
    batch = world.submit_large(3000000)
    there = world.socket_of("a0")
    there.sendall(answer(b"413 Too large", b"no"))
    there.close()
    world.turn()
    ((blamed, error),) = batch.blamed
    assert ([blamed], error.code) == (batch.puts, "RequestEntityTooLarge")


def test_who_refuses_a_put_while_more_is_sent_is_heard(world, monkeypatch):
    """What it says may come after the last look and before the kernel knows that nothing more is taken."""
    batch = world.submit_large(3000000)
    there = world.socket_of("a0")

    def send(flight):
        if there.fileno() >= 0:
            there.sendall(answer(b"413 Too large", b"no"))
            there.close()
        raise ConnectionResetError

    monkeypatch.setattr(dispatch_data.PutInFlight, "send", send)
    while urllib3.util.wait_for_read(there, 0):  # so that it takes more
        there.recv(1 << 20)
    world.turn()
    world.turn()
    ((blamed, error),) = batch.blamed
    assert ([blamed], error.code) == (batch.puts, "RequestEntityTooLarge")


def test_puts_that_nobody_wants_any_more_are_no_recovery(world, caplog):
    """Else an outage were told to be over whenever a batch is cut or its shard moves."""
    retries, batch = world.targets["a"].put_retries, world.submit("a0")
    world.answer("a0", BUSY)
    world.call(world.loop.end, batch)
    assert retries.failures == 1 and not retries.failing
    world.turn(60.0)
    caplog.clear()
    retries.report_recovery()
    assert not caplog.messages
    batch = world.submit("a1")
    world.answer("a1")
    world.assert_delivered(batch)
    retries.report_recovery()
    (line,) = caplog.messages
    assert "puts recovered after 1 failed tries" in line and not retries.failures


def test_what_takes_as_long_as_a_bound_is_counted_up_to_it():
    """As Prometheus has it: less or equal."""
    histogram = dispatch_data.Histogram()
    for seconds in (0.1, 0.11, 100.0):
        histogram.observe(seconds)
    counts = {labels: count for _, labels, count in histogram.samples("latency", '{target="1"}')}
    upto = [counts['{target="1",le="%s"}' % bound] for bound in ("0.05", "0.1", "0.25", "30", "+Inf")]
    assert upto == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("refusal, connections", [(answer(b"403 Quota", ERROR % b"WriteQuotaExceed"), 1), (BUSY, 9)])
def test_a_target_that_refuses_much_is_asked_over_one_connection(world, refusal, connections):
    """As one at its quota does; one that has trouble of its own may have less elsewhere."""
    batch = world.submit("a0")
    for _ in range(8):
        world.answer("a0", refusal)
        world.turn(10.0)
    world.answer("a0")
    world.assert_delivered(batch)
    assert len(world.opened) == connections


@pytest.mark.parametrize("text", [ACCEPTED, answer(b"403 Quota", ERROR % b"WriteQuotaExceed")], ids=["200", "403"])
def test_an_answer_that_came_before_all_was_sent_is_early_however_fast_the_rest_is_sent(world, text):
    """A success says nothing then, and after anything else the connection is not used again."""
    batch = world.submit_large(300 * 1000)
    in_flight, there = world.tries["a0"][0], world.socket_of("a0")
    assert 0 < in_flight.sent < len(in_flight.request)
    there.sendall(text)
    there.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:  # there is room for the rest, in one piece
            there.recv(1 << 20)
    world.turn()
    assert in_flight not in world.loop.flights
    assert batch.unfinished and not world.targets["a"].client.idle_connections


# ---- what fails within this process


class FailingOnce:
    """A method of the loop, which fails once, or once after it was told to."""

    def __init__(self, monkeypatch, name, error=MemoryError, is_to_fail=True):
        method, self.is_to_fail = getattr(PutLoop, name), is_to_fail

        def fail_once(*arguments):
            if self.is_to_fail:
                self.is_to_fail = False
                raise error
            return method(*arguments)

        monkeypatch.setattr(PutLoop, name, fail_once)


@pytest.mark.parametrize(
    "error, code",
    [(MemoryError(), "OutOfMemory"), (RecursionError(), "LocalFailure"), (CallError("NoKey", ""), "NoKey")],
)
def test_a_put_that_cannot_be_begun_fails_and_is_tried_again(world, error, code):
    target = world.targets["a"]
    write, told = target.write, []
    on_result = target.on_result

    def fail(_):
        raise error

    target.write = fail
    target.on_result = lambda put, failure: told.append(failure and failure.code) or on_result(put, failure)
    batch = world.submit("a0")
    assert told == [code]
    target.write = write
    world.turn(1)
    world.answer("a0")
    world.assert_delivered(batch)


def test_a_put_that_was_begun_and_then_fails_within_is_in_flight_no_longer(world, monkeypatch):
    world.warm_up("a")
    FailingOnce(monkeypatch, "wait_for_answer", ValueError)
    batch = world.submit("a0")
    assert world.in_flight() == []
    assert world.opened[0].sock is None, "it was sent: an answer would be taken for another's"
    world.turn(1)
    world.answer("a0")
    world.assert_delivered(batch)


def test_an_accepted_put_whose_counting_fails_is_tried_again(world):
    """Rather twice than once too few: nobody knows how far that came."""
    target = world.targets["a"]
    on_result, failing = target.on_result, [True]
    target.on_result = lambda *arguments: failing.pop() and 1 / 0 if failing else on_result(*arguments)
    batch = world.submit("a0")
    world.answer("a0")
    assert batch.unfinished
    world.turn(1)
    world.answer("a0")
    world.assert_delivered(batch)


def test_a_batch_whose_put_cannot_be_settled_is_given_up_as_a_whole(world):
    batch = world.submit("a0")

    class Full(set):
        def add(self, _):
            raise MemoryError

    batch.failing = Full()
    world.answer("a0", BUSY)
    assert isinstance(batch.failure, MemoryError) and batch.change.is_set()


def test_a_batch_that_could_not_be_queued_is_so_by_the_next_look(world):
    class Full(dict):
        def __setitem__(self, *one):
            if len(world.begun) == 1 and failing:
                raise failing.pop()
            super().__setitem__(*one)

    failing = [MemoryError()]
    world.targets["a"].queue = Full()
    batch = world.submit("a0 a1")
    assert not failing
    world.turn(1)
    world.answer("a0")
    world.turn(1)
    world.answer("a1")
    assert not batch.unfinished


def test_a_retry_whose_turn_has_failed_gets_another(world, monkeypatch):
    make_ready = FailingOnce(monkeypatch, "make_ready", is_to_fail=False)
    world.submit("a0")
    world.answer("a0", BUSY)
    world.clock.now = world.targets["a"].retry_at + 0.001
    world.loop.next_housekeeping = world.clock.now + 0.1
    make_ready.is_to_fail = True
    with pytest.raises(MemoryError):
        world.loop.turn()
    assert not make_ready.is_to_fail and world.in_flight() == []
    world.turn(0.2)
    assert world.in_flight() == ["a0"]


def test_a_cut_batch_whose_end_has_failed_ends(world, monkeypatch):
    end_if_over = FailingOnce(monkeypatch, "end_if_over", is_to_fail=False)
    batch = world.submit("a0 a1")
    world.call(world.loop.cut, batch, 0)
    world.loop.next_housekeeping = world.clock.now + 0.1
    end_if_over.is_to_fail = True
    world.answer("a0")
    assert not end_if_over.is_to_fail and not batch.is_over
    world.turn(0.2)
    assert batch.is_over and batch.change.is_set()


@pytest.mark.parametrize("step", ["queue_next", "end_if_over", "make_ready"])
@pytest.mark.parametrize("when", ["a put begins", "a put is settled"])
def test_what_a_failure_has_left_undone_is_done_by_the_next_look(world, monkeypatch, step, when):
    world.warm_up("ab", 2)
    batch = world.batch("a0 a1 b2 a3")
    world.loop.submit(batch)
    if when == "a put is settled":
        world.turn()
    failing = FailingOnce(monkeypatch, step)
    deadline = world.clock.now + 20
    while batch.unfinished and world.clock.now < deadline and not batch.failure:
        for name in world.in_flight():
            if world.tries[name][-1].connection:
                world.answer(name)
        with contextlib.suppress(MemoryError):
            world.turn(0.25)
    assert not failing.is_to_fail
    assert batch.failure or not batch.unfinished
    assert batch.change.is_set()


# ---- whoever delivers a batch


class Latch:
    """In the place of an event that somebody waits for: each wait takes its time by the test's clock, then a step."""

    def __init__(self, clock, steps):
        self.clock, self.steps, self.is_set, self.waits = clock, iter(steps), False, 0

    def set(self):
        self.is_set = True

    def clear(self):
        self.is_set = False

    def wait(self, seconds):
        self.waits += 1
        assert self.waits < 1000, "it waits for ever"
        self.clock.now += 0 if self.is_set else seconds
        next(self.steps)()


class DeliveryOfTheTest(dispatch_data.Delivery):
    """One whose loop is told what to do, and does nothing."""

    def __init__(self, world, monkeypatch):
        self.world, self.calls = world, []
        self.loop = types.SimpleNamespace(
            submit=lambda batch: None, call=lambda method, *arguments: self.calls.append((method, *arguments[1:])),
            cut="cut", end="end", replace="replace",
        )  # fmt: skip
        self.unmatched = types.SimpleNamespace(add=lambda one: self.calls.append(("unmatched", one.Topic)))
        self.monkeypatch = monkeypatch
        self.closing, self.closed, self.wanted_back = (dispatch_data.CancelToken() for _ in range(3))

    def run(self, batch, steps, others=()):
        """The steps, one after each wait; the last of them is repeated for ever."""

        def repeated():
            yield from steps
            for _ in range(1000):  # whoever waits for longer is red
                yield steps[-1]

        batch.change = Latch(self.world.clock, repeated())
        self.monkeypatch.setattr(dispatch_data, "Batch", lambda *_: batch)
        self.route = lambda _: None
        log_groups = [one for put in batch.puts for one in put.log_groups]
        log_groups = sorted([*log_groups, *others], key=lambda one: one.Topic[1:])
        batch.positions = {id(one): position for position, one in enumerate(log_groups)}
        pull = dispatch_data.PullResult(log_groups, 0, "", 0)
        return self.deliver(pull, self.closing, self.closed, self.wanted_back)


@pytest.fixture
def delivery(world, monkeypatch):
    return DeliveryOfTheTest(world, monkeypatch)


def nothing():
    pass


def end(batch, *finished):
    """As the loop ends one, of which these puts, or all, are done with."""
    batch.unfinished.difference_update(finished or batch.puts)
    batch.is_over = True


def test_at_a_stop_a_batch_is_cut_and_given_up_when_none_was_accepted_for_the_grace(world, delivery):
    batch = world.batch("a0 a1 a2")
    steps = [nothing] * 3 + [delivery.closing.cancel]
    steps += [nothing] * 20 + [lambda: setattr(batch, "accepted_at", world.clock.now), nothing]
    began = world.clock.now
    assert delivery.run(batch, steps) == (0, 0)
    assert set(delivery.calls[:-1]) == {("cut", 0)}
    assert delivery.calls[-1] == ("end",)
    assert world.clock.now - began == pytest.approx(25 * 0.2 + dispatch_data.GRACE, abs=0.5)


def test_a_batch_is_given_up_when_the_copy_must_stop(world, delivery):
    delivery.closing.cancel()
    batch = world.batch("a0")
    began = world.clock.now
    assert delivery.run(batch, [nothing, delivery.closed.cancel]) == (0, 0)
    assert world.clock.now - began < 1
    assert delivery.calls[-1] == ("end",)


def test_a_batch_that_the_loop_has_ended_is_waited_for_no_longer(world, delivery):
    batch = world.batch("a0 a1 a2")
    assert delivery.run(batch, [nothing, lambda: end(batch, world.put_of(batch, "a0"))]) == (1, 0)


def test_a_batch_that_takes_long_is_cut_now_and_then(world, delivery):
    few = world.batch(" ".join("a%d" % number for number in range(dispatch_data.FEW_LOG_GROUPS)))
    many = world.batch(" ".join("a%d" % number for number in range(dispatch_data.FEW_LOG_GROUPS + 1)))
    for batch, least in ((few, 1), (many, 0)):
        delivery.calls.clear()
        began = world.clock.now
        limit = 3.5 * dispatch_data.LONGEST_BATCH
        delivery.run(batch, [lambda: world.clock.now < began + limit or end(batch)])  # noqa: B023
        assert delivery.calls == [("cut", least)] * 3


def test_a_batch_is_given_back_when_others_need_the_memory_unless_it_is_disputed(world, delivery):
    batch = world.batch("a0")
    (put,) = batch.unfinished
    put.rejections, put.first_rejection = 1, world.clock.now
    delivery.wanted_back.cancel()
    delivery.run(batch, [nothing, nothing, lambda: setattr(put, "rejections", 0), lambda: end(batch)])
    assert delivery.calls == [("cut", 0)] * 2


def test_what_fails_in_the_loop_fails_whoever_delivers_and_calls_the_rest_off(world, delivery):
    batch = world.batch("a0")
    with pytest.raises(MemoryError):
        delivery.run(batch, [lambda: batch.fail(MemoryError())])
    assert delivery.calls == [("end",)]


def test_whoever_delivers_waits_without_haste_and_misses_nothing(world, delivery):
    """What is said while it works ends its next wait, and that only."""
    batch, waits = world.batch("a0 a1"), []
    put, _ = batch.puts
    put.target.split_or_reject = lambda *_: batch.change.set() or []
    blamed = CallError("PostBodyInvalid", "", 400)

    def step():
        waits.append(world.clock.now)
        if len(waits) == 2:
            batch.blamed.append((put, blamed))
            batch.change.set()
        if len(waits) == 5:
            end(batch)

    began = world.clock.now
    delivery.run(batch, [step])
    assert [round(when - began, 1) for when in waits] == [0.2, 0.4, 0.4, 0.6, 0.8]
    assert delivery.calls == [("replace", put, [])]


def test_of_a_batch_that_is_over_nothing_more_is_set_aside(world, delivery):
    """It would be so again when it is delivered again."""
    batch = world.batch("a0 a1")
    put, _ = batch.puts
    put.target.split_or_reject = None

    def step():
        batch.blamed.append((put, CallError("PostBodyInvalid", "", 400)))
        batch.is_cut = True
        end(batch)

    delivery.run(batch, [step])
    assert "replace" not in [name for name, *_ in delivery.calls]


def test_unmatched_ones_are_counted_as_far_as_the_batch_was_done_with(world, delivery):
    batch = world.batch("a0 a3")
    others = [LogGroup(topic, 1, b"", b"") for topic in ("x1", "x2", "x4")]
    assert delivery.run(batch, [lambda: end(batch, world.put_of(batch, "a0"))], others) == (3, 0)
    assert delivery.calls[-2:] == [("unmatched", "x1"), ("unmatched", "x2")]


def test_targets_with_one_key_and_address_share_connections_and_all_share_the_files_that_may_be_open(monkeypatch):
    config = {"endpoint": "sls.test", "access_key_id": "id", "access_key": "secret"}
    configs = [logstore_config(logstore=name, **config) for name in "ab"]
    configs.append(logstore_config(project="another-project", **config))
    settings = types.SimpleNamespace(
        targets=[TargetSettings(number, each, ()) for number, each in enumerate(configs)], source="source",
        rejected_dir="", writers=10, merge_packs=False,
    )  # fmt: skip
    monkeypatch.setattr(PutLoop, "start", lambda _: None)
    for budget, most in ((1000, 30), (7, 7)):
        monkeypatch.setattr(dispatch_data, "connection_budget", lambda: budget)  # noqa: B023
        delivery = dispatch_data.Delivery(settings, dispatch_data.CredentialSources())
        clients = [target.client for target in delivery.targets.values()]
        assert clients[0] is clients[1] is not clients[2]
        assert (delivery.loop.max_in_flight, delivery.targets[0].max_in_flight) == (most, 10)


def test_a_third_of_the_files_that_may_be_open_is_for_puts(monkeypatch):
    limits = dispatch_data.resource.RLIM_INFINITY, 1024, 2
    budgets = []
    for soft in limits:
        monkeypatch.setattr(dispatch_data.resource, "getrlimit", lambda _: (soft, soft))  # noqa: B023
        budgets.append(dispatch_data.connection_budget())
    assert budgets == [sys.maxsize, 341, 1]


def test_log_groups_are_joined_unless_their_target_is_in_doubt(world, delivery):
    world.warm_up("ab")
    delivery.targets = dict(enumerate(world.targets.values()))
    delivery.routes = types.SimpleNamespace(target_of={"a": 0, "b": 1}.get)
    delivery.merge_packs = False
    log_groups = [LogGroup(topic, 1, b"", b"") for topic in "aabcab"] + [LogGroup("a", 0, b"", b"")]

    def sizes():
        return [(put.target.number, len(put.log_groups)) for put in delivery.route(log_groups)]

    assert sizes() == [(0, 3), (1, 2)]
    target = world.targets["a"]
    target.failures = 1
    assert sizes() == [(0, 1), (0, 1), (0, 1), (1, 2)], "it fails, though it took others just now"
    target.failures, target.last_accepted = 0, 0.0
    assert sizes() == [(0, 1), (0, 1), (0, 1), (1, 2)], "it has taken none so far"


# ---- whose fault a refusal is


class Refused:
    """Refusals and successes of one target, and what is set aside of it."""

    def __init__(self, clock, target):
        self.clock, self.target = clock, target
        self.numbers = iter(range(1000))
        target.dead_letters = types.SimpleNamespace(save=lambda *_: "path")
        self.pull = types.SimpleNamespace(place_of=lambda _: "place")

    def put(self, size=100, count=1):
        put = PutRequest(b"x" * size)
        for _ in range(count):
            put.add(LogGroup("a%d" % next(self.numbers), 1, b"", b"x" * size))
        return put

    def accept(self, *puts):
        for put in puts or [self.put()]:
            self.clock.now += 0.01
            self.target.on_result(put, None)

    def refuse(self, put, times=dispatch_data.MAX_REJECTIONS, code="PostBodyInvalid"):
        """The last of these: what is to be tried in its place."""
        error = CallError(code, "", 400)
        for _ in range(times):
            self.clock.now += 0.01
            self.target.on_result(put, error)
        return self.target.split_or_reject(put, error, self.pull)


@pytest.fixture
def refused(clock, world):
    return Refused(clock, world.targets["a"])


def test_one_is_at_fault_when_as_many_were_accepted_since_as_are_refused(refused):
    refused.accept()
    one, two = refused.put(), refused.put()
    assert refused.refuse(one) == [one], "what was accepted before proves nothing"
    refused.accept()
    assert refused.refuse(two) == [two], "two are refused, and one was accepted"
    assert refused.refuse(one, 1) == [one]
    refused.accept()
    assert refused.refuse(two, 1) == [two], "since its first refusal only one was"
    assert refused.refuse(one, 1) == []
    assert (refused.target.dead_lettered, refused.target.unproven) == (1, 0)


def test_one_that_was_refused_less_often_is_tried_again(refused):
    one = refused.put()
    refused.refuse(one, 1)
    refused.accept()
    assert refused.refuse(one, dispatch_data.MAX_REJECTIONS - 2) == [one]
    assert refused.refuse(one, 1) == []


def test_of_a_put_that_is_blamed_for_its_size_by_a_gateway_nothing_is_set_aside(refused):
    one = refused.put()
    refused.refuse(one)
    refused.accept()
    assert refused.target.split_or_reject(one, CallError("RequestEntityTooLarge", "", 413), refused.pull) == [one]


def test_what_a_gateway_blames_for_its_size_does_not_count_as_refused(refused):
    one = refused.put()
    assert refused.refuse(one, code="RequestEntityTooLarge") == [one]
    assert not refused.target.rejected
    refused.accept()
    assert refused.refuse(one, dispatch_data.MAX_REJECTIONS - 1) == [one]
    refused.accept()
    assert refused.refuse(one, 1) == []


def test_those_of_a_joined_put_count_from_its_refusal_on(refused):
    joined = refused.put(count=2)
    one, other = refused.refuse(joined, 1)
    assert (one.log_groups, other.log_groups) == (joined.log_groups[:1], joined.log_groups[1:])
    assert not refused.target.rejected, "it is counted by what it is made of"
    assert joined not in refused.target.put_retries.failing
    refused.accept(other)
    assert refused.refuse(one) == []


def test_one_refused_again_and_again_counts_once(refused):
    one = refused.put()
    refused.refuse(one, 10)
    refused.accept()
    assert refused.refuse(one, 1) == []


def test_those_set_aside_still_count_as_refused(refused):
    """Else a target that takes one in many would have them all set aside by the same one."""
    one, two = refused.put(), refused.put()
    refused.refuse(one)
    refused.refuse(two)
    refused.accept(), refused.accept()
    assert refused.refuse(one, 1) == []
    three = refused.put()
    refused.clock.now += 1
    refused.target.rejected.clear()
    three.first_rejection = one.first_rejection
    assert refused.refuse(three) == [three], "three refused, and two accepted since"


def test_one_that_is_accepted_in_the_end_proves_that_refusals_before_prove_nothing(refused):
    one, two = refused.put(), refused.put()
    refused.refuse(one, 2)
    refused.refuse(two, 2)
    refused.accept(one)
    assert one not in refused.target.rejected
    assert refused.refuse(two, 2) == [two], "refused four times, but twice since"
    refused.accept()
    assert refused.refuse(two, 1) == []


def test_where_nothing_else_comes_what_was_accepted_shortly_before_counts_after_a_while(refused):
    refused.accept()
    one = refused.put()
    assert refused.refuse(one) == [one]
    refused.clock.now += dispatch_data.REJECTION_PATIENCE - 1
    assert refused.refuse(one, 1) == [one]
    refused.clock.now += 2
    assert refused.refuse(one, 1) == []
    assert refused.target.unproven == 1


def test_what_was_accepted_long_before_never_counts(refused):
    refused.accept()
    refused.clock.now += dispatch_data.REJECTION_LOOKBACK + 1
    one = refused.put()
    refused.refuse(one)
    refused.clock.now += 1000
    assert refused.refuse(one, 1) == [one]


def test_without_a_success_only_a_few_are_set_aside_by_what_was_accepted_before(refused):
    target = refused.target

    def refuse_for_long(put):
        refused.refuse(put)
        refused.clock.now += dispatch_data.REJECTION_PATIENCE + 1
        return refused.refuse(put, 1)

    refused.accept(*(refused.put() for _ in range(20)))
    for number in range(dispatch_data.MAX_UNPROVEN):
        assert refuse_for_long(refused.put()) == []
        assert target.unproven == number + 1
    one = refused.put()
    assert refuse_for_long(one) == [one]
    refused.accept()
    assert target.unproven == 0
    assert refused.refuse(one, 1) == [], "it has accepted one since"
    assert target.unproven == 0, "which is a proof"


def test_after_a_long_time_one_more_is_set_aside(refused):
    refused.accept(*(refused.put() for _ in range(20)))
    target = refused.target
    target.unproven, target.last_unproven = dispatch_data.MAX_UNPROVEN, refused.clock.now
    one = refused.put()
    refused.refuse(one)
    refused.clock.now += dispatch_data.UNPROVEN_INTERVAL - 1
    assert refused.refuse(one, 1) == [one]
    refused.clock.now += 2
    assert refused.refuse(one, 1) == []
    assert target.unproven == dispatch_data.MAX_UNPROVEN + 1


def test_where_the_size_is_blamed_only_puts_of_that_size_prove_anything_unless_it_is_beyond_all_regions(refused):
    too_large = functools.partial(refused.refuse, code="PostBodyTooLarge")
    one, smaller = refused.put(1000), refused.put(100)
    too_large(one)
    refused.accept(smaller)
    assert too_large(one, 1) == [one]
    refused.accept(refused.put(1000))
    assert too_large(one, 1) == []
    huge = refused.put(dispatch_data.UNDISPUTED_BYTES + 1)
    too_large(huge)
    refused.accept(smaller)
    assert too_large(huge, 1) == []


def test_one_that_cannot_be_set_aside_is_tried_again_and_fails_no_longer_once_it_is_accepted(refused):
    def save(*_):
        raise OSError("full")

    refused.target.dead_letters.save = save
    one = refused.put()
    refused.refuse(one)
    refused.accept()
    assert refused.refuse(one, 1) == [one]
    assert refused.target.dead_letter_retries.failing == {one}
    refused.accept(one)
    assert not refused.target.dead_letter_retries.failing
    assert not refused.target.put_retries.failing
