"""How clients reach the local Log Service: over HTTP and HTTPS, from threads and processes, across restarts."""

import asyncio
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from aliyun.log import LogClient, LogException
from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, LogHubConfig
from aliyun.log.proto import Log, LogGroup
from local_log_service import LocalLogService, quick_acknowledgement

PROJECT = "reached-project"
TARGET = "target"
LIMIT = 60.0  # seconds that anything may take on a slow machine
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["http", "https"])
def log_service(request):
    with LocalLogService(https=request.param == "https") as running:
        running.create_logstore(PROJECT, TARGET, 2)
        yield running


def log_group(value):
    return LogGroup(Topic="nginx", Source="x", Logs=[Log(Time=1, Contents=[Log.Content(Key="key", Value=value)])])


def taken_values(service):
    return [entry.parse().Logs[0].Contents[0].Value for entry in service.ledger(PROJECT, TARGET)]


def process_environment(service):
    inherited = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
    return {**inherited, **service.environment()}


def test_one_client_of_many_calls(log_service):
    client = log_service.client()
    for number in range(20):
        client.put_log_raw(PROJECT, TARGET, log_group(str(number)))
    assert taken_values(log_service) == [str(number) for number in range(20)]
    large = "x" * 3000000
    client.put_log_raw(PROJECT, TARGET, log_group(large), compress=False)
    shard = log_service.ledger(PROJECT, TARGET)[-1].shard
    cursor = client.get_begin_cursor(PROJECT, TARGET, shard).get_cursor()
    pulled = client.pull_logs(PROJECT, TARGET, shard, cursor, compress=False)
    assert pulled.get_loggroup_list().LogGroups[-1].Logs[0].Contents[0].Value == large


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked():
    """Expect: 100-continue, as curl and some clients for Java say it before large bodies."""
    with LocalLogService() as service, socket.create_connection(("127.0.0.1", service.port), LIMIT) as connection:
        host = PROJECT + "." + service.endpoint.partition("://")[2]
        head = "POST /logstores/target HTTP/1.1\r\nHost: %s\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n" % host
        connection.sendall(head.encode())
        received = connection.makefile("rb")
        assert received.readline() == b"HTTP/1.1 100 Continue\r\n" and received.readline() == b"\r\n"
        connection.sendall(b"abc")
        assert received.readline().startswith(b"HTTP/1.1 401 ")  # it is not signed


def test_acknowledgement_at_once_is_asked_for_on_accept_and_after_every_answer(log_service, monkeypatch):
    # Without it every put through a proxy waits 40 ms on Linux, which no test of behaviour would notice.
    armed = []
    monkeypatch.setattr(quick_acknowledgement, "arm", armed.append)
    client = log_service.client()
    for _ in range(3):
        client.put_log_raw(PROJECT, TARGET, log_group("value"))
    log_service.wait_for(lambda: len(armed) >= 1 + 3, what="armed on accept and after three answers")
    assert all(isinstance(transport, asyncio.Transport) for transport in armed)


def test_a_client_ignores_the_environment_of_its_process(log_service, monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, "http://nowhere.test:1")
    environment = dict(os.environ)
    log_service.client().put_log_raw(PROJECT, TARGET, log_group("value"))
    assert taken_values(log_service) == ["value"]
    assert dict(os.environ) == environment


def test_many_clients_at_once(log_service):
    def put_twenty(name):
        client = log_service.client()
        for number in range(20):
            client.put_log_raw(PROJECT, TARGET, log_group("{}-{}".format(name, number)))

    threads = [threading.Thread(target=put_twenty, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {"{}-{}".format(name, number) for name in range(6) for number in range(20)}
    assert set(taken_values(log_service)) == expected
    assert len(taken_values(log_service)) == len(expected)
    sequences = [entry.sequence for entry in log_service.ledger(PROJECT, TARGET)]
    assert sequences == sorted(sequences)


PUTTER = """
import sys
from aliyun.log import LogClient
from aliyun.log.proto import Log, LogGroup
endpoint, project, logstore, name = sys.argv[1:]
client = LogClient(endpoint, "local-id", "local-secret", source="x")
for number in range(5):
    value = "{}-{}".format(name, number)
    group = LogGroup(Topic="t", Logs=[Log(Time=1, Contents=[Log.Content(Key="key", Value=value)])])
    client.put_log_raw(project, logstore, group)
"""


def test_several_processes_at_once_with_nothing_but_the_environment(log_service):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUTTER, log_service.endpoint, PROJECT, TARGET, str(name)],
            env=process_environment(log_service),
        )
        for name in range(2)
    ]
    assert [process.wait(LIMIT) for process in processes] == [0, 0]
    expected = {"{}-{}".format(name, number) for name in range(2) for number in range(5)}
    assert sorted(taken_values(log_service)) == sorted(expected)


