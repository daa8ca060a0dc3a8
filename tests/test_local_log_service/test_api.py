"""The local Log Service's API, called through the vendor's SDK over HTTP."""

import calendar
import itertools
import json
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import lz4.block
import pytest
import requests
import zstd
from aliyun.log import LogException, LogItem, PutLogsRequest, logclient
from aliyun.log.proto import Log, LogGroup, LogGroupRaw, LogTag
from local_log_service import Entry, LocalLogService, Quotas, actions, compression
from local_log_service.errors import ServiceError

pytestmark = pytest.mark.quick

PROJECT = "api-project"
numbers = itertools.count()


@pytest.fixture(scope="module")
def log_service():
    with LocalLogService(max_consumer_groups=3, max_pull_bytes=4000, max_put_bytes=5000) as running:
        yield running


@pytest.fixture(scope="module")
def client(log_service):
    return log_service.client()


@pytest.fixture
def logstore(log_service):
    """Name of a new logstore of one shard."""
    name = "logstore-{}".format(next(numbers))
    log_service.create_logstore(PROJECT, name)
    return name


@pytest.fixture
def two_shards(log_service):
    """Name of a new logstore of two shards."""
    name = "logstore-{}".format(next(numbers))
    log_service.create_logstore(PROJECT, name, 2)
    return name


def log_group(value="value", topic="nginx"):
    return LogGroup(
        Topic=topic,
        Source="10.0.0.1",
        LogTags=[LogTag(Key="__pack_id__", Value="1-1")],
        Logs=[Log(Time=1700000000, Contents=[Log.Content(Key="key", Value=value)])],
    )


def values(pulled):
    return [group.Logs[0].Contents[0].Value for group in pulled.get_loggroup_list().LogGroups]


def refusal(call, *arguments, **named):
    """Call and return the (status, code) of the error that the service answers with."""
    with pytest.raises(LogException) as raised:
        call(*arguments, **named)
    assert raised.value.get_request_id()
    return raised.value.get_resp_status(), raised.value.get_error_code()


# Putting


@pytest.mark.parametrize("compress", [True, False])
def test_put_takes_the_whole_log_group_as_it_was_sent(log_service, client, logstore, compress):
    sent = log_group("ü" * 100)
    before = time.time()
    response = client.put_log_raw(PROJECT, logstore, sent, compress)

    (entry,) = log_service.ledger(PROJECT, logstore)
    assert isinstance(entry, Entry)
    assert entry.log_group == sent.SerializeToString()
    assert entry.parse() == sent
    assert entry.shard == 0
    assert entry.request_id == response.get_request_id()
    assert before <= entry.received_at <= time.time()


def test_put_logs_of_the_sdk_is_taken_and_can_be_pulled(client, logstore):
    item = LogItem(timestamp=1700000000, contents=[("key", "value")])
    client.put_logs(PutLogsRequest(PROJECT, logstore, "nginx", "10.0.0.1", [item]))
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert values(client.pull_logs(PROJECT, logstore, 0, cursor)) == ["value"]


def test_values_that_are_not_utf_8_go_through_unharmed(log_service, client, logstore):
    sent = LogGroupRaw()
    sent.Topic = b"nginx"
    sent.Source = b""
    log = sent.Logs.add()
    log.Time = 1700000000
    log.Contents.add(Key=b"key", Value=b"\xff\xfe\x00")
    client.put_log_raw(PROJECT, logstore, sent)

    (entry,) = log_service.ledger(PROJECT, logstore)
    assert entry.parse().Logs[0].Contents[0].Value == b"\xff\xfe\x00"
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert values(client.pull_logs(PROJECT, logstore, 0, cursor)) == [b"\xff\xfe\x00"]


def test_puts_go_to_the_shards_in_turn(log_service, client, two_shards):
    for _ in range(6):
        client.put_log_raw(PROJECT, two_shards, log_group())
    shards = [entry.shard for entry in log_service.ledger(PROJECT, two_shards)]
    assert sorted(shards) == [0, 0, 0, 1, 1, 1]
    assert shards[:2] == shards[2:4] == shards[4:]


@pytest.mark.parametrize("path", ["/logstores/{}", "/logstores/{}/shards/1"])
def test_puts_of_other_sdks_are_taken(log_service, client, two_shards, path):
    body = log_group().SerializeToString()
    client._send("POST", PROJECT, body, path.format(two_shards), {}, {"x-log-bodyrawsize": str(len(body))})
    (entry,) = log_service.ledger(PROJECT, two_shards)
    assert entry.log_group == body
    assert entry.shard == 1 or "shards" not in path


def test_a_deflated_put_is_taken(log_service, client, logstore):
    body = log_group().SerializeToString()
    put_body(client, logstore, zlib.compress(body), x_log_bodyrawsize=str(len(body)), x_log_compresstype="deflate")
    assert [entry.log_group for entry in log_service.ledger(PROJECT, logstore)] == [body]


@pytest.mark.parametrize("key, shard", [("0" * 32, 0), ("7" + "f" * 31, 0), ("8" + "0" * 31, 1), ("F" * 32, 1)])
def test_a_put_with_a_hash_key_goes_to_the_shard_of_the_key(log_service, client, two_shards, key, shard):
    item = LogItem(timestamp=1700000000, contents=[("key", "value")])
    client.put_logs(PutLogsRequest(PROJECT, two_shards, "nginx", "10.0.0.1", [item], hashKey=key))
    assert log_service.ledger(PROJECT, two_shards)[0].shard == shard


def put_body(client, logstore, body, **headers):
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    client._send("POST", PROJECT, body, "/logstores/" + logstore + "/shards/lb", {}, named)


DEFLATED_20 = zlib.compress(b"\n\x12" + b"x" * 18)
LZ4_OF_20 = lz4.block.compress(b"\n\x12" + b"x" * 18, store_size=False)


@pytest.mark.parametrize(
    "body, headers, code",
    [
        (b"no protobuf", {"x_log_bodyrawsize": "11"}, "PostBodyInvalid"),
        (b"\n\x05abc", {"x_log_bodyrawsize": "5"}, "PostBodyInvalid"),
        (b"\n\x03abc", {"x_log_bodyrawsize": "6"}, "PostBodyInvalid"),
        (b"\n\x03abc", {}, "MissingBodyRawSize"),
        (b"\n\x03abc", {"x_log_bodyrawsize": "-5"}, "InvalidBodyRawSize"),
        (b"\n\x03abc", {"x_log_bodyrawsize": "5", "x_log_compresstype": "snappy"}, "InvalidCompressType"),
        (b"\n\x03abc", {"x_log_bodyrawsize": "5", "x_log_compresstype": "deflate"}, "PostBodyUncompressError"),
        (DEFLATED_20, {"x_log_bodyrawsize": "19", "x_log_compresstype": "deflate"}, "PostBodyInvalid"),
        (DEFLATED_20, {"x_log_bodyrawsize": "21", "x_log_compresstype": "deflate"}, "PostBodyInvalid"),
        (b"\n\x03abc", {"x_log_bodyrawsize": "5", "x_log_compresstype": "lz4"}, "PostBodyUncompressError"),
        (LZ4_OF_20, {"x_log_bodyrawsize": "19", "x_log_compresstype": "lz4"}, "PostBodyUncompressError"),
        (LZ4_OF_20, {"x_log_bodyrawsize": "21", "x_log_compresstype": "lz4"}, "PostBodyInvalid"),
        (LZ4_OF_20, {"x_log_bodyrawsize": "5001", "x_log_compresstype": "lz4"}, "PostBodyTooLarge"),
    ],
)
def test_bad_bodies_are_refused_and_nothing_of_them_is_taken(log_service, client, logstore, body, headers, code):
    status = 413 if code == "PostBodyTooLarge" else 400
    assert refusal(put_body, client, logstore, body, **headers) == (status, code)
    assert log_service.ledger(PROJECT, logstore) == []


