"""Compares the logs that were sent with those that arrived, log by log, on their bytes.

A log is known by its bytes together with those of everything in its LogGroup that is not a log (Topic, Source, LogTags
and so on). How logs were grouped does not count: LogGroups equal in everything but their logs may arrive as one.
"""

import hashlib
from typing import Iterable, Iterator, List, NamedTuple, Tuple

from .wire_format import end_of_group, read_varint

# A field's key is its number and its wire type. These are of LogGroup and of LogTag, all length-delimited.
LOGS_KEY = 1 << 3 | 2
LOG_TAGS_KEY = 6 << 3 | 2
TAG_NAME_KEY = 1 << 3 | 2


class Verdict(NamedTuple):
    """What became of the logs sent; all numbers count logs.

    `delivered` is `sent` - `lost` + `duplicated` + `foreign`.
    """

    sent: int
    delivered: int
    lost: int  # sent and not delivered, or delivered fewer times than sent
    duplicated: int  # deliveries of a log beyond the number of times it was sent
    foreign: int  # delivered and never sent: altered on the way, or of another origin

    @property
    def ok(self) -> bool:
        """Whether every log arrived and nothing else did; duplicates are allowed."""
        return not self.lost and not self.foreign

    def __str__(self) -> str:
        return "%d logs sent, %d delivered: %d lost, %d duplicated, %d foreign" % self


def compare(sent: Iterable[bytes], delivered: Iterable[bytes], ignore_pack_id: bool = False) -> Verdict:
    """Compares serialised LogGroups that were sent with those that arrived, in any order and any grouping.

    With `ignore_pack_id`, LogTags named `__pack_id__` make no difference. Keeps about 150 bytes of memory for each
    distinct log sent, whatever the log's size. Raises ValueError where bytes are no LogGroup.
    """
    missing = {}  # type: Dict[bytes, int]
    sent_count = delivered_count = duplicated = foreign = 0
    for identity in log_identities(sent, ignore_pack_id):
        sent_count += 1
        missing[identity] = missing.get(identity, 0) + 1
    for identity in log_identities(delivered, ignore_pack_id):
        delivered_count += 1
        count = missing.get(identity)
        if count is None:
            foreign += 1
        elif count == 0:
            duplicated += 1
        else:
            missing[identity] = count - 1
    return Verdict(sent_count, delivered_count, sum(missing.values()), duplicated, foreign)


def log_identities(log_groups: Iterable[bytes], ignore_pack_id: bool = False) -> Iterator[bytes]:
    """A hash of 16 bytes for each log in serialised LogGroups: of the log and of all its LogGroup says about it.

    Raises ValueError where bytes are no LogGroup.
    """
    for log_group in log_groups:
        logs, rest = split_log_group(log_group)
        if ignore_pack_id:
            rest = without_pack_id(rest)
        prefix = hashlib.blake2b(rest, digest_size=16).digest()
        for log in logs:
            yield hashlib.blake2b(prefix + log, digest_size=16).digest()


def split_log_group(log_group: bytes) -> Tuple[List[bytes], bytes]:
    """The serialised Logs of a serialised LogGroup, and its other fields just as they are: a LogGroup without logs.

    Raises ValueError where the bytes are no LogGroup.
    """
    logs = []
    rest = []
    for key, start, value, end in read_fields(log_group):
        if key == LOGS_KEY:
            logs.append(log_group[value:end])
        else:
            rest.append(log_group[start:end])
    return logs, b"".join(rest)


def without_pack_id(rest: bytes) -> bytes:
    """A serialised LogGroup but for its LogTags named `__pack_id__`. Raises ValueError where it is no LogGroup."""
    return b"".join(
        rest[start:end]
        for key, start, value, end in read_fields(rest)
        if not (key == LOG_TAGS_KEY and tag_name(rest[value:end]) == b"__pack_id__")
    )


def tag_name(log_tag: bytes) -> bytes:
    """The Key of a serialised LogTag, b"" where it has none. Raises ValueError where it is no LogTag."""
    name = b""
    for key, _, value, end in read_fields(log_tag):
        if key == TAG_NAME_KEY:
            name = log_tag[value:end]
    return name


def read_fields(message: bytes) -> Iterator[Tuple[int, int, int, int]]:
    """The fields of a serialised message as (key, start of the field, start of its value, end of the field).

    Raises ValueError where the bytes are no message.
    """
    position = 0
    while position < len(message):
        start = position
        try:
            key, value = read_varint(message, position)
            wire_type = key & 7
            if wire_type == 2:
                length, value = read_varint(message, value)
                position = value + length
            elif wire_type == 0:
                position = read_varint(message, value)[1]
            elif wire_type in (1, 5):
                position = value + (8 if wire_type == 1 else 4)
            elif wire_type == 3:
                position = end_of_group(message, value, key >> 3)
            else:
                raise ValueError("byte %d begins a field of the unknown wire type %d" % (start, wire_type))
        except IndexError:
            position = len(message) + 1
        if position > len(message):
            raise ValueError("the field at byte %d is cut short" % start)
        yield key, start, value, position
