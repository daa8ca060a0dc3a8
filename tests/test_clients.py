"""How puts and pulls reach the service: proxies, certificates, kept connections; lag; what the SDK leaves to us."""

import contextlib
import datetime
import gc
import http.client
import itertools
import pathlib
import platform
import random
import socket
import socketserver
import ssl
import threading
import time
import types
from urllib.parse import urlsplit

import pytest
import requests
import trustme
import urllib3
from aliyun.log.proto import LogGroup
from conftest import logstore_config, speak_tls
from harness import GROUP, LIMIT, PROJECT, SOURCE, make_log_group, settings_for
from local_log_service import ForeignAnswer, LocalLogService

import dispatch_data
from dispatch_data import (
    NETWORK_ERRORS,
    PUT_HEADERS,
    RESPONSE_TIMEOUT,
    CallError,
    ConnectionFactory,
    Consumer,
    CredentialSources,
    GroupMember,
    LogstoreApi,
    PooledLogClient,
    PutClient,
    PutInFlight,
    largest_lag,
    read_settings,
    read_shard_status,
    watchdog,
)

pytestmark = pytest.mark.quick

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def clean_environment(monkeypatch):
    for name in PROXY_VARIABLES + tuple(map(str.upper, PROXY_VARIABLES)) + ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def use_environment(monkeypatch, service):
    for name, text in service.environment().items():
        monkeypatch.setenv(name, text)


def client_for(service, endpoint=None):
    endpoint = endpoint or service.endpoint
    return PooledLogClient(logstore_config(endpoint=endpoint, access_key_id="local-id", access_key="local-secret"))


def put(client):
    """Puts one LogGroup and returns its bytes."""
    log_group = make_log_group("nginx")
    client.put_log_raw(PROJECT, "nginx", LogGroup.FromString(log_group))
    return log_group


def taken(service):
    return [entry.log_group for entry in service.ledger(PROJECT, "nginx")]


def test_through_a_proxy_from_the_environment(service, clean_environment):
    use_environment(clean_environment, service)
    client = client_for(service)
    assert [put(client), put(client)] == taken(service)


@pytest.mark.parametrize("no_proxy", [None, ".test", "*"])
def test_directly_without_a_proxy_or_around_it(service, clean_environment, no_proxy):
    """The name is made to resolve, which a machine without a name server can't do otherwise."""
    if no_proxy:
        clean_environment.setenv("http_proxy", "http://127.0.0.1:9")
        clean_environment.setenv("no_proxy", no_proxy)
    resolve = socket.getaddrinfo
    clean_environment.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **options: resolve(
            "127.0.0.1" if host == PROJECT + ".local-log-service.test" else host, *rest, **options
        ),
    )
    client = client_for(service, "%s:%d" % (service.endpoint, service.port))
    assert [put(client)] == taken(service)


def test_tls_trusts_the_bundle_of_the_environment_and_nobody_else(clean_environment):
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, "nginx")
        use_environment(clean_environment, service)
        assert [put(client_for(service))] == taken(service)
        clean_environment.delenv("REQUESTS_CA_BUNDLE")
        with pytest.raises(CallError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            put(client_for(service))
        assert len(taken(service)) == 1


def test_where_the_system_has_no_cas_those_of_requests_are_trusted(clean_environment):
    """As in a container without ca-certificates, and for a Python that was built on another distribution."""
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, "nginx")
        use_environment(clean_environment, service)
        path = service.environment()["REQUESTS_CA_BUNDLE"]
        clean_environment.setattr(requests.utils, "DEFAULT_CA_BUNDLE_PATH", path)
        clean_environment.delenv("REQUESTS_CA_BUNDLE")
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            clean_environment.setenv(name, "/nowhere")
        assert [put(client_for(service))] == taken(service)


@pytest.mark.parametrize("is_there", [True, False], ids=["an empty directory", "nothing"])
def test_a_proxy_over_tls_is_trusted_by_the_same_cas(clean_environment, tmp_path, is_there):
    """It is urllib3 that opens those connections, and the empty directory is what some packages of OpenSSL leave."""
    clean_environment.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
    clean_environment.setenv("SSL_CERT_DIR", str(tmp_path if is_there else tmp_path / "nothing"))
    clean_environment.setenv("https_proxy", "https://proxy.test:3128")
    clean_environment.delenv("REQUESTS_CA_BUNDLE", raising=False)
    factory = dispatch_data.ConnectionFactory("https://project.service.test")
    assert factory.is_blocking
    assert factory.pool.ca_certs == factory.trusted_cas.path == requests.utils.DEFAULT_CA_BUNDLE_PATH


def test_what_threads_share_of_tls_is_set_before_they_do(clean_environment):
    """urllib3 sets the protocols of a TLS context for each connection. In PyPy other threads run meanwhile, and two
    that set them free the same memory: copies died of it (PyPy 7.3.11, urllib3 2.6.3, "double free or corruption").
    """
    contexts, set_protocols = [], ssl.SSLContext._set_alpn_protocols

    def note(context, protocols):
        contexts.append((context, bytes(protocols)))
        set_protocols(context, protocols)

    clean_environment.setattr(ssl.SSLContext, "_set_alpn_protocols", note, raising=False)
    with LocalLogService(https=True) as service:
        use_environment(clean_environment, service)
        client = client_for(service)
        for _ in range(3):
            connection = client.factory.connect(10)
            assert connection.sock.context is client.factory.trusted_cas.loaded
            connection.close()
    shared = client.factory.trusted_cas.loaded
    assert [protocols for context, protocols in contexts if context is shared] == [b"\x08http/1.1"]