def test_clients_may_leave_at_any_point(log_service, caplog):
    head = "POST /logstores/{} HTTP/1.1\r\nHost: {}.local-log-service.test\r\n".format(TARGET, PROJECT)
    parts = [head, head + "Content-Length: 100\r\n\r\n", head + "Content-Length: 100\r\n\r\nhalf"]
    parts.append(head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhalf")
    if log_service.endpoint.startswith("http:"):
        for part in parts:
            with socket.create_connection(("127.0.0.1", log_service.port), LIMIT) as connection:
                connection.sendall(part.encode("ascii"))
    with log_service.add_fault("PutLogs", delay=1.0) as fault:
        process = subprocess.Popen(
            [sys.executable, "-c", PUTTER, log_service.endpoint, PROJECT, TARGET, "leaves"],
            env=process_environment(log_service),
        )
        log_service.wait_for(lambda: fault.hits == 1, LIMIT, "a put")
        process.kill()
        process.wait()
        log_service.wait_for(lambda: taken_values(log_service), LIMIT, "the put taken although nobody waits for it")
    log_service.client().put_log_raw(PROJECT, TARGET, log_group("value"))
    assert taken_values(log_service) == ["leaves-0", "value"]
    # Of asyncio, the exceptions only: what is left of other tests may be complained of at any time.
    loggers = [(record.name.partition(".")[0], record.exc_info) for record in caplog.records]
    assert not [name for name, error in loggers if name != "asyncio" or error], caplog.text


def test_state_outlives_a_restart_on_the_same_port(log_service):
    client = log_service.client()
    client.put_log_raw(PROJECT, TARGET, log_group("before"))
    port = log_service.port
    log_service.stop()
    log_service.stop()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1.0)
    log_service.start()
    assert log_service.port == port
    log_service.client().put_log_raw(PROJECT, TARGET, log_group("after"))
    assert taken_values(log_service) == ["before", "after"]


def test_starting_twice_is_refused(log_service):
    with pytest.raises(RuntimeError):
        log_service.start()


@pytest.mark.parametrize("https", [False, True])
def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_behind(https, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as other:
        service = LocalLogService(https=https, port=other.getsockname()[1])
        with pytest.raises(OSError):
            service.start()
    assert set(threading.enumerate()) <= threads  # of others some may have ended
    assert list(tmp_path.iterdir()) == []
    with service:
        service.create_logstore(PROJECT, TARGET)
        service.client().list_shards(PROJECT, TARGET)


# HTTPS


def test_the_certificate_is_verified_and_the_authority_is_gone_after_stop():
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, TARGET)
        authority = service.environment()["REQUESTS_CA_BUNDLE"]
        proxies = {"https": service.environment()["https_proxy"]}
        url = "https://{}.local-log-service.test/logstores".format(PROJECT)
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(url, proxies=proxies)
        assert requests.get(url, proxies=proxies, verify=authority).status_code == 401  # unsigned, but encrypted
        assert os.path.exists(authority)
    assert not os.path.exists(authority)


def test_the_tunnel_leads_to_the_service_only():
    with LocalLogService(https=True) as service:
        for request in (
            b"CONNECT elsewhere.test:443 HTTP/1.1\r\n\r\n",
            b"GET http://p.local-log-service.test/ HTTP/1.1\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", service.port), LIMIT) as connection:
                connection.sendall(request)
                assert connection.makefile("rb").readline() == b"HTTP/1.1 403 Forbidden\r\n"


