"""Just enough of the protobuf wire format to tell a LogGroup from garbage and to frame a LogGroupList.

A hand-written walk over the top-level fields costs the same on every interpreter; parsing whole messages
would be far too slow where the protobuf runtime is pure Python.
"""

from typing import Iterable, Iterator, List, Mapping, Tuple, Union

_LENGTH_DELIMITED = 2
_LAST_KNOWN_FIELD = 6  # Logs, Category, Topic, Source, MachineUUID, LogTags: every one is length-delimited
_LONGEST_OF_32_BITS = 5  # bytes of a varint; parsers take no longer ones for tags and lengths
_FIXED_SIZES = {1: 8, 5: 4}  # wire type -> bytes
_GROUP_START, _GROUP_END = 3, 4  # wire types


def read_varint(data: bytes, position: int, longest: int = 10) -> Tuple[int, int]:
    """Return the varint at ``position`` and the position after it; IndexError when it is cut short.

    Raises:
        ValueError: it has more than ``longest`` bytes.
    """
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift >= 7 * longest:
            raise ValueError("a varint is longer than {} bytes".format(longest))


def end_of_group(data: bytes, position: int, field: int) -> int:
    """Return the position after a protobuf group of number ``field`` whose content begins at ``position``.

    Groups are an old form of messages within messages, which every parser still reads. IndexError when it is cut short.

    Raises:
        ValueError: it holds what is no field, or ends as another group.
    """
    open_groups = [field]
    while open_groups:
        tag, position = read_varint(data, position, _LONGEST_OF_32_BITS)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, position = read_varint(data, position)
        elif wire_type == _LENGTH_DELIMITED:
            size, position = read_varint(data, position, _LONGEST_OF_32_BITS)
            position += size
        elif wire_type in _FIXED_SIZES:
            position += _FIXED_SIZES[wire_type]
        elif wire_type == _GROUP_START:
            open_groups.append(field)
        elif wire_type != _GROUP_END or open_groups.pop() != field:
            raise ValueError("wire type {} is not allowed".format(wire_type))
        if not field:
            raise ValueError("a field has no number")
    return position


def validate_log_group(data: bytes) -> None:  # noqa: C901 - the hot spot of puts, written out
    """Check that the top-level fields of ``data`` are those of a serialized LogGroup.

    Fields this program does not know may have any number and wire type; known ones must have theirs. The logs
    themselves are not looked into.

    Raises:
        ValueError: ``data`` is not a LogGroup.
    """
    position, end = 0, len(data)
    try:
        while position < end:
            tag = data[position]
            if tag < 0x80:
                position += 1
            else:
                tag, position = read_varint(data, position, _LONGEST_OF_32_BITS)
                if tag > 0xFFFFFFFF:
                    raise ValueError("a field number is too large")
            field, wire_type = tag >> 3, tag & 7
            if wire_type == _LENGTH_DELIMITED and field:
                length = data[position]
                if length < 0x80:
                    position += 1 + length
                elif data[position + 1] < 0x80:  # most logs: this spares a call for each of them
                    position += 2 + (length & 0x7F | data[position + 1] << 7)
                else:
                    length, position = read_varint(data, position, _LONGEST_OF_32_BITS)
                    position += length
            elif field <= _LAST_KNOWN_FIELD:
                raise ValueError("field {} has wire type {}".format(field, wire_type))
            elif wire_type == 0:
                _, position = read_varint(data, position)
            elif wire_type in _FIXED_SIZES:
                position += _FIXED_SIZES[wire_type]
            elif wire_type == _GROUP_START:
                position = end_of_group(data, position, field)
            else:
                raise ValueError("wire type {} is not allowed".format(wire_type))
    except IndexError:
        raise ValueError("the message is cut short")
    if position != end:
        raise ValueError("the message is cut short")


def fields(data: bytes) -> Iterator[Tuple[int, Union[int, bytes]]]:
    """Yield the number and the value of every field of a message: a varint's number, the bytes of any other.

    Groups are passed over.

    Raises:
        ValueError: ``data`` is not a message.
    """
    position = 0
    try:
        while position < len(data):
            tag, position = read_varint(data, position, _LONGEST_OF_32_BITS)
            field, wire_type = tag >> 3, tag & 7
            if wire_type == 0:
                value, position = read_varint(data, position)
                yield field, value
                continue
            if wire_type == _GROUP_START:
                position = end_of_group(data, position, field)
                continue
            if wire_type == _LENGTH_DELIMITED:
                size, position = read_varint(data, position, _LONGEST_OF_32_BITS)
            elif wire_type in _FIXED_SIZES:
                size = _FIXED_SIZES[wire_type]
            else:
                raise ValueError("wire type {} is not allowed".format(wire_type))
            if position + size > len(data):
                raise IndexError
            yield field, data[position : position + size]
            position += size
    except IndexError:
        raise ValueError("the message is cut short")


def log_times(log_group: bytes) -> Iterator[int]:
    """Yield the time of every log of a LogGroup, 0 of one without.

    Raises:
        ValueError: a log is not a message.
    """
    for field, log in fields(log_group):
        if field == 1 and isinstance(log, bytes):
            times = [value for number, value in fields(log) if number == 1 and isinstance(value, int)]
            yield times[-1] if times else 0


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def delimited(field: int, value: bytes) -> bytes:
    """Return a length-delimited field."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(value)) + value


def log_of(seconds: int, contents: Mapping[str, str]) -> bytes:
    """Return a serialized Log."""
    pairs = [delimited(1, text(key)) + delimited(2, text(value)) for key, value in contents.items()]
    return b"\x08" + _varint(seconds) + b"".join(delimited(2, pair) for pair in pairs)


def text(value: str) -> bytes:
    """Return a text as UTF-8; half a character, which JSON may have, as a question mark."""
    return value.encode("utf-8", "replace")


def framed_size(log_group: bytes) -> int:
    """Return how many bytes ``log_group`` takes up as an element of a LogGroupList."""
    return 1 + len(_varint(len(log_group))) + len(log_group)


def log_group_list(log_groups: Iterable[bytes]) -> bytes:
    """Return the serialized LogGroupList (field 1, repeated) of serialized LogGroups."""
    parts: List[bytes] = []
    for log_group in log_groups:
        parts.append(b"\n" + _varint(len(log_group)))
        parts.append(log_group)
    return b"".join(parts)
