"""The byte path: equal to the SDK's parser on all valid bytes, safe on any bytes; joining changes no log."""

import runpy
from collections import Counter

import pytest
from aliyun.log import pulllog_response
from aliyun.log.proto import LogGroup as ParsedLogGroup
from aliyun.log.proto import LogGroupList
from aliyun.log.pulllog_response import PullLogResponse
from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

import dispatch_data
from dispatch_data import (
    MAX_MERGED_BYTES,
    MAX_MERGED_LOGS,
    LogGroup,
    log_groups_of,
    merge_log_groups,
    read_log_group_list,
    without_pack_id,
)

pytestmark = pytest.mark.quick

# ---- valid bytes, as the SDK's message classes write them, with fields they don't know mixed in

texts = st.text(max_size=12)
UNKNOWN_FIELDS = [
    b"\x48\x07",
    b"\x52\x02ab",
    b"\x5d1234",
    b"\x6112345678",
    b"\xc2\x3e\x00",
    b"\x48\xff\xff\xff\xff\x0f",
    b"\x4b\x4c",  # groups, which proto2 has given up and every parser still knows
    b"\x4b\x50\x01\x53\x1a\x01x\x54\x4c",
]


@st.composite
def log_groups(draw, topics=st.none() | texts):
    log_group = ParsedLogGroup()
    for seconds, contents, nanoseconds in draw(
        st.lists(
            st.tuples(
                st.integers(0, 2**32 - 1),
                st.lists(st.tuples(texts, st.text(max_size=300)), max_size=3),
                st.none() | st.integers(0, 2**32 - 1),
            ),
            max_size=5,
        )
    ):
        log = log_group.Logs.add(Time=seconds)
        for key, value in contents:
            log.Contents.add(Key=key, Value=value)
        if nanoseconds is not None:
            log.Time_ns = nanoseconds
    for name, strategy in (
        ("Topic", topics),
        ("Source", st.none() | texts),
        ("MachineUUID", st.none() | texts),
        ("Reserved", st.none() | texts),
    ):
        text = draw(strategy)
        if text is not None:
            setattr(log_group, name, text)
    for key, value in draw(st.lists(st.tuples(st.sampled_from(("__pack_id__", "__path__", "")), texts), max_size=3)):
        log_group.LogTags.add(Key=key, Value=value)
    unknown = draw(st.lists(st.sampled_from(UNKNOWN_FIELDS), max_size=2))
    where = draw(st.booleans())
    data = log_group.SerializeToString()
    return b"".join(unknown) + data if where else data + b"".join(unknown)


def varint(number):
    data = b""
    while number >= 0x80:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data + bytes([number])


def list_of(serialised):
    return b"".join(b"\x0a" + varint(len(data)) + data for data in serialised)


def response_of(data, count=1):
    return PullLogResponse(
        data, {"x-log-count": str(count), "x-log-bodyrawsize": str(len(data or b"")), "x-log-cursor": "MA=="}
    )


@given(st.lists(log_groups(), max_size=4))
def test_equal_to_the_parser_on_valid_bytes(serialised):
    data = list_of(serialised)
    ours = read_log_group_list(data)
    theirs = LogGroupList.FromString(data).LogGroups
    assert [log_group.SerializeToString() for log_group in ours] == serialised
    assert [log_group.Topic for log_group in ours] == [parsed.Topic for parsed in theirs]
    assert [log_group.log_count for log_group in ours] == [len(parsed.Logs) for parsed in theirs]


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 129, 16382, 16383, 16384, 16385, 2**21 - 1, 2**21])
def test_logs_of_every_length_of_length(size):
    """One, two, three and four bytes tell the size of a log; the reader takes the first two in its stride."""
    log = b"\x08\x01" + b"\x42" + varint(size) + b"x" * size  # a Time, and a field the SDK doesn't know
    for length in {size, max(0, size - 2 - 1 - len(varint(size)))}:
        logs = [log, b"\x08\x01\x42" + varint(length) + b"y" * length]
        data = b"".join(b"\x0a" + varint(len(one)) + one for one in logs) + b"\x1a\x01t"
        (read,) = read_log_group_list(list_of([data]))
        assert (read.log_count, read.Topic, read.envelope) == (2, "t", b"\x1a\x01t")
        assert read.SerializeToString() == data
        assert len(ParsedLogGroup.FromString(data).Logs) == 2


@given(log_groups(), log_groups())
def test_equal_to_the_parser_when_fields_are_out_of_order(first, second):
    """The concatenation of two messages is a message; then logs come after what describes the LogGroup."""
    (log_group,) = read_log_group_list(list_of([first + second]))
    parsed = ParsedLogGroup.FromString(first + second)
    assert log_group.SerializeToString() == first + second
    assert (log_group.Topic, log_group.log_count) == (parsed.Topic, len(parsed.Logs))
    logs_in_rest = ParsedLogGroup.FromString(log_group.envelope).Logs
    assert log_group.mergeable == (len(logs_in_rest) == 0)


