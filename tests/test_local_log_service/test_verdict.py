"""The verdict says exactly what was lost, duplicated and altered, and the sample logs are what agents send."""

import itertools
import random
import re
from collections import Counter

import pytest
from aliyun.log.proto import LogGroup
from hypothesis import given
from hypothesis import strategies as st
from local_log_service import sample_logs
from local_log_service.verdict import compare, split_log_group

pytestmark = pytest.mark.quick

# Drawn from few values, so that equal logs and equal descriptions come up often.
few_texts = st.sampled_from(["", "a", "b", "ä", "x" * 200])
logs = st.lists(few_texts, max_size=6)
descriptions = st.builds(lambda topic, source, host: {"Topic": topic, "Source": source, "host": host}, *[few_texts] * 3)
packs = st.lists(st.tuples(descriptions, logs), max_size=8)


def make_log_group(description, values, pack_id=None):
    log_group = LogGroup(Topic=description["Topic"], Source=description["Source"])
    for value in values:
        log = log_group.Logs.add(Time=1700000000)
        log.Contents.add(Key="value", Value=value)
    if pack_id is not None:
        log_group.LogTags.add(Key="__pack_id__", Value=pack_id)
    log_group.LogTags.add(Key="__hostname__", Value=description["host"])
    return log_group.SerializeToString()


def make_log_groups(some_packs):
    return [make_log_group(description, values) for description, values in some_packs]


def count_logs(some_packs):
    return Counter((tuple(description.values()), value) for description, values in some_packs for value in values)


@given(packs, packs)
def test_counts_are_those_of_multisets(sent, delivered):
    verdict = compare(make_log_groups(sent), make_log_groups(delivered))
    before, after = count_logs(sent), count_logs(delivered)
    more = after - before
    assert verdict.sent == sum(before.values())
    assert verdict.delivered == sum(after.values())
    assert verdict.lost == sum((before - after).values())
    assert verdict.duplicated == sum(count for log, count in more.items() if log in before)
    assert verdict.foreign == sum(count for log, count in more.items() if log not in before)
    assert verdict.delivered == verdict.sent - verdict.lost + verdict.duplicated + verdict.foreign
    assert verdict.ok == (not before - after and all(log in before for log in after))


@given(packs, st.randoms(use_true_random=False))
def test_grouping_and_order_make_no_difference(sent, choice):
    joined = {}
    for description, values in choice.sample(sent, len(sent)):
        joined.setdefault(tuple(description.items()), []).extend(values)
    delivered = [make_log_group(dict(description), values) for description, values in joined.items()]
    verdict = compare(make_log_groups(sent), delivered)
    assert verdict.ok and not verdict.duplicated
    assert verdict.delivered == verdict.sent


@given(packs, st.data())
def test_one_log_removed_repeated_or_altered_is_told(sent, data):
    description = {"Topic": "t", "Source": "s", "host": "h"}
    values = data.draw(st.lists(few_texts, min_size=1, max_size=6))
    place = data.draw(st.integers(0, len(values) - 1))
    others = make_log_groups(sent)
    log_groups = others + [make_log_group(description, values)]

    removed = make_log_group(description, values[:place] + values[place + 1 :])
    verdict = compare(log_groups, others + [removed])
    assert (verdict.lost, verdict.duplicated, verdict.foreign, verdict.ok) == (1, 0, 0, False)

    repeated = make_log_group(description, [values[place]])
    verdict = compare(log_groups, log_groups + [repeated])
    assert (verdict.lost, verdict.duplicated, verdict.foreign, verdict.ok) == (0, 1, 0, True)

    altered = make_log_group(description, values[:place] + [values[place] + "!"] + values[place + 1 :])
    verdict = compare(log_groups, others + [altered])
    assert (verdict.lost, verdict.duplicated, verdict.foreign, verdict.ok) == (1, 0, 1, False)


@pytest.mark.parametrize("field", ["Topic", "Source", "host"])
def test_what_describes_a_group_belongs_to_its_logs(field):
    description = {"Topic": "t", "Source": "s", "host": "h"}
    sent = make_log_group(description, ["a", "b"])
    verdict = compare([sent], [make_log_group(dict(description, **{field: "other"}), ["a", "b"])])
    assert (verdict.lost, verdict.foreign) == (2, 2)


