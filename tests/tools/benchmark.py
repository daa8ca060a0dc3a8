"""Measures dispatch_data.py beside naive.py: throughput, CPU, memory, requests and latency.

    python tests/tools/benchmark.py [--only small,agent,merged,large,delay,backlog,latency] [--runs 3] [--quick]
    python tests/tools/benchmark.py --service [--quick]

The dispatcher is a process of its own on the same interpreter; the local Log Service runs in this one. MB are 10**6 raw
bytes of the source LogGroups that are routed, for both programs alike. After every run each log is looked for in the
targets: where one is missing the row says LOST instead of figures and the exit status is 1. Each row is run so many
times, the programs in turn: a figure is the median, a ratio comes with the least and the greatest of its runs. Needs
Linux's /proc.

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
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

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


ROWS = (
    Row("small", "small", 8, 120),
    Row("agent", "agent", 30, 100),
    Row("merged", "agent", 30, 150, {"SLS_MERGE_PACKS": "true"}),
    Row("large", "large", 80, 300),
    Row("delay", "agent", 30, 160, {}, 0.005),
)
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
    service_cpu: float  # seconds of this process, in which the service runs in one thread


def text(choice: random.Random, size: int) -> str:
    """So many characters out of a web server's access log, after a place for the log's number."""
    line = "@" * 10
    while len(line) < size:
        line += " " + " ".join(access_line(choice).values())
    return line[:size]


def make_template(choice: random.Random, shape: Shape, topic: str) -> bytes:
    """A serialised LogGroup as a format that takes a number for each log and, of an agent, one for its tag."""
    host = choice.randrange(HOSTS)
    log_group = LogGroup(Topic=topic, Source="10.1.7.%d" % host)
    for second in range(shape.logs):
        log = log_group.Logs.add(Time=1700000000 + second)
        log.Contents.add(Key="content", Value=text(choice, shape.text_size))
    if shape.number_tag:
        log_group.MachineUUID = "6C2F7A4E-0000-000%d" % host
        log_group.LogTags.add(Key="__hostname__", Value="host-%d" % host)
        log_group.LogTags.add(Key="__path__", Value="/var/log/%s/access.log" % topic)
        log_group.LogTags.add(Key=shape.number_tag, Value="5E8C1A70B3D9%04X-" % host + "@" * 10)
    return log_group.SerializeToString().replace(b"%", b"%%").replace(b"@" * 10, b"%010d")


def log_groups(shape: Shape) -> Iterator[Tuple[str, bytes]]:
    """(topic, serialised LogGroup) without end, no two logs alike; the same ones each time."""
    choice = random.Random(shape.logs)
    template_count = 1 + DISTINCT_BYTES // (shape.logs * shape.text_size)
    templates = {
        topic: itertools.cycle([make_template(choice, shape, topic) for _ in range(template_count)])
        for topic in TOPIC_WEIGHTS
    }
    numbers = itertools.count()
    places = shape.logs + bool(shape.number_tag)
    topics, weights = list(TOPIC_WEIGHTS), list(TOPIC_WEIGHTS.values())
    while True:
        (topic,) = choice.choices(topics, weights)
        yield topic, next(templates[topic]) % tuple(itertools.islice(numbers, places))


def routed_alone(topics_and_log_groups: Iterable[Tuple[str, bytes]]) -> List[bytes]:
    return [log_group for topic, log_group in topics_and_log_groups if topic in TARGETS]


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

    def peak(self) -> float:
        """The most memory it has had resident so far, in MB."""
        for line in Path("/proc/%d/status" % self.process.pid).read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise ValueError("no VmHWM in /proc")

    def is_done(self, service: LocalLogService) -> bool:
        """Whether everything in the source is delivered and checkpointed. Raises RuntimeError where it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError("the dispatcher has ended:\n" + self.stderr_path.read_text())
        return bool(group_shards(service)) and service.lag(PROJECT, SOURCE, GROUP) == 0


@contextmanager
def running(
    program: Path, settings: Dict[str, str], shards: int = SHARDS
) -> Iterator[Tuple[LocalLogService, Dispatcher]]:
    """A service with empty logstores and a dispatcher that works on it."""
    with LocalLogService() as service, tempfile.TemporaryDirectory() as directory:
        service.create_logstore(PROJECT, SOURCE, shards)
        for logstore in TARGETS.values():
            service.create_logstore(PROJECT, logstore, 2)
        dispatcher = Dispatcher(program, service, settings, Path(directory))
        try:
            yield service, dispatcher
        finally:
            dispatcher.process.kill()
            dispatcher.process.wait()


