"""A soak that answers for each LogGroup that arrives again: copies at work while events of a schedule befall them.

    python tests/tools/event_soak.py --seed 7 --seconds 120

Copies join, stop, are killed and frozen; shards are split and merged; calls of each kind are refused, fail, hang, are
slow, cut off, answered in vain or applied late, pulls are mangled, targets take a steady rate. All of it is decided up
front, by the seed alone: `schedule`. A ledger of what happened to the logs stands beside one of the events, and
`event_ledger.py` holds one against the other: the exit status is 0 when nothing was lost, astray, altered or set back,
and each LogGroup that arrived again did so by an event that had it in the air. With --gentle no copy is killed or
frozen for long and no answer lost, and none may arrive again.

Each copy has an access key of its own, so that each call tells whose it is.
"""

import argparse
import contextlib
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "tools")]

import event_ledger  # noqa: E402
from aliyun.log.proto import LogGroup  # noqa: E402
from event_ledger import Account, Checkpoint, Event, Handover, Ledger, Pull, Put  # noqa: E402
from harness import GROUP, PROJECT, SOURCE, TARGET_LOGSTORES, TARGETS, Copies, Copy, group_shards  # noqa: E402
from local_log_service import LocalLogService, cursors, mangling  # noqa: E402
from local_log_service.actions import ACTIONS, Answer, Call  # noqa: E402
from local_log_service.consumer_groups import ConsumerGroup  # noqa: E402
from local_log_service.errors import ServiceError  # noqa: E402
from local_log_service.faults import Fault, ForeignAnswer  # noqa: E402
from local_log_service.state import Entry  # noqa: E402
from local_log_service.verdict import split_log_group  # noqa: E402

HEARTBEAT_INTERVAL = 3  # seconds; the group's timeout is twice that
RESPONSE_TIMEOUT = 4  # seconds that copies wait for an answer; with --gentle the program's own
FEED_INTERVAL = 0.05  # seconds
BURST = 800  # LogGroups
LONGEST_WAIT = 120.0  # seconds, for copies to join and for what is left to be delivered
LONGEST_STOP = 30.0  # seconds, on a busy machine
SETTLED = 10.0  # seconds after which a checkpoint that was set back counts as staying so
STALL = 1.0  # seconds that the machine may have no time for this process, or of STALL_INTERVAL for a copy's threads
STALL_INTERVAL = 2.0  # seconds between looks at that
MOST_RESHARDINGS = 8
MOST_COPIES_EVER = 1000
TOPICS = ("nginx", "ngnix", "sql_audit", "click", "nobody's")


# ---- what is to happen -----------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """An event that is to begin `at` so many seconds from the start, and to last `seconds`, if it lasts at all."""

    at: float
    kind: str  # "join", "stop", "kill", "freeze", "split", "merge", "burst" or "calls"
    seconds: float = 0.0
    copy: int = -1
    action: str = ""
    logstore: str = ""
    effect: str = ""
    share: float = 1.0
    number: int = 0  # whatever else is to be chosen, this chooses it

    @property
    def copy_name(self) -> str:
        return "copy-%d" % self.copy if self.copy >= 0 else ""


class Earlier:
    """In the place of an answer to a pull, an earlier one of the same shard, which leads back or nowhere.

    Nobody could tell one that leads on, nor one of another shard, from a gap in the shard.
    """

    def __init__(self) -> None:
        self.last: Dict[str, Answer] = {}

    def __call__(self, answer: Answer, call: Call) -> Answer:
        earlier = self.last.get(call.item, answer)
        self.last[call.item] = answer
        positions = [cursors.decode(text) for text in (earlier.headers["x-log-cursor"], call.query["cursor"])]
        return earlier if positions[0] <= positions[1] else answer