@pytest.mark.parametrize("proxy", ["", "http://proxy.test:1", "https://proxy.test:1"])
def test_no_context_is_shared_that_requests_has_made(clean_environment, proxy):
    """requests 2.32.4 has one for all pools, and so for all threads."""
    before = requests.adapters.HTTPAdapter.get_connection_with_tls_context

    def get_pool(*arguments, **options):
        pool = before(*arguments, **options)
        pool.conn_kw["ssl_context"] = ssl.create_default_context()
        return pool

    clean_environment.setattr(requests.adapters.HTTPAdapter, "get_connection_with_tls_context", get_pool)
    clean_environment.setenv("https_proxy", proxy)
    assert "ssl_context" not in dispatch_data.ConnectionFactory("https://sls.test").pool.conn_kw


class Listener(socketserver.ThreadingTCPServer):
    """Keeps the head of the first request it gets, and answers it with 407."""

    allow_reuse_address = daemon_threads = True

    def __init__(self):
        self.head = b""
        listener = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    listener.head += line
                    if line == b"\r\n":
                        break
                self.wfile.write(
                    b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    "scheme, first_line",
    [
        ("http", b"POST http://test-project.example.test:80/logstores/nginx/shards/lb HTTP/1.1\r\n"),
        ("https", b"CONNECT test-project.example.test:443 HTTP/1."),
    ],
)
def test_a_proxy_is_told_its_user_and_password(clean_environment, scheme, first_line):
    with Listener() as proxy:
        clean_environment.setenv(scheme + "_proxy", "http://user:p%%40ss@127.0.0.1:%d" % proxy.server_address[1])
        with pytest.raises(CallError) as caught:
            put(client_for(None, scheme + "://example.test"))
        proxy.shutdown()
    assert proxy.head.startswith(first_line)
    assert b"proxy-authorization: basic dxnlcjpwqhnz" in proxy.head.lower()  # base64 of user:p@ss
    assert "p@ss" not in str(caught.value) and "p%40ss" not in str(caught.value)


