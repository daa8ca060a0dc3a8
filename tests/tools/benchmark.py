"""Measures dispatch_data.py beside naive.py: throughput, CPU, memory, requests and latency.

    python tests/tools/benchmark.py [--only small,agent,...] [--runs 3] [--quick] [--beside OTHER/dispatch_data.py]
    python tests/tools/benchmark.py --service [--quick]

The dispatcher is a process of its own on the same interpreter; the local Log Service runs in this one. MB are 10**6 raw
bytes of the source LogGroups that are routed, for both programs alike. After every run each log is looked for in the
targets: where one is missing the row says LOST instead of figures and the exit status is 1. Each row is run so many
times, the programs in turn: a figure is the median, a ratio comes with the least and the greatest of its runs. Needs
Linux's /proc.

With --beside another release of dispatch_data.py takes the place of naive.py, with the same backlogs and settings.
With --service it measures the local Log Service alone, in a process of its own, by that process's CPU time: its one
thread does so much for a second of one core.
"""

import argparse
import functools
import itertools
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from aliyun.log import LogClient  # noqa: E402
from aliyun.log.proto import LogGroup  # noqa: E402
from aliyun.log.version import __version__ as sdk_version  # noqa: E402
from harness import GROUP, PROGRAM, PROJECT, SOURCE, group_shards, settings_for  # noqa: E402
from local_log_service import LocalLogService  # noqa: E402
from local_log_service.sample_logs import access_line  # noqa: E402
from local_log_service.verdict import compare, log_identities  # noqa: E402

NAIVE = Path(__file__).resolve().parent / "naive.py"
SHARDS = 4
TARGETS = {"nginx": "nginx", "sql_audit": "sql-audit", "click": "click"}  # topic -> logstore
TOPIC_WEIGHTS = {"nginx": 30, "sql_audit": 30, "click": 25, "debug": 15}  # percent of the LogGroups; debug has no route
HOSTS = 3  # that write each topic, so many Sources it has
DISTINCT_BYTES = 130000  # of logs of each topic, before they come again with other numbers: LZ4 looks 64 KB back
IS_PYPY = platform.python_implementation() == "PyPy"
WARM_UP = 12000 if IS_PYPY else 200  # LogGroups before the backlog: connections, and PyPy compiles what it runs often
LIMIT = 300.0  # seconds that a run may take on a slow machine


TOPIC_NUMBER = "#" * 3  # where a topic is one of several: their number takes its place


class Shape(NamedTuple):
    """How LogGroups look. With a `number_tag` they are an agent's: they bear MachineUUID and tags.

    A log is one field of text, as agents send lines that they don't take apart: what costs a program least that parses
    LogGroups. With ten fields a log the naive program takes up to three times as long on PyPy.
    """

    logs: int
    text_size: int  # characters of each log
    number_tag: str  # the tag whose value each LogGroup has for itself; LogGroups that differ in it can't be joined


SHAPES = {
    "small": Shape(10, 150, ""),
    "agent": Shape(60, 220, "__pack_id__"),
    "large": Shape(600, 350, "__pack_id__"),
    "warm-up": Shape(60, 220, "__session__"),  # never joined: each makes a put
}


class Row(NamedTuple):
    """One comparison. MB of backlog: enough for steady figures, and the naive program, being slower, gets less."""

    name: str
    shape: str
    naive_megabytes: float
    megabytes: float
    settings: Dict[str, str] = {}  # of dispatch_data.py; the naive program is at its defaults
    delay: float = 0.0  # seconds, for each call
    shards: int = SHARDS  # of the source
    targets: int = len(TARGETS)  # each of the three topics is so many / 3, with a target of its own


ROWS = (
    Row("small", "small", 8, 120),
    Row("agent", "agent", 30, 100),
    Row("merged", "agent", 30, 150, {"SLS_MERGE_PACKS": "true"}),
    Row("large", "large", 80, 300),
    Row("delay", "agent", 30, 160, {}, 0.005),
    Row("1 ms", "agent", 30, 160, {}, 0.001),
    Row("20 ms", "agent", 30, 160, {}, 0.020),
)
# Compared with another release only: the naive program knows three targets, and would take an hour.
LOADS = (Row("shards", "agent", 100, 100, shards=256), Row("targets", "agent", 100, 100, targets=300))
IDLE_SHARDS = 256
BACKLOGS = (Row("4 shards", "large", 0, 300, shards=4), Row("32 shards", "large", 0, 300, shards=32))
QUICK = 0.03  # share of the backlogs with --quick
QUICK_WARM_UP = 200  # LogGroups
QUICK_SETTINGS = {"SLS_FETCH_INTERVAL": "0.2"}  # of the naive program with --quick