CODES = {"PutLogs": "ShardWriteQuotaExceed", "PullLogs": "ShardReadQuotaExceed"}
MANGLES: Tuple[Callable[[], Callable], ...] = (
    lambda: mangling.wrong_raw_size,
    lambda: mangling.undecodable,
    lambda: mangling.unknown_compression,
    lambda: mangling.without("x-log-cursor"),
    lambda: mangling.without("x-log-count"),
    lambda: mangling.broken_off,
    Earlier,
)
GATEWAY = ForeignAnswer(502, {"Content-Type": "text/html"}, b"<p>Bad Gateway")
GENTLE_EFFECTS = ("refused", "failed", "hang", "cut", "slow")
EFFECTS = (*GENTLE_EFFECTS, "lost", "gateway", "late")
UNHEARD = ("lost", "gateway", "late")
LONGEST_DELAY = 3.0  # seconds, of what is late, beyond RESPONSE_TIMEOUT


def fault_of(planned: Planned) -> Dict[str, Any]:
    """Arguments for LocalLogService.add_fault."""
    chance = random.Random(planned.number)
    return {
        "refused": lambda: dict(status=403, code=CODES.get(planned.action, "ExceedQuota")),
        "failed": lambda: dict(status=chance.choice([500, 503])),
        "hang": lambda: dict(hold=True),
        "cut": lambda: dict(cut="before"),
        "slow": lambda: dict(delay=chance.uniform(0.1, 0.6)),
        "lost": lambda: dict(cut="after"),
        "gateway": lambda: dict(answer=GATEWAY, takes_effect=True),
        "late": lambda: dict(delay=RESPONSE_TIMEOUT + chance.uniform(1.0, LONGEST_DELAY)),
        "mangled": lambda: dict(mangle=chance.choice(MANGLES)()),
        "truncated": lambda: dict(cut_short=chance.randint(1, 20)),
    }[planned.effect]()


def rate_of(planned: Planned) -> float:
    """Puts a second that a target takes, refusing all others."""
    return (10.0, 40.0)[planned.number % 2]


def schedule(seed: int, seconds: float, copies: int = 3, is_gentle: bool = False) -> List[Planned]:
    """What is to happen, in order. Nothing but the arguments decides."""

    def chance(stream: str) -> random.Random:
        return random.Random("%s, %d" % (stream, seed))

    coming_and_going = list(plan_copies(chance("copies"), seconds, copies, is_gentle))
    events = [
        *coming_and_going,
        *plan_silence(chance("silence"), seconds, copies, is_gentle, coming_and_going),
        *plan_shards(chance("shards"), seconds),
        *plan_calls(chance("calls"), seconds, is_gentle),
    ]
    return sorted(event for event in events if event.at + event.seconds <= seconds)


def plan_copies(chance: random.Random, seconds: float, most: int, is_gentle: bool) -> Iterator[Planned]:
    """Which copies join, stop and are killed; the first `most` run from the start, and one always does."""
    running = list(range(most))
    numbers = itertools.count(most)
    now = 1.0
    while now < seconds:
        if len(running) == 1 or (len(running) < most and chance.random() < 0.6):
            running.append(next(numbers))
            yield Planned(now, "join", copy=running[-1])
        else:
            copy = running.pop(chance.randrange(len(running)))
            is_killed = not is_gentle and chance.random() < 0.5
            yield Planned(now, "kill" if is_killed else "stop", copy=copy, number=chance.randrange(10**6))
        now += chance.uniform(2.0, 7.0)


def plan_silence(
    chance: random.Random, seconds: float, copies: int, is_gentle: bool, coming_and_going: List[Planned]
) -> Iterator[Planned]:
    """What keeps heartbeats away, one at a time: freezes, and faults of them or of all calls."""
    ends = {event.copy: event.at for event in coming_and_going if event.kind == "stop"}
    killed = {event.copy: event.at for event in coming_and_going if event.kind == "kill"}
    begins = dict.fromkeys(range(copies), 0.0)
    begins.update({event.copy: event.at for event in coming_and_going if event.kind == "join"})
    now = 2.0
    while now < seconds:
        is_long = not is_gentle and chance.random() < 0.4
        number, pick = chance.randrange(10**6), chance.random()
        kind = chance.choice(["freeze", "freeze", "HeartBeat", "*"])
        if kind == "freeze":
            lasting = chance.uniform(7.5, 10.0) if is_long else chance.uniform(0.3, 1.5)
            end = now + lasting
            there = [
                copy
                for copy, begin in sorted(begins.items())
                if begin <= now < killed.get(copy, seconds) and end < ends.get(copy, seconds)
            ]
            if there:
                yield Planned(now, kind, lasting, there[int(pick * len(there))], number=number)
        else:
            lasting = chance.uniform(2.0, 7.0) if is_long else chance.uniform(0.3, 1.0)
            effect = chance.choice(GENTLE_EFFECTS if is_gentle else EFFECTS)
            share = chance.choice([0.3, 1.0])
            yield Planned(now, "calls", lasting, action=kind, effect=effect, share=share, number=number)
        now += lasting + chance.uniform(4.0, 8.0)


