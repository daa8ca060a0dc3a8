"""Faults that play something in between, seen from a bare connection: what is sent, to the byte."""

import http.client
import socket
from contextlib import contextmanager, suppress
from urllib.parse import urlencode

import lz4.block
import pytest
from aliyun.log.proto import LogGroup, LogGroupList
from local_log_service import ForeignAnswer, LocalLogService, mangling

pytestmark = pytest.mark.quick

PROJECT = "foreign-project"
SOURCE = "source"
TARGET = "target"
LIMIT = 60.0  # seconds that anything may take on a slow machine
GROUP = LogGroup(Topic="nginx", Source="10.0.0.1")
PAGE = b"<html>We are back soon</html>"


@pytest.fixture(scope="module")
def running():
    with LocalLogService() as service:
        service.create_logstore(PROJECT, SOURCE, 2)
        service.create_logstore(PROJECT, TARGET)
        service.put(PROJECT, SOURCE, [GROUP.SerializeToString()] * 3, shard=0)
        service.put(PROJECT, SOURCE, [GROUP.SerializeToString()] * 5, shard=1)
        yield service


@pytest.fixture
def log_service(running):
    yield running
    running.clear_faults()


@pytest.fixture
def connection(log_service):
    """A connection that is not made anew when it was closed."""
    made = http.client.HTTPConnection("127.0.0.1", log_service.port, timeout=LIMIT)
    made.connect()
    made.auto_open = 0
    yield made
    made.close()


def signed(log_service, call):
    """What the SDK would send for a call: (method, target, body, headers)."""
    client = log_service.client()
    sent = []
    client._sendRequest = lambda *request: sent.append(request) or (None, {})
    with suppress(AttributeError, TypeError, ValueError):  # it gets no answer to understand
        call(client)
    method, url, parameters, body, headers, _ = sent[0]
    path = "/" + url.split("/", 3)[3]
    return method, path + ("?" + urlencode(parameters) if parameters else ""), body, headers


def put(log_service, connection):
    """Put over the connection; return the whole answer."""
    connection.request(*signed(log_service, lambda client: client.put_log_raw(PROJECT, TARGET, GROUP)))
    return Received(connection.getresponse())


def pull(log_service, connection, shard=1):
    cursor = log_service.client().get_begin_cursor(PROJECT, SOURCE, shard).get_cursor()
    connection.request(*signed(log_service, lambda client: client.pull_logs(PROJECT, SOURCE, shard, cursor)))
    return Received(connection.getresponse())


class Received:
    def __init__(self, response):
        self.body = response.read()
        self.status = response.status
        self.headers = {name.lower(): text for name, text in response.getheaders()}
        self.request_id = self.headers.get("x-log-requestid")

    def raw(self):
        """The LogGroupList of a pull."""
        return lz4.block.decompress(self.body, uncompressed_size=int(self.headers["x-log-bodyrawsize"]))


@contextmanager
def everything_sent(log_service, call):
    """The reading side of a connection over which one call was sent that asks for it to be closed after it."""
    method, target, body, headers = signed(log_service, call)
    head = ["%s %s HTTP/1.1" % (method, target), "Connection: close", "Content-Length: %d" % len(body or b"")]
    head += ["%s: %s" % pair for pair in headers.items() if pair[0].lower() != "content-length"]
    with socket.create_connection(("127.0.0.1", log_service.port), LIMIT) as connection:
        connection.sendall("\r\n".join(head + ["", ""]).encode() + (body or b""))
        yield connection.makefile("rb")


