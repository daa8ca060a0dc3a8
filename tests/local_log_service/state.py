"""Everything the service remembers: projects, logstores, shards and the ledger of entries.

There is no HTTP in here. One lock, ``State.lock``, guards all of it: whoever touches a ``State`` or anything
reached through it holds that lock.
"""

import itertools
import threading
import time
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple

from aliyun.log.proto import LogGroup, LogGroupRaw
from google.protobuf.message import DecodeError

from . import cursors, wire_format
from .consumer_groups import ConsumerGroup, ShardView
from .errors import ServiceError
from .quotas import Meter, Quotas

#: The MD5 key range of a logstore is [0, _KEY_END).
_KEY_END = 1 << 128

#: Positions of a shard are [base, base + this); no two shards share any, so that a cursor used with a shard
#: it is not of is noticed.
_POSITIONS_PER_SHARD = 1 << 40

_MAXIMUM_SHARD_COUNT = 256

_SECONDS_A_DAY = 86400

#: Days of retention that mean for ever.
_FOR_EVER = 3650


class Entry(NamedTuple):
    """One LogGroup that the service took.

    Attributes:
        log_group: the serialized LogGroup, uncompressed.
        shard: id of the shard it went to.
        received_at: when it arrived, unix time in seconds.
        request_id: the ``x-log-requestid`` of the answer that acknowledged it.
        sequence: its number in the order in which the whole service took LogGroups.
    """

    log_group: bytes
    shard: int
    received_at: float
    request_id: str
    sequence: int

    def parse(self):
        """Return the SDK's ``LogGroup`` message, or its ``LogGroupRaw`` when a value is not UTF-8."""
        message = LogGroup()
        try:
            message.ParseFromString(self.log_group)
        except (DecodeError, UnicodeDecodeError):  # the pure Python runtime lets the latter through
            message = LogGroupRaw()
            message.ParseFromString(self.log_group)
        return message


class Shard:
    """One shard: an ordered log of entries and its range of MD5 keys.

    Attributes:
        shard_id: its number within the logstore.
        begin_key: first key of its range.
        end_key: first key beyond its range.
        parents: ids of the shards it came from.
        create_time: unix time in whole seconds.
        readonly: whether a split or a merge has closed it for writing.
        entries: every entry it ever took, and what stands for one in a gap.
        gaps: indexes of the entries that are none: positions without a LogGroup.
        meter: what was written to it and read from it in this second.
        expired: how many of the oldest entries the retention time has dropped.
    """

    def __init__(self, shard_id: int, begin_key: int, end_key: int, base: int, parents: Tuple[int, ...] = ()) -> None:
        self.shard_id = shard_id
        self.begin_key = begin_key
        self.end_key = end_key
        self.parents = parents
        self.create_time = int(time.time())
        self.readonly = False
        self.entries: List[Entry] = []
        self.gaps: Set[int] = set()
        self.meter = Meter()
        self.expired = 0
        self._base = base

    def cursor(self, index: int) -> str:
        """Return the cursor of the entry with this index; the end cursor for ``len(entries)``."""
        return cursors.encode(self._base + index)

    def index_of(self, cursor: str) -> int:
        """Return the index a cursor of this shard points at, also when that entry has expired.

        Raises:
            ValueError: it is malformed or not within this shard.
        """
        index = cursors.decode(cursor) - self._base
        if not 0 <= index <= len(self.entries):
            raise ValueError("not within the shard")
        return index

    def readable_index_of(self, cursor: str) -> int:
        """Return the index a cursor points at.

        Raises:
            ServiceError: ParameterInvalid: it is no cursor at all. InvalidCursor: it is not within this shard, or
                expired.
        """
        try:
            cursors.decode(cursor)
        except ValueError:
            raise ServiceError("ParameterInvalid", "Invalid cursor {}".format(cursor))
        try:
            index = self.index_of(cursor)
        except ValueError:
            raise ServiceError("InvalidCursor")
        if index < self.expired:
            raise ServiceError("InvalidCursor", "the cursor is older than the oldest log of the shard")
        return index

    def index_at(self, unix_time: float) -> int:
        """Return the index of the oldest entry received at or after a time; the end when there is none."""
        for index in range(self.expired, len(self.entries)):
            if self.entries[index].received_at >= unix_time:
                return index
        return len(self.entries)

    def readable_from(self, index: int, end: int, size: int) -> Tuple[List[Entry], int]:
        """Return the entries from an index on and the index after them.

        Args:
            index: where to begin.
            end: index where to end at the latest.
            size: most bytes that their LogGroups take up in a LogGroupList, unless there is but one.
        """
        taken: List[Entry] = []
        while index < end:
            if index not in self.gaps:
                size -= wire_format.framed_size(self.entries[index].log_group)
                if size < 0 and taken:
                    break
                taken.append(self.entries[index])
            index += 1
        return taken, index

    def leave_gap(self, count: int) -> None:
        """Let so many positions follow that have no LogGroup."""
        for _ in range(count):
            self.gaps.add(len(self.entries))
            self.entries.append(Entry(b"", self.shard_id, time.time(), "", -1))

    def count_from(self, index: int) -> int:
        """Return how many LogGroups there are from an index on."""
        return len(self.entries) - index - sum(gap >= index for gap in self.gaps)

    def expire_before(self, unix_time: float) -> None:
        """Drop the oldest entries, those received before a time."""
        while self.expired < len(self.entries) and self.entries[self.expired].received_at < unix_time:
            self.expired += 1

    def next_index(self, checkpoint: str) -> int:
        """Return the index of the first entry beyond a checkpoint ("" for none) that has not expired."""
        return max(self.index_of(checkpoint), self.expired) if checkpoint else self.expired