def plan_shards(chance: random.Random, seconds: float) -> Iterator[Planned]:
    """Splits and merges, and many LogGroups at a time."""
    now, reshardings = 0.0, 0
    while now < seconds:
        now += chance.uniform(3.0, 9.0)
        kind = chance.choice(["split", "merge", "burst", "burst", "burst"])
        if kind != "burst":
            reshardings += 1
        if reshardings <= MOST_RESHARDINGS:
            yield Planned(now, kind, number=chance.randrange(10**6))


def plan_calls(chance: random.Random, seconds: float, is_gentle: bool) -> Iterator[Planned]:
    """Faults of all calls but heartbeats; of the same calls one at a time."""
    free_at: Dict[Tuple[str, str], float] = defaultdict(float)
    now = 0.5
    while now < seconds:
        action = chance.choice(["PutLogs"] * 5 + ["UpdateCheckPoint"] * 2 + ["PullLogs", "GetCheckPoint", "GetCursor"])
        logstore = chance.choice(["", *TARGET_LOGSTORES]) if action == "PutLogs" else ""
        effects = list(GENTLE_EFFECTS if is_gentle else EFFECTS)
        effects += ["rate"] * 3 if logstore else ["mangled"] * 4 + ["truncated"] if action == "PullLogs" else []
        effect = chance.choice(effects)
        share = chance.choice([0.3, 0.6, 1.0, 1.0])
        lasting = chance.uniform(0.5, 8.0)
        # What fails altogether fails for less than the grace that a batch has.
        is_partial = action == "PutLogs" and (effect in ("rate", "slow") or (effect != "hang" and share < 1))
        if is_gentle and not is_partial and action != "PullLogs":
            lasting = min(lasting, 2.0)
        number = chance.randrange(10**6)
        if effect == "rate":
            share, lasting = 1.0, chance.uniform(5.0, 12.0)
        if now >= free_at[action, logstore]:
            if effect == "rate":
                yield Planned(now, "burst")  # else there might be no more than it takes
            free_at[action, logstore] = now + lasting
            yield Planned(now, "calls", lasting, -1, action, logstore, effect, share, number)
        now += chance.uniform(0.4, 2.0)


def named(events: List[Planned]) -> Iterator[Tuple[str, Planned]]:
    """Each with a name that says what it is, unlike any other's."""
    for number, event in enumerate(events):
        words = [event.kind, event.copy_name]
        if event.kind == "calls":
            words = [event.action, event.logstore, event.effect, "%d %%" % (event.share * 100)]
            if event.effect == "rate":
                words[-1] = "%g a second" % rate_of(event)
        yield " ".join(filter(None, ["#%d" % number, *words])), event


# ---- what does happen ------------------------------------------------------------------------------------------------


