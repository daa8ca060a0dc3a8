"""A soak: copies at work under a steady feed while everything fails at random, and a verdict on every log at the end.

    python tests/tools/soak.py --seconds 600 --seed 7

What happens, when and for how long is drawn from the seed alone; which process gets how far meanwhile is the machine's
affair, so a seed repeats the events, not their outcome. Out of it are logs that expire, as those are lost by right.
At the end everything is healed, and what is left has to be delivered. The exit status is 0 when nothing was lost,
altered or delivered out of nowhere, no checkpoint went back, and every copy ended as it was told to; duplicates are
counted, as kills and lost answers allow for some. Beside those, a copy may end by itself only before it has joined.
"""

import argparse
import contextlib
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from assertions import checkpoints_watched, verdict  # noqa: E402
from disruptions import (  # noqa: E402
    changed_key,
    deleted_logstore,
    names_switched_by,
    outage,
    unknown_names,
    untrusted_certificate,
    wrong_clock,
)
from harness import GROUP, PROJECT, SOURCE, TARGET_LOGSTORES, Copies, Copy, group_shards, make_log_group  # noqa: E402
from local_log_service import LocalLogService  # noqa: E402
from local_log_service.key_services import KeyServices  # noqa: E402

MOST_COPIES = 5
MOST_RESHARDINGS = 8
LONGEST_HEALING = 180.0  # seconds
LONGEST_STOP = 60.0  # seconds
FEED_INTERVAL = 0.05  # seconds
KEY_LIFE = 4.0  # seconds, of the keys for sql-audit, which an agent hands out
TOPICS = ("nginx", "ngnix", "sql_audit", "click", "nobody's")


def could_not_start(copy: Copy) -> bool:
    """Whether it has ended in an orderly way before it joined, since something was wrong then."""
    is_orderly = copy.process.poll() == 1 and "Traceback" not in copy.stderr()
    return is_orderly and "INFO consumer " not in copy.log()


class Event(NamedTuple):
    """Something that is to happen `at` so many seconds from the start, and to last `seconds` if it lasts at all."""

    at: float
    name: str
    seconds: float
    number: int  # whatever is to be chosen, this chooses it


FAILURES = {
    "ShardWriteQuotaExceed": dict(status=403, code="ShardWriteQuotaExceed"),
    "ServerBusy": dict(status=503, code="ServerBusy"),
    "InternalServerError": dict(status=500),
    "Unauthorized": dict(status=401, code="Unauthorized"),
    "cut before": dict(cut="before"),
    "cut after": dict(cut="after"),
    "no answer": dict(hold=True),
    "slow": dict(delay=0.3),
    "trickling": dict(trickle=0.002),
}
CALLS = ("PutLogs", "PutLogs", "PutLogs", "PullLogs", "HeartBeat", "UpdateCheckPoint", "*")  # puts more often
# One at a time of those that share a name here: they would undo each other.
EXCLUSIVE = {
    "outage": "way",
    "unknown names": "way",
    "untrusted certificate": "way",
    "key of the source changed": "source key",
    "key of the source deleted": "source key",
    "key of click changed": "click key",
    "no keys for sql-audit": "agent",
    "clock": "clock",
    "click deleted": "click",
}
LASTING = (*["failing calls"] * 12, "freeze", "freeze", "freeze", *EXCLUSIVE)
PASSING = (*["join"] * 5, "leave", "leave", "kill", "kill", "split", "merge")


def is_https(seed: int) -> bool:
    """Whether the service speaks HTTPS in this soak."""
    return seed % 2 == 1