class Lost(Exception):
    """Logs did not arrive; says how many."""


class Figures(NamedTuple):
    """What one run came to, from the release of the backlog until all of it was delivered and checkpointed."""

    megabytes: float
    cpu: float  # seconds of the dispatcher, user and system
    wall: float  # seconds
    requests: int  # of all kinds
    puts: int  # those of them that put
    peak: float  # MB of memory, from the dispatcher's start
    threads: int  # the most that were seen
    service_cpu: float  # seconds of this process, in which the service runs in one thread


def text(choice: random.Random, size: int) -> str:
    """So many characters out of a web server's access log, after a place for the log's number."""
    line = "@" * 10
    while len(line) < size:
        line += " " + " ".join(access_line(choice).values())
    return line[:size]


def make_template(choice: random.Random, shape: Shape, topic: str, is_numbered: bool) -> bytes:
    """A serialised LogGroup as a format that takes a number for each log and, of an agent, one for its tag. Between
    them stands the topic's own number where it is one of several."""
    host = choice.randrange(HOSTS)
    log_group = LogGroup(Topic=topic + TOPIC_NUMBER * is_numbered, Source="10.1.7.%d" % host)
    for second in range(shape.logs):
        log = log_group.Logs.add(Time=1700000000 + second)
        log.Contents.add(Key="content", Value=text(choice, shape.text_size))
    if shape.number_tag:
        log_group.MachineUUID = "6C2F7A4E-0000-000%d" % host
        log_group.LogTags.add(Key="__hostname__", Value="host-%d" % host)
        log_group.LogTags.add(Key="__path__", Value="/var/log/%s/access.log" % topic)
        log_group.LogTags.add(Key=shape.number_tag, Value="5E8C1A70B3D9%04X-" % host + "@" * 10)
    template = log_group.SerializeToString().replace(b"%", b"%%").replace(b"@" * 10, b"%010d")
    return template.replace(TOPIC_NUMBER.encode(), b"%03d") if is_numbered else template


def targets_of(row: Row) -> Dict[str, str]:
    """Topic -> logstore."""
    each = row.targets // len(TARGETS)
    if each == 1:
        return TARGETS
    return {
        "%s%03d" % (topic, n): "%s-%03d" % (logstore, n) for topic, logstore in TARGETS.items() for n in range(each)
    }


def log_groups(shape: Shape, topics_each: int = 1) -> Iterator[Tuple[str, bytes]]:
    """(topic, serialised LogGroup) without end, no two logs alike; the same ones each time."""
    choice = random.Random(shape.logs)
    template_count = 1 + DISTINCT_BYTES // (shape.logs * shape.text_size)
    templates = {
        topic: itertools.cycle([make_template(choice, shape, topic, topics_each > 1) for _ in range(template_count)])
        for topic in TOPIC_WEIGHTS
    }
    numbers = itertools.count()
    topics, weights = list(TOPIC_WEIGHTS), list(TOPIC_WEIGHTS.values())
    for count in itertools.count():
        (topic,) = choice.choices(topics, weights)
        number = [count % topics_each] if topics_each > 1 else []
        tag = [next(numbers)] if shape.number_tag else []
        values = (*itertools.islice(numbers, shape.logs), *number, *tag)
        yield topic + "%03d" % number[0] if number else topic, next(templates[topic]) % values


def routed_alone(
    topics_and_log_groups: Iterable[Tuple[str, bytes]], targets: Mapping[str, str] = TARGETS
) -> List[bytes]:
    return [log_group for topic, log_group in topics_and_log_groups if topic in targets]


def cpu_of(process: "subprocess.Popen[bytes]") -> float:
    """Seconds of CPU time of a process so far, user and system."""
    after_name = Path("/proc/%d/stat" % process.pid).read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


