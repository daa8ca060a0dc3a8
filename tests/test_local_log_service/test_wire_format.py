"""Telling LogGroups from garbage and framing LogGroupLists, against the real protobuf messages."""

import pytest
from aliyun.log.proto import Log, LogGroup, LogGroupListRaw, LogTag
from hypothesis import given
from hypothesis import strategies as st
from local_log_service import cursors
from local_log_service.wire_format import fields, framed_size, log_group_list, log_times, validate_log_group

pytestmark = pytest.mark.quick

texts = st.text(max_size=200)
logs = st.builds(
    Log, Time=st.integers(0, 2**32 - 1), Contents=st.lists(st.builds(Log.Content, Key=texts, Value=texts), max_size=3)
)
log_groups = st.builds(
    LogGroup,
    Logs=st.lists(logs, max_size=5),
    Topic=texts,
    Source=texts,
    LogTags=st.lists(st.builds(LogTag, Key=texts, Value=texts), max_size=2),
).map(lambda message: message.SerializeToString())


@given(log_groups)
def test_every_log_group_is_valid(log_group):
    validate_log_group(log_group)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16383, 16384, 2097151, 2097152])
def test_lengths_of_every_encoded_size_are_understood(length):
    topic = "x" * length
    log_group = LogGroup(Topic=topic, Source="source").SerializeToString()
    validate_log_group(log_group)
    (parsed,) = LogGroupListRaw.FromString(log_group_list([log_group])).LogGroups
    assert parsed.Topic == topic
    assert framed_size(log_group) == len(log_group_list([log_group]))
    with pytest.raises(ValueError):
        validate_log_group(log_group[:-1])


@given(log_groups, st.data())
def test_a_log_group_cut_within_a_field_is_refused(log_group, data):
    whole = log_group + LogGroup(Topic="the end").SerializeToString()
    cut = data.draw(st.integers(len(log_group) + 1, len(whole) - 1))
    with pytest.raises(ValueError):
        validate_log_group(whole[:cut])


@given(st.lists(log_groups, max_size=4))
def test_a_log_group_list_is_what_the_sdk_reads(groups):
    framed = log_group_list(groups)
    read = LogGroupListRaw.FromString(framed)
    assert [group.SerializeToString() for group in read.LogGroups] == groups
    assert len(framed) == sum(map(framed_size, groups))


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",  # no length
        b"\x0a\x80",  # half a length
        b"\x0a\x05abc",  # cut short
        b"\x08\x01",  # Logs is no number
        b"\x1d1234",  # Topic is no fixed32
        b"\x00\x01",  # field 0
        b"\x02\x00",  # field 0 with a length
        b"\x3b",  # a group without an end
        b"\x3b\x44",  # a group that ends as another
        b"\x3c",  # the end of none
        b"\x3b\x3a\x02a\x3c",  # a group's field goes beyond it
        b"\x3b\x00\x00\x3c",  # field 0 in a group
        b"\x1b\x1c",  # Topic is no group
        b"\x3e\x00",  # wire type 6
        b"\x3d123",  # field 7, fixed32 cut short
        b"\x0a" + b"\xff" * 11,  # a length without end
        b"GET / HTTP/1.1",
    ],
)
def test_garbage_is_refused(data):
    with pytest.raises(ValueError):
        validate_log_group(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x38\xff\x01",
        b"\x3d1234",
        b"\x3912345678",
        b"\x82\x01\x03abc",
        b"\x82\x01\x80\x01" + b"x" * 128,
        b"\x3b\x3c",
        b"\x3b\x08\x01\x0b\x0a\x01x\x0c\x1d1234\x3c",
    ],
)
def test_unknown_fields_are_let_through(data):
    log_group = b"\x1a\x01t" + data
    validate_log_group(log_group)
    assert LogGroup.FromString(log_group).Topic == "t"
    assert (3, b"t") in fields(log_group)


@given(log_groups)
def test_the_times_of_logs_are_found(log_group):
    assert list(log_times(log_group)) == [log.Time for log in LogGroup.FromString(log_group).Logs]


@given(st.binary(max_size=40))
def test_the_times_in_any_bytes_are_numbers_or_refused(data):
    try:
        assert all(isinstance(time, int) for time in log_times(data))
    except ValueError:
        pass


@given(st.binary(max_size=40))
def test_any_bytes_are_either_refused_or_valid_without_another_exception(data):
    try:
        validate_log_group(data)
    except ValueError:
        pass


@given(st.integers(0, 10**19))
def test_cursors_are_read_as_written(position):
    assert cursors.decode(cursors.encode(position)) == position
    assert cursors.decode(cursors.encode(position) + "\n") == position


@given(st.text(max_size=20))
def test_any_text_is_a_cursor_or_refused(text):
    try:
        assert cursors.decode(text) >= 0
    except ValueError:
        pass
