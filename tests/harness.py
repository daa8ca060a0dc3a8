"""Runs copies of dispatch_data.py as processes, and feeds and checks what they work on."""

import builtins
import contextlib
import dis
import functools
import http.client
import inspect
import itertools
import operator
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

from aliyun.log.proto import LogGroup
from forked import MAIN, PROGRAM, ForkedProcess, is_as_here
from local_log_service import LocalLogService
from local_log_service.errors import ServiceError

import dispatch_data

PROJECT = "test-project"
SOURCE = "source"
GROUP = "dispatch"
TARGETS = {"nginx": "nginx", "ngnix": "nginx", "sql_audit": "sql-audit", "click": "click"}  # topic -> logstore
TARGET_LOGSTORES = ("nginx", "sql-audit", "click")
# Settings for the same routes and a fourth target that takes what is left.
AND_A_CATCH_ALL = {
    "SLS_TOPIC_TO1": "nginx,ngnix",
    "SLS_TOPIC_TO2": "sql_audit",
    "SLS_TOPIC_TO3": "click",
    "SLS_LOGSTORE_TO4": "rest",
    "SLS_TOPIC_TO4": "*",
}
LIMIT = 120.0  # seconds that any condition may take on a slow machine
# A copy may be silent for twice as long. PyPy, which warms up, is silent for 2 s at times beside other tests.
HEARTBEAT_INTERVAL = "2" if platform.python_implementation() == "PyPy" else "1"  # seconds