class Dispatcher:
    """A process that runs one of the two programs, at its defaults but for `settings`."""

    def __init__(self, program: Path, service: LocalLogService, settings: Dict[str, str], directory: Path) -> None:
        self.stderr_path = directory / "stderr"
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(program)],
                cwd=str(directory),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=settings_for(service, SLS_HEARTBEAT_INTERVAL=None, **settings),
            )

    def cpu(self) -> float:
        """Seconds of CPU time so far, user and system."""
        return cpu_of(self.process)

    def status(self, name: str) -> int:
        """A number that Linux tells of the process: VmHWM is the most memory it has had resident so far, in KB."""
        for line in Path("/proc/%d/status" % self.process.pid).read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
        raise ValueError("no %s in /proc" % name)

    def is_done(self, service: LocalLogService) -> bool:
        """Whether everything in the source is delivered and checkpointed. Raises RuntimeError where it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError("the dispatcher has ended:\n" + self.stderr_path.read_text())
        return bool(group_shards(service)) and service.lag(PROJECT, SOURCE, GROUP) == 0


@contextmanager
def running(
    program: Path, settings: Dict[str, str], shards: int = SHARDS, targets: Mapping[str, str] = TARGETS
) -> Iterator[Tuple[LocalLogService, Dispatcher]]:
    """A service with empty logstores and a dispatcher that works on it."""
    with LocalLogService() as service, tempfile.TemporaryDirectory() as directory:
        service.create_logstore(PROJECT, SOURCE, shards)
        for number, (topic, logstore) in enumerate(targets.items(), start=1):
            service.create_logstore(PROJECT, logstore, 2)
            if targets is not TARGETS:
                settings = {**settings, "SLS_LOGSTORE_TO%d" % number: logstore, "SLS_TOPIC_TO%d" % number: topic}
        dispatcher = Dispatcher(program, service, settings, Path(directory))
        try:
            yield service, dispatcher
        finally:
            dispatcher.process.kill()
            dispatcher.process.wait()


def measure(program: Path, settings: Dict[str, str], row: Row, megabytes: float, warm_up_count: int) -> Figures:
    """One run of a program over a backlog of so many MB, after so many LogGroups of warm-up. Raises Lost."""
    targets = targets_of(row)
    source = log_groups(SHAPES[row.shape], row.targets // len(TARGETS))
    # For each target its own, where there are many: each has a limit of its own to learn.
    warm_up = list(itertools.islice(log_groups(SHAPES["warm-up"]) if targets is TARGETS else source, warm_up_count))
    backlog = []
    size = 0
    for topic, log_group in source:
        backlog.append((topic, log_group))
        size += len(log_group) if topic in targets else 0
        if size > megabytes * 1e6:
            break
    with running(program, settings, row.shards, targets) as (service, dispatcher):
        service.put(PROJECT, SOURCE, (log_group for _, log_group in warm_up))
        service.wait_for(lambda: dispatcher.is_done(service), LIMIT, "the warm-up")
        if row.delay:
            service.add_fault("*", delay=row.delay)
        # Pulls wait until all of the backlog is there.
        with service.add_fault("PullLogs", hold=True):
            service.put(PROJECT, SOURCE, (log_group for _, log_group in backlog))
            requests, puts = service.calls("*"), service.calls("PutLogs")
            cpu, service_cpu = dispatcher.cpu(), time.process_time()
            start = time.monotonic()
        threads = []

        def is_done() -> bool:
            threads.append(dispatcher.status("Threads"))
            return dispatcher.is_done(service)

        service.wait_for(is_done, LIMIT, "the backlog")
        wall = time.monotonic() - start
        figures = Figures(
            size / 1e6,
            dispatcher.cpu() - cpu,
            wall,
            service.calls("*") - requests,
            service.calls("PutLogs") - puts,
            dispatcher.status("VmHWM") * 1024 / 1e6,
            max(threads),
            time.process_time() - service_cpu,
        )
        delivered = (entry.log_group for logstore in targets.values() for entry in service.ledger(PROJECT, logstore))
        verdict = compare(routed_alone(warm_up + backlog, targets), delivered, "SLS_MERGE_PACKS" in settings)
    if not verdict.ok:
        raise Lost("%s: %s" % (program.name, verdict))
    return figures


def measure_latency(program: Path, settings: Dict[str, str], seconds: float) -> Tuple[float, float, float]:
    """One copy, idle for half of `seconds`, then fed with 5 LogGroups a second at random moments. Raises Lost.

    Returns median and 99th percentile of the seconds from a log's arrival in the source to that in a target, and the
    pulls a second of each idle shard.
    """
    choice = random.Random(0)
    fed = iter(routed_alone(itertools.islice(log_groups(SHAPES["small"]), int(20 * seconds))))
    with running(program, settings) as (service, dispatcher):
        service.wait_for(lambda: service.calls("PullLogs") >= 2 * SHARDS, LIMIT, "pulls from every shard")
        pulls = service.calls("PullLogs")
        time.sleep(seconds / 2)
        pulls = service.calls("PullLogs") - pulls

        sent = {}  # identity of a log -> unix time
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(choice.expovariate(5))
            (entry,) = service.put(PROJECT, SOURCE, [next(fed)], shard=choice.randrange(SHARDS))
            sent.update(dict.fromkeys(log_identities([entry.log_group]), entry.received_at))
        service.wait_for(lambda: dispatcher.is_done(service), LIMIT, "the last log")
        arrived = {
            identity: entry.received_at
            for logstore in TARGETS.values()
            for entry in service.ledger(PROJECT, logstore)
            for identity in log_identities([entry.log_group])
        }
    if not sent.keys() <= arrived.keys():
        raise Lost("%s: %d of %d logs" % (program.name, len(sent.keys() - arrived.keys()), len(sent)))
    latencies = sorted(arrived[identity] - sent[identity] for identity in sent)
    return statistics.median(latencies), latencies[len(latencies) * 99 // 100], pulls / (seconds / 2) / SHARDS


def measure_idle(program: Path, seconds: float) -> Tuple[float, float]:
    """One copy holds IDLE_SHARDS shards without logs. Returns the percent of a CPU it takes, and its pulls a second."""
    with running(program, {}, IDLE_SHARDS) as (service, dispatcher):
        # Until it has gone over to looking rarely.
        service.wait_for(lambda: dispatcher.is_done(service), LIMIT, "every shard held")
        time.sleep(seconds / 2)
        pulls, cpu, start = service.calls("PullLogs"), dispatcher.cpu(), time.monotonic()
        time.sleep(seconds)
        wall = time.monotonic() - start
        return 100 * (dispatcher.cpu() - cpu) / wall, (service.calls("PullLogs") - pulls) / wall


class Serialised(NamedTuple):
    """All that the SDK's client asks of a LogGroup."""

    log_group: bytes

    def SerializeToString(self) -> bytes:
        return self.log_group


