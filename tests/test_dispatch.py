"""What a copy delivers, through the real SDK over real HTTP: routing, fidelity, where it begins, how it is reached."""

import time

import pytest
from aliyun.log.proto import LogGroup
from assertions import arrived_in_targets, assert_all_delivered_once, assert_delivered_once
from conftest import create_logstores
from harness import (
    AND_A_CATCH_ALL,
    GROUP,
    PROJECT,
    SOURCE,
    Copies,
    feed,
    group_shards,
    make_log_group,
    wait_until_begun,
    wait_until_delivered,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from local_log_service import LocalLogService
from local_log_service.verdict import compare


def topics_in(service, logstore):
    return sorted(entry.parse().Topic for entry in service.ledger(PROJECT, logstore))


def test_default_routes(service, copies):
    feed(service, 40, topics=("nginx", "ngnix", "sql_audit", "click"))
    copies.start()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert set(topics_in(service, "nginx")) == {"nginx", "ngnix"}
    assert set(topics_in(service, "sql-audit")) == {"sql_audit"}
    assert set(topics_in(service, "click")) == {"click"}


def test_exact_topics_beat_patterns_and_patterns_go_in_order(service, copies):
    service.create_logstore(PROJECT, "rest")
    expected = {
        "app_audit": "sql-audit",
        "app_web": "nginx",
        "app_": "nginx",
        "web_1": "click",
        "web_12": "rest",
        "[x]": "rest",
        "": "rest",
        "App_web": "rest",
    }
    feed(service, len(expected), topics=tuple(expected))
    copies.start(
        SLS_TOPIC_TO1="app_*",
        SLS_TOPIC_TO2=" app_audit , other ",
        SLS_TOPIC_TO3="app_w*,web_?",
        SLS_LOGSTORE_TO12="rest",
        SLS_TOPIC_TO12="*",
    )
    wait_until_delivered(service)
    arrived = {
        topic: logstore
        for logstore in ("nginx", "sql-audit", "click", "rest")
        for topic in topics_in(service, logstore)
    }
    assert arrived == expected
    assert_all_delivered_once(service, expected)


def test_log_groups_without_a_topic_and_topics_spelt_with_brackets_have_routes(service, copies):
    expected = {"": "nginx", "app[1]": "sql-audit", "app1": "click", "app2": "click", "[]": "rest"}
    service.create_logstore(PROJECT, "rest")
    feed(service, 20, topics=tuple(expected))
    without_the_field = LogGroup.FromString(make_log_group(""))
    without_the_field.ClearField("Topic")
    service.put(PROJECT, SOURCE, [without_the_field.SerializeToString()])
    copy = copies.start(
        SLS_TOPIC_TO1="[]",
        SLS_TOPIC_TO2="app[[]1]",
        SLS_TOPIC_TO3="app[12]",
        SLS_LOGSTORE_TO4="rest",
        SLS_TOPIC_TO4='"*"',
    )
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert_all_delivered_once(service, expected)
    arrived = {topic: name for name in set(expected.values()) for topic in topics_in(service, name)}
    assert arrived == expected
    (warning,) = [line for line in copy.stderr().splitlines() if "SLS_TOPIC_TO" in line]
    assert " WARNING SLS_TOPIC_TO3: 'app[12]' is a pattern" in warning and "'app[[]12]'" in warning
    assert "default topics" not in copy.log()


def test_unmatched_topics_are_left_out_counted_and_named(service, copies):
    feed(service, 30, topics=("nginx", "ngnxi", "debug"))
    copy = copies.start()
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert_all_delivered_once(service)
    summary = copy.log().splitlines()[-1]
    assert "unmatched_groups=20 unmatched_logs=100 unmatched_topics=" in summary
    assert '"debug 10, ngnxi 10"' in summary or '"ngnxi 10, debug 10"' in summary
    assert "target=1 logstore=test-project/nginx groups=10 logs=50 " in copy.log()


def test_targets_in_other_projects_and_accounts(service, copies):
    service.access_keys["other-id"] = "other-secret"
    service.create_logstore("project-two", "nginx")
    service.create_logstore("project-three", "click")
    feed(service, 30)
    copies.start(
        SLS_PROJECT_TO="project-two",
        SLS_LOGSTORE_TO2=None,
        SLS_PROJECT_TO3="project-three",
        SLS_AK_ID_TO3="other-id",
        SLS_AK_KEY_TO3="other-secret",
    )
    wait_until_delivered(service)
    assert set(topics_in(service, "nginx")) == set(topics_in(service, "click")) == set()
    assert {entry.parse().Topic for entry in service.ledger("project-two", "nginx")} == {"nginx", "ngnix"}
    assert {entry.parse().Topic for entry in service.ledger("project-three", "click")} == {"click"}


# Wire bytes are made by hand: the SDK's message classes refuse strings that are not UTF-8, the service doesn't.
def field(number, value):
    length = len(value)
    size = b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + value


pairs = st.lists(
    st.builds(lambda key, value: field(1, key) + field(2, value), st.binary(max_size=20), st.binary(max_size=200)),
    max_size=4,
)
logs = st.builds(
    lambda seconds, contents, nanoseconds: (
        b"\x08"
        + bytes([seconds & 0x7F | 0x80, seconds >> 7])
        + b"".join(field(2, pair) for pair in contents)
        + (b"" if nanoseconds is None else b"\x25" + nanoseconds.to_bytes(4, "little"))
    ),
    st.integers(128, 16383),
    pairs,
    st.none() | st.integers(0, 999999999),
)
wire_log_groups = st.builds(
    lambda logs, category, topic, source, machine, tags, unknown: (
        b"".join(field(1, log) for log in logs)
        + b"".join(
            field(number, value)
            for number, value in ((2, category), (3, topic), (4, source), (5, machine))
            if value is not None
        )
        + b"".join(field(6, tag) for tag in tags)
        + unknown
    ),
    st.lists(logs, max_size=4),
    st.none() | st.binary(max_size=9),
    st.sampled_from((b"nginx", b"sql_audit", b"click", b"\xff\xfe", b"", None)),
    st.none() | st.binary(max_size=15),
    st.none() | st.binary(max_size=40),
    pairs,
    st.sampled_from((b"", b"\x48\x07", b"\x4b\x50\x01\x53\x0a\x01x\x54\x4c")),  # a number, a group that has a group
)


def test_log_groups_arrive_byte_for_byte(service, copies):
    """Every field, in its order, with values that are not UTF-8; LogGroups may come joined, so logs are compared."""
    service.create_logstore(PROJECT, "rest")
    copies.start(**AND_A_CATCH_ALL)

    @settings(max_examples=25)
    @given(st.lists(wire_log_groups, min_size=1, max_size=20))
    def arrives(log_groups):
        before = {name: len(service.ledger(PROJECT, name)) for name in ("nginx", "sql-audit", "click", "rest")}
        service.put(PROJECT, SOURCE, log_groups)
        wait_until_delivered(service)
        arrived = [entry.log_group for name, count in before.items() for entry in service.ledger(PROJECT, name)[count:]]
        assert_delivered_once(log_groups, arrived)

    arrives()


def test_an_unmixed_log_group_is_put_as_it_came(service, copies):
    """One LogGroup with everything in it: the put body is the source's bytes, to the last one."""
    log_group = make_log_group("nginx", 3, Source="10.0.0.1", MachineUUID="uuid", Reserved="category")
    parsed = LogGroup.FromString(log_group)
    for key in ("__path__", "__hostname__", "__path__"):
        parsed.LogTags.add(Key=key, Value="value of " + key)
    parsed.Logs[0].Time_ns = 123456789
    log_group = parsed.SerializeToString()
    service.put(PROJECT, SOURCE, [log_group])
    copies.start()
    wait_until_delivered(service)
    assert [entry.log_group for entry in service.ledger(PROJECT, "nginx")] == [log_group]


# What writers send for a log of 1700000000 with a=b, to the byte; the local service's README has them in a table.
LOG = b"\x08\x80\xe2\xcf\xaa\x06\x12\x06\x0a\x01a\x12\x01b"
PACK_ID = b"\x320\x0a\x0b__pack_id__\x12!15EFE0E16F21C089-000000000000000"
WIRE_FORMS = {
    "Python SDK 0.9.52, no topic": b"\x0a\x13" + LOG + b"\x25\x00\x39\xdf\x17" + b"\x1a\x00\x22\x02p9",
    "Python SDK 0.9.52, 0 ns": b"\x0a\x13" + LOG + b"\x25\x00\x00\x00\x00" + b"\x1a\x00\x22\x02p0",
    "Python SDK 0.8.0": b"\x0a\x0e" + LOG + b"\x1a\x05nginx\x22\x02p8",
    "Python SDK 0.8.0, no topic": b"\x0a\x0e" + LOG + b"\x1a\x00\x22\x02p8",
    "Node SDK, no topic": b"\x0a\x0e" + LOG + b"\x22\x04node",
    "Node SDK": b"\x0a\x13" + LOG + b"\x25\x05\x00\x00\x00" + b"\x1a\x05nginx\x22\x04node\x32\x06\x0a\x01k\x12\x01v",
    "Node SDK, milliseconds": b"\x0a\x0e"
    + LOG.replace(b"\xe2\xcf\xaa\x06", b"\xd0\x95\xff\x0c")
    + b"\x1a\x05nginx\x22\x02ms",
    "Node SDK, half an emoji": b"\x0a\x10" + LOG[:6] + b"\x12\x08\x0a\x01a\x12\x03\xed\xa0\xbd" + b"\x1a\x05nginx",
    "OpenAPI SDK": b"\x0a\x0e" + LOG + b"\x1a\x05click\x22\x0810.0.0.1\x32\x06\x0a\x01k\x12\x01v",
    "OpenAPI SDK, no topic": b"\x0a\x0e" + LOG,
    "Rust producer": b"\x0a\x0e" + LOG + b"\x1a\x05click\x22\x01s" + PACK_ID + b"1",
    "Rust producer, no topic": b"\x0a\x0e" + LOG + b"\x1a\x00\x22\x00" + PACK_ID + b"2",
    "fastpb": b"\x0a\x13" + LOG[:-1] + b"\xff" + b"\x25\x05\x00\x00\x00" + b"\x1a\x05click\x22\x01f",
    "fastpb, no topic": b"\x0a\x0e" + LOG + b"\x1a\x00\x22\x00\x32\x06\x0a\x01k\x12\x01v",
    "an agent": b"\x0a\x0e" + LOG + b"\x1a\x05nginx\x2a\x04uuid\x32\x06\x0a\x01k\x12\x01v",
}


@pytest.mark.parametrize("settings", [{}, {"SLS_MERGE_PACKS": "true"}], ids=["", "merging"])
def test_what_writers_send_arrives_in_the_form_that_it_has(service, copies, settings):
    """No two of these are alike in all but their logs, so that none is joined; no field is added, dropped or moved."""
    service.create_logstore(PROJECT, "rest")
    service.put(PROJECT, SOURCE, WIRE_FORMS.values(), shard=0)
    copies.start(**AND_A_CATCH_ALL, **settings)
    wait_until_delivered(service)
    arrived = {
        name: [entry.log_group for entry in service.ledger(PROJECT, name)]
        for name in ("nginx", "click", "rest", "sql-audit")
    }
    assert [len(log_groups) for log_groups in arrived.values()] == [5, 3, 7, 0]
    assert sorted(log_group for log_groups in arrived.values() for log_group in log_groups) == sorted(
        WIRE_FORMS.values()
    )


def test_group_begins_at_the_first_log(service, copies):
    feed(service, 20)
    copies.start(SLS_CURSOR_START="begin")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_group_begins_at_the_end(service, copies):
    feed(service, 20)
    copies.start(SLS_CURSOR_START="end")
    wait_until_begun(service)
    later = feed(service, 20)
    wait_until_delivered(service)
    assert_delivered_once(later, arrived_in_targets(service))


def test_group_begins_at_a_time(service, copies):
    feed(service, 20)
    # The service keeps whole seconds: the next one divides what was from what is to come.
    boundary = int(time.time()) + 1
    service.wait_for(lambda: time.time() >= boundary, 5, "the next second")
    later = feed(service, 20)
    # In the zone of the copy and in another: both name the same instant, and the log says which.
    eight_hours_on = time.strftime("%Y-%m-%dT%H:%M:%S UTC+8", time.gmtime(boundary + 8 * 3600))
    copy = copies.start(SLS_CURSOR_START=eight_hours_on, TZ="America/New_York")
    wait_until_delivered(service)
    assert_delivered_once(later, arrived_in_targets(service))
    assert time.strftime("(%Y-%m-%d %H:%M:%S UTC)", time.gmtime(boundary)) in copy.log()
    assert "no SLS_TOPIC_TO<n> is set: the default topics apply" in copy.log()


def test_logs_that_come_while_no_copy_runs_are_not_skipped_by_a_start_at_the_end(service, copies):
    """A copy killed before it delivered anything has yet settled where the group begins."""
    first = copies.start(SLS_CURSOR_START="end")
    wait_until_begun(service)
    first.process.kill()
    feed(service, 20)
    copies.start(SLS_CURSOR_START="end")
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_shards_born_by_a_split_are_read_from_their_first_log(service, copies):
    copies.start(SLS_CURSOR_START="end")
    wait_until_begun(service)
    service.split_shard(PROJECT, SOURCE, 0)
    service.merge_shards(PROJECT, SOURCE, 1)
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


@pytest.mark.parametrize("is_foreign", [False, True], ids=["of this program", "of another"])
def test_shards_born_while_no_copy_runs_are_read_from_their_first_log_whatever_the_start_says(
    service, copies, is_foreign
):
    """The group goes on; whoever sets a time for its next start may mean anything, but not to leave out logs."""
    first = copies.start()
    feed(service, 20)
    wait_until_delivered(service)
    assert first.stop() == 0
    for shard, state in group_shards(service).items() if is_foreign else ():  # who made it does not say when
        service.set_checkpoint(PROJECT, SOURCE, GROUP, shard, state["checkpoint"], "somebody else's")
    service.split_shard(PROJECT, SOURCE, 0)
    feed(service, 40)
    boundary = int(time.time()) + 1
    service.wait_for(lambda: time.time() >= boundary, 5, "the next second")
    feed(service, 20)
    copies.start(SLS_CURSOR_START=str(boundary))
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_an_expired_checkpoint_goes_on_at_the_oldest_log(service, copies):
    first = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert first.stop() == 0
    kept = feed(service, 40, shard=0)[-10:]
    service.expire(PROJECT, SOURCE, 0, 40)  # 10 delivered and 30 that are gone for good: only the last 10 are left
    second = copies.start()
    wait_until_delivered(service)
    assert compare(kept, arrived_in_targets(service)).lost == 0
    assert "shard 0: the service no longer knows cursor" in second.stderr()


@pytest.mark.parametrize("https, region", [(True, None), (False, "local"), (True, "local")])
def test_https_and_signature_v4(https, region, tmp_path):
    with LocalLogService(https=https, region="local") as service:
        create_logstores(service)
        feed(service, 40)
        with Copies(service, tmp_path) as copies:
            copy = copies.start(SLS_REGION=region)
            wait_until_delivered(service)
            assert_all_delivered_once(service)
            assert service.endpoint.startswith("https://") == https
            assert copy.stop() == 0


def test_temporary_credentials(tmp_path):
    with LocalLogService(security_tokens={"local-id": "a-temporary-token"}) as service:
        create_logstores(service)
        feed(service, 20)
        with Copies(service, tmp_path) as copies:
            copy = copies.start(SLS_STS_TOKEN="a-temporary-token", SLS_LOG_LEVEL="DEBUG")
            wait_until_delivered(service)
            assert_all_delivered_once(service)
            copy.stop()
            assert "a-temporary-token" not in copy.log() + copy.stderr()
            assert "local-secret" not in copy.log() + copy.stderr()


def test_checkpoints_are_cursors_the_service_gave(service, copies):
    """The checkpoint saved last is the cursor after the last LogGroup delivered, for each shard."""
    feed(service, 40)
    copies.start()
    wait_until_delivered(service)
    shards = group_shards(service)
    assert {shard: state["next"] for shard, state in shards.items()} == dict.fromkeys(range(4), 10)


def agent_packs(count, topic="nginx"):
    """LogGroups of one agent: alike but for their logs and the number of the pack."""
    packs = []
    for number in range(count):
        parsed = LogGroup.FromString(make_log_group(topic, 3, Source="10.0.0.1"))
        parsed.LogTags.add(Key="__path__", Value="/var/log/nginx/access.log")
        parsed.LogTags.add(Key="__pack_id__", Value="5E8C1A70B3D9-%X" % number)
        packs.append(parsed.SerializeToString())
    return packs


# At the start a pull brings few, and while nobody knows whether a target takes any, each LogGroup is a put of its own.
NEITHER_FEW_NOR_ALONE = {"ShardConsumer.INITIAL_COUNT": 20, "DOUBT_SECONDS": 1e9}


def test_log_groups_alike_in_all_but_their_logs_share_a_put(service, copies):
    feed(service, 60, topics=("nginx",))
    copies.start(constants=NEITHER_FEW_NOR_ALONE)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert len(service.ledger(PROJECT, "nginx")) == service.calls("PutLogs") == 4  # one for each shard


@pytest.mark.parametrize("merge_packs, put_count", [("false", 20), ("true", 1)])
def test_packs_of_an_agent_share_a_put_when_asked_to(service, copies, merge_packs, put_count):
    packs = agent_packs(20)
    service.put(PROJECT, SOURCE, packs, shard=2)
    copies.start(constants=NEITHER_FEW_NOR_ALONE, SLS_MERGE_PACKS=merge_packs)
    wait_until_delivered(service)
    arrived = [entry.log_group for entry in service.ledger(PROJECT, "nginx")]
    outcome = compare(packs, arrived, ignore_pack_id=True)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 0, 0), str(outcome)
    assert len(arrived) == put_count
    if merge_packs == "true":
        sent_in_order = [log for pack in packs for log in LogGroup.FromString(pack).Logs]
        assert list(LogGroup.FromString(arrived[0]).Logs) == sent_in_order


def test_a_joined_put_that_is_refused_goes_piece_by_piece(tmp_path):
    """Should a service take less at once than it does today, only what it never takes would be held up."""
    with LocalLogService(max_put_bytes=1000) as service:
        create_logstores(service)
        feed(service, 400, topics=("nginx",))
        with Copies(service, tmp_path) as copies:
            copies.start()
            wait_until_delivered(service)
            assert_all_delivered_once(service)
            assert max(len(entry.log_group) for entry in service.ledger(PROJECT, "nginx")) <= 1000