class Logstore:
    """One logstore.

    Attributes:
        name: the logstore's name.
        shards: id -> Shard; ``shard`` and ``current_shards`` return them with what is too old dropped.
        ledger: every entry of every shard, in order of arrival.
        consumer_groups: name -> ConsumerGroup.
        create_time: unix time in whole seconds.
        last_modify_time: the same, of the last change of a setting.
        settings: what GetLogStore answers beside names, numbers of shards and times; "ttl" is in days.
        retention: how old an entry may become, in seconds, None for ever; follows "ttl" when that is set.
    """

    def __init__(self, name: str, shard_count: int, bases: Iterator[int]) -> None:
        self.name = name
        self.create_time = self.last_modify_time = int(time.time())
        self.settings: Dict[str, Any] = {
            "ttl": 30,
            "enable_tracking": False,
            "appendMeta": False,
            "autoSplit": False,
            "maxSplitShard": 64,
            "telemetryType": "",
            "mode": "standard",
        }
        self.retention: Optional[float] = 30.0 * _SECONDS_A_DAY
        self.ledger: List[Entry] = []
        self.consumer_groups: Dict[str, ConsumerGroup] = {}
        self.shards: Dict[int, Shard] = {}
        self._bases = bases
        self._writable: List[Shard] = []
        self._turn = 0
        bounds = [_KEY_END * number // shard_count for number in range(shard_count + 1)]
        for begin_key, end_key in zip(bounds, bounds[1:]):
            self._add_shard(begin_key, end_key)

    def _add_shard(self, begin_key: int, end_key: int, parents: Tuple[int, ...] = ()) -> Shard:
        shard = Shard(len(self.shards), begin_key, end_key, next(self._bases), parents)
        self.shards[shard.shard_id] = shard
        self._writable.append(shard)
        return shard

    def _close_shard(self, shard: Shard) -> None:
        shard.readonly = True
        self._writable.remove(shard)

    def change_settings(self, changes: Mapping[str, Any]) -> None:
        """Take over settings that were checked before."""
        self.settings.update(changes)
        self.last_modify_time = int(time.time())
        if "ttl" in changes:
            days = changes["ttl"]
            self.retention = None if days >= _FOR_EVER else float(days * _SECONDS_A_DAY)

    def shard(self, shard_id: int) -> Shard:
        """Return a shard, with what is older than the retention time dropped.

        Raises:
            ServiceError: ShardNotExist.
        """
        try:
            shard = self.shards[shard_id]
        except KeyError:
            raise ServiceError("ShardNotExist", "Shard {} does not exist".format(shard_id))
        if self.retention is not None:
            shard.expire_before(time.time() - self.retention)
        return shard

    def current_shards(self) -> Dict[int, Shard]:
        """Return every shard by its id, with what is older than the retention time dropped."""
        return {shard_id: self.shard(shard_id) for shard_id in self.shards}

    def writable_shard(self, shard_id: int) -> Shard:
        """Return a shard that takes logs.

        Raises:
            ServiceError: ShardNotExist; ParameterInvalid when it is readonly.
        """
        shard = self.shard(shard_id)
        if shard.readonly:
            raise ServiceError("ParameterInvalid", "shard {} is readonly".format(shard_id))
        return shard

    def next_writable_shard(self) -> Shard:
        """Return the readwrite shard whose turn it is to take logs."""
        self._turn += 1
        return self._writable[self._turn % len(self._writable)]

    def shard_of_key(self, key: int) -> Shard:
        """Return the readwrite shard whose range contains an MD5 key (an integer of 128 bits)."""
        return next(shard for shard in self._writable if shard.begin_key <= key < shard.end_key)

    def append(self, shard: Shard, log_group: bytes, request_id: str, sequence: int) -> Entry:
        """Store a LogGroup at the end of a shard and of the ledger."""
        entry = Entry(log_group, shard.shard_id, time.time(), request_id, sequence)
        shard.entries.append(entry)
        self.ledger.append(entry)
        return entry

    def split(self, shard_id: int, key: Optional[int] = None) -> List[Shard]:
        """Split a readwrite shard at a key, by default in the middle; return it and its two children.

        Raises:
            ServiceError: ShardNotExist; ParameterInvalid when it is readonly or the key is not inside it.
        """
        shard = self.writable_shard(shard_id)
        if key is None:
            key = (shard.begin_key + shard.end_key) // 2
        if not shard.begin_key < key < shard.end_key:
            raise ServiceError("ParameterInvalid", "the key is not inside the range of shard {}".format(shard_id))
        self._close_shard(shard)
        left = self._add_shard(shard.begin_key, key, (shard_id,))
        right = self._add_shard(key, shard.end_key, (shard_id,))
        return [shard, left, right]

    def merge(self, shard_id: int) -> List[Shard]:
        """Merge a readwrite shard with its right neighbour; return the child and its two parents.

        Raises:
            ServiceError: ShardNotExist; ParameterInvalid when it is readonly or has no readwrite neighbour.
        """
        left = self.writable_shard(shard_id)
        for right in self._writable:
            if right.begin_key == left.end_key:
                break
        else:
            raise ServiceError("ParameterInvalid", "shard {} has no neighbour to merge with".format(shard_id))
        self._close_shard(left)
        self._close_shard(right)
        child = self._add_shard(left.begin_key, right.end_key, (left.shard_id, right.shard_id))
        return [child, left, right]

    def expire(self, shard_id: int, count: int) -> None:
        """Drop the oldest ``count`` entries of a shard, as the retention time does. The ledger keeps them."""
        shard = self.shard(shard_id)
        shard.expired = min(shard.expired + count, len(shard.entries))

    def consumer_group(self, name: str) -> ConsumerGroup:
        """Return a consumer group.

        Raises:
            ServiceError: ConsumerGroupNotExist.
        """
        try:
            return self.consumer_groups[name]
        except KeyError:
            raise ServiceError("ConsumerGroupNotExist", "consumer group not exist: {}".format(name))

    def views(self, group: ConsumerGroup) -> Dict[int, ShardView]:
        """Return what the state machine of a group needs to know of every shard."""
        return {
            shard_id: ShardView(
                shard.parents, shard.readonly and shard.next_index(group.checkpoint(shard_id)) == len(shard.entries)
            )
            for shard_id, shard in self.current_shards().items()
        }


class Project:
    """One project.

    Attributes:
        name: the project's name.
        description: what its owner says of it.
        create_time: unix time in whole seconds.
        last_modify_time: the same, of the last change of the description.
        logstores: name -> Logstore.
        meter: what was written to all of it and read from it in this second.
    """

    def __init__(self, name: str, description: str = "") -> None:
        self.name = name
        self.description = description
        self.create_time = self.last_modify_time = int(time.time())
        self.logstores: Dict[str, Logstore] = {}
        self.meter = Meter()

    def describe(self, description: str) -> None:
        """Change the description."""
        self.description = description
        self.last_modify_time = int(time.time())


class State:
    """All projects of the service.

    Attributes:
        lock: to be held while anything in here is used.
        quotas: what each shard and project may be given, None for any amount.
        projects: name -> Project.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.projects: Dict[str, Project] = {}
        self.quotas: Optional[Quotas] = None
        self._bases = itertools.count(_POSITIONS_PER_SHARD, _POSITIONS_PER_SHARD)
        self._sequences = itertools.count()

    def create_project(self, project: str, description: str = "") -> None:
        """Create a project.

        Raises:
            ServiceError: ProjectAlreadyExist.
        """
        if project in self.projects:
            raise ServiceError("ProjectAlreadyExist", "Project {} already exist".format(project))
        self.projects[project] = Project(project, description)

    def project(self, project: str) -> Project:
        """Return a project.

        Raises:
            ServiceError: ProjectNotExist.
        """
        try:
            return self.projects[project]
        except KeyError:
            raise ServiceError("ProjectNotExist", "The Project does not exist : {}".format(project))

    def logstores(self, project: str) -> Dict[str, Logstore]:
        """Return the logstores of a project by name.

        Raises:
            ServiceError: ProjectNotExist.
        """
        return self.project(project).logstores

    def delete_project(self, project: str) -> None:
        """Delete a project with everything in it.

        Raises:
            ServiceError: ProjectNotExist.
        """
        self.project(project)
        del self.projects[project]

    def create_logstore(self, project: str, logstore: str, shard_count: int) -> None:
        """Create a logstore in a project that exists.

        Raises:
            ServiceError: ProjectNotExist, LogStoreAlreadyExist; LogStoreInfoInvalid unless there are 1 to
                256 shards.
        """
        logstores = self.logstores(project)
        if not 1 <= shard_count <= _MAXIMUM_SHARD_COUNT:
            raise ServiceError("LogStoreInfoInvalid", "shardCount is invalid")
        if logstore in logstores:
            raise ServiceError("LogStoreAlreadyExist", "logstore {} already exists".format(logstore))
        logstores[logstore] = Logstore(logstore, shard_count, self._bases)

    def delete_logstore(self, project: str, logstore: str) -> None:
        """Delete a logstore with everything in it.

        Raises:
            ServiceError: ProjectNotExist, LogStoreNotExist.
        """
        self.logstore(project, logstore)
        del self.logstores(project)[logstore]

    def logstore(self, project: str, logstore: str) -> Logstore:
        """Return a logstore.

        Raises:
            ServiceError: ProjectNotExist, LogStoreNotExist.
        """
        try:
            return self.logstores(project)[logstore]
        except KeyError:
            raise ServiceError("LogStoreNotExist", "logstore {} does not exist".format(logstore))

    def next_sequence(self) -> int:
        """Return the number of the next entry."""
        return next(self._sequences)