@contextmanager
def served() -> Iterator[Tuple["subprocess.Popen[bytes]", LogClient, str, str]]:
    """A service in a process of its own: the process, a client, and a project and logstore of one shard."""
    process = subprocess.Popen(
        [sys.executable, "-m", "local_log_service", "serve", "--shards", "1"], cwd=str(TESTS), stdout=subprocess.PIPE
    )
    try:
        environment = {}
        for line in process.stdout:
            words = shlex.split(line.decode(), comments=True)
            if not words:
                break
            name, _, value = words[1].partition("=")
            environment[name] = value
        client = LogClient(
            environment["SLS_ENDPOINT"], environment["SLS_AK_ID"], environment["SLS_AK_KEY"], source="localhost"
        )
        client._session.trust_env = False
        client._session.proxies = {"http": environment["http_proxy"]}
        yield process, client, environment["SLS_PROJECT"], environment["SLS_LOGSTORE"]
    finally:
        process.terminate()
        process.wait()


def measure_service(
    shape: str, megabytes: float, passes: int, empty_pulls: int, warm_up_count: int
) -> Tuple[float, ...]:
    """What the service does for a second of its CPU time, with LogGroups of this shape, after so many puts of warm-up.

    What was put is pulled ``passes`` times.

    Returns puts, MB put, pulls, MB pulled and empty pulls.
    """
    sent = []
    size = 0
    for _, log_group in log_groups(SHAPES[shape]):
        sent.append(Serialised(log_group))
        size += len(log_group)
        if size > megabytes * 1e6:
            break
    with served() as (process, client, project, logstore):
        for log_group in itertools.islice(itertools.cycle(sent), warm_up_count):
            client.put_log_raw(project, logstore, log_group)
        begin = client.get_end_cursor(project, logstore, 0).get_cursor()

        cpu = cpu_of(process)
        for log_group in sent:
            client.put_log_raw(project, logstore, log_group)
        put_cpu = cpu_of(process) - cpu

        count = min(1000, max(1, len(sent) * SERVICE_PULL // size))
        pulls = 0
        cpu = cpu_of(process)
        for _ in range(passes):
            cursor, left = begin, len(sent)
            while left > 0:
                answer = client.pull_logs(project, logstore, 0, cursor, count)
                cursor = answer.get_next_cursor()
                left -= answer.get_loggroup_count()
                pulls += 1
        pull_cpu = cpu_of(process) - cpu

        cpu = cpu_of(process)
        for _ in range(empty_pulls):
            client.pull_logs(project, logstore, 0, cursor)
        empty_cpu = cpu_of(process) - cpu
    tick = 1 / os.sysconf("SC_CLK_TCK")  # what CPU times are counted in
    put_cpu, pull_cpu, empty_cpu = max(put_cpu, tick), max(pull_cpu, tick), max(empty_cpu, tick)
    return (
        len(sent) / put_cpu,
        size / 1e6 / put_cpu,
        pulls / pull_cpu,
        passes * size / 1e6 / pull_cpu,
        empty_pulls / empty_cpu,
    )


SERVICE_LEGEND = """\
For each second of the service's CPU time: puts of one LogGroup each, pulls of up to 2 MB each, and pulls of nothing.
"""
SERVICE_COLUMNS = "%-7s %9s %9s %9s %9s %12s"
SERVICE_HEADINGS = ("row", "puts", "MB put", "pulls", "MB pulled", "empty pulls")
SERVICE_ROWS = (
    ("small", 5, 40),
    ("agent", 40, 5),
    ("large", 300, 1),
)  # shape of LogGroups, MB of them, how often pulled
SERVICE_PULL = 2000000  # bytes asked of a pull
SERVICE_EMPTY_PULLS = 2000


def print_service_table(quick: bool) -> None:
    print(SERVICE_LEGEND)
    print(SERVICE_COLUMNS % SERVICE_HEADINGS)
    scale, warm_up_count = (QUICK, 10) if quick else (1.0, WARM_UP)
    for shape, megabytes, passes in SERVICE_ROWS:
        figures = measure_service(shape, megabytes * scale, passes, int(SERVICE_EMPTY_PULLS * scale), warm_up_count)
        print(SERVICE_COLUMNS % ((shape,) + tuple("%.1f" % figure for figure in figures)), flush=True)


LEGEND = """\
Each pair is %s / dispatch_data.py. CPU s: the dispatcher's own, user and system. busy: the CPU time of the service's
process as a share of the wall time. The service has one thread: near 100 %% MB/s tells its speed, not the dispatcher's.
MB/CPU s does not depend on it. %d LogGroups went through before the clock started.
"""
COLUMNS = "%-7s %15s %20s %15s %13s %13s %11s %11s"
HEADINGS = ("row", "MB/CPU s", "ratio", "MB/s", "calls/put", "peak MB", "threads", "busy %")
BACKLOG = "backlog of %-9s %.1f MB/s, %.1f of each shard; peak %.0f MB"
IDLE = "idle %-19s %.1f %% of a CPU with %d shards, %.0f pulls a second"
LATENCY = "latency %-16s median %.2f s, 99th percentile %.2f s, %.2f pulls a second of each idle shard"


def table_line(row: Row, runs: Sequence[Tuple[Figures, Figures]]) -> str:
    """Of the runs of both programs, the naive one's first."""

    def pair(number_format: str, of: Callable[[Figures], float]) -> str:
        naive, ours = (statistics.median(map(of, figures)) for figures in zip(*runs))
        return (number_format + " / " + number_format) % (naive, ours)

    ratios = sorted(ours.megabytes / ours.cpu * naive.cpu / naive.megabytes for naive, ours in runs)
    return COLUMNS % (
        row.name,
        pair("%.1f", lambda run: run.megabytes / run.cpu),
        "%.1fx (%.1f to %.1f)" % (statistics.median(ratios), ratios[0], ratios[-1]),
        pair("%.1f", lambda run: run.megabytes / run.wall),
        pair("%.2f", lambda run: run.requests / run.puts),
        pair("%.0f", lambda run: run.peak),
        pair("%.0f", lambda run: run.threads),
        pair("%.0f", lambda run: 100 * run.service_cpu / run.wall),
    )


def name(program: Path) -> str:
    return program.name if program in (NAIVE, PROGRAM) else "the other"


def interpreter() -> str:
    version = platform.python_version()
    if IS_PYPY:
        version = "%d.%d.%d (Python %s)" % (sys.pypy_version_info[:3] + (version,))
    return "%s %s" % (platform.python_implementation(), version)


NAMES = [row.name for row in ROWS] + ["backlog", "latency", "idle"]


def read_options(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="rows, separated by commas, out of " + ",".join(NAMES))
    parser.add_argument("--runs", type=int, default=3, help="runs of each row; 3 by default, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="small backlogs: shows that it works, not how fast")
    parser.add_argument("--service", action="store_true", help="measure the local Log Service alone")
    parser.add_argument(
        "--beside",
        type=lambda path: Path(path).resolve(),
        help="another release of dispatch_data.py to compare with, for naive.py",
    )
    options = parser.parse_args(arguments)
    options.names = NAMES + [row.name for row in LOADS] * bool(options.beside)
    options.wanted = options.only.split(",") if options.only else options.names
    if not set(options.wanted) <= set(options.names):
        parser.error("there are the rows %s, and with --beside shards,targets" % ",".join(NAMES))
    options.runs = 1 if options.quick else max(1, options.runs)
    return options


class Table:
    """Measures and prints row by row, each as its lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.runs, self.beside = options.runs, options.beside
        self.scale, self.warm_up_count = (QUICK, QUICK_WARM_UP) if options.quick else (1.0, WARM_UP)
        self.naive_settings = QUICK_SETTINGS if options.quick else {}
        self.seconds = 4 if options.quick else 20
        self.naive_figures = {}  # type: Dict[Tuple[str, float, int], Figures]
        rows = {row.name: functools.partial(self.row, row) for row in ROWS + LOADS}
        self.lines = dict(rows)  # type: Dict[str, Callable[[], str]]
        self.lines.update(backlog=self.backlog, latency=self.latency, idle=self.idle)

    def print_head(self) -> None:
        print("%s, aliyun-log-python-sdk %s, %d CPUs" % (interpreter(), sdk_version, os.cpu_count()))
        print(LEGEND % (name(self.beside or NAIVE), self.warm_up_count))
        print(COLUMNS % HEADINGS, flush=True)

    def run(self, row: Row, program: Path = PROGRAM) -> Figures:
        return measure(program, row.settings, row, row.megabytes * self.scale, self.warm_up_count)

    def run_other(self, row: Row, number: int) -> Figures:
        """Rows of one shape share the naive program's runs, by their number."""
        if self.beside:
            return self.run(row, self.beside)
        key = row.shape, row.delay, number
        if key not in self.naive_figures:
            megabytes = row.naive_megabytes * self.scale
            plain = row._replace(settings={})
            self.naive_figures[key] = measure(NAIVE, self.naive_settings, plain, megabytes, self.warm_up_count)
        return self.naive_figures[key]

    def row(self, row: Row) -> str:
        return table_line(row, [(self.run_other(row, number), self.run(row)) for number in range(self.runs)])

    def backlog(self) -> str:
        figures = [(row, self.run(row)) for row in BACKLOGS]
        return "\n".join(
            BACKLOG % (row.name, ours.megabytes / ours.wall, ours.megabytes / ours.wall / row.shards, ours.peak)
            for row, ours in figures
        )

    def latency(self) -> str:
        other = (self.beside, {}) if self.beside else (NAIVE, self.naive_settings)
        return "\n".join(
            LATENCY % ((name(program),) + measure_latency(program, settings, self.seconds))
            for program, settings in (other, (PROGRAM, {}))
        )

    def idle(self) -> str:
        figures = [(each, *measure_idle(each, self.seconds)) for each in (self.beside, PROGRAM) if each]
        return "\n".join(IDLE % (name(program), cpu, IDLE_SHARDS, pulls) for program, cpu, pulls in figures)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Prints the table; returns 1 where logs were lost, else 0."""
    options = read_options(arguments)
    if options.service:
        print("%s, aliyun-log-python-sdk %s, %d CPUs\n" % (interpreter(), sdk_version, os.cpu_count()))
        print_service_table(options.quick)
        return 0
    table = Table(options)
    table.print_head()
    status = 0
    for wanted in options.names:
        if wanted in options.wanted:
            try:
                print(table.lines[wanted](), flush=True)
            except Lost as lost:
                print("%-7s LOST %s" % (wanted, lost), flush=True)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