class TlsProxy(socketserver.ThreadingTCPServer):
    """Speaks TLS with who connects, and passes what it hears on to a port of this machine."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port):
        self.authority = trustme.CA(organization_name="Proxy")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("localhost").configure_cert(context)
        self.connections = 0
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                proxy.connections += 1
                with context.wrap_socket(self.request, server_side=True) as near, socket.socket() as far:
                    far.connect(("127.0.0.1", port))
                    back = threading.Thread(target=self.copy, args=(far, near), daemon=True)
                    back.start()
                    self.copy(near, far)

            @staticmethod
            def copy(source, destination):
                with contextlib.suppress(OSError):
                    for data in iter(lambda: source.recv(1 << 16), b""):
                        destination.sendall(data)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@contextlib.contextmanager
def behind_a_tls_proxy(monkeypatch, service, tmp_path, https):
    name = "https_proxy" if https else "http_proxy"
    with TlsProxy(urlsplit(service.environment()[name]).port) as proxy:
        bundle = tmp_path / "authorities.pem"
        known = pathlib.Path(service.environment()["REQUESTS_CA_BUNDLE"]).read_bytes() if https else b""
        bundle.write_bytes(known + proxy.authority.cert_pem.bytes())
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        monkeypatch.setenv(name, "https://localhost:%d" % proxy.server_address[1])
        monkeypatch.setenv(name.upper(), "https://localhost:%d" % proxy.server_address[1])
        yield proxy
        proxy.shutdown()


@pytest.mark.parametrize("https", [False, True])
def test_a_proxy_may_be_spoken_to_in_tls(clean_environment, tmp_path, https):
    with LocalLogService(https=https) as service:
        service.create_logstore(PROJECT, "nginx")
        use_environment(clean_environment, service)
        with behind_a_tls_proxy(clean_environment, service, tmp_path, https) as proxy:
            client = client_for(service)
            assert [put(client), put(client)] == taken(service)
            assert proxy.connections == 1


@pytest.mark.parametrize("https", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("tls_proxy", [False, True], ids=["proxy", "tls-proxy"])
@pytest.mark.parametrize("fault", [dict(hold=True), dict(trickle=0.1)], ids=["silence", "trickle"])
def test_an_answer_that_does_not_come_in_time_ends_whatever_the_line(
    clean_environment, tmp_path, https, tls_proxy, fault
):
    """Also on a connection that was used before; the next put gets one of its own."""
    with LocalLogService(https=https) as service, contextlib.ExitStack() as stack:
        service.create_logstore(PROJECT, "nginx")
        use_environment(clean_environment, service)
        if tls_proxy:
            stack.enter_context(behind_a_tls_proxy(clean_environment, service, tmp_path, https))
        client = client_for(service)
        put(client)
        client.response_timeout = 0.5
        for _ in range(2):  # over the connection there is, and over a fresh one
            with service.add_fault("PutLogs", **fault), pytest.raises(CallError, match=r"NoAnswer.*timed out"):
                put(client)
            assert not client.idle_connections
        client.response_timeout = RESPONSE_TIMEOUT
        last = put(client)
        assert last in taken(service) and len(client.idle_connections) == 1
    assert not watchdog.deadlines


@pytest.fixture
def idle_tls_connection(clean_environment):
    """A client over https, and a connection that it has opened ahead: the tickets of TLS 1.3 lie unread on it."""
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, "nginx")
        use_environment(clean_environment, service)
        client = client_for(service)
        put(client)
        client.idle_connections[0][0].opened -= dispatch_data.MAX_AGE - 1
        client.open_ahead(2)
        connection, _ = client.idle_connections[-1]
        assert connection.sock.version() == "TLSv1.3" and len(client.idle_connections) == 2
        assert urllib3.util.wait_for_read(connection.sock, 10), "tickets"
        yield client, connection
    assert not dispatch_data.is_silent(connection.sock), "the service is gone"


def test_the_tickets_of_tls_are_not_taken_for_something_that_nobody_has_asked_for(idle_tls_connection):
    client, connection = idle_tls_connection
    client.close_stale(all_idle=False)
    assert connection in [one for one, _ in client.idle_connections]
    assert client.take_idle() is connection
    assert connection.sock.gettimeout() is None
    client.idle_connections.append((connection, time.monotonic()))
    put(client)
    assert client.idle_connections[-1][0] is connection


@pytest.fixture
def tls_through_pipes():
    """Both ends of a TLS connection, and the ends of the pipes between them: what it sends goes on as the test will."""
    here, near = socket.socketpair()
    there, far = socket.socketpair()
    is_over = threading.Event()

    def pass_on():
        while not is_over.is_set():
            for source, destination in ((near, far), (far, near)):
                if urllib3.util.wait_for_read(source, 0.01):
                    destination.sendall(source.recv(1 << 16))

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    here, there = speak_tls(here, there)
    assert urllib3.util.wait_for_read(here, 10), "tickets"
    is_over.set()
    thread.join()
    with here, near, there, far:
        yield here, there, near, far


def test_of_half_a_tls_record_nobody_can_tell_that_it_is_a_ticket(tls_through_pipes):
    """OpenSSL would take it, and whoever looks next sees nothing of what then comes in the place of an answer."""
    here, there, near, far = tls_through_pipes
    assert dispatch_data.is_silent(here)
    there.sendall(WHOLE_ANSWERS["accepted"])
    record = far.recv(1 << 16)
    for part in (record[:3], record[3:20]):
        near.sendall(part)
        for _ in range(2):
            assert not dispatch_data.is_silent(here)
    near.sendall(record[20:])
    assert not dispatch_data.is_silent(here)


def test_what_openssl_has_decrypted_is_seen(tls_through_pipes):
    here, there, near, far = tls_through_pipes
    there.sendall(WHOLE_ANSWERS["accepted"])
    near.sendall(far.recv(1 << 16))
    assert here.recv(1) == b"H"
    assert not dispatch_data.is_silent(here)


class Trickler(socketserver.ThreadingTCPServer):
    """Of TLS, or the answer to CONNECT, it sends the beginning, and then a byte now and then, without end."""

    allow_reuse_address = daemon_threads = True
    CONNECTED = b"HTTP/1.1 200 OK\r\n"
    SERVER_HELLO = bytes.fromhex("160303400002003ffc0303")  # the beginning of one of 16 KB

    def __init__(self, trickles_connect=False):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                beginning = Trickler.SERVER_HELLO
                if self.request.recv(1 << 16).startswith(b"CONNECT "):
                    self.request.sendall(Trickler.CONNECTED)
                    if trickles_connect:
                        beginning = b"X-Header: "
                    else:
                        self.request.sendall(b"\r\n")
                        self.request.recv(1 << 16)
                with contextlib.suppress(OSError):
                    self.request.sendall(beginning)
                    while True:
                        self.request.sendall(b"x")
                        time.sleep(0.05)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.parametrize("way", ["direct", "proxy's answer", "proxy", "tls-proxy"])
def test_the_opening_of_a_connection_that_trickles_ends(clean_environment, tmp_path, way):
    """Its time is counted from its beginning, not from the last byte: by TLS's own deadline, or by the watchdog."""
    with contextlib.ExitStack() as stack:
        trickler = stack.enter_context(Trickler(trickles_connect=way == "proxy's answer"))
        stack.callback(trickler.shutdown)
        address = "127.0.0.1:%d" % trickler.server_address[1]
        origin = "https://" + (address if way == "direct" else "sls.test")
        if way in ("proxy", "proxy's answer"):
            clean_environment.setenv("https_proxy", "http://" + address)
        elif way == "tls-proxy":
            proxy = stack.enter_context(TlsProxy(trickler.server_address[1]))
            stack.callback(proxy.shutdown)
            bundle = tmp_path / "authorities.pem"
            bundle.write_bytes(proxy.authority.cert_pem.bytes())
            clean_environment.setenv("REQUESTS_CA_BUNDLE", str(bundle))
            clean_environment.setenv("https_proxy", "https://localhost:%d" % proxy.server_address[1])
        watchdog.start()
        with pytest.raises(NETWORK_ERRORS):
            ConnectionFactory(origin).connect(0.3)
    assert not watchdog.deadlines