@pytest.mark.parametrize("compress", [True, False])
def test_the_size_limit_of_a_put_is_that_of_the_raw_body(log_service, client, logstore, compress):
    overhead = len(log_group("x" * 4000).SerializeToString()) - 4000
    client.put_log_raw(PROJECT, logstore, log_group("x" * (5000 - overhead)), compress)
    one_more = log_group("x" * (5001 - overhead))
    assert refusal(client.put_log_raw, PROJECT, logstore, one_more, compress) == (413, "PostBodyTooLarge")
    assert len(log_service.ledger(PROJECT, logstore)) == 1


@pytest.mark.parametrize("settings, status", [({}, 499), ({"log_time_status": 400}, 400)])
def test_puts_with_logs_of_long_ago_or_of_the_future_are_refused_when_that_is_ordered(settings, status):
    now = int(time.time())
    with LocalLogService(check_log_times=True, **settings) as strict:
        strict.create_logstore(PROJECT, "target")
        client = strict.client()

        def put(*offsets):
            group = LogGroup(Topic="nginx", Source="10.0.0.1")
            for offset in offsets:
                group.Logs.add(Time=now + offset).Contents.add(Key="key", Value="value")
            client.put_log_raw(PROJECT, "target", group)

        put(0, -7 * 86400 + 600, 14 * 60)
        put()
        for offset in (-7 * 86400 - 600, -now, 20 * 60):
            with pytest.raises(LogException) as raised:
                put(0, offset)
            assert (raised.value.get_resp_status(), raised.value.get_error_code()) == (status, "PostBodyInvalid")
            assert raised.value.get_error_message() == "The post data time is out of range"
        assert len(strict.ledger(PROJECT, "target")) == 2


def test_a_body_far_beyond_the_limit_is_refused_with_an_answer(log_service, client, logstore):
    huge = log_group("x" * 3000000)
    assert refusal(client.put_log_raw, PROJECT, logstore, huge, False) == (413, "PostBodyTooLarge")
    client.put_log_raw(PROJECT, logstore, log_group())
    assert len(log_service.ledger(PROJECT, logstore)) == 1


# Pulling


def test_pulling_follows_the_cursor_to_the_end_and_beyond_when_more_arrives(log_service, client, logstore):
    log_service.put(PROJECT, logstore, [log_group(str(number)).SerializeToString() for number in range(5)])
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()

    first = client.pull_logs(PROJECT, logstore, 0, cursor, 3)
    assert values(first) == ["0", "1", "2"]
    assert (first.get_loggroup_count(), first.get_header("x-log-end-of-cursor")) == (3, "0")

    second = client.pull_logs(PROJECT, logstore, 0, first.get_next_cursor(), 3)
    assert values(second) == ["3", "4"]
    assert second.get_header("x-log-end-of-cursor") == "1"
    assert second.get_next_cursor() == client.get_end_cursor(PROJECT, logstore, 0).get_cursor()

    empty = client.pull_logs(PROJECT, logstore, 0, second.get_next_cursor())
    assert (empty.get_loggroup_count(), empty.get_raw_size()) == (0, 0)
    assert empty.get_header("x-log-cursor-time") == empty.get_header("x-log-read-last-cursor") == ""
    assert empty.get_next_cursor() == second.get_next_cursor()

    client.put_log_raw(PROJECT, logstore, log_group("5"))
    assert values(client.pull_logs(PROJECT, logstore, 0, empty.get_next_cursor())) == ["5"]


@pytest.mark.parametrize("compress", [True, False])
def test_a_pull_is_compressed_when_the_client_accepts_it(client, logstore, compress):
    client.put_log_raw(PROJECT, logstore, log_group("x" * 1000))
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    pulled = client.pull_logs(PROJECT, logstore, 0, cursor, compress=compress)
    assert values(pulled) == ["x" * 1000]
    assert pulled.get_header("x-log-compresstype") == ("lz4" if compress else "")
    assert (int(pulled.get_header("Content-Length")) < 200) == compress
    assert pulled.get_raw_size() == 1000 + len(log_group("").SerializeToString()) + 6  # longer lengths, framing


def test_a_pull_ends_before_the_size_limit_but_brings_one_log_group_at_least(log_service, client, logstore):
    sizes = [1500, 1500, 1500, 4500, 100]
    log_service.put(PROJECT, logstore, [log_group("x" * size).SerializeToString() for size in sizes])
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    pulled_sizes = []
    for _ in range(4):
        pulled = client.pull_logs(PROJECT, logstore, 0, cursor)
        cursor = pulled.get_next_cursor()
        pulled_sizes.append([len(value) for value in values(pulled)])
    assert pulled_sizes == [[1500, 1500], [1500], [4500], [100]]


def test_a_pull_stops_at_the_end_cursor(log_service, client, logstore):
    log_service.put(PROJECT, logstore, [log_group(str(number)).SerializeToString() for number in range(4)])
    begin = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    third = client.pull_logs(PROJECT, logstore, 0, begin, 2).get_next_cursor()
    pulled = client.pull_logs(PROJECT, logstore, 0, begin, end_cursor=third)
    assert values(pulled) == ["0", "1"]
    assert pulled.get_next_cursor() == third


def test_a_pull_says_what_it_read_last(log_service, client, logstore):
    entries = log_service.put(PROJECT, logstore, [log_group(str(number)).SerializeToString() for number in range(3)])
    begin = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    pulled = client.pull_logs(PROJECT, logstore, 0, begin, 2)
    assert pulled.get_header("x-log-cursor-time") == str(int(entries[1].received_at))
    last = pulled.get_header("x-log-read-last-cursor")
    assert values(client.pull_logs(PROJECT, logstore, 0, last, 1)) == ["1"]