class Recorder:
    """Takes down, within the service, whose calls take effect and which consumer loses a shard; holds targets to rates.

    Everything is called with the service's own lock held or by its one thread.
    """

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.puts: List[Tuple[float, str, str, Entry]] = []
        self.pulls: List[Pull] = []
        self.checkpoints: List[Tuple[Checkpoint, str]] = []  # and the request id
        self.handovers: List[Handover] = []
        self.copy_of: Dict[str, str] = {}  # by the consumer's name
        self.listed: Dict[str, Set[int]] = {}  # the shards in its last heartbeat, by the same
        self.rates: Dict[str, List[float]] = {}  # target -> [puts a second, when it takes the next]
        self.shards: Any = {}

    def now(self) -> float:
        return time.monotonic() - self.begin

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        actions, refresh = dict(ACTIONS), ConsumerGroup.refresh
        for action in ("PutLogs", "PullLogs", "UpdateCheckPoint", "HeartBeat"):
            ACTIONS[action] = self.recorded(ACTIONS[action], getattr(self, "on_" + action))
        ConsumerGroup.refresh = self.refreshing(refresh)  # type: ignore[method-assign]
        try:
            yield
        finally:
            ACTIONS.update(actions)
            ConsumerGroup.refresh = refresh  # type: ignore[method-assign]

    def recorded(self, perform: Callable, take_down: Callable) -> Callable:
        def recorded(limits, state, call):
            copy = call.headers["authorization"].split()[1].partition(":")[0]
            store = state.logstore(call.project, call.logstore)
            return take_down(copy, store, call, lambda: perform(limits, state, call))

        return recorded

    def on_PutLogs(self, copy, store, call, perform):
        rate = self.rates.get(store.name)
        if rate:
            now = self.now()
            if now < rate[1]:
                raise ServiceError("ShardWriteQuotaExceed")
            rate[1] = max(rate[1] + 1 / rate[0], now)
        answer = perform()
        entry = store.ledger[-1]
        assert entry.request_id == call.request_id
        self.puts.append((self.now(), copy, store.name, entry))
        return answer

    def on_PullLogs(self, copy, store, call, perform):
        answer = perform()
        shard = store.shards[int(call.item)]
        first, following = (shard.index_of(text) for text in (call.query["cursor"], answer.headers["x-log-cursor"]))
        if following > first:
            self.pulls.append(Pull(self.now(), copy, shard.shard_id, first, following))
        return answer

    def on_UpdateCheckPoint(self, copy, store, call, perform):
        document = json.loads(call.body)
        shard, group = store.shards[document["shard"]], store.consumer_group(call.item)
        before = group.checkpoint(shard.shard_id)
        answer = perform()
        indexes = [shard.index_of(text) if text else 0 for text in (before, group.checkpoint(shard.shard_id))]
        self.checkpoints.append((Checkpoint(self.now(), copy, shard.shard_id, *indexes), call.request_id))
        return answer

    def on_HeartBeat(self, copy, store, call, perform):
        consumer, group = call.query["consumer"], store.consumer_group(call.item)
        self.copy_of[consumer] = copy
        self.shards = store.shards
        answer = perform()
        listed = set(json.loads(call.body))
        # What it no longer lists it has let go of, also where the service then leaves it the shard.
        for shard in self.listed.get(consumer, set()) - listed:
            self.hand_over(group, shard, consumer, is_forgotten=False)
        self.listed[consumer] = listed
        return answer

    def refreshing(self, refresh: Callable) -> Callable:
        """Takes down as well whom the group forgets by it."""

        def refreshing(group, *arguments):
            before = {shard: one.consumer for shard, one in group.assignments.items() if one.consumer}
            refresh(group, *arguments)
            for shard, consumer in before.items():
                if consumer not in group.consumers:
                    self.hand_over(group, shard, consumer, is_forgotten=True)

        return refreshing

    def hand_over(self, group: ConsumerGroup, shard: int, consumer: str, is_forgotten: bool) -> None:
        checkpoint = group.checkpoint(shard)
        index = self.shards[shard].index_of(checkpoint) if checkpoint else 0
        self.handovers.append(Handover(self.now(), self.copy_of[consumer], shard, index, is_forgotten))


