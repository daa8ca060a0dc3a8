"""Whatever is sent to the local Log Service, it answers in the service's form, and no exception of its own gets out."""

import base64
import hashlib
import hmac
import http.client
import json
import logging
import os
import socket
from email.utils import formatdate
from urllib.parse import quote

import lz4.block
import pytest
from aliyun.log.proto import Log, LogGroup, LogTag
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_log_service import LocalLogService
from local_log_service.wire_format import validate_log_group

pytestmark = pytest.mark.quick

PROJECT = "fuzzed-project"
LOGSTORE = "fuzzed"
GROUP = "group"
LIMIT = 20.0  # seconds in which an answer has to come, on a slow machine
EXAMPLES = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")))
EXAMPLES_OF_EACH = settings(max_examples=EXAMPLES.max_examples // 4)


class Complaints(logging.Handler):
    """Keeps what the service and aiohttp log: they have nothing to say, whatever is sent.

    Of asyncio, the exceptions only: what is left of other tests in this process may be complained of at any time.
    """

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        source = record.name.partition(".")[0]
        if source in ("local_log_service", "aiohttp") or (source == "asyncio" and record.exc_info):
            self.texts.append(self.format(record))


@pytest.fixture(scope="module")
def running():
    with LocalLogService(max_put_bytes=5000) as service:
        service.create_logstore(PROJECT, LOGSTORE, 2)
        service.client().create_consumer_group(PROJECT, LOGSTORE, GROUP, 60)
        yield service


@pytest.fixture
def log_service(running):
    complaints = Complaints()
    root = logging.getLogger()
    root.addHandler(complaints)
    yield running
    root.removeHandler(complaints)
    assert complaints.texts == []


def check(status, headers, body):
    """Check the form of an answer; return the code of an error, None of a success."""
    assert len(headers["x-log-requestid"]) == 24
    if status == 200:
        return None
    document = json.loads(body.decode("ascii"))
    assert set(document) == {"errorCode", "errorMessage"} and document["errorCode"] and document["errorMessage"]
    assert headers["content-type"] == "application/json"
    assert 400 <= status < 500, document
    return document["errorCode"]


def signed(method, path, query, headers, body, host):
    """The headers with a signature of version 1, made here and not by the SDK, which would refuse much of this."""
    headers = {name.lower(): value for name, value in headers.items()}
    headers.update({"date": formatdate(usegmt=True), "host": host, "x-log-signaturemethod": "hmac-sha1"})
    if body:
        headers["content-md5"] = hashlib.md5(body).hexdigest().upper()  # noqa: S324 - the protocol's
    lines = [method, headers.get("content-md5", ""), headers.get("content-type", ""), headers["date"]]
    lines += ["%s:%s" % (name, headers[name]) for name in sorted(headers) if name.startswith(("x-log-", "x-acs-"))]
    lines.append(path + "?" * bool(query) + "&".join("%s=%s" % pair for pair in sorted(query.items())))
    digest = hmac.new(b"local-secret", "\n".join(lines).encode("utf-8"), hashlib.sha1).digest()
    headers["authorization"] = "LOG local-id:" + base64.b64encode(digest).decode()
    return headers


def send(service, method, path, query, headers, body, sign=True, project=PROJECT):
    """Send a request; return status, headers and body of the answer."""
    host = "%s.local-log-service.test" % project if project else "local-log-service.test"
    if sign:
        headers = signed(method, path, query, headers, body, host)
    target = quote(path, safe="/~") + "?" * bool(query)
    target += "&".join("%s=%s" % (quote(name, safe=""), quote(value, safe="")) for name, value in query.items())
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=LIMIT)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        sent = {"host": host, **headers, "content-length": str(len(body))}
        for name, value in sent.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


# ---- requests of the right form with anything in them

