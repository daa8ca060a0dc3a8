"""How much may be written and read in a second, and counting it."""

import time
from typing import NamedTuple, Optional

from .errors import ServiceError

_MB = 1000 * 1000


class Quotas(NamedTuple):
    """What may be written and read in each second, None for any amount. By default as documented.

    A call is refused when what came before it in the same second has used the quota up, so one that is larger than a
    quota gets through all the same.

    Attributes:
        shard_write_bytes: raw bytes into one shard.
        shard_writes: puts into one shard.
        shard_read_bytes: raw bytes out of one shard.
        shard_reads: pulls from one shard.
        project_write_bytes: raw bytes into all of a project.
        project_read_bytes: raw bytes out of all of a project.
    """

    shard_write_bytes: Optional[int] = 5 * _MB
    shard_writes: Optional[int] = 500
    shard_read_bytes: Optional[int] = 20 * _MB
    shard_reads: Optional[int] = 100
    project_write_bytes: Optional[int] = None
    project_read_bytes: Optional[int] = None


class Meter:
    """Counts what was written to one thing and read from it in the second that is under way."""

    def __init__(self) -> None:
        self._second = 0
        self._written = self._writes = self._read = self._reads = 0

    def check_write(self, code: str, most_bytes: Optional[int], most_calls: Optional[int] = None) -> None:
        """Raise ServiceError ``code`` when this second's quota of writing is used up."""
        self._begin_second()
        _check(code, self._written, most_bytes, "inflow")
        _check(code, self._writes, most_calls, "qps")

    def check_read(self, code: str, most_bytes: Optional[int], most_calls: Optional[int] = None) -> None:
        """Raise ServiceError ``code`` when this second's quota of reading is used up."""
        self._begin_second()
        _check(code, self._read, most_bytes, "outflow")
        _check(code, self._reads, most_calls, "qps")

    def count_write(self, size: int) -> None:
        """Count a put of this many raw bytes."""
        self._writes += 1
        self._written += size

    def count_read(self, size: int) -> None:
        """Count a pull of this many raw bytes."""
        self._reads += 1
        self._read += size

    def _begin_second(self) -> None:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._written = self._writes = self._read = self._reads = 0


def _check(code: str, used: int, quota: Optional[int], what: str) -> None:
    if quota is not None and used >= quota:
        kind = "read" if "Read" in code else "write"
        place = "Shard" if code.startswith("Shard") else "Project"
        raise ServiceError(code, "{} {} quota exceed: {}".format(place, kind, what))