class Feed:
    """Makes LogGroups, none like another, of all sorts, and knows each of them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random("feed, %d" % seed)
        self.made: List[bytes] = []
        self.first_logs: Dict[Tuple[bytes, bytes], int] = {}  # (first log, what is no log) -> number
        self.parts: List[Tuple[Tuple[bytes, ...], bytes]] = []
        self.entries: List[Entry] = []
        self.topics: List[str] = []

    def make(self) -> bytes:
        chance, number = self.chance, len(self.made)
        topic = chance.choice(TOPICS)
        log_group = LogGroup(Topic=topic, Source="10.0.0.%d" % chance.randrange(30))
        if chance.random() < 0.2:
            log_group.Reserved, log_group.MachineUUID = "category", "uuid"
        if chance.random() < 0.3:
            log_group.LogTags.add(Key="__pack_id__", Value="%X-%d" % (number % 7, number))
        for count in range(chance.randint(1, 6)):
            log = log_group.Logs.add(Time=1700000000 + number)
            log.Contents.add(Key="number", Value="%d.%d" % (number, count))
            log.Contents.add(Key="text", Value="\u65e5\u5fd7 " * chance.randrange(20))
        raw = log_group.SerializeToString()
        logs, rest = split_log_group(raw)
        if chance.random() < 0.1:  # what isn't in the order that serialisers keep to is valid, too
            raw = rest + raw[: len(raw) - len(rest)]
        self.made.append(raw)
        self.parts.append((tuple(logs), rest))
        self.first_logs[logs[0], rest] = number
        self.topics.append(topic)
        return raw

    def put(self, service: LocalLogService, count: int) -> None:
        self.entries += service.put(PROJECT, SOURCE, [self.make() for _ in range(count)])

    def recognise(self, raw: bytes) -> Tuple[int, ...]:
        """Numbers of the LogGroups that were joined to this one. Raises ValueError where it is anything else."""
        logs, rest = split_log_group(raw)
        found: List[int] = []
        position = 0
        while position < len(logs):
            number = self.first_logs.get((logs[position], rest))
            if number is None:
                raise ValueError("no LogGroup of the source")
            found.append(number)
            own = self.parts[number][0]
            if tuple(logs[position : position + len(own)]) != own:
                raise ValueError("LogGroup %d, without some of its logs" % number)
            position += len(own)
        one_by_one = [self.made[number][: len(self.made[number]) - len(rest)] for number in found]
        right = self.made[found[0]] if len(found) == 1 else b"".join(one_by_one) + rest
        if raw != right:
            raise ValueError("LogGroups %s, in other bytes" % found)
        return tuple(found)


class Soak:
    """One run."""

    def __init__(self, service: LocalLogService, copies: Copies, seed: int, is_gentle: bool, say: Callable) -> None:
        self.service, self.copies, self.is_gentle, self.say_line = service, copies, is_gentle, say
        self.recorder = Recorder()
        self.now = self.recorder.now
        self.feed = Feed(seed)
        self.events: List[Event] = []
        self.faults: List[Tuple[Event, Fault]] = []
        self.running: Dict[str, Copy] = {}
        self.leaving: Dict[str, Tuple[float, Copy]] = {}
        self.ends: List[Tuple[float, str, Callable[[], None]]] = []
        self.problems: List[str] = []
        self.late_until = 0.0  # until then what is late may be applied
        self.slowest_stop = 0.0
        self.waited: Dict[str, float] = {}  # for a processor, seconds, by the thread's file
        self.last_stall: Dict[str, Event] = {}  # by the copy's name
        self.next_feed = self.last_turn = self.last_look = 0.0

    def say(self, text: str) -> None:
        self.say_line("%7.1f s  %s" % (self.now(), text))

    def problem(self, text: str) -> None:
        self.say("PROBLEM: " + text)
        self.problems.append(text)

    # What goes on all the time

    def turn(self) -> None:
        now = self.now()
        if now - self.last_turn > STALL:
            self.note_stall("", self.last_turn, now)
        self.last_turn = now
        if now - self.last_look > STALL_INTERVAL:
            self.look_for_stalls(self.last_look, now)
            self.last_look = now
        if now >= self.next_feed:
            self.next_feed = now + FEED_INTERVAL
            self.feed.put(self.service, 4)
        for entry in [entry for entry in self.ends if entry[0] <= now]:
            self.ends.remove(entry)
            self.say("%s: over" % entry[1])
            entry[2]()
        for name, copy in list(self.running.items()):
            if copy.process.poll() is not None:
                self.ended_by_itself(name, copy)
        for name, (since, copy) in list(self.leaving.items()):
            status = copy.process.poll()
            if status is not None or now - since > LONGEST_STOP:
                del self.leaving[name]
                self.events.append(Event("stop " + name, "stop", since, now, name))
                self.slowest_stop = max(self.slowest_stop, now - since)
                # Until it has set up its log it can't know better than to die of a signal.
                if status != 0 and (status is None or copy.log()):
                    self.problem("%s was told to stop: status %s after %.1f s" % (name, status, now - since))
        time.sleep(0.005)

    def look_for_stalls(self, begin: float, end: float) -> None:
        """Which copies have waited for a processor since `begin`, by what Linux says."""
        everybody = {**self.running, **{name: copy for name, (_, copy) in self.leaving.items()}}
        for name, copy in everybody.items():
            delay = 0.0
            for path in Path("/proc/%d/task" % copy.process.pid).glob("*/schedstat"):
                with contextlib.suppress(OSError, IndexError):
                    waited = int(path.read_text().split()[1]) / 1e9
                    delay += waited - self.waited.get(str(path), waited)
                    self.waited[str(path)] = waited
            if delay > STALL:  # of all threads: where one waits with the interpreter's lock, the others wait for that
                self.note_stall(name, begin, end)

    def note_stall(self, copy_name: str, begin: float, end: float) -> None:
        last = self.last_stall.get(copy_name)
        if last and begin <= last.end + 0.5:
            self.events.remove(last)
            begin = min(begin, last.begin)
        name = ("stall at %.1f s %s" % (begin, copy_name)).strip()
        self.last_stall[copy_name] = Event(name, "stall", begin, end, copy_name)
        self.events.append(self.last_stall[copy_name])

    def ended_by_itself(self, name: str, copy: Copy) -> None:
        """Where the start's own looks fail, it ends, and would be started again; nothing else may."""
        del self.running[name]
        text = "%s ended by itself with status %s: %s" % (name, copy.process.poll(), copy.stderr()[-2000:])
        if self.is_gentle or copy.process.poll() != 1 or "INFO consumer " in copy.log() or "Traceback" in text:
            self.problem(text)
        self.say(text)
        self.join(name)

    # Events

    def join(self, name: str) -> None:
        self.running[name] = self.copies.start(
            constants={} if self.is_gentle else {"RESPONSE_TIMEOUT": RESPONSE_TIMEOUT},
            SLS_AK_ID=name,
            SLS_AK_KEY="secret",
            SLS_HEARTBEAT_INTERVAL=str(HEARTBEAT_INTERVAL),
        )

    def happen(self, name: str, planned: Planned) -> None:
        copy_name = planned.copy_name
        copy = self.running.get(copy_name)
        self.say(name + (", for %.1f s" % planned.seconds if planned.seconds else ""))
        if planned.kind == "join":
            self.join(copy_name)
        elif planned.kind == "burst":
            self.feed.put(self.service, BURST)
        elif planned.kind in ("split", "merge"):
            self.reshard(planned)
        elif planned.kind == "calls":
            self.begin_fault(name, planned)
        elif planned.kind == "stop":
            del self.running[copy_name]
            self.leaving[copy_name] = self.now(), copy
            copy.send((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[planned.number % 3])
        elif planned.kind == "kill":
            del self.running[copy_name]
            self.events.append(Event(name, "kill", self.now(), self.now(), copy_name))
            copy.stop(signal.SIGKILL)
        elif planned.kind == "freeze":
            began = self.now()
            copy.send(signal.SIGSTOP)
            self.ends.append((began + planned.seconds, name, lambda: self.thaw(name, copy_name, copy, began)))

    def thaw(self, name: str, copy_name: str, copy: Copy, began: float) -> None:
        if copy.process.poll() is None:
            copy.send(signal.SIGCONT)
        self.events.append(Event(name, "freeze", began, self.now(), copy_name))

    def reshard(self, planned: Planned) -> None:
        call = self.service.split_shard if planned.kind == "split" else self.service.merge_shards
        shards = sorted(group_shards(self.service))
        first = planned.number % len(shards)
        for shard in shards[first:] + shards[:first]:
            with contextlib.suppress(ServiceError):
                self.say("%s of shard %d: %s" % (planned.kind, shard, call(PROJECT, SOURCE, shard)))
                return

    def begin_fault(self, name: str, planned: Planned) -> None:
        began, action, logstore = self.now(), planned.action, planned.logstore
        fault: Optional[Fault] = None
        if planned.effect == "rate":
            self.recorder.rates[logstore] = [rate_of(planned), 0.0]
        else:
            only = dict(logstore=logstore or None, share=planned.share)
            fault = self.service.add_fault(action, **only, **fault_of(planned))  # type: ignore[arg-type]

        def end() -> None:
            if fault:
                fault.remove()
            else:
                del self.recorder.rates[logstore]
            ended, effect = self.now(), planned.effect
            if effect == "late":
                ended += RESPONSE_TIMEOUT + LONGEST_DELAY
                self.late_until = ended
            event = Event(name, "calls", began, ended, "", action, logstore, effect, planned.share)
            self.events.append(event)
            if fault:
                self.faults.append((event, fault))

        self.ends.append((began + planned.seconds, name, end))

    # From the first to the last

    def run(self, events: List[Planned], copies: int) -> None:
        for number in range(copies):
            self.join("copy-%d" % number)
        self.last_turn = self.last_look = self.now()
        self.wait(lambda: all("INFO consumer " in copy.log() for copy in self.running.values()), "copies that join")
        begin = self.now()
        for name, event in named(events):
            while self.now() - begin < event.at:
                self.turn()
            self.happen(name, event)
        while self.ends or self.leaving:
            self.turn()
        self.say("everything is healed; what is left is to be delivered")
        self.next_feed = float("inf")
        self.wait(lambda: self.now() > self.late_until and self.is_all_delivered(), "everything delivered and saved")
        self.say("all copies stop")
        for name, copy in self.running.items():
            self.leaving[name] = self.now(), copy
            copy.send(signal.SIGTERM)
        self.running = {}
        while self.leaving:
            self.turn()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = self.now() + LONGEST_WAIT
        while not condition():
            self.turn()
            if self.now() > end:
                return self.problem("%s: not within %.0f s" % (what, LONGEST_WAIT))

    def is_all_delivered(self) -> bool:
        if not group_shards(self.service):
            return False
        return self.service.lag(PROJECT, SOURCE, GROUP) == 0

    # The ledger

    def ledger(self) -> Ledger:
        events = sorted(self.events, key=lambda event: event.begin)
        struck: Dict[str, List[Tuple[Event, float]]] = defaultdict(list)
        for event, fault in self.faults:
            for request_id, since in list(fault.struck.items()):
                struck[request_id].append((event, since - self.recorder.begin))
        index: Dict[int, itertools.count] = defaultdict(itertools.count)
        fed = [
            event_ledger.LogGroup(entry.shard, next(index[entry.shard]), TARGETS.get(topic, ""))
            for entry, topic in zip(self.feed.entries, self.feed.topics)
        ]
        puts, altered = [], []
        for at, copy, target, entry in self.recorder.puts:
            unheard = self.late(at, struck[entry.request_id]) or self.not_there(at, copy, events)
            try:
                puts.append(Put(at, copy, target, self.feed.recognise(entry.log_group), unheard))
            except ValueError as error:
                altered.append("%s put into %s at %.3f s: %s: %r" % (copy, target, at, error, entry.log_group[:200]))
        checkpoints = []
        for one, request_id in self.recorder.checkpoints:
            checkpoints.append(one._replace(late=self.late(one.at, struck[request_id])))
        timeout = 2.0 * HEARTBEAT_INTERVAL
        recorder = self.recorder
        return Ledger(timeout, fed, puts, recorder.pulls, checkpoints, recorder.handovers, events, altered)

    @property
    def patience(self) -> float:
        """Seconds that a copy waits for an answer."""
        return 30.0 if self.is_gentle else RESPONSE_TIMEOUT

    def late(self, at: float, struck: List[Tuple[Event, float]]) -> str:
        """The event for which a call that was performed then had no answer in time, "" if it had."""
        for event, since in struck:
            if event.effect in UNHEARD or at - since > 0.8 * self.patience:
                return event.name
        return ""

    def not_there(self, at: float, copy: str, events: List[Event]) -> str:
        """The event for which a copy could not read an answer that came then, "" if it could."""
        for event in events:
            is_long = event.kind in ("freeze", "stall") and event.lasts(self.patience - 1)
            if is_long and event.copy in ("", copy) and event.overlaps(at - 0.5, at + 1.0):
                return event.name
        return ""


def soak(
    seconds: float, seed: int, directory: Path, say: Callable[[str], None], copies: int = 3, is_gentle: bool = False
) -> List[str]:
    """Runs a soak and says what happens; returns what must not have been, nothing if all is well."""
    what = "seed %d, %.0f s, %d copies%s" % (seed, seconds, copies, ", gentle" if is_gentle else "")
    say(what)
    keys = {"copy-%d" % number: "secret" for number in range(MOST_COPIES_EVER)}
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(LocalLogService(access_keys=keys))
        service.create_logstore(PROJECT, SOURCE, 4)
        for logstore in TARGET_LOGSTORES:
            service.create_logstore(PROJECT, logstore, 2)
        started = stack.enter_context(Copies(service, directory))
        run = Soak(service, started, seed, is_gentle, say)
        stack.enter_context(run.recorder.installed())
        run.run(schedule(seed, seconds, copies, is_gentle), copies)
        ledger = run.ledger()
    (directory / "ledger.json").write_text(json.dumps(ledger._asdict()), encoding="utf-8")
    account = event_ledger.judge(ledger, is_gentle)
    problems = [*run.problems, *account.problems]
    tell(account, say)
    routed = sum(bool(one.target) for one in ledger.log_groups)
    counts = "%d of %d LogGroups routed; %d lost, %d astray, %d altered, %d checkpoints set back, " % (
        routed, len(ledger.log_groups), account.lost, account.astray, len(ledger.altered), account.set_back
    )  # fmt: skip
    counts += "%d arrived again by events, %d for no cause" % (sum(account.repeated.values()), account.unattributed)
    stalls = [event for event in ledger.events if event.kind == "stall"]
    waits = len(stalls), sum(event.end - event.begin for event in stalls)
    say("the machine had no time %d times, %.0f s in all" % waits)
    say("slowest graceful stop: %.1f s" % run.slowest_stop)
    say("%s: %s: %s" % (what, counts, "NOT OK: " + "; ".join(problems) if problems else "OK"))
    return problems


def tell(account: Account, say: Callable[[str], None]) -> None:
    """What arrived again, by event."""
    for cause, count in sorted(account.repeated.items()):
        air = account.in_the_air[cause]
        say("%5d again%s by %s: %s" % (count, ", of %d in the air," % air if air else "", cause.kind, cause.event))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="how long events begin (default: 120)")
    parser.add_argument("--seed", type=int, default=None, help="what decides on the events (default: any)")
    parser.add_argument("--copies", type=int, choices=(2, 3), default=3, help="most that run at once (default: 3)")
    parser.add_argument("--gentle", action="store_true", help="no crashes and no lost answers: nothing arrives again")
    parser.add_argument("--directory", type=Path, default=None, help="an empty one, to keep ledger and logs in")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="event-soak-"))
    print("ledger, and logs of the copies: %s" % directory, flush=True)
    say = lambda line: print(line, flush=True)  # noqa: E731
    problems = soak(arguments.seconds, seed, directory, say, arguments.copies, arguments.gentle)
    if not problems and not arguments.directory:
        shutil.rmtree(str(directory))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