def settings_for(service: LocalLogService, **changes: Optional[str]) -> Dict[str, str]:
    """The environment of a copy: what reaches the service, the default routes, and `changes` (None removes one)."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLS_")}
    environment.update(service.environment())
    access_key_id, access_key = next(iter(service.access_keys.items()))
    environment.update(
        {
            "SLS_ENDPOINT": service.endpoint,
            "SLS_AK_ID": access_key_id,
            "SLS_AK_KEY": access_key,
            "SLS_PROJECT": PROJECT,
            "SLS_LOGSTORE": SOURCE,
            "SLS_CG": GROUP,
            "SLS_LOGSTORE_TO1": "nginx",
            "SLS_LOGSTORE_TO2": "sql-audit",
            "SLS_LOGSTORE_TO3": "click",
            "SLS_HEARTBEAT_INTERVAL": HEARTBEAT_INTERVAL,
        }
    )
    environment.update({name: text for name, text in changes.items() if text is not None})
    return {name: text for name, text in environment.items() if changes.get(name, text) is not None}


PATCH = """
patch = {}
exec(compile(%r, %r, "exec"), patch)
patch[%r](sys.modules[__name__], *%r, **%r)
"""
Patch = Union[Callable[..., None], Sequence[Callable[..., None]]]


def changes_of(patch: Patch = (), constants: Optional[Mapping[str, object]] = None) -> str:
    """Lines of Python that change the program, see `Copies.start`.

    What is changed has to be there: a test might pass for no other reason than that it is gone.
    """
    assert_in_program(constants or {})
    changes = ["%s = %r\n" % change for change in (constants or {}).items()]
    changes += map(lines_of, patch if isinstance(patch, Sequence) else [patch])
    compile("".join(changes), "patches", "exec")  # a value whose repr is no Python is told here
    return "".join(changes)


def program_with(directory: Path, patch: Patch = (), constants: Optional[Mapping[str, object]] = None) -> Path:
    """The program with such changes, in a copy of its file if there are any."""
    changes = changes_of(patch, constants)
    if not changes:
        return PROGRAM
    text = PROGRAM.read_text(encoding="utf-8")
    assert text.count(MAIN) == 1
    path = directory / PROGRAM.name
    path.write_text(text.replace(MAIN, "\n%s\n%s" % (changes, MAIN)), encoding="utf-8")
    return path


def assert_in_program(names: Iterable[str]) -> None:
    for name in names:
        try:
            operator.attrgetter(name)(dispatch_data)
        except AttributeError as error:
            raise AssertionError("a test changes %s, which is not in the program: %s" % (name, error)) from None


def lines_of(patch: Callable[..., None]) -> str:
    """Lines of Python that define a patch once more, in a namespace of its own, and call it."""
    call = functools.partial(patch)  # of a partial, too, it has the function and all the arguments
    lines, first = inspect.getsourcelines(call.func)
    source = textwrap.dedent("".join(lines))
    foreign = names_outside(compile(source, "patch", "exec")).difference(vars(builtins))
    assert not foreign, "%s runs in another process, and has to import %s itself" % (call.func.__name__, foreign)
    assert_in_program(re.findall(r"\bprogram\.(\w+(?:\.\w+)*)", source))
    at_its_line = "\n" * (first - 1) + source  # so that tracebacks show it
    return PATCH % (at_its_line, inspect.getsourcefile(call.func), call.func.__name__, call.args, call.keywords)


def names_outside(code: types.CodeType) -> Set[str]:
    """The names that code, and the functions in it, take from around it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    within = [names_outside(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*within)


@contextlib.contextmanager
def inherited_signals(ignored: Sequence[int]) -> Iterator[None]:
    """What is started meanwhile finds these signals ignored, and SIGHUP not, unless named: tests may run in nohup."""
    dispositions = {signal.SIGHUP: signal.SIG_DFL, **dict.fromkeys(ignored, signal.SIG_IGN)}
    before = {number: signal.signal(number, disposition) for number, disposition in dispositions.items()}
    try:
        yield
    finally:
        for number, disposition in before.items():
            signal.signal(number, disposition)


class Copy:
    """One process that runs dispatch_data.py, its stderr in a file beside its log."""

    def __init__(
        self,
        environment: Dict[str, str],
        directory: Path,
        patch: Patch = (),
        constants: Optional[Mapping[str, object]] = None,
        ignored: Sequence[int] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.stderr_path = directory / "stderr"
        program = program_with(directory, patch, constants)
        if is_as_here(environment):
            self.stderr_path.touch()
            command = [str(program), *arguments]
            files = (str(directory), os.devnull, str(self.stderr_path))
            self.process = ForkedProcess(environment, changes_of(patch, constants), command, *files, ignored)  # type: Union[ForkedProcess, subprocess.Popen[bytes]]
            return
        with self.stderr_path.open("wb") as stderr, inherited_signals(ignored):
            self.process = subprocess.Popen(
                [sys.executable, str(program), *arguments],
                env=environment,
                cwd=str(directory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = LIMIT) -> int:
        """Sends a signal and returns the exit status (negative: ended by that signal).

        Raises subprocess.TimeoutExpired where that takes more than `seconds`.
        """
        self.send(number)
        return self.process.wait(seconds)

    def stderr(self) -> str:
        return self.stderr_path.read_text(encoding="utf-8")

    def log(self) -> str:
        """What it has written to its log file so far."""
        return "".join(path.read_text(encoding="utf-8") for path in self.directory.glob("dispatch_data_*.log"))

    def held_shards(self, service: LocalLogService) -> List[int]:
        """The shards that the service has given this copy, found by the process id in the consumer's name."""
        return sorted(
            shard
            for shard, state in group_shards(service).items()
            if state["state"] == "already_alloc" and "-%d-" % self.process.pid in state["consumer"]
        )


class Copies:
    """Starts copies and makes sure that none outlives its test."""

    def __init__(self, service: LocalLogService, directory: Path) -> None:
        self.service = service
        self.directory = directory
        self.started = []  # type: List[Copy]

    def start(
        self,
        patch: Patch = (),
        constants: Optional[Mapping[str, object]] = None,
        ignored: Sequence[int] = (),
        arguments: Sequence[str] = (),
        **changes: Optional[str],
    ) -> Copy:
        """Starts a copy, with these changes of its settings.

        `constants` are other values for names of the program, dotted for those of a class.
        `patch` is for what neither can do: a function of a test file, or several, that the copy calls with its module,
        `program`, before its main part. A copy has nothing but the function's source, so that imports what it needs;
        what it needs to know are arguments, `functools.partial(function, path)`. Values and arguments go by their repr.
        `ignored` are signals that it inherits as ignored, as from nohup; `arguments` those of the command line.
        """
        directory = self.directory / ("copy%d" % len(self.started))
        directory.mkdir()
        copy = Copy(settings_for(self.service, **changes), directory, patch, constants, ignored, arguments)
        self.started.append(copy)
        return copy

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, *exception: object) -> None:
        for copy in self.started:
            if copy.process.poll() is None:
                copy.process.kill()
                copy.process.wait()


numbers = itertools.count()


def make_log_group(topic: str, log_count: int = 5, **fields: str) -> bytes:
    """A serialised LogGroup whose logs are unlike any other's."""
    log_group = LogGroup(Topic=topic, **fields)
    for _ in range(log_count):
        log = log_group.Logs.add(Time=int(time.time()))
        log.Contents.add(Key="number", Value=str(next(numbers)))
    return log_group.SerializeToString()


def feed(service: LocalLogService, count: int, topics: Iterable[str] = tuple(TARGETS), **options: int) -> List[bytes]:
    """Puts `count` LogGroups into the source, over all shards, each topic as often and in every shard."""
    names = list(topics)
    log_groups = [make_log_group(names[(number + number // len(names)) % len(names)]) for number in range(count)]
    service.put(PROJECT, SOURCE, log_groups, **options)
    return log_groups


def feed_separately(service: LocalLogService, count: int, **options: int) -> List[bytes]:
    """Puts LogGroups into the source that can't be joined, so that a batch is many puts."""
    topics = list(TARGETS)
    log_groups = [make_log_group(topics[number // 4 % 4], Source="10.0.0.%d" % number) for number in range(count)]
    service.put(PROJECT, SOURCE, log_groups, **options)
    return log_groups


@contextlib.contextmanager
def pulled_at_once(service: LocalLogService) -> Iterator[None]:
    """What is fed to a shard meanwhile comes with one pull, so that it is one batch, whoever is faster."""
    with service.add_fault("PullLogs", project=PROJECT, logstore=SOURCE, hold=True):
        yield


class SteadyFeed:
    """Feeds the source a little at each look, so that logs flow while a test waits for something else."""

    INTERVAL = 0.02  # seconds

    def __init__(self, service: LocalLogService) -> None:
        self.service = service
        self.next_time = 0.0

    def go_on(self) -> None:
        if time.monotonic() >= self.next_time:
            self.next_time = time.monotonic() + self.INTERVAL
            feed(self.service, 4)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        def fed_and_met() -> bool:
            self.go_on()
            return condition()

        self.service.wait_for(fed_and_met, LIMIT, what)

    def wait_until_shared(self, *sharing: Copy) -> None:
        self.wait_for(lambda: is_shared(self.service, sharing), "the shards shared among %d copies" % len(sharing))


def group_shards(service: LocalLogService) -> Dict[int, dict]:
    """What the service says of the group's shards; nothing before the first copy has made the group."""
    try:
        return service.consumer_group(PROJECT, SOURCE, GROUP)["shards"]
    except ServiceError:
        return {}


def make_group(service: LocalLogService, timeout: int, in_order: bool = False) -> None:
    """Makes the group before a copy does.

    With a longer timeout than these would give it their heartbeats are as frequent, so that shards move as soon, and no
    stall of a busy machine ends a lease. But who leaves is missed as much later.
    """
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, timeout, in_order)


def is_delivered(service: LocalLogService) -> bool:
    """Whether the group's checkpoints have reached the end of the source."""
    return bool(group_shards(service)) and service.lag(PROJECT, SOURCE, GROUP) == 0


def wait_until_delivered(service: LocalLogService, limit: float = LIMIT) -> None:
    """Waits until the group's checkpoints have reached the end of the source, so many seconds at the most."""
    service.wait_for(lambda: is_delivered(service), limit, "everything delivered and checkpointed")


def wait_until_forgotten(service: LocalLogService) -> None:
    """Waits until every consumer has been silent for longer than the group's timeout.

    By then the service has also dealt with the last calls of copies that were killed.
    """
    service.wait_for(
        lambda: not service.consumer_group(PROJECT, SOURCE, GROUP)["consumers"], LIMIT, "the consumers removed"
    )


def is_shared(service: LocalLogService, sharing: Sequence[Copy], shard_count: int = 4) -> bool:
    """Whether the service has given all shards to these copies, to within one."""
    held = [len(copy.held_shards(service)) for copy in sharing]
    return sum(held) == shard_count and max(held) - min(held) <= 1


def wait_until_shared(service: LocalLogService, *sharing: Copy, shard_count: int = 4) -> None:
    """Waits until the service has given all shards to these copies, to within one."""
    service.wait_for(
        lambda: is_shared(service, sharing, shard_count), LIMIT, "the shards shared among %d copies" % len(sharing)
    )


def wait_until_joined(service: LocalLogService, *started: Copy) -> None:
    """Waits until these copies have made sure of their settings and joined the group."""
    service.wait_for(lambda: all("INFO consumer " in copy.log() for copy in started), LIMIT, "copies that have joined")


def joined(service):
    """A group exists and each shard of the source has a checkpoint."""
    shards = group_shards(service)
    return bool(shards) and all(shard["checkpoint"] for shard in shards.values())


def wait_until_begun(service: LocalLogService) -> None:
    """Waits until the group knows where each shard begins."""
    service.wait_for(lambda: service.calls("HeartBeat") > 0 and joined(service), LIMIT, "a start saved for each shard")


def run_program(
    environment: Dict[str, str], *arguments: str, cwd: Optional[Path] = None, program: Path = PROGRAM, stdout: str = ""
) -> subprocess.CompletedProcess:
    """Runs the program to its end, with both streams as text, or with stdout in the file of that name."""
    if program == PROGRAM and is_as_here(environment):
        return run_forked(environment, arguments, str(cwd or os.getcwd()), stdout)
    with open(stdout, "wb") if stdout else contextlib.nullcontext(subprocess.PIPE) as taker:
        return subprocess.run(
            [sys.executable, str(program), *arguments],
            env=environment,
            cwd=cwd and str(cwd),
            stdin=subprocess.DEVNULL,
            stdout=taker,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
        )


def run_forked(
    environment: Dict[str, str], arguments: Sequence[str], directory: str, stdout: str
) -> subprocess.CompletedProcess:
    """As `run_program`; what the program writes goes to files on the way."""
    with tempfile.TemporaryDirectory() as kept:
        paths = [stdout or os.path.join(kept, "stdout"), os.path.join(kept, "stderr")]
        for path in paths:
            Path(path).touch()
        command = [str(PROGRAM), *arguments]
        process = ForkedProcess(environment, "", command, directory, *paths, ())
        try:
            status = process.wait(LIMIT)
        finally:
            process.kill()
        texts = [None if path == stdout else Path(path).read_text(encoding="utf-8") for path in paths]
    return subprocess.CompletedProcess(command, status, *texts)


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


ports = itertools.count(os.getpid())


def free_port() -> int:
    """One that nobody listens on, and that nobody gets until it is used.

    What kernels choose from for connections, and for who asks for any port, begins above these; of them each worker of
    pytest has a thousand.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 20000 + 1000 * (worker % 12) + next(ports) % 1000
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def get(port: int, path: str) -> Optional[Tuple[int, str]]:
    """(status, text) of an answer; None where nobody listens yet. Asks again where the connection is broken off."""
    end = time.monotonic() + LIMIT
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except ConnectionRefusedError:
            return None
        except ConnectionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        finally:
            connection.close()