@given(packs, st.booleans())
def test_pack_ids_count_unless_ignored(some_packs, ignore_pack_id):
    numbered = [make_log_group(*pack, pack_id="P-%X" % number) for number, pack in enumerate(some_packs)]
    renumbered = [make_log_group(*pack, pack_id="Q-%X" % number) for number, pack in enumerate(some_packs)]
    verdict = compare(numbered, renumbered, ignore_pack_id)
    changed = 0 if ignore_pack_id else verdict.sent
    assert (verdict.lost, verdict.duplicated, verdict.foreign) == (changed, 0, changed)


def test_only_the_tag_of_that_name_is_ignored():
    def with_tag(key, value):
        log_group = LogGroup(Topic="t")
        log_group.Logs.add(Time=1)
        log_group.LogTags.add(Key=key, Value=value)
        return log_group.SerializeToString()

    for key, value, other in (("__pack_id__x", "1", "2"), ("x", "__pack_id__", "__pack_id")):
        assert compare([with_tag(key, value)], [with_tag(key, other)], ignore_pack_id=True).lost == 1


def test_logs_amid_other_fields_are_found():
    first, second, topic = b"\x0a\x02\x08\x01", b"\x0a\x02\x08\x02", b"\x1a\x01t"
    assert compare([first + second + topic], [first + topic + second]) == (2, 2, 0, 0, 0)


@given(packs)
def test_splitting_agrees_with_the_parser(some_packs):
    for log_group in make_log_groups(some_packs):
        split, rest = split_log_group(log_group)
        parsed = LogGroup.FromString(log_group)
        assert split == [log.SerializeToString() for log in parsed.Logs]
        del parsed.Logs[:]
        assert LogGroup.FromString(rest) == parsed


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\x05abc", b"\x0a\x80", b"\x08", b"\x0b\x01", b"\x0d\x01", b"\xff" * 11]
)
def test_what_is_no_log_group_is_refused(data):
    with pytest.raises(ValueError):
        compare([data], [])


def test_one_line_tells_all():
    description = {"Topic": "t", "Source": "s", "host": "h"}
    sent = [make_log_group(description, ["a", "b", "c"])]
    delivered = [make_log_group(description, ["a", "b", "b", "x"])]
    assert str(compare(sent, delivered)) == "3 logs sent, 4 delivered: 1 lost, 1 duplicated, 1 foreign"


def first_sample_logs(count, **options):
    return list(itertools.islice(sample_logs.log_groups(**options), count))


def test_sample_logs_are_repeatable():
    first = first_sample_logs(20, seed=1)
    random.random()
    assert first_sample_logs(20, seed=1) == first
    assert first_sample_logs(20, seed=2) != first


def test_sample_logs_are_as_agents_send_them():
    parsed = [LogGroup.FromString(log_group) for log_group in first_sample_logs(300, seed=1)]
    assert {log_group.Topic for log_group in parsed} == {"nginx", "ngnix", "sql_audit", "click", "debug"}
    pack_ids = set()
    for log_group in parsed:
        tags = {tag.Key: tag.Value for tag in log_group.LogTags}
        assert set(tags) == {"__hostname__", "__path__", "__pack_id__"}
        assert re.fullmatch("[0-9A-F]{16}-[0-9A-F]+", tags["__pack_id__"])
        pack_ids.add(tags["__pack_id__"])
        assert log_group.Source and log_group.MachineUUID
        assert 10 <= len(log_group.Logs) <= 100
        assert all(log.Time == 1700000000 and log.Contents for log in log_group.Logs)
    assert len(pack_ids) == len(parsed)
    with_nanoseconds = [log_group.Logs[0].HasField("Time_ns") for log_group in parsed]
    assert any(with_nanoseconds) and not all(with_nanoseconds)


def test_sample_logs_of_chosen_topics_and_time():
    for log_group in map(LogGroup.FromString, first_sample_logs(20, topics=["click", "debug"], now=lambda: 7.9)):
        assert log_group.Topic in ("click", "debug")
        assert {log.Time for log in log_group.Logs} == {7}
