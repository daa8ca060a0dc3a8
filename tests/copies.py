"""Runs copies of dispatch_data.py as processes, and feeds and checks what they work on."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence

from aliyun.log.proto import LogGroup
from local_log_service import LocalLogService
from local_log_service.errors import ServiceError
from local_log_service.verdict import Verdict, compare

PROGRAM = Path(__file__).resolve().parent.parent / "dispatch_data.py"
PROJECT = "test-project"
SOURCE = "source"
GROUP = "dispatch"
TARGETS = {"nginx": "nginx", "ngnix": "nginx", "sql_audit": "sql-audit", "click": "click"}  # topic -> logstore
LIMIT = 60.0  # seconds that any condition may take on a slow machine


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
            "SLS_HEARTBEAT_INTERVAL": "1",
        }
    )
    environment.update({name: text for name, text in changes.items() if text is not None})
    return {name: text for name, text in environment.items() if changes.get(name, text) is not None}


class Copy:
    """One process that runs dispatch_data.py, its stderr in a file beside its log."""

    def __init__(self, environment: Dict[str, str], directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.stderr_path = directory / "stderr"
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                env=environment,
                cwd=str(directory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status (negative: ended by that signal)."""
        self.send(number)
        return self.process.wait(LIMIT)

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

    def start(self, **changes: Optional[str]) -> Copy:
        copy = Copy(settings_for(self.service, **changes), self.directory / ("copy%d" % len(self.started)))
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


def verdict(service: LocalLogService, targets: Dict[str, str] = TARGETS) -> Verdict:
    """All that was ever put into the source under a routed topic, against all that arrived in the targets."""
    sent = [entry.log_group for entry in service.ledger(PROJECT, SOURCE) if entry.parse().Topic in targets]
    delivered = [entry.log_group for logstore in set(targets.values()) for entry in service.ledger(PROJECT, logstore)]
    return compare(sent, delivered)


def group_shards(service: LocalLogService) -> Dict[int, dict]:
    """What the service says of the group's shards; nothing before the first copy has made the group."""
    try:
        return service.consumer_group(PROJECT, SOURCE, GROUP)["shards"]
    except ServiceError:
        return {}


def wait_until_delivered(service: LocalLogService) -> None:
    """Waits until the group's checkpoints have reached the end of the source."""
    service.wait_for(
        lambda: group_shards(service) and service.lag(PROJECT, SOURCE, GROUP) == 0,
        LIMIT,
        "everything delivered and checkpointed",
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
