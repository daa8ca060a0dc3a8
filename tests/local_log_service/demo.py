"""The demonstration: three copies of dispatch_data.py at work, one of them killed, every log accounted for."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

from rich.progress import BarColumn, Progress, Task, TextColumn

from . import sample_logs
from .service import LocalLogService
from .verdict import Verdict, compare

PROGRAM = Path(__file__).resolve().parents[2] / "dispatch_data.py"
PROJECT, SOURCE, GROUP = "demo", "source", "dispatch"
SHARD_COUNT = 4
TARGETS = {"nginx": ("nginx", "ngnix"), "sql-audit": ("sql_audit",), "click": ("click",)}  # logstore -> its topics
ROUTED = {topic for topics in TARGETS.values() for topic in topics}
ACCESS_KEYS = {"demo-id": "demo-secret"}
HEARTBEAT_INTERVAL = 2  # seconds; a copy that is silent for twice as long loses its shards
RATE = 25  # LogGroups a second
LIMIT = 120.0  # seconds that anything may take on a slow machine

LEGEND = """
source:                   logs written to the source logstore so far
nginx, sql-audit, click:  logs that have arrived in each target
unmatched:                logs among the source's whose topic nobody routes; they are left out on purpose
lag:                      LogGroups of the source not yet delivered and checkpointed
A, B, C:                  the shards that each copy of dispatch_data.py holds
"""
ROW = "%5s %9s %9s %9s %9s %10s %5s   %-8s %-12s %s"
RESULT_ROW = "%-12s %9s %9s %9s %9s %11s %9s"


def say(line: str = "") -> None:
    print(line, flush=True)


class BarOfTarget(BarColumn):
    def render(self, task: Task):
        """Nothing in the line of the copies, which has no description."""
        return super().render(task) if task.description else ""


class Bars(Progress):
    """What a terminal shows in the place of rows: a bar for each target, and who holds which shards.

    What is said meanwhile appears above it.
    """

    def __init__(self) -> None:
        columns = TextColumn("{task.description:>9}"), BarOfTarget(40), TextColumn("{task.fields[text]}")
        super().__init__(*columns, auto_refresh=False)
        self.of_targets = {target: self.add_task(target, text="") for target in TARGETS}
        self.of_copies = self.add_task("", text="")

    def show(self, sent: Dict[str, int], delivered: Dict[str, int], lag: int, held: Sequence[str]) -> None:
        """`sent` and `delivered` are logs for each target; `held` are the shards of each copy, in words."""
        for target, task in self.of_targets.items():
            text = "%d of %d logs delivered" % (delivered[target], sent[target])
            self.update(task, total=max(1, sent[target]), completed=delivered[target], text=text)
        holders = "".join("   %s: %s" % pair for pair in zip("ABC", held))
        self.update(self.of_copies, visible=bool(holders), text="lag %d LogGroups%s" % (lag, holders))
        self.refresh()


class DemoFailed(Exception):
    """The demonstration cannot go on; the text says why, in one line."""


class Message(bytes):
    """A serialised LogGroup that offers what the SDK asks of one."""

    def SerializeToString(self) -> bytes:
        return bytes(self)


class Feeder(threading.Thread):
    """Writes LogGroups to the source at a steady rate, through the SDK, until it is stopped."""

    def __init__(self, service: LocalLogService) -> None:
        super().__init__(daemon=True)
        self.client = service.client()
        self.stopping = threading.Event()
        self.error = None  # type: Optional[Exception]

    def run(self) -> None:
        next_put = time.monotonic()
        try:
            for log_group in sample_logs.log_groups(now=time.time):
                self.client.put_log_raw(PROJECT, SOURCE, Message(log_group))
                next_put += 1 / RATE
                if self.stopping.wait(max(0, next_put - time.monotonic())):
                    break
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        """Ends the feeding; returns once the last put has been answered."""
        self.stopping.set()
        if self.is_alive():
            self.join()


class Copy:
    """One process that runs dispatch_data.py."""

    def __init__(self, letter: str, environment: Dict[str, str], directory: str) -> None:
        self.letter = letter
        self.killed = False
        self.stderr_path = Path(directory, "stderr_of_%s" % letter)
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def kill(self) -> None:
        """Ends it with SIGKILL, which leaves it no time to do anything."""
        self.killed = True
        self.process.kill()
        self.process.wait()

    def show_stderr(self) -> None:
        stderr = self.stderr_path.read_text(encoding="utf-8", errors="replace").strip()
        say("-- stderr of copy %s:\n%s" % (self.letter, stderr or "(nothing)"))

    def check(self, status: Optional[int]) -> None:
        """Shows its stderr and raises DemoFailed unless this is its exit status (None: it is running)."""
        actual = self.process.poll()
        if actual != status:
            self.show_stderr()
            raise DemoFailed(
                "copy %s %s" % (self.letter, "does not end" if actual is None else "ended with exit status %d" % actual)
            )


class Arrivals:
    """The LogGroups that one logstore has taken, by topic, and how many logs they hold."""

    def __init__(self, service: LocalLogService, logstore: str) -> None:
        self.service = service
        self.logstore = logstore
        self.seen = 0
        self.log_groups = defaultdict(list)  # type: Dict[str, List[bytes]]
        self.logs = Counter()  # type: Dict[str, int]

    def update(self) -> None:
        """Takes in what has arrived since the last update."""
        for entry in self.service.ledger(PROJECT, self.logstore)[self.seen :]:
            self.seen += 1
            message = entry.parse()
            self.log_groups[message.Topic].append(entry.log_group)
            self.logs[message.Topic] += len(message.Logs)


class Demonstration:
    """What is shown, and the processes it takes; they are gone when the `with` block ends, however it does."""

    def __init__(self, service: LocalLogService, directory: str, interrupts: List[int]) -> None:
        """`interrupts` are the signals to end it that have come so far."""
        self.service = service
        self.directory = directory
        self.interrupts = interrupts
        self.copies = []  # type: List[Copy]
        self.feeder = Feeder(service)
        self.bars = Bars() if sys.stdout.isatty() else None
        self.start_time = self.next_row = time.monotonic()
        service.create_logstore(PROJECT, SOURCE, SHARD_COUNT)
        for target in TARGETS:
            service.create_logstore(PROJECT, target)
        # The first copy would make the group too; this way it can be looked at before that.
        service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 2 * HEARTBEAT_INTERVAL)
        self.source = Arrivals(service, SOURCE)
        self.targets = {target: Arrivals(service, target) for target in TARGETS}

    def __enter__(self) -> "Demonstration":
        return self

    def __exit__(self, *exception: object) -> None:
        for copy in self.copies:
            copy.process.kill()
        for copy in self.copies:
            copy.process.wait()
        self.feeder.stop()

    def environment(self) -> Dict[str, str]:
        """The environment of a copy."""
        ((access_key_id, access_key),) = ACCESS_KEYS.items()
        environment = {name: text for name, text in os.environ.items() if not name.startswith("SLS_")}
        environment.update(self.service.environment())
        environment.update(
            {
                "SLS_ENDPOINT": self.service.endpoint,
                "SLS_AK_ID": access_key_id,
                "SLS_AK_KEY": access_key,
                "SLS_PROJECT": PROJECT,
                "SLS_LOGSTORE": SOURCE,
                "SLS_CG": GROUP,
                "SLS_LOG_DIR": self.directory,
                "SLS_HEARTBEAT_INTERVAL": str(HEARTBEAT_INTERVAL),
            }
        )
        for number, (target, topics) in enumerate(TARGETS.items(), 1):
            environment["SLS_LOGSTORE_TO%d" % number] = target
            environment["SLS_TOPIC_TO%d" % number] = ",".join(topics)
        return environment

    def held_shards(self, copy: Copy) -> List[int]:
        """The shards that the service has given to a copy, known by the process id in the consumer's name."""
        shards = self.service.consumer_group(PROJECT, SOURCE, GROUP)["shards"]
        return sorted(
            shard
            for shard, state in shards.items()
            if state["consumer"] and state["consumer"].rsplit("-", 2)[1] == str(copy.process.pid)
        )

    def is_shared(self) -> bool:
        """Whether all shards are held by the copies that run, and each of them has its share."""
        shares = [len(self.held_shards(copy)) for copy in self.copies if not copy.killed]
        return sum(shares) == SHARD_COUNT and all(shares)

    def is_fed(self) -> bool:
        """Whether the source has logs for every target, as far as the rows shown know."""
        return all(any(self.source.logs[topic] for topic in topics) for topics in TARGETS.values())

    def lag(self) -> int:
        return self.service.lag(PROJECT, SOURCE, GROUP)

    def show_row(self) -> None:
        for arrivals in [self.source] + list(self.targets.values()):
            arrivals.update()
        held = []
        for copy in self.copies:
            shards = " ".join(map(str, self.held_shards(copy)))
            held.append(" ".join(filter(None, [shards or "-", "(killed)" if copy.killed else ""])))
        delivered = {target: sum(arrivals.logs.values()) for target, arrivals in self.targets.items()}
        if self.bars:
            sent = {target: sum(self.source.logs[topic] for topic in topics) for target, topics in TARGETS.items()}
            self.bars.show(sent, delivered, self.lag(), held)
            return
        source = sum(self.source.logs.values())
        unmatched = sum(count for topic, count in self.source.logs.items() if topic not in ROUTED)
        seconds = "%d s" % (time.monotonic() - self.start_time)
        say(ROW % (seconds, source, *delivered.values(), unmatched, self.lag(), *held))

    def watch(self, until: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
        """Shows a row a second until a condition holds.

        Raises DemoFailed when it is interrupted, when a copy or the feeder ends before that, and after `limit` seconds.
        """
        deadline = time.monotonic() + limit
        while not until():
            if self.interrupts:
                raise DemoFailed("interrupted")
            for copy in self.copies:
                copy.check(-signal.SIGKILL if copy.killed else None)
            if self.feeder.error:
                raise DemoFailed("the source cannot be written to: %s" % self.feeder.error)
            if time.monotonic() > deadline:
                for copy in self.copies:
                    copy.show_stderr()
                raise DemoFailed("waited %d s in vain for %s" % (limit, what))
            if time.monotonic() >= self.next_row:
                self.show_row()
                self.next_row = max(self.next_row + 1, time.monotonic())
            time.sleep(0.1)

    def play(self, seconds: float) -> Verdict:
        """Shows it all, feeding for `seconds` and through the failover; returns what became of the routed logs.

        Raises DemoFailed.
        """
        with self.bars or contextlib.nullcontext():
            self.show(seconds)
        self.stop_copies()
        return self.account()

    def show(self, seconds: float) -> None:
        for letter in "ABC":
            self.copies.append(Copy(letter, self.environment(), self.directory))
        say(
            "-- started dispatch_data.py: %s"
            % ", ".join("%s (process %d)" % (copy.letter, copy.process.pid) for copy in self.copies)
        )
        if not self.bars:
            say(LEGEND)
            say(ROW % ("time", "source", *TARGETS, "unmatched", "lag", *(copy.letter for copy in self.copies)))
        self.watch(self.is_shared, "the copies to share the shards")

        say("-- the copies have shared the shards; feeding %d LogGroups a second" % RATE)
        self.feeder.start()
        fed_since = time.monotonic()
        self.watch(
            lambda: time.monotonic() > fed_since + seconds * 0.4 and self.is_fed(),
            "logs for every target, and the time to kill a copy",
            seconds + LIMIT,
        )
        victim = self.copies[1]
        shards = self.held_shards(victim)
        victim.kill()
        say("-- copy %s killed with kill -9; it held: %s" % (victim.letter, " ".join(map(str, shards))))
        killed_at = time.monotonic()
        self.watch(self.is_shared, "the other copies to take over")
        say("-- taken over by the others after %.1f s" % (time.monotonic() - killed_at))
        self.watch(lambda: time.monotonic() > fed_since + seconds, "the feeding to end", seconds + LIMIT)

        self.feeder.stop()
        say("-- feeding stopped; waiting until nothing is left to deliver")
        self.watch(lambda: self.lag() == 0, "everything delivered and checkpointed")
        self.show_row()

    def stop_copies(self) -> None:
        """Stops the copies as an operator would. Raises DemoFailed unless each ends with exit status 0."""
        running = [copy for copy in self.copies if not copy.killed]
        say("-- stopping %s with SIGTERM" % " and ".join(copy.letter for copy in running))
        for copy in running:
            copy.process.terminate()
        for copy in running:
            try:
                copy.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                pass  # check() tells
            copy.check(0)

    def account(self) -> Verdict:
        """Compares what the source and the targets have taken, log by log, and prints the outcome."""
        for arrivals in [self.source] + list(self.targets.values()):
            arrivals.update()
        verdicts = []
        say("\nEvery log compared, byte by byte:\n")
        say(RESULT_ROW % ("", "sent", "delivered", "left out", "lost", "duplicated", "foreign"))
        for target, topics in TARGETS.items():
            sent = [log_group for topic in topics for log_group in self.source.log_groups[topic]]
            delivered = [log_group for some in self.targets[target].log_groups.values() for log_group in some]
            verdict = compare(sent, delivered)
            verdicts.append(verdict)
            say(RESULT_ROW % (target, verdict.sent, verdict.delivered, 0, *verdict[2:]))
        left_out = sum(count for topic, count in self.source.logs.items() if topic not in ROUTED)
        say(RESULT_ROW % ("unmatched", left_out, 0, left_out, 0, 0, 0))
        total = Verdict(*map(sum, zip(*verdicts)))
        say(RESULT_ROW % ("all", total.sent + left_out, total.delivered, left_out, *total[2:]))
        return total


def positive(text: str) -> float:
    """A number above 0. Raises ValueError."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demonstration's command line arguments to a parser."""
    parser.add_argument(
        "--seconds",
        type=positive,
        default=20.0,
        metavar="N",
        help="how long to feed the source, at the least (default: 20); the whole takes about 10 seconds more",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the demonstration; returns the exit status, 0 when all went well and every log arrived, else 1.

    Ctrl-C, SIGTERM and the end of the terminal end it and all that it has started; to this end it takes over the
    process's signals, and must be called in the main thread.
    """
    interrupts = []  # type: List[int]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, lambda number, _: interrupts.append(number))
    try:
        with LocalLogService(ACCESS_KEYS) as service, tempfile.TemporaryDirectory() as directory:
            with Demonstration(service, directory, interrupts) as demonstration:
                verdict = demonstration.play(arguments.seconds)
    except DemoFailed as failure:
        say("\nNOT OK: %s" % failure)
        return 1
    say(
        """
kill -9 leaves a copy no time to save how far it has come. Who takes over its shards delivers again what was in flight:
for each shard one batch at the most. Logs that come twice for that reason (%d here) are no failure, a lost log is.
"""
        % verdict.duplicated
    )
    say("%s: %s" % ("OK" if verdict.ok else "NOT OK", verdict))
    return 0 if verdict.ok else 1