def test_a_tunnel_may_be_left_at_any_point():
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, TARGET)
        connect = "CONNECT {}.local-log-service.test:443 HTTP/1.1\r\n\r\n".format(PROJECT).encode("ascii")
        for sent in (b"", b"CONN", connect, connect + b"no TLS at all", b"\r\n" * 40000):
            with socket.create_connection(("127.0.0.1", service.port), LIMIT) as connection:
                connection.sendall(sent)
        service.client().put_log_raw(PROJECT, TARGET, log_group("value"))
        assert taken_values(service) == ["value"]


def test_cutting_ends_a_tunnelled_connection_too():
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, TARGET)
        client = service.client()
        with service.add_fault("PutLogs", cut="after") as fault:
            with pytest.raises(LogException, match="LogRequestError"):
                client.put_log_raw(PROJECT, TARGET, log_group("value"))
        assert fault.hits == 1  # over HTTPS the SDK does not repeat it
        assert taken_values(service) == ["value"]


def test_http_needs_none_of_the_libraries_for_certificates():
    program = (
        "import sys\n"
        "sys.modules['trustme'] = sys.modules['cryptography'] = None\n"
        "from local_log_service import LocalLogService\n"
        "with LocalLogService():\n"
        "    pass\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=str(TESTS), check=True, timeout=LIMIT)


def test_the_authority_stays_the_same_over_a_restart():
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, TARGET)
        environment = service.environment()
        context = ssl.create_default_context(cafile=environment["REQUESTS_CA_BUNDLE"])
        service.stop()
        service.start()
        assert service.environment() == environment
        assert context.get_ca_certs() == ssl.create_default_context(cafile=service._ca_file).get_ca_certs() != []
        service.client().put_log_raw(PROJECT, TARGET, log_group("value"))


def test_a_certificate_that_nobody_vouches_for_is_presented_to_new_connections_only():
    with LocalLogService(https=True) as service:
        service.create_logstore(PROJECT, TARGET)
        connected = service.client()
        connected.put_log_raw(PROJECT, TARGET, log_group("before"))
        service.present_certificate(trusted=False)
        connected.put_log_raw(PROJECT, TARGET, log_group("kept"))
        with pytest.raises(LogException, match="certificate verify failed"):
            service.client().list_shards(PROJECT, TARGET)
        service.present_certificate(trusted=True)
        service.client().put_log_raw(PROJECT, TARGET, log_group("after"))
        assert taken_values(service) == ["before", "kept", "after"]


def test_there_is_no_certificate_to_choose_without_https():
    with LocalLogService() as service, pytest.raises(RuntimeError):
        service.present_certificate(trusted=False)


@pytest.mark.parametrize("offset, refused", [(1200, True), (-1200, True), (600, False), (-600, False)])
def test_the_clock_of_the_service_may_be_off(offset, refused):
    with LocalLogService() as service:
        service.create_logstore(PROJECT, TARGET)
        client = service.client()
        service.clock_offset = offset
        if refused:
            with pytest.raises(LogException, match="RequestTimeExpired"):
                client.list_shards(PROJECT, TARGET)
            service.clock_offset = 0
        client.put_log_raw(PROJECT, TARGET, log_group("value"))
        assert abs(service.ledger(PROJECT, TARGET)[0].received_at - time.time()) < LIMIT


def test_a_tls_context_of_a_client_accepts_the_certificate():
    with LocalLogService(https=True, endpoint_host="another-host.test") as service:
        context = ssl.create_default_context(cafile=service.environment()["REQUESTS_CA_BUNDLE"])
        host = "any-project.another-host.test"
        with socket.create_connection(("127.0.0.1", service.port), LIMIT) as connection:
            connection.sendall("CONNECT {}:443 HTTP/1.1\r\n\r\n".format(host).encode("ascii"))
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            with context.wrap_socket(connection, server_hostname=host) as encrypted:
                encrypted.sendall("GET / HTTP/1.1\r\nHost: {}\r\n\r\n".format(host).encode("ascii"))
                assert encrypted.recv(1000).startswith(b"HTTP/1.1 401 ")


# The SDK's own consumers