def test_a_pull_may_move_over_nothing(log_service, client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    begin = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    log_service.leave_gap(PROJECT, logstore, 0, 3)
    client.put_log_raw(PROJECT, logstore, log_group("between"))
    log_service.leave_gap(PROJECT, logstore, 0, 2)
    assert log_service.lag(PROJECT, logstore, "group") == len(log_service.ledger(PROJECT, logstore)) == 1

    first = client.pull_logs(PROJECT, logstore, 0, begin, 2)
    assert (first.get_loggroup_count(), first.get_header("x-log-end-of-cursor")) == (0, "0")
    assert first.get_next_cursor() != begin
    second = client.pull_logs(PROJECT, logstore, 0, first.get_next_cursor(), 2)
    assert values(second) == ["between"]
    last = client.pull_logs(PROJECT, logstore, 0, second.get_next_cursor())
    assert (last.get_loggroup_count(), last.get_header("x-log-end-of-cursor")) == (0, "1")
    assert last.get_next_cursor() == client.get_end_cursor(PROJECT, logstore, 0).get_cursor()
    assert values(client.pull_logs(PROJECT, logstore, 0, begin)) == ["between"]
    client.update_check_point(PROJECT, logstore, "group", 0, second.get_next_cursor(), "one")
    assert log_service.lag(PROJECT, logstore, "group") == 0


@pytest.fixture
def quotas_clock(log_service, monkeypatch):
    """A list of one item: the time by which quotas are counted. Afterwards there are none."""
    now = [1000.0 * next(numbers)]  # no other test has counted in that second
    monkeypatch.setattr("local_log_service.quotas.time", SimpleNamespace(time=lambda: now[0]))
    yield now
    log_service.quotas = None


NO_QUOTAS = Quotas(None, None, None, None)


@pytest.mark.parametrize(
    "quota, code",
    [
        ({"shard_writes": 2}, "ShardWriteQuotaExceed"),
        ({"shard_write_bytes": 100}, "ShardWriteQuotaExceed"),
        ({"project_write_bytes": 100}, "WriteQuotaExceed"),
    ],
)
def test_a_quota_of_writes_is_for_a_second(log_service, client, logstore, quotas_clock, quota, code):
    size = len(log_group().SerializeToString())
    assert 50 <= size < 100
    log_service.quotas = NO_QUOTAS._replace(**quota)
    for _ in range(2):
        client.put_log_raw(PROJECT, logstore, log_group())
        client.put_log_raw(PROJECT, logstore, log_group())
        assert refusal(client.put_log_raw, PROJECT, logstore, log_group()) == (403, code)
        quotas_clock[0] += 1
    assert len(log_service.ledger(PROJECT, logstore)) == 4


@pytest.mark.parametrize(
    "quota, code",
    [
        ({"shard_reads": 2}, "ShardReadQuotaExceed"),
        ({"shard_read_bytes": 100}, "ShardReadQuotaExceed"),
        ({"project_read_bytes": 100}, "ReadQuotaExceed"),
    ],
)
def test_a_quota_of_reads_is_for_a_second(log_service, client, logstore, quotas_clock, quota, code):
    begin = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    client.put_log_raw(PROJECT, logstore, log_group())
    log_service.quotas = NO_QUOTAS._replace(**quota)
    for _ in range(2):
        client.pull_logs(PROJECT, logstore, 0, begin)
        client.pull_logs(PROJECT, logstore, 0, begin)
        assert refusal(client.pull_logs, PROJECT, logstore, 0, begin) == (403, code)
        quotas_clock[0] += 1


def test_shards_have_quotas_of_their_own(log_service, client, two_shards, quotas_clock):
    assert log_service.quotas is None
    log_service.quotas = NO_QUOTAS._replace(shard_writes=1)
    for _ in range(2):  # one for each
        client.put_log_raw(PROJECT, two_shards, log_group())
    assert refusal(client.put_log_raw, PROJECT, two_shards, log_group()) == (403, "ShardWriteQuotaExceed")


def test_zstd_goes_both_ways(log_service, client, logstore):
    body = log_group("x" * 1000).SerializeToString()
    sizes = {"x_log_bodyrawsize": str(len(body)), "x_log_compresstype": "zstd"}
    put_body(client, logstore, zstd.compress(body, 1), **sizes)
    assert [entry.log_group for entry in log_service.ledger(PROJECT, logstore)] == [body]
    assert refusal(put_body, client, logstore, b"no zstd", **sizes) == (400, "PostBodyUncompressError")
    sizes["x_log_bodyrawsize"] = str(len(body) - 1)
    assert refusal(put_body, client, logstore, zstd.compress(body, 1), **sizes) == (400, "PostBodyInvalid")
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    pulled = client.pull_logs(PROJECT, logstore, 0, cursor, accept_compress_type="zstd")
    assert pulled.get_header("x-log-compresstype") == "zstd" and values(pulled) == ["x" * 1000]


def zstd_stream(data, block=50):
    """A frame as encoders of streams make it: without the size of its content, in blocks; these are not compressed."""
    blocks = [data[start : start + block] for start in range(0, len(data), block)] + [b""]
    headers = [
        (len(each) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") for number, each in enumerate(blocks)
    ]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(header + each for header, each in zip(headers, blocks))


# What zstandard 0.25.0 writes for 20 times "abc" as a stream: a block that is compressed, one that is empty, and in
# the second form with a checksum.
STREAMS = ["28b52ffd00584d0000186162630100f67443", "28b52ffd04584d0000186162630100f67443384b202f"]


@pytest.mark.parametrize("first", [zstd.compress, zstd_stream], ids=["sized", "stream"])
@pytest.mark.parametrize("second", [zstd.compress, zstd_stream], ids=["sized", "stream"])
def test_frames_of_zstd_of_any_form_are_one_body(log_service, client, logstore, first, second):
    body = LogGroup(Topic="t", Source="abc" * 20).SerializeToString()
    for data in (
        first(body[:7]) + second(body[7:]),
        second(body),
        first(body[:-60]) + bytes.fromhex("".join(STREAMS[:1])),
    ):
        put_body(client, logstore, data, x_log_bodyrawsize=str(len(body)), x_log_compresstype="zstd")
    assert [entry.log_group for entry in log_service.ledger(PROJECT, logstore)] == [body] * 3


@pytest.mark.parametrize("stream", STREAMS)
def test_a_frame_of_zstd_that_is_cut_or_followed_by_garbage_is_refused(stream):
    stream = bytes.fromhex(stream)
    assert compression.decompress("zstd", stream * 3, 180) == b"abc" * 60
    for data in [stream[:size] for size in range(1, len(stream))] + [
        stream + b"x",
        b"x" + stream,
        stream + stream[:-1],
    ]:
        with pytest.raises(ServiceError, match="PostBodyUncompressError"):
            compression.decompress("zstd", data, 60)


def track(log_service, logstore, document):
    url = "%s/logstores/%s/track?APIVersion=0.6.0" % (log_service.environment()["http_proxy"], logstore)
    host = PROJECT + "." + log_service.endpoint[len("http://") :]
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    answer = requests.post(url, data=body, headers={"Host": host}, proxies={"http": ""})
    return answer.status_code, answer.json()["errorCode"] if answer.content else None


def test_web_pages_are_tracked_without_a_key(log_service, client, logstore):
    page = {"__logs__": [{"a": "t\xe4glich"}, {}], "__topic__": "t", "__source__": "s", "__tags__": {"k": "v"}}
    assert track(log_service, logstore, page) == (401, "Unauthorized")
    client.update_logstore(PROJECT, logstore, enable_tracking=True)
    assert track(log_service, logstore, page) == (200, None)
    assert track(log_service, logstore, {"__logs__": [{"half": "\ud83d"}]}) == (200, None)
    first, second = [entry.parse() for entry in log_service.ledger(PROJECT, logstore)]
    assert (first.Topic, first.Source, [(tag.Key, tag.Value) for tag in first.LogTags]) == ("t", "s", [("k", "v")])
    assert [[(pair.Key, pair.Value) for pair in log.Contents] for log in first.Logs] == [[("a", "t\xe4glich")], []]
    assert abs(first.Logs[0].Time - time.time()) < 60 and second.Logs[0].Contents[0].Value == "?"
    for wrong in (b"no JSON", [], {}, {"__logs__": [1]}, {"__logs__": [{"a": 1}]}, {**page, "__tags__": {"k": {}}}):
        assert track(log_service, logstore, wrong) == (400, "PostBodyInvalid")
    assert track(log_service, logstore, {"__logs__": [{"a": "x" * 5000}]}) == (413, "PostBodyTooLarge")
    assert track(log_service, "no-logstore", page) == (404, "LogStoreNotExist")


def test_an_unknown_compression_is_refused(client, logstore):
    headers = {"x_log_bodyrawsize": "5", "x_log_compresstype": "snappy"}
    assert refusal(put_body, client, logstore, b"\n\x03abc", **headers) == (400, "InvalidCompressType")
    assert compression.accepted("gzip") == ""


@pytest.mark.parametrize("count", [1001, -1, "many"])
def test_a_pull_count_out_of_range_is_refused(client, logstore, count):
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert refusal(client.pull_logs, PROJECT, logstore, 0, cursor, count) == (400, "ParameterInvalid")


def test_a_pull_with_an_spl_query_is_refused_rather_than_answered_wrong(client, logstore):
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert refusal(client.pull_logs, PROJECT, logstore, 0, cursor, query="* | where a = '1'") == (
        400,
        "ParameterInvalid",
    )


# Cursors


def test_cursors_by_time_are_by_time_of_arrival(log_service, client, logstore, monkeypatch):
    second = int(time.time()) - 1000
    arrivals = [second + offset for offset in (0.2, 0.9, 2.0, 5.5)]
    clock = iter(arrivals)
    with monkeypatch.context() as patched:
        patched.setattr("local_log_service.state.time", SimpleNamespace(time=lambda: next(clock, second)))
        log_service.put(PROJECT, logstore, [log_group(str(at)).SerializeToString() for at in arrivals])

    def first_from(at):
        cursor = client.get_cursor(PROJECT, logstore, 0, at).get_cursor()
        if cursor == end:
            return None
        (value,) = values(client.pull_logs(PROJECT, logstore, 0, cursor, 1))
        return round(float(value) - second, 1)

    end = client.get_end_cursor(PROJECT, logstore, 0).get_cursor()
    assert first_from(0) == 0.2
    assert first_from(second) == 0.2
    assert first_from(second + 1) == 2.0
    assert first_from(second + 2) == 2.0
    assert first_from(second + 3) == 5.5
    assert first_from(second + 6) is None

    cursor = client.get_cursor(PROJECT, logstore, 0, second + 3).get_cursor()
    assert client.get_cursor_time(PROJECT, logstore, 0, cursor).get_cursor_time() == second + 5
    assert client.get_previous_cursor_time(PROJECT, logstore, 0, cursor).get_cursor_time() == second + 2
    begin = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert client.get_previous_cursor_time(PROJECT, logstore, 0, begin).get_cursor_time() == second


def test_the_time_of_the_end_cursor_is_now(client, logstore):
    end = client.get_end_cursor(PROJECT, logstore, 0).get_cursor()
    before = int(time.time())
    assert before <= client.get_cursor_time(PROJECT, logstore, 0, end).get_cursor_time() <= time.time()


@pytest.mark.parametrize(
    "cursor, code",
    [
        ("", "ParameterInvalid"),
        ("***", "ParameterInvalid"),
        ("bm8gbnVtYmVy", "ParameterInvalid"),
        ("LTE=", "ParameterInvalid"),
        ("ü", "ParameterInvalid"),
        ("MA==", "InvalidCursor"),
        ("OTk5OTk5OTk5OTk5OTk5OTk5OQ==", "InvalidCursor"),
    ],
)
def test_malformed_and_foreign_cursors_are_refused(client, logstore, cursor, code):
    assert refusal(client.pull_logs, PROJECT, logstore, 0, cursor) == (400, code)
    assert refusal(client.get_cursor_time, PROJECT, logstore, 0, cursor) == (400, code)


def test_a_cursor_of_another_shard_is_refused(client, two_shards):
    cursor = client.get_begin_cursor(PROJECT, two_shards, 1).get_cursor()
    assert refusal(client.pull_logs, PROJECT, two_shards, 0, cursor) == (400, "InvalidCursor")


def test_a_cursor_of_a_logstore_that_was_deleted_is_refused_by_its_successor(log_service, client, logstore):
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    log_service.delete_logstore(PROJECT, logstore)
    log_service.create_logstore(PROJECT, logstore)
    assert refusal(client.pull_logs, PROJECT, logstore, 0, cursor) == (400, "InvalidCursor")


def test_expired_log_groups_can_not_be_read_any_more(log_service, client, logstore):
    log_service.put(PROJECT, logstore, [log_group(str(number)).SerializeToString() for number in range(5)])
    oldest = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    log_service.expire(PROJECT, logstore, 0, 2)

    assert refusal(client.pull_logs, PROJECT, logstore, 0, oldest) == (400, "InvalidCursor")
    begin = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert begin == client.get_cursor(PROJECT, logstore, 0, 0).get_cursor()
    assert values(client.pull_logs(PROJECT, logstore, 0, begin)) == ["2", "3", "4"]

    log_service.expire(PROJECT, logstore, 0, 100)
    assert client.get_begin_cursor(PROJECT, logstore, 0).get_cursor() == (
        client.get_end_cursor(PROJECT, logstore, 0).get_cursor()
    )
    assert len(log_service.ledger(PROJECT, logstore)) == 5


@pytest.fixture
def clock(monkeypatch):
    """A list of one item: the time by which LogGroups arrive and grow too old."""
    now = [float(int(time.time()))]
    monkeypatch.setattr("local_log_service.state.time", SimpleNamespace(time=lambda: now[0]))
    return now


def test_log_groups_older_than_the_retention_time_expire(log_service, client, logstore, clock):
    log_service.set_ttl(PROJECT, logstore, 10)
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    oldest = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    client.put_log_raw(PROJECT, logstore, log_group("0"))
    second = client.pull_logs(PROJECT, logstore, 0, oldest, 1).get_next_cursor()
    for offset in (4, 8):
        clock[0] += offset
        client.put_log_raw(PROJECT, logstore, log_group(str(offset)))
    client.update_check_point(PROJECT, logstore, "group", 0, oldest, "one")

    assert refusal(client.pull_logs, PROJECT, logstore, 0, oldest) == (400, "InvalidCursor")  # 12 s old
    assert refusal(client.get_cursor_time, PROJECT, logstore, 0, oldest) == (400, "InvalidCursor")
    assert client.get_begin_cursor(PROJECT, logstore, 0).get_cursor() == second
    assert client.get_cursor(PROJECT, logstore, 0, 0).get_cursor() == second
    assert values(client.pull_logs(PROJECT, logstore, 0, second)) == ["4", "8"]
    assert log_service.lag(PROJECT, logstore, "group") == 2

    clock[0] += 1000
    end = client.get_end_cursor(PROJECT, logstore, 0).get_cursor()
    assert client.get_begin_cursor(PROJECT, logstore, 0).get_cursor() == end
    assert refusal(client.pull_logs, PROJECT, logstore, 0, second) == (400, "InvalidCursor")
    assert values(client.pull_logs(PROJECT, logstore, 0, end)) == []
    assert log_service.lag(PROJECT, logstore, "group") == 0
    assert len(log_service.ledger(PROJECT, logstore)) == 3

    log_service.set_ttl(PROJECT, logstore, None)
    client.put_log_raw(PROJECT, logstore, log_group("kept"))
    clock[0] += 10**9
    assert values(client.pull_logs(PROJECT, logstore, 0, end)) == ["kept"]


def test_the_retention_time_of_a_logstore_is_in_days(client, clock):
    client.create_logstore(PROJECT, "seven-days", ttl=7, shard_count=1)
    assert client.get_logstore(PROJECT, "seven-days").ttl == 7
    begin = client.get_begin_cursor(PROJECT, "seven-days", 0).get_cursor()
    client.put_log_raw(PROJECT, "seven-days", log_group())
    clock[0] += 7 * 86400
    assert values(client.pull_logs(PROJECT, "seven-days", 0, begin)) == ["value"]
    clock[0] += 1
    assert refusal(client.pull_logs, PROJECT, "seven-days", 0, begin) == (400, "InvalidCursor")

    client.update_logstore(PROJECT, "seven-days", ttl=3650)  # for ever
    begin = client.get_begin_cursor(PROJECT, "seven-days", 0).get_cursor()
    client.put_log_raw(PROJECT, "seven-days", log_group("kept"))
    clock[0] += 4000 * 86400
    assert values(client.pull_logs(PROJECT, "seven-days", 0, begin)) == ["kept"]


# Shards


def ranges(shards):
    return [
        (shard["shardID"], shard["status"], shard["inclusiveBeginKey"][:2], shard["exclusiveEndKey"][:2])
        for shard in shards
    ]


def test_shards_split_the_range_of_keys_evenly(log_service, client):
    log_service.create_logstore(PROJECT, "even-ranges", 4)
    shards = client.list_shards(PROJECT, "even-ranges").get_shards_info()
    assert ranges(shards) == [
        (0, "readwrite", "00", "40"),
        (1, "readwrite", "40", "80"),
        (2, "readwrite", "80", "c0"),
        (3, "readwrite", "c0", "ff"),
    ]
    for shard in shards:
        assert len(shard["inclusiveBeginKey"]) == len(shard["exclusiveEndKey"]) == 32
        assert abs(shard["createTime"] - time.time()) < 60


def test_a_split_closes_the_parent_and_its_children_take_the_logs(log_service, client, logstore):
    client.put_log_raw(PROJECT, logstore, log_group("before"))
    answer = client.split_shard(PROJECT, logstore, 0, "40" + "0" * 30).get_shards_info()
    assert ranges(answer) == [(0, "readonly", "00", "ff"), (1, "readwrite", "00", "40"), (2, "readwrite", "40", "ff")]
    assert client.list_shards(PROJECT, logstore).get_shards_info() == answer

    for _ in range(4):
        client.put_log_raw(PROJECT, logstore, log_group("after"))
    assert sorted(entry.shard for entry in log_service.ledger(PROJECT, logstore)) == [0, 1, 1, 2, 2]
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert values(client.pull_logs(PROJECT, logstore, 0, cursor)) == ["before"]


def test_a_merge_closes_both_parents(client, two_shards):
    answer = client.merge_shard(PROJECT, two_shards, 0).get_shards_info()
    assert ranges(answer) == [(2, "readwrite", "00", "ff"), (0, "readonly", "00", "80"), (1, "readonly", "80", "ff")]
    client.put_log_raw(PROJECT, two_shards, log_group())


def test_splits_and_merges_that_make_no_sense_are_refused(client, two_shards):
    invalid = (400, "ParameterInvalid")
    assert refusal(client.split_shard, PROJECT, two_shards, 0, "80" + "0" * 30) == invalid  # its end
    assert refusal(client.split_shard, PROJECT, two_shards, 0, "0" * 32) == invalid  # its begin
    assert refusal(client.split_shard, PROJECT, two_shards, 0, "no key") == invalid
    assert refusal(client.split_shard, PROJECT, two_shards, 7, "40" + "0" * 30) == invalid
    assert refusal(client.merge_shard, PROJECT, two_shards, 1) == invalid  # the last one
    assert refusal(client.merge_shard, PROJECT, two_shards, 7) == invalid
    client.split_shard(PROJECT, two_shards, 0, "40" + "0" * 30)
    assert refusal(client.split_shard, PROJECT, two_shards, 0, "20" + "0" * 30) == invalid  # readonly
    assert refusal(client.merge_shard, PROJECT, two_shards, 0) == invalid
    body = log_group().SerializeToString()
    path = "/logstores/" + two_shards + "/shards/0"
    size = {"x-log-bodyrawsize": str(len(body))}
    assert refusal(client._send, "POST", PROJECT, body, path, {}, size) == invalid


def test_shards_are_split_and_merged_by_method(log_service, client, logstore):
    assert log_service.split_shard(PROJECT, logstore, 0) == [1, 2]
    assert log_service.split_shard(PROJECT, logstore, 2, "c0" + "0" * 30) == [3, 4]
    assert log_service.merge_shards(PROJECT, logstore, 1) == 5
    assert ranges(client.list_shards(PROJECT, logstore).get_shards_info()) == [
        (0, "readonly", "00", "ff"),
        (1, "readonly", "00", "80"),
        (2, "readonly", "80", "ff"),
        (3, "readonly", "80", "c0"),
        (4, "readwrite", "c0", "ff"),
        (5, "readwrite", "00", "c0"),
    ]
    with pytest.raises(ServiceError, match="ParameterInvalid"):
        log_service.put(PROJECT, logstore, [b""], shard=0)
    with pytest.raises(ServiceError, match="ParameterInvalid"):
        log_service.merge_shards(PROJECT, logstore, 4)


# Projects and logstores


def test_logstores_are_created_listed_and_deleted(log_service, client):
    client.create_project("made-by-sdk", "description")
    client.get_project("made-by-sdk")
    client.create_logstore("made-by-sdk", "first", shard_count=3)
    client.create_logstore("made-by-sdk", "second")
    client.put_log_raw("made-by-sdk", "first", log_group())

    listed = client.list_logstore("made-by-sdk")
    assert (listed.get_logstores(), listed.get_logstores_total()) == (["first", "second"], 2)
    assert client.list_logstore("made-by-sdk", "eco").get_logstores() == ["second"]
    assert client.list_logstore("made-by-sdk", offset=1, size=5).get_logstores() == ["second"]
    assert client.get_logstore("made-by-sdk", "first").get_shard_count() == 3

    exists = (400, "LogStoreAlreadyExist")
    assert refusal(client.create_logstore, "made-by-sdk", "first") == exists
    assert refusal(client.create_project, "made-by-sdk", "") == (400, "ProjectAlreadyExist")
    for name in ("ab", "x" * 64, "under_score", "Upper", "-begin", "end-"):
        assert refusal(client.create_project, name, "") == (400, "ParameterInvalid")
    for name in ("ab", "x" * 64, "Upper", "_begin", "end-"):
        assert refusal(client.create_logstore, "made-by-sdk", name) == (400, "LogStoreInfoInvalid")
    client.create_logstore("made-by-sdk", "under_score")
    client.delete_logstore("made-by-sdk", "under_score")
    with pytest.raises(ServiceError, match="ParameterInvalid"):
        log_service.create_logstore("under_score", "first")
    assert refusal(client.create_logstore, "made-by-sdk", "No Name") == (400, "LogStoreInfoInvalid")
    assert refusal(client.create_logstore, "made-by-sdk", "third", shard_count=0) == (400, "LogStoreInfoInvalid")

    client.delete_logstore("made-by-sdk", "first")
    assert refusal(client.put_log_raw, "made-by-sdk", "first", log_group()) == (404, "LogStoreNotExist")
    with pytest.raises(ServiceError, match="LogStoreAlreadyExist"):
        log_service.create_logstore("made-by-sdk", "second")
    with pytest.raises(ServiceError, match="LogStoreInfoInvalid"):
        log_service.create_logstore("made-by-sdk", "third", 0)


def test_projects_are_described_listed_and_deleted(log_service, client):
    before = int(time.time())
    client.create_project("described-one", "first words")
    client.create_project("described-two", "")
    client.create_logstore("described-one", "logstore")
    client.update_project("described-one", "other words")
    shown = client.get_project("described-one").get_body()
    assert (shown["projectName"], shown["description"]) == ("described-one", "other words")
    assert (shown["status"], shown["region"]) == ("Normal", log_service.region)
    created, changed = (
        calendar.timegm(time.strptime(shown[name], "%Y-%m-%d %H:%M:%S")) for name in ("createTime", "lastModifyTime")
    )
    assert before <= created <= changed <= time.time()

    listed = client.list_project(project_name_pattern="described")
    assert (listed.get_count(), listed.get_total()) == (2, 2)
    assert [project["projectName"] for project in listed.get_projects()] == ["described-one", "described-two"]
    assert int(listed.get_projects()[0]["createTime"]) == created
    page = client.list_project(offset=1, size=1, project_name_pattern="described")
    assert [project["projectName"] for project in page.get_projects()] == ["described-two"]
    assert (page.get_count(), page.get_total()) == (1, 2)

    client.delete_project("described-one")
    missing = (404, "ProjectNotExist")
    assert refusal(client.get_project, "described-one") == missing
    assert refusal(client.put_log_raw, "described-one", "logstore", log_group()) == missing
    assert refusal(client.delete_project, "described-one") == missing
    assert refusal(client.update_project, "described-one", "") == missing
    assert client.list_project(project_name_pattern="described").get_total() == 1


def test_settings_of_logstores_are_kept(client):
    client.create_logstore(PROJECT, "with-settings", ttl=5, shard_count=2, enable_tracking=True, max_split_shard=8)
    shown = client.get_logstore(PROJECT, "with-settings")
    assert (shown.ttl, shown.shard_count, shown.enable_tracking) == (5, 2, True)
    assert (shown.auto_split, shown.max_split_shard, shown.append_meta) == (True, 8, False)
    client.update_logstore(PROJECT, "with-settings", ttl=9, append_meta=True)
    shown = client.get_logstore(PROJECT, "with-settings")
    assert (shown.ttl, shown.append_meta, shown.enable_tracking, shown.max_split_shard) == (9, True, True, 8)
    for ttl in (0, 3651):
        assert refusal(client.update_logstore, PROJECT, "with-settings", ttl=ttl) == (400, "LogStoreInfoInvalid")
        assert refusal(client.create_logstore, PROJECT, "never-made", ttl=ttl) == (400, "LogStoreInfoInvalid")
    assert refusal(client.update_logstore, PROJECT, "no-logstore", ttl=1) == (404, "LogStoreNotExist")
    assert "never-made" not in client.list_logstore(PROJECT).get_logstores()


def test_queries_are_refused_as_on_a_logstore_without_an_index(client, logstore):
    for query in (client.get_log, client.get_log_all):
        with pytest.raises(LogException, match="IndexConfigNotExist"):
            list(query(PROJECT, logstore, 1700000000, 1700000100, query="*"))
    path = "/logstores/" + logstore
    times = {"from": "1700000000", "to": "1700000100"}

    def ask(**parameters):
        return refusal(client._send, "GET", PROJECT, None, path, parameters, {})

    assert ask(type="log", **times) == ask(type="histogram", **times) == (400, "IndexConfigNotExist")
    assert ask(type="log", **{**times, "to": "1700000000"}) == (400, "InvalidTimeRange")
    assert ask(type="log", **{**times, "from": "-1"}) == (400, "ParameterInvalid")
    assert ask(type="log", offset="-1", **times) == (400, "ParameterInvalid")
    assert ask(type="context_log", **times) == (404, "InvalidAPI")
    assert refusal(client.get_index_config, PROJECT, logstore) == (400, "IndexConfigNotExist")
    assert refusal(client.delete_index, PROJECT, logstore) == (400, "IndexConfigNotExist")
    assert refusal(client.get_index_config, PROJECT, "no-logstore") == (404, "LogStoreNotExist")
    assert refusal(client.get_log, PROJECT, "no-logstore", 1, 2) == (404, "LogStoreNotExist")


def test_pulling_by_time_goes_from_the_first_arrival_to_the_last(log_service, client, logstore, clock):
    for text in "abcd":
        client.put_log_raw(PROJECT, logstore, log_group(text))
        clock[0] += 10
    first = clock[0] - 40

    def pulled(begin, end):
        return [values(page) for page in client.pull_log(PROJECT, logstore, 0, begin, end, batch_size=2)]

    assert pulled(int(first), "end") == [["a", "b"], ["c", "d"]]
    assert pulled(int(first) + 1, int(first) + 30) == [["b", "c"]]
    assert pulled("begin", "begin") == [[]]


def test_every_call_to_what_does_not_exist_says_so(log_service, client, logstore):
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    for project, name, status_and_code in (
        ("no-project", logstore, (404, "ProjectNotExist")),
        (PROJECT, "no-logstore", (404, "LogStoreNotExist")),
    ):
        assert refusal(client.put_log_raw, project, name, log_group()) == status_and_code
        assert refusal(client.pull_logs, project, name, 0, cursor) == status_and_code
        assert refusal(client.get_begin_cursor, project, name, 0) == status_and_code
        assert refusal(client.get_cursor_time, project, name, 0, cursor) == status_and_code
        assert refusal(client.list_shards, project, name) == status_and_code
        assert refusal(client.split_shard, project, name, 0, "40" + "0" * 30) == status_and_code
        assert refusal(client.create_consumer_group, project, name, "group", 10) == status_and_code
        assert refusal(client.list_consumer_group, project, name) == status_and_code
        assert refusal(client.heart_beat, project, name, "group", "consumer") == status_and_code
        with pytest.raises(ServiceError, match=status_and_code[1]):
            log_service.ledger(project, name)
    assert refusal(client.get_project, "no-project") == (404, "ProjectNotExist")
    for call in (client.get_begin_cursor, client.get_end_cursor):
        assert refusal(call, PROJECT, logstore, 3) == (400, "ShardNotExist")
    assert refusal(client.pull_logs, PROJECT, logstore, 3, cursor) == (400, "ShardNotExist")
    assert refusal(client.get_cursor_time, PROJECT, logstore, 3, cursor) == (400, "ShardNotExist")
    assert refusal(client.pull_logs, PROJECT, logstore, "three", cursor) == (400, "ParameterInvalid")
    assert refusal(client.list_machine_group, PROJECT) == (404, "InvalidAPI")


def test_a_host_outside_the_endpoint_is_refused(log_service):
    response = requests.get(
        "http://project.elsewhere.test/logstores", proxies={"http": log_service.environment()["http_proxy"]}
    )
    assert (response.status_code, response.json()["errorCode"]) == (400, "InvalidHost")


# Consumer groups


def test_consumer_groups_are_created_listed_updated_and_deleted(client, logstore):
    client.create_consumer_group(PROJECT, logstore, "first", 10)
    client.create_consumer_group(PROJECT, logstore, "second", 20, in_order=True)

    def listed():
        groups = client.list_consumer_group(PROJECT, logstore).get_consumer_groups()
        return [(group.get_consumer_group_name(), group.get_timeout(), group.is_in_order()) for group in groups]

    assert listed() == [("first", 10, False), ("second", 20, True)]
    client.update_consumer_group(PROJECT, logstore, "first", timeout=30)
    client.update_consumer_group(PROJECT, logstore, "second", in_order=False)
    assert listed() == [("first", 30, False), ("second", 20, False)]
    client.delete_consumer_group(PROJECT, logstore, "first")
    assert listed() == [("second", 20, False)]


def test_consumer_group_calls_that_make_no_sense_are_refused(client, logstore):
    create = client.create_consumer_group
    create(PROJECT, logstore, "a", 10)
    assert refusal(create, PROJECT, logstore, "a", 10) == (400, "ConsumerGroupAlreadyExist")
    create(PROJECT, logstore, "b", 10)
    create(PROJECT, logstore, "c", 10)
    assert refusal(create, PROJECT, logstore, "d", 10) == (403, "ConsumerGroupQuotaExceed")
    client.delete_consumer_group(PROJECT, logstore, "c")
    for name, timeout in (("", 10), ("no spaces", 10), ("x" * 129, 10), ("d", 0), ("d", "10")):
        assert refusal(create, PROJECT, logstore, name, timeout) == (400, "JsonInfoInvalid")
    for name, document in enumerate(({"timeout": 10}, {"order": False}, {"timeout": 10, "order": None})):
        body = json.dumps({"consumerGroup": "d-%d" % name, **document}).encode()
        path = "/logstores/" + logstore + "/consumergroups"
        assert refusal(client._send, "POST", PROJECT, body, path, {}, {}) == (400, "JsonInfoInvalid")
    for timeout, order in (("10", None), (0, None), (None, "true"), (None, None)):
        change = {name: value for name, value in (("timeout", timeout), ("order", order)) if value is not None}
        path = "/logstores/" + logstore + "/consumergroups/a"
        refused = refusal(client._send, "PUT", PROJECT, json.dumps(change).encode(), path, {}, {})
        assert refused == (400, "JsonInfoInvalid")

    missing = (404, "ConsumerGroupNotExist")
    assert refusal(client.update_consumer_group, PROJECT, logstore, "no-group", 10) == missing
    assert refusal(client.delete_consumer_group, PROJECT, logstore, "no-group") == missing
    assert refusal(client.heart_beat, PROJECT, logstore, "no-group", "consumer") == missing
    assert refusal(client.get_check_point, PROJECT, logstore, "no-group") == missing
    cursor = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    assert refusal(client.update_check_point, PROJECT, logstore, "no-group", 0, cursor, "consumer") == missing


def heart_beat(client, logstore, consumer, shards=()):
    return client.heart_beat(PROJECT, logstore, "group", consumer, list(shards)).get_shards()


def test_a_shard_moves_once_its_holder_has_let_go_of_it(log_service, client, two_shards):
    client.create_consumer_group(PROJECT, two_shards, "group", 60)

    def shard(number):
        return log_service.consumer_group(PROJECT, two_shards, "group")["shards"][number]

    assert heart_beat(client, two_shards, "one") == [0, 1]
    assert heart_beat(client, two_shards, "two") == []  # it has to wait
    assert (shard(1)["state"], shard(1)["consumer"]) == ("transfer", "one")
    assert heart_beat(client, two_shards, "one", [0, 1]) == [0]  # told to let go, but still at it
    assert heart_beat(client, two_shards, "two") == []
    assert heart_beat(client, two_shards, "one", [0]) == [0]
    assert shard(1)["state"] == "not_alloc"
    assert heart_beat(client, two_shards, "two") == [1]
    assert (shard(1)["state"], shard(1)["consumer"]) == ("already_alloc", "two")


def test_a_silent_consumer_loses_its_shards(log_service, client, two_shards):
    client.create_consumer_group(PROJECT, two_shards, "group", 3)
    assert heart_beat(client, two_shards, "one") == [0, 1]
    assert list(log_service.consumer_group(PROJECT, two_shards, "group")["consumers"]) == ["one"]
    log_service.wait_for(lambda: heart_beat(client, two_shards, "two") == [0, 1], what="failover")
    group = log_service.consumer_group(PROJECT, two_shards, "group")
    assert list(group["consumers"]) == ["two"] and group["timeout"] == 3 and group["in_order"] is False


def test_a_consumer_that_is_not_known_has_to_let_go_of_its_shards_to_join_anew(log_service, client, two_shards):
    client.create_consumer_group(PROJECT, two_shards, "group", 3)
    assert refusal(heart_beat, client, two_shards, "one", [0, 1]) == (400, "NotExistConsumerWithBody")
    assert heart_beat(client, two_shards, "one") == [0, 1]
    log_service.wait_for(
        lambda: not log_service.consumer_group(PROJECT, two_shards, "group")["consumers"], what="its removal"
    )
    assert refusal(heart_beat, client, two_shards, "one", [0, 1]) == (400, "NotExistConsumerWithBody")
    assert heart_beat(client, two_shards, "one") == [0, 1]


def test_bad_heartbeats_are_refused(client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    for consumer in ("", "two words", "ü", "x" * 129):
        assert refusal(heart_beat, client, logstore, consumer) == (400, "ParameterInvalid")
    for shards in (["one"], [None]):
        assert refusal(heart_beat, client, logstore, "consumer", shards) == (400, "PostBodyInvalid")
    path = "/logstores/" + logstore + "/consumergroups/group"
    parameters = {"type": "heartbeat", "consumer": "consumer"}
    for body in (b"{}", b"[1", b"\xff"):
        assert refusal(client._send, "POST", PROJECT, body, path, parameters, {}) == (400, "PostBodyInvalid")
    assert refusal(client._send, "POST", PROJECT, b"[]", path, {"type": "heartbeat"}, {}) == (400, "MissingParameter")


def test_check_points_are_saved_and_show_the_lag(log_service, client, two_shards):
    log_service.put(PROJECT, two_shards, [log_group().SerializeToString()] * 5, shard=1)
    client.create_consumer_group(PROJECT, two_shards, "group", 60)
    heart_beat(client, two_shards, "one")
    begin = client.get_begin_cursor(PROJECT, two_shards, 1).get_cursor()
    third = client.pull_logs(PROJECT, two_shards, 1, begin, 2).get_next_cursor()
    assert log_service.lag(PROJECT, two_shards, "group") == 5

    before = time.time()
    client.update_check_point(PROJECT, two_shards, "group", 1, third, "one", force_success=False)
    check_points = client.get_check_point(PROJECT, two_shards, "group").get_consumer_group_check_points()
    update_time = check_points[1].pop("updateTime")
    assert before <= update_time / 1e6 <= time.time()
    assert check_points == [
        {"shard": 0, "checkpoint": "", "updateTime": 0, "consumer": ""},
        {"shard": 1, "checkpoint": third, "consumer": "one"},
    ]
    (of_one,) = client.get_check_point(PROJECT, two_shards, "group", 1).get_consumer_group_check_points()
    assert of_one["checkpoint"] == third
    assert client.get_check_point(PROJECT, two_shards, "group", 7).get_consumer_group_check_points() == []
    saving = refusal(client.update_check_point, PROJECT, two_shards, "group", 7, third, "one")
    assert saving == (404, "ShardNotExist")

    shards = log_service.consumer_group(PROJECT, two_shards, "group")["shards"]
    assert (shards[0]["checkpoint"], shards[0]["next"]) == ("", None)
    assert (shards[1]["checkpoint"], shards[1]["next"]) == (third, 2)
    assert log_service.lag(PROJECT, two_shards, "group") == 3
    log_service.expire(PROJECT, two_shards, 1, 4)
    assert log_service.lag(PROJECT, two_shards, "group") == 1


def test_only_the_holder_saves_check_points_unless_it_is_forced(log_service, client, two_shards):
    client.create_consumer_group(PROJECT, two_shards, "group", 60)
    cursor = client.get_begin_cursor(PROJECT, two_shards, 1).get_cursor()

    def save(consumer, force):
        client.update_check_point(PROJECT, two_shards, "group", 1, cursor, consumer, force)

    def saved_by():
        return client.get_check_point(PROJECT, two_shards, "group", 1).get_consumer_group_check_points()[0]["consumer"]

    assert refusal(save, "one", False) == (404, "ConsumerNotExsit")
    heart_beat(client, two_shards, "one")
    heart_beat(client, two_shards, "two")
    assert refusal(save, "two", False) == (400, "ConsumerNotMatch")
    assert log_service.consumer_group(PROJECT, two_shards, "group")["shards"][1]["state"] == "transfer"
    save("one", False)  # that is what the state of transfer is for
    assert saved_by() == "one"
    save("two", True)
    assert saved_by() == "two"
    save("stranger", True)
    assert saved_by() == "stranger"
    save("", True)
    assert refusal(save, "", False) == (400, "ParameterInvalid")


def test_a_consumer_that_is_not_known_is_spelt_as_ordered():
    with LocalLogService(unknown_consumer="ConsumerNotExist") as documented:
        documented.create_logstore(PROJECT, "source")
        client = documented.client()
        client.create_consumer_group(PROJECT, "source", "group", 60)
        cursor = client.get_begin_cursor(PROJECT, "source", 0).get_cursor()
        save = client.update_check_point
        assert refusal(save, PROJECT, "source", "group", 0, cursor, "one", False) == (404, "ConsumerNotExist")


def test_by_default_a_logstore_has_30_consumer_groups_at_most():
    with LocalLogService() as service:
        service.create_logstore(PROJECT, "source")
        client = service.client()
        for number in range(30):
            client.create_consumer_group(PROJECT, "source", "group-%d" % number, 60)
        refused = refusal(client.create_consumer_group, PROJECT, "source", "one-more", 60)
        assert refused == (403, "ConsumerGroupQuotaExceed")


def test_what_is_named_in_vain_is_named_in_the_message(client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    with pytest.raises(LogException, match="already exist: group"):
        client.create_consumer_group(PROJECT, logstore, "group", 60)
    with pytest.raises(LogException, match="not exist: another"):
        client.heart_beat(PROJECT, logstore, "another", "one")
    with pytest.raises(LogException, match="The Project does not exist : no-project"):
        client.list_shards("no-project", logstore)


@pytest.mark.parametrize("check_point", ["", "***", "bm8gbnVtYmVy", "MA=="])
def test_check_points_that_are_no_cursors_of_the_shard_are_refused(client, logstore, check_point):
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    refused = refusal(client.update_check_point, PROJECT, logstore, "group", 0, check_point, "one")
    assert refused == (400, "InvalidShardCheckPoint")


def test_a_check_point_may_have_expired(log_service, client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    old = client.get_begin_cursor(PROJECT, logstore, 0).get_cursor()
    log_service.put(PROJECT, logstore, [log_group().SerializeToString()] * 3)
    log_service.expire(PROJECT, logstore, 0, 2)
    client.update_check_point(PROJECT, logstore, "group", 0, old, "one")
    assert log_service.consumer_group(PROJECT, logstore, "group")["shards"][0]["next"] == 0
    assert log_service.lag(PROJECT, logstore, "group") == 1


def test_groups_in_order_wait_for_a_split_shard_to_be_finished(log_service, client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60, in_order=True)
    log_service.put(PROJECT, logstore, [log_group().SerializeToString()] * 2)
    log_service.split_shard(PROJECT, logstore, 0)

    def states():
        shards = log_service.consumer_group(PROJECT, logstore, "group")["shards"]
        return [shards[number]["state"] for number in sorted(shards)]

    assert heart_beat(client, logstore, "one") == [0]
    assert states() == ["already_alloc", "wait", "wait"]
    end = client.get_end_cursor(PROJECT, logstore, 0).get_cursor()
    client.update_check_point(PROJECT, logstore, "group", 0, end, "one", False)
    assert heart_beat(client, logstore, "one", [0]) == [1, 2]
    assert states() == ["over", "already_alloc", "already_alloc"]


def test_groups_in_order_wait_for_both_parents_of_a_merge_and_for_shards_split_later(log_service, client, two_shards):
    client.create_consumer_group(PROJECT, two_shards, "group", 60, in_order=True)
    for shard in (0, 1):
        log_service.put(PROJECT, two_shards, [log_group().SerializeToString()], shard=shard)
    held = []

    def beat():
        held[:] = heart_beat(client, two_shards, "one", held)
        return held

    def finish(shard):
        end = client.get_end_cursor(PROJECT, two_shards, shard).get_cursor()
        client.update_check_point(PROJECT, two_shards, "group", shard, end, "one", False)

    def states():
        shards = log_service.consumer_group(PROJECT, two_shards, "group")["shards"]
        return " ".join(shards[number]["state"] for number in sorted(shards))

    assert beat() == [0, 1]
    assert log_service.merge_shards(PROJECT, two_shards, 0) == 2
    log_service.put(PROJECT, two_shards, [log_group().SerializeToString()], shard=2)
    assert beat() == [0, 1] and states() == "already_alloc already_alloc wait"
    finish(0)
    assert beat() == [1] and states() == "over already_alloc wait"

    client.split_shard(PROJECT, two_shards, 2, "80" + "0" * 30)  # its children come later still
    assert beat() == [1] and states() == "over already_alloc wait wait wait"
    finish(1)
    assert beat() == [2] and states() == "over over already_alloc wait wait"
    finish(2)
    assert beat() == [3, 4] and states() == "over over over already_alloc already_alloc"

    # A log that arrives does not change that, and a checkpoint that is set back opens the shard again.
    log_service.put(PROJECT, two_shards, [log_group().SerializeToString()], shard=3)
    begin = client.get_begin_cursor(PROJECT, two_shards, 2).get_cursor()
    client.update_check_point(PROJECT, two_shards, "group", 2, begin, "one")
    assert beat() == [2, 3, 4]


def test_a_parent_whose_logs_have_expired_is_over(log_service, client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60, in_order=True)
    log_service.put(PROJECT, logstore, [log_group().SerializeToString()] * 2)
    log_service.split_shard(PROJECT, logstore, 0)
    assert heart_beat(client, logstore, "one") == [0]
    log_service.expire(PROJECT, logstore, 0, 2)
    assert heart_beat(client, logstore, "one", [0]) == [1, 2]


def test_groups_without_order_take_parents_and_children_at_once(log_service, client, logstore):
    client.create_consumer_group(PROJECT, logstore, "group", 60)
    log_service.put(PROJECT, logstore, [log_group().SerializeToString()] * 2)
    log_service.split_shard(PROJECT, logstore, 0)
    assert heart_beat(client, logstore, "one") == [0, 1, 2]


# What every answer has, and what is counted


def test_request_ids_are_unique_and_errors_carry_them_too(client, logstore):
    identifiers = [client.list_shards(PROJECT, logstore).get_request_id() for _ in range(5)]
    for _ in range(5):
        with pytest.raises(LogException) as raised:
            client.list_shards(PROJECT, "no-logstore")
        identifiers.append(raised.value.get_request_id())
    assert len(set(identifiers)) == 10 and all(len(identifier) == 24 for identifier in identifiers)


def test_a_bug_in_the_service_is_an_internal_server_error(log_service, client, logstore, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(logclient, "time", SimpleNamespace(sleep=lambda seconds: None))  # it retries ten times
    monkeypatch.setitem(actions.ACTIONS, "ListShards", fails)
    assert refusal(client.list_shards, PROJECT, logstore) == (500, "InternalServerError")
    assert "a bug" in caplog.text


def test_calls_are_counted_by_action_and_logstore(client):
    with LocalLogService() as counted:
        counted.create_logstore(PROJECT, "target")
        other = counted.client()
        for _ in range(3):
            other.put_log_raw(PROJECT, "target", log_group())
        other.list_shards(PROJECT, "target")
        refusal(other.list_shards, PROJECT, "missing")
        assert counted.calls() == {"PutLogs": 3, "ListShards": 2}
        assert (counted.calls("PutLogs"), counted.calls("PullLogs"), counted.calls("*")) == (3, 0, 5)
        assert counted.calls_by_logstore["ListShards", PROJECT, "missing"] == 1
        with pytest.raises(ValueError):
            counted.calls("PutLog")


def test_the_order_of_the_ledger_is_that_of_arrival_whichever_way_they_came(log_service, client, two_shards):
    fed = log_service.put(PROJECT, two_shards, (log_group(text).SerializeToString() for text in "ab"), shard=1)
    client.put_log_raw(PROJECT, two_shards, log_group("c"))
    log_service.put(PROJECT, two_shards, [log_group("d").SerializeToString()])
    ledger = log_service.ledger(PROJECT, two_shards)
    assert [entry.parse().Logs[0].Contents[0].Value for entry in ledger] == list("abcd")
    assert ledger[:2] == fed and [entry.shard for entry in fed] == [1, 1]
    sequences = [entry.sequence for entry in ledger]
    assert sequences == sorted(set(sequences))


def test_the_table_of_calls_names_each_of_them():
    """What it says of them is for people to keep true."""
    text = (Path(actions.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Calls")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert sorted(row[0] for row in rows[1:]) == sorted(actions.ACTIONS)
    assert all(len(line.split("|")) == 6 for line in table.splitlines() if line.startswith("|"))


def test_waiting_in_vain_names_what_was_waited_for(log_service):
    log_service.wait_for(lambda: True, timeout=0.0)
    with pytest.raises(AssertionError, match="the impossible"):
        log_service.wait_for(lambda: False, timeout=0.01, what="the impossible")