def schedule(seed: int, seconds: float) -> List[Event]:
    """The events of a soak, in order: drawn from the seed and nothing else."""
    chance = random.Random(seed)
    events: List[Event] = []
    free_at: Dict[str, float] = {}
    running = 2
    reshardings = 0
    now = 0.0
    while True:
        now += chance.uniform(0.2, 2.5)
        name = chance.choice(chance.choice([LASTING, PASSING]))
        lasting = chance.uniform(0.5, 8) if name in LASTING else 0.0
        number = chance.randrange(10**6)
        if now + lasting > seconds:
            return events
        exclusive = EXCLUSIVE.get(name, "")
        if (exclusive and now < free_at.get(exclusive, 0.0)) or (
            name == "untrusted certificate" and not is_https(seed)
        ):
            continue
        if name in ("split", "merge"):
            if reshardings == MOST_RESHARDINGS:
                continue
            reshardings += 1
        if running == 0 or (name == "join" and running == MOST_COPIES):
            name, lasting = ("join", 0.0) if running == 0 else ("leave", 0.0)
        if exclusive:
            free_at[exclusive] = now + lasting
        running += {"join": 1, "leave": -1, "kill": -1}.get(name, 0)
        events.append(Event(now, name, lasting, number))


class Soak:
    """One run. `problems` are what must not have been."""

    def __init__(
        self,
        service: LocalLogService,
        key_services: KeyServices,
        copies: Copies,
        directory: Path,
        https: bool,
        say: Callable,
    ) -> None:
        self.service = service
        self.key_services = key_services
        self.copies = copies
        self.https = https
        self.begin = time.monotonic()
        self.say_line = say
        self.switch = directory / "names are unknown"
        self.authority = directory / "authority.pem"  # stays while the service is gone
        if https:
            shutil.copy(service.environment()["REQUESTS_CA_BUNDLE"], str(self.authority))
        self.running: List[Copy] = []
        self.frozen: List[Copy] = []
        self.leaving: Dict[Copy, float] = {}
        self.gone: List[bytes] = []  # what was in logstores that were deleted
        self.counts: Counter = Counter()
        self.problems: List[str] = []
        self.slowest_stop = 0.0
        self.next_feed = 0.0
        self.feed_turn = itertools.count()
        self.ends: List = []  # (when, name, what ends it)

    def say(self, text: str) -> None:
        self.say_line("%7.1f s  %s" % (time.monotonic() - self.begin, text))

    def name(self, copy: Copy) -> str:
        return "copy %d" % self.copies.started.index(copy)

    # What goes on all the time

    def turn(self) -> None:
        """One look at everything; to be called all the time."""
        now = time.monotonic()
        if now >= self.next_feed:
            self.next_feed = now + FEED_INTERVAL
            self.feed()
        for entry in [entry for entry in self.ends if entry[0] <= now]:
            self.ends.remove(entry)
            self.say("%s: over" % entry[1])
            entry[2]()
        for copy in [copy for copy in self.running if copy.process.poll() is not None]:
            self.ended_by_itself(copy)
        for copy, since in list(self.leaving.items()):
            status = copy.process.poll()
            if status is not None:
                del self.leaving[copy]
                self.slowest_stop = max(self.slowest_stop, now - since)
                # Until it has set up its log it can't know better than to die of a signal.
                if status != 0 and copy.log() and not could_not_start(copy):
                    self.problem("%s was told to stop and ended with status %d" % (self.name(copy), status))
            elif now - since > LONGEST_STOP:
                del self.leaving[copy]
                self.problem("%s was told to stop and did not within %.0f s" % (self.name(copy), LONGEST_STOP))
        time.sleep(0.005)

    def problem(self, text: str) -> None:
        self.say("PROBLEM: " + text)
        self.problems.append(text)

    def feed(self) -> None:
        turn = next(self.feed_turn)
        log_groups = [
            make_log_group(TOPICS[(turn + number) % len(TOPICS)], 3, Source="10.0.0.%d" % (turn % 3))
            for number in range(4)
        ]
        self.service.put(PROJECT, SOURCE, log_groups)

    def ended_by_itself(self, copy: Copy) -> None:
        """A refused key, a wrong clock or a missing target ends a copy that starts: it would be started again."""
        self.running.remove(copy)
        status = copy.process.poll()
        if could_not_start(copy):
            self.counts["could not start, started again"] += 1
            self.say("%s could not start: %s" % (self.name(copy), copy.stderr().splitlines()[-1:]))
        else:
            self.problem("%s ended by itself with status %s: %s" % (self.name(copy), status, copy.stderr()[-2000:]))
        self.join()

    # Events that pass

    def join(self, _: int = 0) -> None:
        changes: Dict[str, Optional[str]] = {"REQUESTS_CA_BUNDLE": str(self.authority)} if self.https else {}
        keys = dict(SLS_AK_ID="local-id", SLS_AK_KEY="local-secret", SLS_AK_ID_TO3="click-id")
        keys.update(SLS_CREDENTIALS_TO2="uri", ALIBABA_CLOUD_CREDENTIALS_URI=self.key_services.agent)
        self.running.append(
            self.copies.start(
                patch=names_switched_by(self.switch),
                constants={"RESPONSE_TIMEOUT": 5},
                **keys,  # type: ignore
                SLS_AK_KEY_TO3="click-secret",
                **changes,  # type: ignore
            )
        )
        self.say("%s joins" % self.name(self.running[-1]))

    def take_one(self, number: int) -> Copy:
        copy = self.running.pop(number % len(self.running))
        self.thaw(copy)
        return copy

    def leave(self, number: int) -> None:
        copy = self.take_one(number)
        how = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[number % 3]
        self.say("%s leaves: %s" % (self.name(copy), how.name))
        self.leaving[copy] = time.monotonic()
        copy.send(how)

    def kill(self, number: int) -> None:
        copy = self.running.pop(number % len(self.running))
        self.say("%s is killed%s" % (self.name(copy), ", frozen" if copy in self.frozen else ""))
        copy.stop(signal.SIGKILL)

    def thaw(self, copy: Copy) -> None:
        if copy in self.frozen:
            self.frozen.remove(copy)
            copy.send(signal.SIGCONT)

    def split(self, number: int) -> None:
        shard = number % self.shard_count()
        self.reshard("split", self.service.split_shard, shard)

    def merge(self, number: int) -> None:
        shard = number % self.shard_count()
        self.reshard("merge", self.service.merge_shards, shard)

    def shard_count(self) -> int:
        return max(group_shards(self.service), default=3) + 1

    def reshard(self, what: str, call: Callable, first: int) -> None:
        """Splits or merges the first shard from `first` on that lets itself be split or merged."""
        for shard in [*range(first, self.shard_count()), *range(first)]:
            with contextlib.suppress(Exception):
                self.say("%s of shard %d: %s" % (what, shard, call(PROJECT, SOURCE, shard)))
                return

    # Events that last

    def trouble(self, event: Event):
        """The block that an event lasts for."""
        service, number = self.service, event.number
        if event.name == "failing calls":
            return self.failing_calls(number)
        if event.name == "freeze":
            return self.freeze(number)
        return {
            "outage": lambda: outage(service),
            "unknown names": lambda: unknown_names(service, self.switch),
            "untrusted certificate": lambda: untrusted_certificate(service),
            "key of the source changed": lambda: changed_key(service, "local-id", "another-secret"),
            "key of the source deleted": lambda: changed_key(service, "local-id", None),
            "key of click changed": lambda: changed_key(service, "click-id", "another-secret"),
            "no keys for sql-audit": lambda: outage(self.key_services),
            "clock": lambda: wrong_clock(service, 1200 if number % 2 else -1200),
            "click deleted": lambda: deleted_logstore(service, "click", self.gone),
        }[event.name]()

    @contextlib.contextmanager
    def failing_calls(self, number: int) -> Iterator[str]:
        chance = random.Random(number)
        action = chance.choice(CALLS)
        failure = chance.choice(sorted(FAILURES))
        logstore = chance.choice([None, *TARGET_LOGSTORES]) if action == "PutLogs" else None
        share = chance.choice([0.3, 1.0])
        with self.service.add_fault(action, logstore=logstore, share=share, **FAILURES[failure]):
            yield "%s of %s, %d %%: %s" % (action, logstore or "all", share * 100, failure)

    @contextlib.contextmanager
    def freeze(self, number: int) -> Iterator[str]:
        thawed = [copy for copy in self.running if copy not in self.frozen]
        copy = thawed[number % len(thawed)] if thawed else None
        if copy:
            self.frozen.append(copy)
            copy.send(signal.SIGSTOP)
        yield self.name(copy) if copy else "nobody"
        if copy and copy.process.poll() is None:
            self.thaw(copy)

    def happen(self, event: Event) -> None:
        self.counts[event.name] += 1
        if event.name in PASSING:
            return getattr(self, event.name)(event.number)
        stack = contextlib.ExitStack()
        what = stack.enter_context(self.trouble(event))
        self.say("%s, for %.1f s: %s" % (event.name, event.seconds, what))
        self.ends.append((time.monotonic() + event.seconds, "%s (%s)" % (event.name, what), stack.close))

    # From the first to the last

    def run(self, events: List[Event]) -> None:
        self.join()
        self.join()
        for event in events:
            while time.monotonic() - self.begin < event.at:
                self.turn()
            self.happen(event)
        while self.ends or self.leaving:
            self.turn()
        if not self.running:
            self.join()
        self.say("everything is healed; what is left is to be delivered")
        self.next_feed = float("inf")
        end = time.monotonic() + LONGEST_HEALING
        while not self.is_all_delivered():
            self.turn()
            if time.monotonic() > end:
                self.problem("%d LogGroups not delivered within %.0f s" % (self.lag(), LONGEST_HEALING))
                break
        self.say("all copies stop")
        while self.running:
            self.leave(0)
        while self.leaving:
            self.turn()

    def lag(self) -> int:
        return self.service.lag(PROJECT, SOURCE, GROUP)

    def is_all_delivered(self) -> bool:
        return bool(group_shards(self.service)) and self.lag() == 0