class Collector(ConsumerProcessorBase):
    """Keeps the values of all logs and saves a checkpoint after each batch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def process(self, log_groups, check_point_tracker):
        for group in log_groups.LogGroups:
            self.values.extend(log.Contents[0].Value for log in group.Logs)
        check_point_tracker.save_check_point(True)


def test_the_workers_of_the_sdk_share_the_shards_and_consume_everything(monkeypatch):
    with LocalLogService() as service:
        service.create_logstore(PROJECT, "source", 4)
        for name, text in service.environment().items():
            monkeypatch.setenv(name, text)
        service.put(PROJECT, "source", [log_group(str(number)).SerializeToString() for number in range(40)])
        values = []
        workers = [
            ConsumerWorker(
                Collector,
                LogHubConfig(
                    service.endpoint,
                    "local-id",
                    "local-secret",
                    PROJECT,
                    "source",
                    "group",
                    name,
                    heartbeat_interval=1,
                    data_fetch_interval=0.1,
                ),
                args=(values,),
            )
            for name in ("first", "second")
        ]
        for worker in workers:
            worker.start()

        def shares():
            shards = service.consumer_group(PROJECT, "source", "group")["shards"].values()
            return sorted(shard["consumer"] for shard in shards if shard["state"] == "already_alloc")

        service.wait_for(lambda: shares() == ["first"] * 2 + ["second"] * 2, LIMIT, "the shards shared")
        service.put(PROJECT, "source", [log_group(str(number)).SerializeToString() for number in range(40, 80)])
        service.wait_for(lambda: service.lag(PROJECT, "source", "group") == 0, LIMIT, "everything consumed")
        for worker in workers:
            worker.shutdown()
        for worker in workers:
            worker.join(LIMIT)
        assert set(values) == {str(number) for number in range(80)}


# The command line


class Served:
    """A process that runs the command "serve" and what it printed."""

    def __init__(self, *arguments, module="local_log_service", directory=TESTS):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve"] + list(arguments),
            cwd=str(directory),
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )
        self.exports = {}
        for line in self.process.stdout:
            if line.startswith("#"):
                break
            command, assignment = shlex.split(line)
            assert command == "export"
            name, _, value = assignment.partition("=")
            self.exports[name] = value

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def client(self, monkeypatch):
        """An SDK client that was told no more than what was printed."""
        for name, value in self.exports.items():
            monkeypatch.setenv(name, value)
        names = ("SLS_ENDPOINT", "SLS_AK_ID", "SLS_AK_KEY")
        return LogClient(*(self.exports[name] for name in names), source="x")


@pytest.mark.parametrize("arguments, number", [([], signal.SIGTERM), (["--https", "--shards", "2"], signal.SIGINT)])
def test_the_command_serves_until_a_signal_and_what_it_prints_is_all_one_needs(arguments, number, monkeypatch):
    with Served(*arguments) as served:
        client = served.client(monkeypatch)
        project, source = served.exports["SLS_PROJECT"], served.exports["SLS_LOGSTORE"]
        assert (project, source) == ("demo-project", "source")
        assert client.list_shards(project, source).count == (2 if arguments else 4)
        for target in ("nginx", "sql-audit", "click"):
            client.put_log_raw(project, target, log_group("value"))
        assert [served.exports["SLS_LOGSTORE_TO%d" % place] for place in (1, 2, 3)] == ["nginx", "sql-audit", "click"]
        client.create_consumer_group(project, source, served.exports["SLS_CG"], 10)
        served.process.send_signal(number)
        assert served.process.wait(LIMIT) == 0
        if arguments:
            assert not os.path.exists(served.exports["REQUESTS_CA_BUNDLE"])


def test_the_command_runs_from_the_root_of_the_repository_on_a_given_port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with Served("--port", str(port), module="tests.local_log_service", directory=TESTS.parent) as served:
        assert served.exports["http_proxy"] == "http://127.0.0.1:{}".format(port)
        served.client(monkeypatch).list_shards("demo-project", "source")


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--shards", "0"], ["--shards", "many"], ["more"], ["--frobnicate"]]
)
def test_a_wrong_command_line_is_refused_with_status_2(arguments, capsys):
    from local_log_service.__main__ import main

    with pytest.raises(SystemExit) as exited:
        main(["serve"] + arguments)
    assert exited.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_taken_port_is_told_on_the_command_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finished = subprocess.run(
            [sys.executable, "-m", "local_log_service", "serve", "--port", str(port)],
            cwd=str(TESTS),
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
        )
    assert finished.returncode == 1
    assert str(port) in finished.stderr and "Traceback" not in finished.stderr