# Characters that a request can bear: no surrogates, which have no UTF-8, nor ends of lines.
plain = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12)
printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
names = st.sampled_from(["logstores", "shards", "consumergroups", "index", "logs", LOGSTORE, GROUP, "lb", "route", "0"])
segments = st.one_of(names, st.integers(-1, 3).map(str), plain.map(lambda text: text.replace("/", "").strip()))
known_paths = st.sampled_from(
    ["/"]
    + ["/logstores" + rest for rest in ("", "/fuzzed", "/fuzzed/index", "/fuzzed/logs", "/fuzzed/shards")]
    + ["/logstores/fuzzed/shards/" + shard for shard in ("0", "1", "7", "lb", "route")]
    + ["/logstores/fuzzed/consumergroups", "/logstores/fuzzed/consumergroups/group"]
)
paths = st.one_of(known_paths, st.lists(segments, max_size=6).map(lambda parts: "/" + "/".join(parts)))
methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS"])
numbers = st.one_of(st.integers(-2, 1002).map(str), st.sampled_from(["", "1e3", "²", "9" * 30, "begin", "end"]))
cursors = st.one_of(numbers, st.integers(0, 1 << 70).map(lambda n: base64.b64encode(b"%d" % n).decode()))
values = st.one_of(numbers, cursors, plain, st.sampled_from(["true", "False", "f" * 32, GROUP]))
queries = st.dictionaries(
    st.one_of(
        st.sampled_from(["cursor", "end_cursor", "count", "from", "to", "key", "shard", "consumer", "forceSuccess"]),
        st.sampled_from(["offset", "size", "logstoreName", "query", "processor"]),
        plain.filter(bool),
    ),
    values,
    max_size=4,
)
calls = st.sampled_from(
    ["log", "logs", "cursor", "cursor_time", "histogram", "heartbeat", "checkpoint", "split", "merge"]
)
kinds = st.one_of(
    st.just({}),
    st.builds(lambda name, kind: {name: kind}, st.sampled_from(["type", "action"]), st.one_of(calls, values)),
)
header_names = st.one_of(
    st.sampled_from(["x-log-bodyrawsize", "x-log-compresstype", "x-acs-security-token", "accept-encoding"]),
    st.sampled_from(["content-type", "content-encoding", "content-md5", "x-log-date", "x-log-hashkey", "expect"]),
    printable.map(lambda text: "x-log-" + "".join(filter(str.isalnum, text))),
)
header_values = st.one_of(
    numbers, printable, st.sampled_from(["lz4", "deflate", "gzip", "zstd", "100-continue", "application/json"])
).map(str.strip)
headers_of_requests = st.dictionaries(header_names, header_values, max_size=4)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), cursors),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(plain, inner, max_size=3)),
    max_leaves=6,
)
documents = st.one_of(
    json_values,
    st.dictionaries(
        st.sampled_from(
            ["logstoreName", "projectName", "ttl", "shardCount", "consumerGroup", "timeout", "order", "shard"]
            + ["checkpoint", "from", "to", "description", "mode", "autoSplit"]
        ),
        st.one_of(json_values, st.sampled_from(["a-name", 1, 30, True])),
    ),
)
bodies = st.one_of(st.just(b""), st.binary(max_size=200), documents.map(lambda document: json.dumps(document).encode()))


@EXAMPLES
@given(
    method=methods,
    path=paths,
    kind=kinds,
    query=queries,
    headers=headers_of_requests,
    body=bodies,
    sign=st.booleans(),
    project=st.sampled_from([PROJECT, PROJECT, PROJECT, "", "no-project", "täglich"]),
)
@example("POST", "/logstores", {}, {}, {}, b"[" * 50000, True, PROJECT)
@example("POST", "/logstores/fuzzed/shards/lb", {}, {}, {"content-encoding": "gzip"}, b"no gzip", True, PROJECT)
@example("POST", "/logstores/fuzzed/consumergroups", {}, {}, {}, b'{"timeout": NaN}', True, PROJECT)
@example("GET", "/logstores/fuzzed", {"type": "context_log"}, {}, {}, b"", True, PROJECT)
def test_any_request_is_answered(log_service, method, path, kind, query, headers, body, sign, project):
    if method in ("DELETE", "PUT") and path.strip("/") in ("", "logstores/" + LOGSTORE):
        project = "no-project"  # what the other examples work on is to stay
    status, answered, content = send(log_service, method, path, {**query, **kind}, headers, body, sign, project)
    if method == "HEAD":
        assert status in (400, 401, 404, 405) and len(answered["x-log-requestid"]) == 24
    else:
        code = check(status, answered, content)
        assert sign or status != 200, "no signature was asked for"
        assert code != "InternalServerError"


# ---- calls of the API with anything in their parameters and bodies