def taken(log_service):
    return len(log_service.ledger(PROJECT, TARGET))


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize("request_id", [False, True])
@pytest.mark.parametrize(
    "status, headers, body",
    [
        (200, {}, b""),
        (200, {"Content-Type": "application/json"}, b"{}"),
        (200, {"Content-Type": "application/json"}, b"[]"),
        (200, {"Content-Type": "application/json"}, b'{"status":"ok"}'),
        (200, {}, b"null"),
        (200, {"Content-Type": "text/html", "Server": "gateway"}, PAGE),
        (200, {}, bytes(range(256)) * 1000),
        (302, {"Location": "http://portal.test/login"}, b""),
        (413, {"Content-Type": "text/html"}, PAGE),
        (499, {}, b""),
        (503, {"Retry-After": "120"}, PAGE),
        (520, {}, b"an unknown status"),
    ],
)
def test_a_foreign_answer_is_sent_to_the_byte(log_service, connection, status, headers, body, request_id, takes_effect):
    before = taken(log_service)
    answer = ForeignAnswer(status, headers, body, request_id)
    with log_service.add_fault("PutLogs", answer=answer, takes_effect=takes_effect) as fault:
        received = put(log_service, connection)
    assert (received.status, received.body) == (status, body)
    assert bool(received.request_id) == request_id
    named = {name.lower(): text for name, text in headers.items()}
    assert {name for name in received.headers if name != "x-log-requestid"} == {*named, "content-length"}
    assert named.items() <= received.headers.items()
    assert (fault.hits, taken(log_service)) == (1, before + takes_effect)
    assert put(log_service, connection).status == 200  # over the same connection
    assert taken(log_service) == before + takes_effect + 1


@pytest.mark.parametrize("status", [204, 304])
def test_a_foreign_answer_without_a_body_announces_none(log_service, connection, status):
    with log_service.add_fault("PutLogs", answer=ForeignAnswer(status)):
        received = put(log_service, connection)
    assert (received.status, received.headers) == (status, {})
    assert put(log_service, connection).status == 200


def test_a_foreign_answer_may_be_framed_otherwise(log_service, connection):
    chunked = ForeignAnswer(200, {"Transfer-Encoding": "chunked"}, b"2\r\n{}\r\n0\r\n\r\n")
    with log_service.add_fault("PutLogs", answer=chunked):
        assert put(log_service, connection).body == b"{}"
    with log_service.add_fault("PutLogs", answer=ForeignAnswer(200, {"Connection": "close", "Content-Length": "0"})):
        assert put(log_service, connection).status == 200
    with pytest.raises(http.client.NotConnected):
        put(log_service, connection)


def test_a_foreign_answer_comes_whatever_the_service_would_have_said(log_service, connection):
    foreign = ForeignAnswer(200, {}, b"ok")
    for takes_effect in (False, True):
        with log_service.add_fault("PutLogs", project=PROJECT, answer=foreign, takes_effect=takes_effect):
            connection.request("POST", "/logstores/%s/shards/lb" % TARGET, b"", {"Host": PROJECT + ".nowhere.test"})
            assert connection.getresponse().read().startswith(b'{"errorCode": "InvalidHost"')
            host = PROJECT + "." + log_service.endpoint.partition("://")[2]
            connection.request("POST", "/logstores/%s/shards/lb" % TARGET, b"", {"Host": host})  # not signed
            assert connection.getresponse().read() == b"ok"


def test_a_share_of_calls_gets_a_foreign_answer(log_service, connection):
    with log_service.add_fault("PutLogs", logstore=TARGET, answer=ForeignAnswer(302), share=0.5) as fault:
        assert [put(log_service, connection).status for _ in range(4)] == [302, 200, 302, 200]
        assert pull(log_service, connection).status == 200
    assert fault.hits == 2


def test_a_connection_is_closed_after_the_answer_without_a_word(log_service, connection):
    before = taken(log_service)
    with log_service.add_fault("PutLogs", close=True):
        received = put(log_service, connection)
        assert (received.status, received.body, "connection" in received.headers) == (200, b"", False)
        assert received.request_id
        assert connection.sock.recv(1) == b""
    assert taken(log_service) == before + 1


@pytest.mark.parametrize("status, headers", [(100, {}), (103, {"Link": "</style.css>"})])
def test_an_interim_answer_comes_before_the_right_one(log_service, status, headers):
    interim = ForeignAnswer(status, headers)
    with log_service.add_fault("PutLogs", interim=interim) as fault:
        with everything_sent(log_service, lambda client: client.put_log_raw(PROJECT, TARGET, GROUP)) as received:
            assert received.readline().startswith(b"HTTP/1.1 %d " % status)
            for name, text in headers.items():
                assert received.readline() == ("%s: %s\r\n" % (name, text)).encode()
            assert received.readline() == b"\r\n"
            assert received.readline() == b"HTTP/1.1 200 OK\r\n"
    assert fault.hits == 1