def test_an_answer_of_unknown_length_whose_end_does_not_come_is_none(clean_environment):
    """Without a length it ends with the connection, but not where the client itself has ended that."""

    class Silent(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nx-log-requestid: 1\r\n\r\n")
            self.request.recv(1)  # until the client is gone

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clean_environment.setenv("http_proxy", "http://127.0.0.1:%d" % server.server_address[1])
        client = PooledLogClient(
            logstore_config(endpoint="http://test", access_key_id="id", access_key="key"), response_timeout=0.5
        )
        with pytest.raises(CallError, match=r"NoAnswer.*timed out"):
            put(client)
        server.shutdown()


def test_a_put_that_nobody_reads_ends(clean_environment):
    """More than the kernel keeps for who does not read."""
    clean_environment.setattr("dispatch_data.MIN_THROUGHPUT", 1e12)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        clean_environment.setenv("http_proxy", "http://127.0.0.1:%d" % nobody.getsockname()[1])
        client = PooledLogClient(
            logstore_config(endpoint="http://test", access_key_id="id", access_key="secret"), response_timeout=0.5
        )
        noise = LogGroup(Topic="nginx", Source="".join(map(chr, random.Random(0).choices(range(33, 127), k=9000000))))
        with pytest.raises(CallError, match=r"NoAnswer.*timed out"):
            client.put_log_raw(PROJECT, "nginx", noise)
    assert not watchdog.deadlines


def test_a_socks_proxy_is_used_or_its_lack_is_told(service, clean_environment):
    """requests speaks SOCKS where PySocks is installed; without it nothing may go past the proxy."""
    use_environment(clean_environment, service)
    clean_environment.setenv("http_proxy", "socks5h://127.0.0.1:9")
    clean_environment.setenv("HTTP_PROXY", "socks5h://127.0.0.1:9")
    with pytest.raises(CallError, match="SOCKS") as caught:
        put(client_for(service))
    assert caught.value.code == "NoAnswer" and not taken(service)


def test_an_idle_connection_that_the_service_closed_is_replaced_unnoticed(service, clean_environment):
    use_environment(clean_environment, service)
    client = client_for(service)
    first = put(client)
    service.stop()
    service.start()
    assert [first, put(client)] == taken(service)


def test_as_many_connections_are_kept_as_calls_were_in_the_air(service, clean_environment):
    use_environment(clean_environment, service)
    client = client_for(service)
    put(client)
    ((connection, _),) = client.idle_connections
    socket_before = connection.sock
    put(client)
    assert client.idle_connections[0][0] is connection and connection.sock is socket_before
    with service.add_fault("PutLogs", hold=True) as fault:
        threads = [threading.Thread(target=put, args=(client,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        service.wait_for(lambda: fault.hits == 20, LIMIT, "twenty puts in the air")
    for thread in threads:
        thread.join()
    assert len(taken(service)) == 22 and len(client.idle_connections) == 20


@pytest.mark.parametrize("name", ["Connection", "connection"])
def test_a_connection_that_the_answer_says_will_be_closed_is_not_kept(service, clean_environment, name):
    """Even before it is: a put over it would have to be repeated."""
    use_environment(clean_environment, service)
    client = client_for(service)
    with service.add_fault("PutLogs", answer=ForeignAnswer(200, {name: "close"}, request_id=True)):
        put(client)
    assert not client.idle_connections
    with service.add_fault("PutLogs", answer=ForeignAnswer(200, {name: "keep-alive"}, request_id=True)):
        put(client)
    assert len(client.idle_connections) == 1


@pytest.mark.parametrize(
    "fault, is_kept",
    [
        (dict(code="WriteQuotaExceed", status=403), True),
        (dict(code="PostBodyInvalid", status=400), False),
        (dict(code="ServerBusy", status=503), False),
        (dict(answer=ForeignAnswer(403, {}, b"forbidden")), False),
        (dict(answer=ForeignAnswer(403, {"Connection": "close"}, b"{}", request_id=True)), False),
    ],
)
def test_a_refusal_for_a_quota_costs_no_connection(service, clean_environment, fault, is_kept):
    """A project at its quota refuses much, by 403. After other answers the next server may say something else."""
    use_environment(clean_environment, service)
    client = client_for(service)
    put(client)
    ((connection, _),) = client.idle_connections
    with service.add_fault("PutLogs", **fault), pytest.raises(CallError):
        put(client)
    assert [one for one, _ in client.idle_connections] == [connection] * is_kept
    put(client)
    assert len(taken(service)) == 2


def test_a_put_that_fails_before_it_is_sent_holds_up_no_other(service, clean_environment):
    """One thread at a time prepares its put; whatever happens there, it is the next one's turn."""

    class TooLarge:
        def SerializeToString(self):
            raise MemoryError

    use_environment(clean_environment, service)
    client = client_for(service)
    with pytest.raises(MemoryError):
        client.put_log_raw(PROJECT, "nginx", TooLarge())
    thread = threading.Thread(target=put, args=(client,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(taken(service)) == 1


def test_parameters_are_signed_as_they_are_sent(service, clean_environment):
    """Pulls go the same way, with a query string that needs encoding."""
    use_environment(clean_environment, service)
    log_group = put(client_for(service))
    client = client_for(service)
    shard = taken(service) and service.ledger(PROJECT, "nginx")[0].shard
    cursor = client.get_begin_cursor(PROJECT, "nginx", shard).get_cursor()
    assert cursor.endswith("=")
    pulled = client.pull_logs(PROJECT, "nginx", shard, cursor, 10).get_loggroup_list().LogGroups
    assert [one.SerializeToString() for one in pulled] == [log_group]
    assert client.idle_connections


# ---- puts that are begun, not waited for

ERROR_BODY = b'{"errorCode":"ServerBusy","errorMessage":"busy"}'
WHOLE_ANSWERS = {
    "accepted": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nx-log-requestid: 1\r\n\r\n",
    "accepted, in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-log-requestid: 1\r\n\r\n0\r\n\r\n",
    "accepted, after a hint": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nx-log-requestid: 1\r\n\r\n",
    "accepted, to be closed": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\nx-log-requestid: 1"
    b"\r\n\r\n",
    "a portal": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nlogin",
    "refused": b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\nx-log-requestid: 1\r\n\r\n%s"
    % (len(ERROR_BODY), ERROR_BODY),
}


@contextlib.contextmanager
def put_over_a_pair_of_sockets(request=b"request"):
    """A PutInFlight, sent, and the other end of its connection."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        client = PutClient(logstore_config(endpoint="sls.test", access_key_id="id", access_key="secret"))
        put = PutInFlight(client, request, "")
        put.use(types.SimpleNamespace(sock=here), is_fresh=True)
        put.send()
        yield put, there


@pytest.mark.parametrize("answer", WHOLE_ANSWERS.values(), ids=list(WHOLE_ANSWERS))
def test_an_answer_means_the_same_wherever_it_is_split(answer):
    outcomes = set()
    for split in range(1, len(answer) + 1):
        with put_over_a_pair_of_sockets() as (put, there):
            there.sendall(answer[:split])
            response = put.receive()
            if split < len(answer):
                assert response is None, answer[:split]
                there.sendall(answer[split:])
                response = put.receive()
            outcomes.add((response.status, response.body, "x-log-requestid" in response.headers, response.is_last))
    assert len(outcomes) == 1
    ((status, body, is_of_the_service, is_last),) = outcomes
    assert answer.endswith(body) and b"HTTP/1.1 %d " % status in answer
    assert is_of_the_service == (b"requestid" in answer)
    assert is_last or (b"Connection: close" not in answer and status == 200)


def test_the_usual_answer_and_what_only_looks_like_it_are_told_apart():
    """What is accepted at a glance means what it would mean if it were read, as each with two blanks is."""
    heads = ["x-log-requestid: 1"], []
    lengths = [], ["Content-Length: 0"], ["Content-Length: 5"], ["Content-Length: 0", "Content-Length: 5"]
    codings = [], ["Transfer-Encoding: chunked"]
    connections = [], ["Connection: close"], ["Connection: keep-alive"], ["Connection: keep-alive, close"], [
        "Connection: keep-alive", "Connection: close"
    ]  # fmt: skip
    bodies = b"", b"x", b"login", b"0\r\n\r\n", WHOLE_ANSWERS["accepted"]
    starts = b"HTTP/1.1 200 OK", b"HTTP/1.1  200 OK"
    for id_, length, coding, connection in itertools.product(heads, lengths, codings, connections):
        head = "\r\n".join(["", *id_, *length, *coding, *connection, "", ""]).encode()
        for body, is_closed in itertools.product(bodies, (False, True)):
            usual, other = (outcome_of(start + head + body, is_closed) for start in starts)
            if isinstance(usual, tuple):
                says_nothing = id_ and length == ["Content-Length: 0"] and not (coding or body)
                is_kept = says_nothing and connection in ([], ["Connection: keep-alive"])
                assert usual[2] != bool(is_kept), (head, body, is_closed)
                usual, other = usual[:2], other[:2]
            assert usual == other, (head, body, is_closed)


def outcome_of(answer, is_closed):
    """(body, is it of the service, is it the last) of an answer, or what it raises; None where more has to come."""
    with put_over_a_pair_of_sockets() as (put, there):
        there.sendall(answer)
        if is_closed:
            there.shutdown(socket.SHUT_WR)
        try:
            response = put.receive()
        except (OSError, http.client.HTTPException) as error:
            return type(error)
    return response and (response.body.decode(), "x-log-requestid" in response.headers, response.is_last)


def test_what_comes_beyond_an_answer_is_not_taken_for_that_of_the_next_put():
    with put_over_a_pair_of_sockets() as (put, there):
        there.sendall(WHOLE_ANSWERS["accepted"] * 2)
        response = put.receive()
        assert (response.status, response.is_last) == (200, True)


REFUSAL = b"HTTP/1.1 403 Forbidden\r\nx-log-requestid: 1\r\n%s\r\n%s"
LENGTH = b"Content-Length: %d\r\n" % len(ERROR_BODY)


def test_after_a_usual_refusal_the_connection_is_used_again_wherever_that_is_split():
    refusal = REFUSAL % (LENGTH, ERROR_BODY)
    for split in range(1, len(refusal)):
        with put_over_a_pair_of_sockets() as (put, there):
            there.sendall(refusal[:split])
            assert put.receive() is None
            there.sendall(refusal[split:])
            response = put.receive()
            assert (response.status, response.body, response.is_last) == (403, ERROR_BODY, False)


@pytest.mark.parametrize(
    "head, body",
    [
        (LENGTH, ERROR_BODY + b"HTTP/1.1 200 OK"),
        (LENGTH + b"Connection: close\r\n", ERROR_BODY),
        (b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(ERROR_BODY), ERROR_BODY)),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"),
    ],
    ids=["more comes", "closes", "chunks", "chunks and a length"],
)
def test_after_an_odd_refusal_it_is_not(head, body):
    assert outcome_of(REFUSAL % (head, body), is_closed=False)[2]


class Pieces(ssl.SSLSocket):
    """A TLS connection over which these come; exceptions are raised. It takes a byte at a time, or raises as well."""

    def __init__(self, *pieces, when_sent=()):
        self.pieces, self.when_sent, self.sent = list(pieces), list(when_sent), b""

    def recv(self, *_):
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def send(self, data):
        if self.when_sent and len(self.sent) == 3:
            raise self.when_sent.pop(0)
        self.sent += bytes(data[:1])
        return 1


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("answer", ["accepted", "accepted, in chunks", "a portal"])
def test_all_that_a_tls_connection_holds_is_taken_at_once_its_end_too(answer, is_closed):
    """No selector shows what it holds."""
    client = PutClient(logstore_config(endpoint="sls.test", access_key_id="id", access_key="secret"))
    put, text = PutInFlight(client, b"", ""), WHOLE_ANSWERS[answer]
    end = b"" if is_closed else ssl.SSLWantReadError()
    put.use(types.SimpleNamespace(sock=Pieces(text[:20], text[20:], end)), is_fresh=True)
    response = put.receive()
    assert response.status == 200
    assert not put.sock.pieces
    assert response.is_last or (answer != "accepted, in chunks" and not is_closed)


@pytest.mark.parametrize("wait", [ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError])
def test_a_put_goes_on_where_its_connection_took_no_more(wait):
    client = PutClient(logstore_config(endpoint="sls.test", access_key_id="id", access_key="secret"))
    put = PutInFlight(client, b"request", "")
    put.use(types.SimpleNamespace(sock=Pieces(when_sent=[wait()])), is_fresh=True)
    assert not put.send()
    assert put.sock.sent == b"req"
    assert put.send()
    assert put.sock.sent == b"request"


class EndlessAnswer(ssl.SSLSocket):
    """A TLS connection over which more comes than anybody reads; a selector shows nothing of what it holds."""

    def __init__(self):
        self.begun, self.given = b"HTTP/1.1 200 OK\r\nx-log-requestid: 1\r\n\r\n", 0

    def recv(self, *_):
        data, self.begun = self.begun or b"x" * 16384, b""
        self.given += len(data)
        if self.given > 20000000:
            raise ssl.SSLWantReadError
        return data


def test_an_answer_without_end_over_tls_keeps_nobody_busy():
    client = PutClient(logstore_config(endpoint="sls.test", access_key_id="id", access_key="secret"))
    put = PutInFlight(client, b"", "")
    put.use(types.SimpleNamespace(sock=EndlessAnswer()), is_fresh=True)
    with pytest.raises(CallError, match="without end"):
        put.receive()
    assert put.sock.given < 2000000


class PiecesOfSixteenBytes:
    """A connection over which an answer without end trickles."""

    def __init__(self):
        self.given = 0

    def recv(self, *_):
        begun = b"HTTP/1.1 200 OK\r\nx-log-requestid: 1\r\n\r\n"
        data = begun[self.given : self.given + 16] if self.given < len(begun) else b"x" * 16
        self.given += len(data)
        return data


def test_an_answer_that_trickles_without_end_is_not_read_anew_for_ever():
    """Whenever a piece comes, all that has come is read: the bytes that are read grow with its square."""
    client = PutClient(logstore_config(endpoint="sls.test", access_key_id="id", access_key="secret"))
    put = PutInFlight(client, b"", "")
    put.use(types.SimpleNamespace(sock=PiecesOfSixteenBytes()), is_fresh=True)
    with pytest.raises(CallError, match="without end"):
        any(put.receive() for _ in range(60000))
    assert put.sock.given < 200000


def test_an_answer_before_the_put_was_sent_does_not_say_that_it_was_accepted():
    """More than the kernel takes at once; whoever answers has not read it."""
    with put_over_a_pair_of_sockets(b"x" * 20000000) as (put, there):
        assert put.sent < len(put.request)
        there.sendall(WHOLE_ANSWERS["accepted"])
        with pytest.raises(http.client.HTTPException, match="before the request was sent"):
            put.receive()
    with put_over_a_pair_of_sockets(b"x" * 20000000) as (put, there):
        there.sendall(WHOLE_ANSWERS["refused"])
        assert put.receive().status == 503, "who won't read it all may say why"


@pytest.mark.parametrize("answer", ["accepted", "accepted, after a hint"])
@pytest.mark.parametrize("then", ["the rest is sent", "it is closed"])
def test_an_answer_that_began_too_early_counts_for_nothing_whatever_comes_then(answer, then):
    with put_over_a_pair_of_sockets(b"x" * 20000000) as (put, there):
        there.sendall(WHOLE_ANSWERS[answer][:-5])
        assert put.receive() is None
        there.sendall(WHOLE_ANSWERS[answer][-5:])
        if then == "it is closed":
            there.shutdown(socket.SHUT_WR)
        else:
            left = len(put.request)
            while left:
                left -= len(there.recv(1 << 20))
                put.send()
        with pytest.raises(http.client.HTTPException, match="before the request was sent"):
            put.receive()


def test_an_interim_answer_may_come_before_the_put_was_sent():
    with put_over_a_pair_of_sockets(b"x" * 20000000) as (put, there):
        interim, final = WHOLE_ANSWERS["accepted, after a hint"].split(b"HTTP/1.1 200", 1)
        there.sendall(interim)
        assert put.receive() is None
        left = len(put.request)
        while left:
            left -= len(there.recv(1 << 20))
            put.send()
        there.sendall(b"HTTP/1.1 200" + final)
        assert put.receive().status == 200


def test_a_connection_closed_while_a_call_is_sent_has_accepted_nothing(clean_environment):
    """Whatever it said before: a 200 that it has not read all for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_the_beginning():
            there, _ = listener.accept()
            with there:
                there.recv(1000)
                there.sendall(WHOLE_ANSWERS["accepted"])
                time.sleep(0.2)  # so that it is there before the connection is reset

        threading.Thread(target=answer_the_beginning, daemon=True).start()
        client = client_for(None, "127.0.0.1:%d" % listener.getsockname()[1])
        client.factory = ConnectionFactory("http://" + client._endpoint)
        with pytest.raises(CallError, match="before the request was sent"):
            client._getHttpResponse(
                "POST", "http://%s/logstores/nginx/shards/lb" % client._endpoint, {}, b"x" * 20000000, {}
            )


# ---- lag


def test_silence_counts_from_when_a_heartbeat_was_sent(service, clean_environment):
    """To the service it does; an answer may take its time."""
    use_environment(clean_environment, service)
    member = GroupMember(read_settings(settings_for(service)), delivery=None, credential_sources=CredentialSources())
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 20)
    consumer = Consumer(member, 20)
    sending = threading.Thread(target=consumer.heart_beat.send)
    with service.add_fault("HeartBeat", hold=True) as held:
        before = consumer.lease.now()
        sending.start()
        service.wait_for(lambda: held.hits == 1, LIMIT, "a heartbeat that waits for its answer")
        heard = consumer.lease.now()
    sending.join()
    assert before + 20 <= consumer.lease.expires <= heard + 20


def test_a_connection_that_takes_long_to_open_ahead_is_no_loop_that_stands_still(service, monkeypatch):
    """Nor is a name server that doesn't answer this process's fault."""
    settings = read_settings(settings_for(service))
    consumer = Consumer(GroupMember(settings, delivery=None, credential_sources=CredentialSources()), 20)
    heart_beat, beats = consumer.heart_beat, []
    monkeypatch.setattr(heart_beat.source, "heartbeat", lambda *_: [])
    heart_beat.source.client.of_thread.sent = consumer.lease.now()
    beat_of = dispatch_data.watchdog.beats
    client = heart_beat.source.client
    monkeypatch.setattr(client, "open_ahead", lambda _: beats.append(beat_of[threading.current_thread()]))
    heart_beat.send()
    assert beats == [float("inf")] and beat_of[threading.current_thread()] <= time.monotonic()


def test_lag_counts_from_the_arrival_of_the_oldest_log_not_delivered(service, clean_environment):
    use_environment(clean_environment, service)
    member = GroupMember(read_settings(settings_for(service)), delivery=None, credential_sources=CredentialSources())
    source = member.source

    def lag(*shards):
        return largest_lag(read_shard_status(source, GROUP, shards))

    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 2)
    for shard in range(4):
        service.client().update_check_point(PROJECT, SOURCE, GROUP, shard, source.get_cursor(shard, "begin"))
    assert lag(0, 1, 2, 3) == pytest.approx(0, abs=1.5)
    (first,) = service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.wait_for(lambda: time.time() > first.received_at + 4, 10, "four seconds of lag")
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=3)
    assert lag(0, 1, 2, 3) >= 2
    assert lag(0, 1) == pytest.approx(0, abs=1.5)
    member.measure_lag()
    assert member.lag == 0  # of no shards
    with service.add_fault("GetCheckPoint", status=403, code="ReadQuotaExceed"):
        member.measure_lag()
        assert member.lag is None
    service.client().update_check_point(PROJECT, SOURCE, GROUP, 2, source.get_cursor(2, "end"))
    assert lag(2) == pytest.approx(0, abs=1.5)


def test_a_checkpoint_of_a_copy_that_does_not_hold_the_shard_is_refused(service, clean_environment):
    """The SDK's own call would force it over the holder's."""
    use_environment(clean_environment, service)
    source = LogstoreApi(read_settings(settings_for(service)).source)
    holder = service.client()
    holder.create_consumer_group(PROJECT, SOURCE, GROUP, 20)
    assert holder.heart_beat(PROJECT, SOURCE, GROUP, "holder", []).get_shards() == [0, 1, 2, 3]
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    end = source.get_cursor(2, "end")
    holder.update_check_point(PROJECT, SOURCE, GROUP, 2, end, "holder", False)
    with pytest.raises(CallError, match="ConsumerNot"):
        source.save_checkpoint(GROUP, "another", 2, source.get_cursor(2, "begin"))
    assert source.get_checkpoints(GROUP)[2]["checkpoint"] == end


# ---- what dispatch_data.py overrides in the SDK: these fail when a new release changes it


def test_the_sdk_s_client_still_sends_through_the_method_we_override(service, clean_environment):
    """If not, calls go through requests again: they work, and cost four times as much."""
    use_environment(clean_environment, service)
    client = client_for(service)
    put(client)
    assert client.idle_connections


@pytest.mark.parametrize("endpoint", ["sls.test", "http://sls.test:8080", "https://sls.test", "192.0.2.1"])
@pytest.mark.parametrize("kind", [PooledLogClient, PutClient])
def test_connections_go_where_the_sdk_s_would_go(monkeypatch, endpoint, kind):
    """Which puts no project in front of an address."""
    client = kind(logstore_config(endpoint=endpoint, access_key_id="id", access_key="secret"))
    urls = []
    monkeypatch.setattr(
        client, "_getHttpResponse", lambda method, url, *_: urls.append(url) or (200, b"{}", {"x-log-requestid": "1"})
    )
    client.delete_logstore(PROJECT, "nginx")
    assert urls == [client.origin + "/logstores/nginx"]


def test_the_sdk_s_client_still_takes_the_date_from_where_we_put_it(monkeypatch, service, clean_environment):
    """If not, each signature sets the locale of the process, and costs as much again as compressing the put."""
    use_environment(clean_environment, service)
    client = client_for(service)
    monkeypatch.setattr("locale.setlocale", lambda *_: pytest.fail("the locale is set"))
    dates = []
    take_date = client._auth._getGMT
    client._auth._getGMT = lambda: dates.append(take_date()) or dates[-1]
    put(client)
    assert len(dates) == 1 and dates[0].endswith(" GMT")


def signed_by_the_sdk(client, resource, size, body):
    """(request, token) of a put, by the signature that LogClient has."""
    headers = {**PUT_HEADERS, "Host": "%s.%s" % (PROJECT, client._logHost)}
    headers.update({"x-log-bodyrawsize": str(size), "Content-Length": str(len(body))})
    client._auth.sign_request("POST", resource, {}, headers, body)
    return client.factory.request("POST", resource, headers, body)


@pytest.mark.parametrize("region, begins", [("", b"LOG id:"), ("cn-test", b"SLS4-HMAC-SHA256 Credential=id/202609")])
@pytest.mark.parametrize("token", ["", "token/+="])
@pytest.mark.parametrize("proxied", [False, True])
def test_puts_are_signed_byte_for_byte_as_the_sdk_signs_them(
    monkeypatch, clean_environment, token, proxied, region, begins
):
    """With what is the same for many of them made once, which is what a release of the SDK might change."""
    if proxied:
        clean_environment.setenv("http_proxy", "http://user:password@127.0.0.1:9")
    access_keys = {"access_key_id": "id", "access_key": "secret", "security_token": token}
    client = PutClient(logstore_config(endpoint="sls.test", region=region, **access_keys))
    for day in (0, 0, 1):
        now = 1789000000.5 + 86400 * day
        monkeypatch.setattr("time.time", lambda now=now: now)

        class Clock(datetime.datetime):
            @classmethod
            def utcnow(cls, now=now):
                return cls(1970, 1, 1) + datetime.timedelta(seconds=now)

        monkeypatch.setattr("aliyun.log.auth.datetime", Clock)
        for logstore, body in (("nginx", b"x"), ("nginx", b"y" * 3000), ("click", b"z")):
            resource = "/logstores/%s/shards/lb" % logstore
            lean, its_token = client.sign(resource, 7, body)
            assert its_token == token
            parts = [one.partition(b"\r\n\r\n") for one in (lean, signed_by_the_sdk(client, resource, 7, body))]
            (lean_head, _, lean_body), (head, _, plain_body) = parts
            lean_lines, lines = lean_head.split(b"\r\n"), head.split(b"\r\n")
            assert (lean_lines[0], sorted(lean_lines), lean_body) == (lines[0], sorted(lines), plain_body)
            assert any(line.startswith(b"Authorization: " + begins) for line in lines)


@pytest.mark.parametrize("region", ["", "cn-hangzhou"])
def test_what_signatures_share_is_made_anew_for_another_key_second_and_day(clean_environment, region):
    moment = [0]
    fake = types.SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
    fake.time = lambda: moment[0]
    clean_environment.setattr(dispatch_data, "time", fake)

    def client():
        return PutClient(logstore_config(endpoint="sls.test", region=region, access_key_id="id", access_key="secret"))

    lasting, requests, keys = client(), set(), [dispatch_data.AccessKey("id", secret, "") for secret in ("one", "two")]
    for key, moment[0] in ((keys[0], 1.7e9), (keys[1], 1.7e9), (keys[1], 1.7e9 + 1), (keys[1], 1.7e9 + 86400)):
        fresh = client()
        fresh.credential_source.key = lasting.credential_source.key = key
        sent = [one.put_log_raw(PROJECT, "nginx", dispatch_data.PutRequest(b"")).request for one in (lasting, fresh)]
        assert sent[0] == sent[1]
        requests.add(sent[0])
    assert len(requests) == 4


def test_the_sdk_s_client_still_leaves_trying_again_to_us(service, clean_environment):
    """If not, LogClient repeats some failures ten times, a second apart, and a copy is slow to stop."""
    use_environment(clean_environment, service)
    with service.add_fault("PutLogs", status=500, code="InternalServerError") as fault:
        with pytest.raises(CallError) as caught:
            put(client_for(service))
        assert fault.hits == 1
    assert (caught.value.status, caught.value.code, caught.value.is_transient()) == (500, "InternalServerError", True)


@pytest.mark.parametrize(
    "status, code, is_transient",
    [
        (403, "ShardWriteQuotaExceed", True),
        (503, "ServerBusy", True),
        (404, "LogStoreNotExist", False),
        (401, "Unauthorized", False),
        (400, "PostBodyInvalid", False),
    ],
)
def test_failures_say_what_the_service_said(service, clean_environment, status, code, is_transient):
    use_environment(clean_environment, service)
    with service.add_fault("PutLogs", status=status, code=code):
        with pytest.raises(CallError, match="^%d %s: " % (status, code)) as caught:
            put(client_for(service))
    assert caught.value.is_transient() == is_transient


def test_without_an_answer_there_is_no_status(service, clean_environment):
    use_environment(clean_environment, service)
    with service.add_fault("PutLogs", cut="before"):
        with pytest.raises(CallError) as caught:
            put(client_for(service))
    assert caught.value.status is None and caught.value.is_transient()


@pytest.mark.skipif(platform.python_implementation() == "PyPy", reason="there all is left to the garbage collector")
def test_a_call_leaves_nothing_to_the_garbage_collector(service, clean_environment):
    """Python 3.14 runs it less often, and each call has a buffer: 50 MB more were seen."""
    use_environment(clean_environment, service)
    client = client_for(service)
    put(client)
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            put(client)
        assert gc.collect() == 0
    finally:
        gc.enable()