SHARD = "/logstores/fuzzed/shards/0"
OF_GROUP = "/logstores/fuzzed/consumergroups/group"
CURSOR = base64.b64encode(b"%d" % (1 << 40)).decode()
API_CALLS = [  # method, path, parameters, document: each one that the service would take, but for some cursor
    ("GET", "/", {}, None),
    ("GET", "/", {"offset": "0", "size": "10", "projectName": "a"}, None),
    ("PUT", "/", {}, {"description": "text"}),
    ("POST", "/", {}, {"projectName": PROJECT, "description": "text"}),
    ("GET", "/logstores", {"offset": "0", "size": "10", "logstoreName": "a"}, None),
    (
        "POST",
        "/logstores",
        {},
        {"logstoreName": LOGSTORE, "ttl": 1, "shardCount": 2, "autoSplit": True, "mode": "query"},
    ),
    ("PUT", "/logstores/fuzzed", {}, {"ttl": 3650, "maxSplitShard": 64, "appendMeta": True}),
    ("GET", "/logstores/fuzzed", {"type": "log", "from": "1", "to": "2", "offset": "0"}, None),
    ("GET", "/logstores/fuzzed", {"type": "histogram", "from": "1", "to": "2"}, None),
    ("POST", "/logstores/fuzzed/logs", {}, {"from": 1, "to": 2, "query": "*"}),
    ("GET", SHARD, {"type": "cursor", "from": "begin"}, None),
    ("GET", SHARD, {"type": "cursor_time", "cursor": CURSOR}, None),
    ("GET", SHARD, {"type": "log", "cursor": CURSOR, "count": "10", "end_cursor": CURSOR}, None),
    ("POST", SHARD, {"action": "split", "key": "f" * 32}, None),
    ("POST", "/logstores/fuzzed/shards/1", {"action": "merge"}, None),
    ("POST", "/logstores/fuzzed/shards/route", {"key": "0" * 32}, None),
    ("POST", "/logstores/fuzzed/consumergroups", {}, {"consumerGroup": GROUP, "timeout": 60, "order": True}),
    ("PUT", OF_GROUP, {}, {"timeout": 60, "order": True}),
    ("GET", OF_GROUP, {"shard": "0"}, None),
    ("POST", OF_GROUP, {"type": "heartbeat", "consumer": "consumer"}, [0]),
    (
        "POST",
        OF_GROUP,
        {"type": "checkpoint", "consumer": "consumer", "forceSuccess": "true"},
        {"shard": 0, "checkpoint": CURSOR},
    ),
]


@EXAMPLES_OF_EACH
@given(data=st.data())
@pytest.mark.parametrize("call", API_CALLS, ids=lambda call: " ".join([*call[:2], *call[2]]))
def test_any_value_in_a_call_of_the_api_is_answered(log_service, call, data):
    method, path, query, document = call

    def perhaps_changed(known, strategy):
        changed = dict(known)
        for name in known:
            if data.draw(st.booleans()):
                changed[name] = data.draw(strategy)
                if data.draw(st.integers(0, 3)) == 0:
                    del changed[name]
        return changed

    selector = {name: query[name] for name in ("type", "action") if name in query}
    query = perhaps_changed({name: text for name, text in query.items() if name not in selector}, values)
    if isinstance(document, dict):
        document = perhaps_changed(document, json_values)
    elif document is not None and data.draw(st.booleans()):
        document = data.draw(json_values)
    body = b"" if document is None else json.dumps(document).encode()
    if path == "/logstores/fuzzed/shards/route":
        body = LogGroup(Topic="nginx").SerializeToString()
    headers = {"x-log-bodyrawsize": str(len(body))}
    project = data.draw(st.sampled_from([PROJECT, PROJECT, ""]))
    code = check(*send(log_service, method, path, {**query, **selector}, headers, body, True, project))
    assert code != "SignatureNotMatch"


# ---- bytes that may be no HTTP at all