def test_a_stray_answer_lies_on_the_connection_before_the_next_request(log_service, connection):
    """So that the next call, which is refused, seems to be taken."""
    before = taken(log_service)
    with log_service.add_fault("PutLogs", stray=ForeignAnswer(request_id=True), stray_pause=0.05, share=0.5):
        first = put(log_service, connection)
        assert connection.sock.recv(1, socket.MSG_PEEK) == b"H"
        with log_service.add_fault("PutLogs", code="ShardWriteQuotaExceed") as fault:
            second = put(log_service, connection)
            log_service.wait_for(lambda: fault.hits == 1, LIMIT, "the refusal")
    assert (first.status, second.status) == (200, 200) and first.request_id != second.request_id
    assert taken(log_service) == before + 1


def test_a_stray_answer_comes_with_the_segment_of_the_right_one(log_service):
    log_service.add_fault("PutLogs", stray=ForeignAnswer(200, {}, b"stray", request_id=True))
    with everything_sent(log_service, lambda client: client.put_log_raw(PROJECT, TARGET, GROUP)) as received:
        first = received.raw.read(65536)
    assert first.count(b"HTTP/1.1 200 OK") == first.count(b"x-log-requestid: ") == 2
    assert first.endswith(b"\r\n\r\nstray")


def test_what_is_sent_with_an_answer_goes_with_errors_and_foreign_answers_too(log_service):
    stray = ForeignAnswer(200, {}, b"stray")
    log_service.add_fault("PutLogs", stray=stray, interim=ForeignAnswer(103), close=True)
    for other in ({"code": "WriteQuotaExceed"}, {"answer": ForeignAnswer(403, {}, PAGE)}):
        with log_service.add_fault("PutLogs", **other):
            with everything_sent(log_service, lambda client: client.put_log_raw(PROJECT, TARGET, GROUP)) as received:
                answers = received.read()
        assert answers.index(b"HTTP/1.1 103 ") < answers.index(b"HTTP/1.1 403 ") < answers.index(b"HTTP/1.1 200 ")
        assert answers.endswith(b"\r\n\r\nstray")


@pytest.mark.parametrize("missing", [1, 10, 10**6])
def test_a_body_is_cut_short(log_service, connection, missing):
    whole = pull(log_service, connection).body
    with log_service.add_fault("PullLogs", cut_short=missing):
        with pytest.raises(http.client.IncompleteRead) as raised:
            pull(log_service, connection)
    assert raised.value.partial == whole[: max(0, len(whole) - missing)]
    assert raised.value.expected == missing


def test_an_answer_without_a_body_is_cut_short_by_announcing_one(log_service, connection):
    before = taken(log_service)
    with log_service.add_fault("PutLogs", cut_short=7):
        with pytest.raises(http.client.IncompleteRead) as raised:
            put(log_service, connection)
    assert (raised.value.partial, raised.value.expected) == (b"", 7)
    assert taken(log_service) == before + 1


def test_a_head_ends_within_the_value_of_a_header(log_service):
    log_service.add_fault("PullLogs", cut_head="X-Log-Cursor")
    cursor = log_service.client().get_begin_cursor(PROJECT, SOURCE, 1).get_cursor()
    with everything_sent(log_service, lambda client: client.pull_logs(PROJECT, SOURCE, 1, cursor)) as received:
        head = received.read()
    name, _, value = head.rpartition(b"x-log-cursor: ")
    assert name.startswith(b"HTTP/1.1 200 OK\r\n") and 0 < len(value) < len(cursor) and b"\r\n" not in value


@pytest.mark.parametrize("endless, start", [("chunks", b"HTTP/1.1 200 OK\r\n"), ("interims", b"HTTP/1.1 103 ")])
def test_an_answer_without_end_goes_on_until_its_client_has_had_enough(log_service, endless, start):
    log_service.add_fault("PutLogs", endless=endless)
    before = taken(log_service)
    with everything_sent(log_service, lambda client: client.put_log_raw(PROJECT, TARGET, GROUP)) as received:
        assert received.read(3000000).startswith(start)
    log_service.clear_faults()
    assert taken(log_service) == before + 1


# Right answers that were mangled