@example(b"\x0b,")
@given(
    st.binary(max_size=200)
    | st.lists(log_groups(), max_size=3)
    .flatmap(lambda serialised: st.tuples(st.just(list_of(serialised)), st.integers(0, 300), st.integers(0, 255)))
    .map(lambda made: made[0][: made[1]] + bytes([made[2]]) + made[0][made[1] + 1 :])
)
def test_safe_on_any_bytes(data):
    """Bytes are passed on unchanged, or refused by our reader and the SDK's parser alike; nothing is dropped.

    But for a protobuf group that ends with another's end, or with none open: protobuf in Python alone takes that.
    """
    try:
        ours = log_groups_of(response_of(data))
    except ValueError as refusal:
        if api_implementation.Type() == "python" and str(refusal.__context__) == "wire type 4":
            return
        with pytest.raises((DecodeError, UnicodeDecodeError)):
            LogGroupList.FromString(data)
        return
    try:
        count = len(LogGroupList.FromString(data).LogGroups)
    except Exception:  # DecodeError of either protobuf runtime: we look less deep, the target will judge
        return
    assert len(ours) == count
    for log_group, parsed in zip(ours, LogGroupList.FromString(data).LogGroups):
        assert ParsedLogGroup.FromString(log_group.SerializeToString()) == parsed


@pytest.mark.parametrize(
    "text", [b"\x1a\x02\xff\xfe", b"\x22\x01\xff", b"\x32\x04\x0a\x01k\x12"], ids=["topic", "source", "tag"]
)
@pytest.mark.parametrize("group", [b"\x4b\x4c", b"\x4b" * 20000 + b"\x4c" * 20000], ids=["one", "nested"])
def test_protobuf_groups_beside_texts_that_are_not_utf8_are_passed_on_as_they_came(text, group):
    """Wire types 3 and 4. Where protobuf is pure Python, the SDK's parser reads nothing of a pull with such a text."""
    log_groups = [b"\x1a\x05nginx" + group, group + text, b"\x0a\x02\x08\x01" + group + b"\x1a\x01t"]
    read = log_groups_of(response_of(list_of(log_groups)))
    assert [log_group.SerializeToString() for log_group in read] == log_groups
    topics = ["nginx", "\ufffd\ufffd" if text.startswith(b"\x1a") else "", "t"]
    assert [(log_group.Topic, log_group.log_count) for log_group in read] == list(zip(topics, [0, 0, 1]))
    assert [put.SerializeToString() for put in merge_log_groups(read, True)] == log_groups


@pytest.mark.parametrize(
    "group", [b"\x4b", b"\x4c", b"\x4b\x54", b"\x4b\x4c\x4c", b"\x03\x04", b"\x4b\x50\x4c", b"\x4b\x4b\x4c"]
)
def test_a_group_that_does_not_end_where_it_should_is_no_log_group(group):
    with pytest.raises(ValueError, match="no LogGroupList"):
        log_groups_of(response_of(list_of([b"\x1a\x01t" + group])))


def test_topics_that_are_not_utf8_are_routable():
    (read,) = read_log_group_list(list_of([b"\x1a\x02\xff\xfe"]))
    assert read.Topic == "\ufffd\ufffd"


def test_the_sdk_still_keeps_the_bytes_of_a_pull():
    """Fails when a new SDK release moves them: then dispatch_data.py refuses to start."""
    data = list_of([ParsedLogGroup(Topic="nginx").SerializeToString()])
    assert response_of(data)._raw_uncompressed_body == data


def test_without_them_it_refuses_to_start(monkeypatch):
    """In the SDK's parser's place there is none: on PyPy that fails for texts that are not UTF-8."""
    monkeypatch.setattr(pulllog_response, "PullLogResponse", lambda body, header: object())
    with pytest.raises(SystemExit, match="no attribute '_raw_uncompressed_body'; install what it knows"):
        runpy.run_path(dispatch_data.__file__, run_name="another_release")


def test_an_empty_pull_has_no_log_groups():
    assert log_groups_of(response_of(None, count=0)) == []


# ---- joining

few_topics = st.sampled_from(("a", "b", None))


def logs_by_description(serialised, merge_packs=False):
    """What must not change: for each description of a LogGroup, its logs in their order."""
    sequences = {}
    for data in serialised:
        parsed = ParsedLogGroup.FromString(data)
        logs = [log.SerializeToString() for log in parsed.Logs]
        del parsed.Logs[:]
        if merge_packs:
            kept = [tag for tag in parsed.LogTags if tag.Key != "__pack_id__"]
            del parsed.LogTags[:]
            parsed.LogTags.extend(kept)
        sequences.setdefault(parsed.SerializeToString(), []).extend(logs)
    return sequences


def copies_of(serialised):
    return read_log_group_list(list_of(serialised))


@given(st.lists(log_groups(few_topics), max_size=12), st.booleans())
def test_joining_keeps_every_log_in_its_order_under_its_description(serialised, merge_packs):
    joined = merge_log_groups(copies_of(serialised), merge_packs)
    assert len(joined) <= len(serialised)
    before = logs_by_description(serialised, merge_packs)
    after = logs_by_description([log_group.SerializeToString() for log_group in joined], merge_packs)
    assert before == after
    assert sum(log_group.log_count for log_group in joined) == sum(map(len, before.values()))
    assert sum(len(put.log_groups) for put in joined) == len(serialised)