request_lines = st.sampled_from([b"GET / HTTP/1.1", b"POST /logstores HTTP/1.0", b"GET * HTTP/1.1", b"GET / HTTP/9.9"])
header_lines = st.one_of(
    st.sampled_from([b"Host: " + PROJECT.encode() + b".local-log-service.test", b"Host: elsewhere", b"Host"]),
    st.sampled_from([b"abc", b"X: " + b"y" * 9000, b"X:\x00", b": x", b"Authorization: LOG a:b"]),
    st.binary(max_size=30),
)
body_lines = st.one_of(
    st.sampled_from(
        [b"Content-Length: 3", b"Content-Length: x", b"Content-Length: -1", b"Content-Length: 99999999999"]
    ),
    st.sampled_from([b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Upgrade: websocket"]),
    st.sampled_from([b"", b"zz", b"3", b"0", b"Connection: Upgrade", b"CONNECT a:80 HTTP/1.1"]),
)
lines = st.one_of(request_lines, header_lines, body_lines)
heads = (
    st.tuples(st.one_of(request_lines, header_lines), st.lists(header_lines, max_size=4))
    .map(lambda parts: b"\r\n".join([parts[0], *parts[1]]))
    .filter(lambda head: head.strip(b"\r\n"))
)


@EXAMPLES
@given(sent=st.lists(lines, max_size=8).map(b"\r\n".join), ended=st.booleans())
@example(sent=b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", ended=False)
@example(sent=b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", ended=True)
@example(sent=b"GET / HTTP/9.9\r\n\r\n", ended=False)
@example(sent=b"no HTTP\r\n\r\n", ended=False)
def test_any_bytes_are_answered_or_the_connection_ends(log_service, sent, ended):
    """A client that has sent all it has to say gets answers in the service's form until the connection ends."""
    received = b""
    with socket.create_connection(("127.0.0.1", log_service.port), timeout=LIMIT) as connection:
        connection.sendall(sent + b"\r\n\r\n" * ended)
        connection.shutdown(socket.SHUT_WR)
        try:
            while True:
                data = connection.recv(65536)
                if not data:
                    break
                received += data
        except ConnectionResetError:
            pass
    received = received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status_line, *header_lines = head.decode("ascii").split("\r\n")
        headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in header_lines}
        length = int(headers["content-length"])
        assert check(int(status_line.split()[1]), headers, received[:length]) is not None
        received = received[length:]


@EXAMPLES
@given(heads)
@example(b"this is no HTTP")
@example(b"\x16\x03\x01\x02\x00")  # how TLS begins
@example(b"PRI * HTTP/2.0\r\n\r\nSM")  # how HTTP/2 begins
@example(b"GET / HTTP/1.1\r\nHost")
def test_every_head_that_is_complete_is_answered(log_service, head):
    """Also where it is no HTTP: a client that waits for an answer gets one."""
    with socket.create_connection(("127.0.0.1", log_service.port), timeout=LIMIT) as connection:
        connection.sendall(head + b"\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        headers = {name.lower(): text for name, text in answer.getheaders()}
        code = check(answer.status, headers, answer.read())
    assert code is not None
    if not head.lstrip(b"\r\n").startswith((b"GET", b"POST")):
        assert code == "BadRequest"


# ---- LogGroups, and what is almost one

texts = st.text(max_size=10)
log_groups = st.builds(
    LogGroup,
    Logs=st.lists(
        st.builds(
            Log,
            Time=st.integers(0, 2**32 - 1),
            Contents=st.lists(st.builds(Log.Content, Key=texts, Value=texts), max_size=2),
        ),
        max_size=3,
    ),
    Topic=texts,
    LogTags=st.lists(st.builds(LogTag, Key=texts, Value=texts), max_size=2),
).map(lambda message: message.SerializeToString())
damages = st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3)), max_size=3)


def damaged(log_group, changes):
    for position, replacement in changes:
        position = min(position, len(log_group))
        log_group = log_group[:position] + replacement + log_group[position + len(replacement) :]
    return log_group


almost_log_groups = st.one_of(
    st.binary(max_size=60),
    st.builds(damaged, log_groups, damages),
    st.builds(lambda a, b: a + b, log_groups, log_groups),
)


def is_framed(body):
    """Whether the real parser takes the body for fields one after the other, as it does when it knows none of them."""
    try:
        Empty().ParseFromString(body)
    except (DecodeError, ValueError, IndexError, TypeError):  # which one depends on the protobuf runtime
        return False
    return True


@EXAMPLES
@given(body=almost_log_groups, compressed=st.booleans(), size_error=st.sampled_from([0, 0, 0, -1, 1]))
def test_puts_take_log_groups_whole_or_not_at_all(log_service, body, compressed, size_error):
    before = log_service.ledger(PROJECT, LOGSTORE)
    headers = {"x-log-bodyrawsize": str(len(body) + size_error), "content-type": "application/x-protobuf"}
    sent = body
    if compressed:
        headers["x-log-compresstype"] = "lz4"
        sent = lz4.block.compress(body, store_size=False)
    code = check(*send(log_service, "POST", "/logstores/%s/shards/lb" % LOGSTORE, {}, headers, sent))
    taken = log_service.ledger(PROJECT, LOGSTORE)[len(before) :]
    if code is None:
        assert size_error == 0
        assert [entry.log_group for entry in taken] == [body]
        assert is_framed(body)
    else:
        assert code in ("PostBodyInvalid", "PostBodyUncompressError", "InvalidBodyRawSize")
        assert taken == []


@EXAMPLES
@given(almost_log_groups)
@example(b"\x8a\x80\x80\x80\x80\x00\x00")  # the tag of Logs, and more bytes of it than a parser takes
@example(b"\x0a\x80\x80\x80\x80\x80\x00")  # the same of a length
@example(b"\xba\xff\xff\xff\x7f\x00")  # a field number of more than 29 bits
def test_what_is_taken_for_a_log_group_is_framed_as_one(body):
    """The service is laxer than the parser in one thing: it does not look into Logs and LogTags. It is stricter in two:
    it takes no groups of old (wire types 3 and 4), and no known field with a wire type that is not its own."""
    try:
        validate_log_group(body)
    except ValueError:
        return
    assert is_framed(body)