def test_a_pull_may_announce_or_bring_what_it_does_not(log_service, connection):
    right = pull(log_service, connection)
    with log_service.add_fault("PullLogs", mangle=mangling.announcing(count="7", bodyrawsize="0")):
        wrong = pull(log_service, connection)
    assert (wrong.headers["x-log-count"], wrong.headers["x-log-bodyrawsize"]) == ("7", "0") and wrong.body == right.body
    one = LogGroupList(LogGroups=[GROUP]).SerializeToString()
    with log_service.add_fault("PullLogs", mangle=mangling.bringing(lambda groups: groups[:1])):
        wrong = pull(log_service, connection)
    assert (wrong.body, wrong.headers["x-log-bodyrawsize"], wrong.headers["x-log-count"]) == (one, str(len(one)), "5")
    with log_service.add_fault("PullLogs", mangle=mangling.broken_off):
        assert pull(log_service, connection).body == right.raw()[:-3]


def test_a_checkpoint_may_be_any_text(log_service):
    client = log_service.client()
    client.create_consumer_group(PROJECT, SOURCE, "group", 20)
    log_service.set_checkpoint(PROJECT, SOURCE, "group", 1, "a text", "a tool")
    with log_service.add_fault("GetCheckPoint", mangle=mangling.checkpoints(checkpoint="another")):
        first, second = client.get_check_point(PROJECT, SOURCE, "group").get_consumer_group_check_points()
    assert first["checkpoint"] == "another"
    assert (second["checkpoint"], second["consumer"]) == ("a text", "a tool") and second["updateTime"] > 0
    client.delete_consumer_group(PROJECT, SOURCE, "group")


def test_a_pull_may_announce_another_size(log_service, connection):
    right = pull(log_service, connection)
    with log_service.add_fault("PullLogs", mangle=mangling.wrong_raw_size):
        wrong = pull(log_service, connection)
    assert wrong.body == right.body and wrong.request_id
    assert int(wrong.headers["x-log-bodyrawsize"]) == int(right.headers["x-log-bodyrawsize"]) + 1


def test_a_pull_may_not_be_decodable(log_service, connection):
    with log_service.add_fault("PullLogs", mangle=mangling.undecodable):
        received = pull(log_service, connection)
    assert (received.status, received.headers["x-log-compresstype"]) == (200, "lz4")
    with pytest.raises(lz4.block.LZ4BlockError):
        received.raw()


def test_a_pull_may_come_in_an_unknown_compression_or_lack_a_header(log_service, connection):
    with log_service.add_fault("PullLogs", mangle=mangling.unknown_compression):
        assert pull(log_service, connection).headers["x-log-compresstype"] == "snappy"
    with log_service.add_fault("PullLogs", mangle=mangling.without("x-log-cursor")):
        received = pull(log_service, connection)
    assert "x-log-cursor" not in received.headers and "x-log-count" in received.headers


def test_the_answer_to_an_earlier_call_comes_in_the_place_of_each(log_service, connection):
    before = taken(log_service)
    with log_service.add_fault("PutLogs", mangle=mangling.Earlier()):
        identifiers = [put(log_service, connection).request_id for _ in range(3)]
    entries = [entry.request_id for entry in log_service.ledger(PROJECT, TARGET)[before:]]
    assert identifiers == [entries[0], entries[0], entries[1]]


def test_the_answer_that_another_shard_had_comes_in_the_place_of_each(log_service, connection):
    right = {shard: pull(log_service, connection, shard) for shard in (0, 1)}
    with log_service.add_fault("PullLogs", mangle=mangling.OfAnotherShard()):
        counts = [pull(log_service, connection, shard).headers["x-log-count"] for shard in (0, 0, 1, 0)]
    assert (right[0].headers["x-log-count"], right[1].headers["x-log-count"]) == ("3", "5")
    assert counts == ["3", "3", "3", "5"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"answer": ForeignAnswer(), "status": 403},
        {"answer": ForeignAnswer(), "cut": "after"},
        {"answer": ForeignAnswer(), "mangle": mangling.undecodable},
        {"takes_effect": True, "status": 403},
        {"interim": ForeignAnswer(200)},
        {"cut_short": -1},
        {"endless": "body"},
        {"stray_pause": 0.1, "status": 403},
    ],
)
def test_faults_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError):
        LocalLogService().add_fault("PutLogs", **arguments)