def small(source="s", logs=3, size=10, **fields):
    log_group = ParsedLogGroup(Topic="t", Source=source, **fields)
    for number in range(logs):
        log_group.Logs.add(Time=number).Contents.add(Key="k", Value="v" * size)
    return log_group


def with_tags(*tags):
    log_group = small()
    for key, value in tags:
        log_group.LogTags.add(Key=key, Value=value)
    return log_group.SerializeToString()


def sizes_joined(serialised, merge_packs=False):
    return [log_group.log_count for log_group in merge_log_groups(copies_of(serialised), merge_packs)]


def test_equal_descriptions_become_one_put():
    assert sizes_joined([small().SerializeToString()] * 100) == [300]


@pytest.mark.parametrize(
    "other",
    [small(source="other"), small(MachineUUID="m"), small(Reserved="c"), small(source="")],
    ids=["source", "machine", "category", "empty source"],
)
def test_other_descriptions_stay_apart(other):
    assert sizes_joined([small().SerializeToString(), other.SerializeToString(), small().SerializeToString()]) == [6, 3]


def test_tags_in_another_order_stay_apart():
    ab, ba = with_tags(("a", "1"), ("b", "2")), with_tags(("b", "2"), ("a", "1"))
    assert sizes_joined([ab, ba, ab]) == [6, 3]


def test_packs_stay_apart_by_default_and_come_together_when_asked():
    packs = [with_tags(("__path__", "p"), ("__pack_id__", "id-%d" % number)) for number in range(5)]
    assert sizes_joined(packs) == [3] * 5
    assert sizes_joined(packs, merge_packs=True) == [15]
    other = with_tags(("__path__", "q"), ("__pack_id__", "id-9"))
    assert sizes_joined(packs + [other, packs[0]], merge_packs=True) == [18, 3]
    (joined,) = merge_log_groups(copies_of(packs), True)
    assert [(tag.Key, tag.Value) for tag in ParsedLogGroup.FromString(joined.SerializeToString()).LogTags] == [
        ("__path__", "p"),
        ("__pack_id__", "id-0"),
    ]


def test_only_the_tag_of_that_very_name_is_the_pack_id():
    rest = with_tags(("__pack_id__x", "1"), ("x", "\n\x0b__pack_id__"))
    assert without_pack_id(rest) == rest


def test_joining_stays_within_the_limits():
    by_logs = sizes_joined([small(logs=100).SerializeToString()] * 100)
    assert sum(by_logs) == 10000 and max(by_logs) <= MAX_MERGED_LOGS and len(by_logs) == 3
    serialised = [small(logs=1, size=MAX_MERGED_BYTES // 7).SerializeToString()] * 20
    joined = merge_log_groups(copies_of(serialised), False)
    assert [log_group.log_count for log_group in joined] == [6, 6, 6, 2]
    assert [log_group.size for log_group in joined] == [len(log_group.SerializeToString()) for log_group in joined]
    assert max(log_group.size for log_group in joined) <= MAX_MERGED_BYTES


def test_one_beyond_the_limits_is_not_split():
    huge = small(logs=MAX_MERGED_LOGS + 1).SerializeToString()
    assert sizes_joined([huge, small().SerializeToString(), huge]) == [MAX_MERGED_LOGS + 1, 3, MAX_MERGED_LOGS + 1]


def test_what_has_logs_out_of_order_is_never_joined():
    """Its rest holds a log, which joining by equal rests would drop."""
    strange = b"\x1a\x01t" + b"\x0a\x02\x08\x01"
    joined = merge_log_groups(copies_of([strange, strange]), False)
    assert [log_group.SerializeToString() for log_group in joined] == [strange, strange]


def test_counting_is_by_description():
    counted = Counter(log_group.Topic for log_group in copies_of([small().SerializeToString()] * 3))
    assert counted == {"t": 3}
    assert isinstance(copies_of([small().SerializeToString()])[0], LogGroup)
    assert ParsedLogGroup.DESCRIPTOR.fields_by_name["Logs"].number << 3 | 2 == dispatch_data.LOGS_KEY
    assert ParsedLogGroup.DESCRIPTOR.fields_by_name["Topic"].number << 3 | 2 == dispatch_data.TOPIC_KEY
    assert ParsedLogGroup.DESCRIPTOR.fields_by_name["LogTags"].number << 3 | 2 == dispatch_data.LOG_TAGS_KEY


def test_what_has_logs_in_its_envelope_is_put_as_it_is_where_packs_are_merged():
    """Its envelope is the whole LogGroup: it has logs, and a group of protobuf, beside a pack id."""
    strange = b"\x32\x12\x0a\x0b__pack_id__\x12\x03A-1" + b"\x7b\x7c"
    log_group = LogGroup("t", 1, b"", strange, mergeable=False)
    assert [put.SerializeToString() for put in merge_log_groups([log_group], True)] == [strange]