def soak(seconds: float, seed: int, directory: Path, say: Callable[[str], None]) -> List[str]:
    """Runs a soak and says what happens; returns what must not have been, nothing if all is well."""
    https = is_https(seed)
    say("seed %d, %.0f s, %s" % (seed, seconds, "https" if https else "http"))
    keys = {"local-id": "local-secret", "click-id": "click-secret"}
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(LocalLogService(access_keys=keys, https=https))
        service.create_logstore(PROJECT, SOURCE, 4)
        for logstore in TARGET_LOGSTORES:
            service.create_logstore(PROJECT, logstore, 2)
        set_back = stack.enter_context(checkpoints_watched())
        copies = stack.enter_context(Copies(service, directory))
        key_services = stack.enter_context(KeyServices(service, KEY_LIFE))
        run = Soak(service, key_services, copies, directory, https, say)
        run.run(schedule(seed, seconds))
        outcome = verdict(service, delivered_before=run.gone)
        problems = [*run.problems, *set_back]
    if not outcome.ok:
        problems.append(str(outcome))
    for name, count in sorted(run.counts.items()):
        say("%5d x %s" % (count, name))
    say("slowest graceful stop: %.1f s" % run.slowest_stop)
    say("checkpoints that went back: %d" % len(set_back))
    say("seed %d: %s: %s" % (seed, outcome, "NOT OK: " + "; ".join(problems) if problems else "OK"))
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long things fail (default: 600)")
    parser.add_argument("--seed", type=int, default=None, help="what to draw the events from (default: any)")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    print("logs of the copies: %s" % directory, flush=True)
    problems = soak(arguments.seconds, seed, directory, lambda line: print(line, flush=True))
    if not problems:
        shutil.rmtree(str(directory))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