def measure(program: Path, settings: Dict[str, str], row: Row, megabytes: float, warm_up_count: int) -> Figures:
    """One run of a program over a backlog of so many MB, after so many LogGroups of warm-up. Raises Lost."""
    warm_up = list(itertools.islice(log_groups(SHAPES["warm-up"]), warm_up_count))
    backlog = []
    size = 0
    for topic, log_group in log_groups(SHAPES[row.shape]):
        backlog.append((topic, log_group))
        size += len(log_group) if topic in TARGETS else 0
        if size > megabytes * 1e6:
            break
    with running(program, settings, row.shards) as (service, dispatcher):
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
        service.wait_for(lambda: dispatcher.is_done(service), LIMIT, "the backlog")
        wall = time.monotonic() - start
        figures = Figures(
            size / 1e6,
            dispatcher.cpu() - cpu,
            wall,
            service.calls("*") - requests,
            service.calls("PutLogs") - puts,
            dispatcher.peak(),
            time.process_time() - service_cpu,
        )
        delivered = (entry.log_group for logstore in TARGETS.values() for entry in service.ledger(PROJECT, logstore))
        verdict = compare(routed_alone(warm_up + backlog), delivered, "SLS_MERGE_PACKS" in settings)
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
Each pair is naive / dispatch_data.py. CPU s: the dispatcher's own, user and system. busy: the CPU time of the service's
process as a share of the wall time. The service has one thread: near 100 %% MB/s tells its speed, not the dispatcher's.
MB/CPU s does not depend on it. %d LogGroups went through before the clock started.
"""
COLUMNS = "%-7s %15s %20s %15s %13s %13s %11s"
HEADINGS = ("row", "MB/CPU s", "ratio", "MB/s", "calls/put", "peak MB", "busy %")
BACKLOG = "backlog of %-9s %.1f MB/s, %.1f of each shard; peak %.0f MB"
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
        pair("%.0f", lambda run: 100 * run.service_cpu / run.wall),
    )


def interpreter() -> str:
    version = platform.python_version()
    if IS_PYPY:
        version = "%d.%d.%d (Python %s)" % (sys.pypy_version_info[:3] + (version,))
    return "%s %s" % (platform.python_implementation(), version)


NAMES = [row.name for row in ROWS] + ["backlog", "latency"]


def read_options(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="rows, separated by commas, out of " + ",".join(NAMES), default=",".join(NAMES))
    parser.add_argument("--runs", type=int, default=3, help="runs of each row; 3 by default, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="small backlogs: shows that it works, not how fast")
    parser.add_argument("--service", action="store_true", help="measure the local Log Service alone")
    options = parser.parse_args(arguments)
    options.wanted = options.only.split(",")
    if not set(options.wanted) <= set(NAMES):
        parser.error("there are the rows " + ",".join(NAMES))
    options.runs = 1 if options.quick else max(1, options.runs)
    return options


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Prints the table; returns 1 where logs were lost, else 0."""
    options = read_options(arguments)
    if options.service:
        print("%s, aliyun-log-python-sdk %s, %d CPUs\n" % (interpreter(), sdk_version, os.cpu_count()))
        print_service_table(options.quick)
        return 0
    scale, warm_up_count = (QUICK, QUICK_WARM_UP) if options.quick else (1.0, WARM_UP)
    naive_settings = QUICK_SETTINGS if options.quick else {}

    @functools.lru_cache(maxsize=None)
    def naive_run(shape: str, delay: float, number: int) -> Figures:
        """Rows of one shape share the naive program's runs, by their number."""
        row = next(row for row in ROWS if (row.shape, row.delay) == (shape, delay))
        return measure(NAIVE, naive_settings, row, row.naive_megabytes * scale, warm_up_count)

    def run(row: Row) -> Figures:
        return measure(PROGRAM, row.settings, row, row.megabytes * scale, warm_up_count)

    def row_line(row: Row) -> str:
        return table_line(row, [(naive_run(row.shape, row.delay, number), run(row)) for number in range(options.runs)])

    def backlog_lines() -> str:
        figures = [(row, run(row)) for row in BACKLOGS]
        return "\n".join(
            BACKLOG % (row.name, ours.megabytes / ours.wall, ours.megabytes / ours.wall / row.shards, ours.peak)
            for row, ours in figures
        )

    def latency_lines() -> str:
        seconds = 4 if options.quick else 20
        return "\n".join(
            LATENCY % ((program.name,) + measure_latency(program, settings, seconds))
            for program, settings in ((NAIVE, naive_settings), (PROGRAM, {}))
        )

    print("%s, aliyun-log-python-sdk %s, %d CPUs" % (interpreter(), sdk_version, os.cpu_count()))
    print(LEGEND % warm_up_count)
    print(COLUMNS % HEADINGS, flush=True)
    lines = {row.name: functools.partial(row_line, row) for row in ROWS}  # type: Dict[str, Callable[[], str]]
    lines["backlog"] = backlog_lines
    lines["latency"] = latency_lines
    status = 0
    for name in NAMES:
        if name in options.wanted:
            try:
                print(lines[name](), flush=True)
            except Lost as lost:
                print("%-7s LOST %s" % (name, lost), flush=True)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
