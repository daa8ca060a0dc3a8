"""/metrics and /healthz: what they say of real copies, over real HTTP, and that they cost a copy nothing."""

import contextlib
import functools
import http.client
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from assertions import assert_all_delivered_once, assert_nothing_lost, logs_in
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    TARGET_LOGSTORES,
    TARGETS,
    SteadyFeed,
    feed,
    free_port,
    get,
    make_log_group,
    wait_until_begun,
    wait_until_delivered,
    wait_until_joined,
)
from prometheus_client.parser import text_string_to_metric_families

import dispatch_data

OF_A_TARGET = ("log_groups_total", "logs_total", "bytes_total", "put_retries_total", "set_aside_total", "puts_failing")
BOUNDS = [*map("{:g}".format, dispatch_data.Histogram.BOUNDS), "+Inf"]
OF_A_COPY = (
    "unmatched_log_groups_total",
    "unmatched_logs_total",
    "shards_held",
    "routes_differ",
    "lag_seconds",
    "last_heartbeat_timestamp_seconds",
    "build_info",
)


port = pytest.fixture(free_port)


def wait_for_health(service, port, status):
    """The text that came with this status."""
    answers = []

    def has_come():
        answers.append(get(port, "/healthz"))
        return answers[-1] is not None and answers[-1][0] == status

    service.wait_for(has_come, LIMIT, "status %d" % status)
    return answers[-1][1]


def metrics(port):
    """(name, target's number or "") -> value, read as Prometheus would."""
    status, text = get(port, "/metrics")
    assert status == 200
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            is_histogram = "put_duration_seconds" in sample.name
            kind = "histogram" if is_histogram else "counter" if sample.name.endswith("_total") else "gauge"
            assert family.type == kind
            key = sample.name[len("dispatch_data_") :], sample.labels.get("target", "")
            if is_histogram:
                assert set(sample.labels) - {"le"} == {"target", "logstore"}
                key = key[0] + sample.labels.get("le", ""), key[1]
            assert sample.name.startswith("dispatch_data_") and key not in samples
            samples[key] = sample.value
    return samples


# ---- metrics


def test_the_counts_are_those_of_the_ledgers(service, copies, port, tmp_path):
    refused = make_log_group("click", Source="refused") + b"\x28\x01"  # a field that the service's parser won't have
    strange = 'a "quoted" \\ topic\nof two lines{}'
    sent = Counter()
    with service.add_fault("PutLogs", logstore="nginx", status=403, code="WriteQuotaExceed") as fault:
        copy = copies.start(
            constants={"SUMMARY_INTERVAL": 0.3},
            SLS_METRICS_PORT=str(port),
            SLS_REJECTED_DIR=str(tmp_path),
            SLS_HEARTBEAT_INTERVAL="20",
        )
        feed(service, 40)
        service.put(PROJECT, SOURCE, [make_log_group(strange, log_count=3) for _ in range(2)])
        service.put(PROJECT, SOURCE, [refused])
        service.wait_for(lambda: get(port, "/metrics"), LIMIT, "somebody who listens")
        service.wait_for(lambda: metrics(port)["puts_failing", "1"] > 0, LIMIT, "puts that fail")
        service.wait_for(lambda: metrics(port)["put_retries_total", "1"] > 1, LIMIT, "puts that were tried again")
        assert metrics(port)["puts_failing", "2"] == 0
        fault.remove()
    wait_until_delivered(service)
    service.wait_for(lambda: metrics(port).get(("lag_seconds", "")) == 0, LIMIT, "no lag")
    for entry in service.ledger(PROJECT, SOURCE):
        if entry.log_group != refused:
            sent[TARGETS.get(entry.parse().Topic)] += 1
    found = metrics(port)
    for target, logstore in zip("123", TARGET_LOGSTORES):
        steps = [found.pop(("put_duration_seconds_bucket" + bound, target)) for bound in BOUNDS]
        assert steps == sorted(steps) and steps[-1] == found.pop(("put_duration_seconds_count", target))
        assert steps[-1] == len(service.ledger(PROJECT, logstore)), "each put that was taken"
        assert 0 < found.pop(("put_duration_seconds_sum", target)) < LIMIT * steps[-1]
    assert set(found) == {(name, target) for name in OF_A_TARGET for target in "123"} | {(one, "") for one in OF_A_COPY}
    for target, logstore in zip("123", TARGET_LOGSTORES):
        assert found["log_groups_total", target] == sent[logstore] > 0
        assert found["logs_total", target] == logs_in(service, logstore)
        taken = [one.log_group for one in service.ledger(PROJECT, logstore) if one.parse().Logs]
        assert found["bytes_total", target] == sum(map(len, taken))
        assert found["set_aside_total", target] == (logstore == "click")
        assert found["puts_failing", target] == 0
    assert (found["unmatched_log_groups_total", ""], found["unmatched_logs_total", ""]) == (2, 6)
    assert found["shards_held", ""] == 4 and found["build_info", ""] == 1
    assert abs(time.time() - found["last_heartbeat_timestamp_seconds", ""]) < LIMIT
    text = get(port, "/metrics")[1]
    assert "topic" not in text
    assert 'dispatch_data_logs_total{target="2",logstore="%s/sql-audit"} ' % PROJECT in text
    with service.add_fault("GetCheckPoint", status=403, code="ReadQuotaExceed"):
        service.wait_for(lambda: ("lag_seconds", "") not in metrics(port), LIMIT, "a lag that is unknown")
    assert copy.stop() == 0


@pytest.mark.quick
@pytest.mark.parametrize("name", ['"', "\\", '\\"', 'a\nb{c="d"} 1', "{}", "\\n", ""])
def test_no_name_breaks_a_label(name):
    text = "up%s 1\n" % dispatch_data.prometheus_labels(target=1, logstore=name)
    ((sample,),) = [family.samples for family in text_string_to_metric_families(text)]
    assert sample.labels == {"target": "1", "logstore": name}


@pytest.mark.quick
def test_a_histogram_counts_each_up_to_its_bound():
    histogram = dispatch_data.Histogram()
    for seconds in (0.0, 0.005, 0.006, 29.9, 30.0, 31.0):
        histogram.observe(seconds)
    samples = {name + labels: value for name, labels, value in histogram.samples("x", '{a="b"}')}
    assert len(samples) == len(BOUNDS) + 2
    assert samples['x_bucket{a="b",le="0.005"}'] == 2 and samples['x_bucket{a="b",le="10"}'] == 3
    assert samples['x_bucket{a="b",le="30"}'] == 5
    assert samples['x_bucket{a="b",le="+Inf"}'] == samples['x_count{a="b"}'] == 6
    assert samples['x_sum{a="b"}'] == pytest.approx(90.911)


# ---- health


def stuck_in(program, method):
    """It stands still while there is a file of that name."""
    import os
    import time

    class_name, name = method.split(".")
    owner = getattr(program, class_name)
    original = getattr(owner, name)

    def stuck(*arguments):
        while os.path.exists("stuck"):
            time.sleep(0.01)
        return original(*arguments)

    setattr(owner, name, stuck)


@pytest.mark.parametrize(
    ("loop", "method"),
    [
        ("tells", "GroupMember.report_recoveries"),
        ("joins", "Consumer.is_alive"),
        ("gives out work", "Heartbeat.get_held_shards"),
        ("sends heartbeats", "Heartbeat.send"),
        ("puts", "PutLoop.turn"),
        ("ends silent connections", "Deadline.is_over"),
        ("delivers shard", "Delivery.route"),
    ],
)
def test_a_loop_that_stands_still_is_told(service, copies, port, loop, method):
    """And no longer when it goes on."""
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 300)  # else a copy without heartbeats joins anew
    patch = functools.partial(stuck_in, method)
    copy = copies.start(patch=patch, constants={"WATCHDOG_TIMEOUT": 2.0}, SLS_METRICS_PORT=str(port))
    wait_until_joined(service, copy)
    assert wait_for_health(service, port, 200) == "ok\n"
    switch = copy.directory / "stuck"
    switch.touch()
    feed(service, 8)
    service.wait_for(lambda: "the loop that %s " % loop in get(port, "/healthz")[1], LIMIT, "the one that stands still")
    assert get(port, "/healthz")[0] == 503
    assert get(port, "/metrics")[0] == 200
    switch.unlink()
    wait_for_health(service, port, 200)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


def test_a_copy_that_has_lost_its_lease_holds_nothing(service, copies):
    """Others hold its shards by then: summed over copies they would count twice."""
    port = free_port()
    copy = copies.start(SLS_METRICS_PORT=str(port))
    wait_until_begun(service)
    service.wait_for(lambda: "dispatch_data_shards_held 4\n" in get(port, "/metrics")[1], LIMIT, "all shards")
    with service.add_fault("HeartBeat", status=503, code="ServerBusy"):
        with service.add_fault("ListConsumerGroup", status=503, code="ServerBusy"):
            service.wait_for(lambda: "dispatch_data_shards_held 0\n" in get(port, "/metrics")[1], LIMIT, "none")
            service.wait_for(lambda: "holds shards none, before: 0,1,2,3" in copy.log(), LIMIT, "a word about it")
    service.wait_for(lambda: "dispatch_data_shards_held 4\n" in get(port, "/metrics")[1], LIMIT, "all shards again")
    assert copy.stop() == 0


@pytest.mark.slow
def test_the_process_is_well_whatever_the_service_does_for_longer_than_the_minute(service, copies, port):
    """Silent from before the group is joined, refusing at the targets, silent again, gone: longer than a loop may stand
    still, and no call ends in that time."""
    standstill = 10.0  # which the process itself may take a while on a slow machine
    answers = Counter()

    def observe(what, has_come=lambda: True):
        """Looks at the health until something has come, and then for longer than a loop may stand still."""
        end = None

        def is_over():
            nonlocal end
            answers[get(port, "/healthz")] += 1
            if end is None and has_come():
                end = time.monotonic() + standstill * 1.2
            return end is not None and time.monotonic() > end

        service.wait_for(is_over, LIMIT, what)

    with service.add_fault("*", hold=True):
        # A batch in flight of a lost consumer is waited for, for a second more than GRACE.
        copies.start(
            constants={"WATCHDOG_TIMEOUT": standstill, "GRACE": 1.0, "SUMMARY_INTERVAL": 0.2},
            SLS_METRICS_PORT=str(port),
        )
        service.wait_for(lambda: get(port, "/healthz"), LIMIT, "somebody who listens")
        observe("a copy that has not joined")
    with service.add_fault("PutLogs", status=403, code="Unauthorized"):
        feed(service, 20)
        observe("targets that refuse", lambda: service.calls("PutLogs") > 3)
    with service.add_fault("*", hold=True):
        observe("a service that hangs")
    service.stop()
    observe("a service that is gone")
    service.start()
    assert set(answers) == {(200, "ok\n")}
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=100)  # a put that hangs may be taken, and is tried again


# ---- what it costs a copy: nothing


@pytest.mark.slow
def test_a_port_that_is_taken_is_warned_about_and_no_more(service, copies, port):
    seldom = {"SLS_HEARTBEAT_INTERVAL": "3"}  # so that none is late
    first = copies.start(SLS_METRICS_PORT=str(port), **seldom)
    wait_for_health(service, port, 200)
    second = copies.start(SLS_METRICS_PORT=str(port), **seldom)
    elsewhere = copies.start(SLS_METRICS_PORT=str(port), SLS_METRICS_HOST="192.0.2.1", **seldom)
    SteadyFeed(service).wait_until_shared(first, second, elsewhere)
    service.wait_for(
        lambda: metrics(port)["shards_held", ""] == len(first.held_shards(service)), LIMIT, "its own share told"
    )
    wait_until_delivered(service)
    assert [copy.stop() for copy in (first, second, elsewhere)] == [0, 0, 0]
    assert_all_delivered_once(service)
    assert first.stderr() == ""
    for copy, reason in ((second, "127.0.0.1 port %d" % port), (elsewhere, "192.0.2.1 port %d" % port)):
        (line,) = copy.stderr().splitlines()
        assert " WARNING SLS_METRICS_PORT: " in line and reason in line


def test_clients_that_ask_nothing_hold_up_neither_the_others_nor_the_stop(service, copies, port):
    def threads():
        return len(list(Path("/proc/%d/task" % copy.process.pid).iterdir()))

    copy = copies.start(SLS_METRICS_PORT=str(port), SLS_HEARTBEAT_INTERVAL="20")
    wait_until_joined(service, copy)
    feed(service, 40)
    wait_until_delivered(service)
    before = threads()
    clients = []
    for begun in [b"", b"GET /hea", b"\x16\x03\x01", b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n"] * 6:
        clients.append(socket.create_connection(("127.0.0.1", port)))
        clients[-1].sendall(begun)
    assert get(port, "/healthz") == (200, "ok\n")
    assert get(port, "/elsewhere?x=/healthz")[0] == 404
    assert threads() < before + len(clients) / 2
    for client in clients:  # each gets an answer, or is hung up on
        client.settimeout(LIMIT)
        while client.recv(1000):
            pass
        client.close()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert copy.stop(seconds=10) == 0
    assert copy.stderr() == ""


def silent(port):
    return socket.create_connection(("127.0.0.1", port))


def trickling(port):
    client = silent(port)
    client.sendall(b"GET /hea")
    return client


def not_reading(port):
    """One that asks again and again, and takes no answer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" * 50)
    return client


@pytest.mark.parametrize("count", [24, 40, 400])
@pytest.mark.parametrize("connect", [silent, trickling, not_reading])
def test_clients_that_are_silent_hold_up_no_probe(service, copies, port, count, connect):
    """Half of them are renewed between two probes of the kubelet. Their time is never over: a probe that they held up
    would wait in vain."""

    def of_process(kind):
        return len(list(Path("/proc/%d/%s" % (copy.process.pid, kind)).iterdir()))

    copy = copies.start(
        constants={"REQUEST_TIMEOUT": 10 * LIMIT}, SLS_METRICS_PORT=str(port), SLS_HEARTBEAT_INTERVAL="20"
    )
    wait_until_joined(service, copy)
    feed(service, 40)
    wait_until_delivered(service)
    threads, files = of_process("task"), of_process("fd")
    clients = []
    for _ in range(10):
        clients += [connect(port) for _ in range(count - len(clients))]
        with socket.create_connection(("127.0.0.1", port), LIMIT) as probe:
            probe.sendall(b"GET /healthz HTTP/1.1\r\nHost: pod\r\n\r\n")
            answer = b"".join(iter(lambda probe=probe: probe.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.0 200 OK\r\n") and answer.endswith(b"\r\n\r\nok\n")
        assert of_process("task") < threads + 8 and of_process("fd") < files + 100
        for client in clients[: count // 2]:
            client.close()
        del clients[: count // 2]
    assert copy.stop(seconds=10) == 0
    for client in clients:
        client.close()
    assert copy.stderr() == ""


def test_an_answer_that_the_kernel_does_not_take_at_once_arrives_whole(service, copies, port):
    """With a hundred targets, and a client that reads when others have been answered."""
    targets = {"SLS_LOGSTORE_TO%d" % number: "nginx" for number in range(100, 200)}
    topics = {"SLS_TOPIC_TO%d" % number: "topic-%d" % number for number in range(100, 200)}
    copies.start(SLS_METRICS_PORT=str(port), **targets, **topics, SLS_TOPIC_TO1="nginx", SLS_TOPIC_TO2="a",
                 SLS_TOPIC_TO3="b", patch=small_buffers, constants={"REQUEST_TIMEOUT": LIMIT})  # fmt: skip
    wait_for_health(service, port, 200)
    client = not_reading(port)
    assert get(port, "/healthz") == (200, "ok\n")
    client.settimeout(LIMIT)
    answer = b"".join(iter(lambda: client.recv(100000), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert ("Content-Length: %d" % len(body)).encode() in head and len(body) > 40000
    client.close()


def small_buffers(program):
    """What a client doesn't read waits in the program, not in the kernel."""
    import socket

    create = program.socket.create_server

    def creating(*arguments, **named):
        server = create(*arguments, **named)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return server

    program.socket.create_server = creating


def test_head_is_get_without_the_body_and_other_methods_are_refused(service, copies, port):
    copies.start(SLS_METRICS_PORT=str(port))
    wait_for_health(service, port, 200)

    def ask(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        connection.request(method, path)
        answer = connection.getresponse()
        with contextlib.closing(connection):
            return answer.status, answer.getheader("Content-Length"), answer.getheader("Content-Type"), answer.read()

    plain = "text/plain; version=0.0.4; charset=utf-8"
    assert ask("GET", "/healthz") == (200, "3", plain, b"ok\n")
    assert ask("HEAD", "/healthz") == (200, "3", plain, b"")
    status, length, _, body = ask("HEAD", "/metrics")
    assert (status, body) == (200, b"") and int(length) > 1000
    assert ask("HEAD", "/elsewhere") == (404, "0", plain, b"")
    assert [ask(method, "/healthz")[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [405] * 4


@pytest.mark.parametrize(
    "request_text, status",
    [
        (b"GET /healthz HTTP/1.0\n\n", b"200"),
        (b"GET /healthz?verbose HTTP/1.1\r\n\r\n", b"200"),
        (b"GET\r\n\r\n", b"404"),
        (b"\r\n\r\n", b"400"),
        (b"\xff\xfe\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 20000 + b"\r\n\r\n", b""),
    ],
)
def test_each_request_gets_the_answer_that_it_deserves(service, copies, port, request_text, status):
    copies.start(SLS_METRICS_PORT=str(port))
    wait_for_health(service, port, 200)
    with socket.create_connection(("127.0.0.1", port), LIMIT) as client:
        client.sendall(request_text)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = b"".join(iter(lambda: client.recv(1000), b""))
    assert answer[:12] == (b"HTTP/1.0 " + status if status else b"")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("host, addresses", [("::", ["127.0.0.1", "::1"]), ("::1", ["::1"])])
def test_it_is_served_on_the_addresses_of_either_kind(service, copies, port, host, addresses):
    copy = copies.start(SLS_METRICS_PORT=str(port), SLS_METRICS_HOST=host)
    wait_until_joined(service, copy)
    for address in addresses:
        with socket.create_connection((address, port), LIMIT) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert b"".join(iter(lambda client=client: client.recv(1000), b"")).endswith(b"ok\n")


def test_few_open_files_are_left_to_the_logs(service, copies, port):
    copy = copies.start(SLS_METRICS_PORT=str(port), patch=few_files)
    wait_until_joined(service, copy)
    clients = [silent(port) for _ in range(100)]
    assert get(port, "/healthz") == (200, "ok\n")
    feed(service, 200)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    for client in clients:
        client.close()
    assert "TooManyOpenFiles" not in copy.stderr()


def few_files(program):
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_a_client_that_trickles_its_request_is_hung_up_on(service, copies, port):
    """Each byte comes in time, the whole doesn't."""
    copies.start(SLS_METRICS_PORT=str(port))
    wait_for_health(service, port, 200)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n")

        def is_hung_up_on():
            try:
                client.sendall(b"a")
            except ConnectionError:
                return True

        service.wait_for(is_hung_up_on, LIMIT, "the end of a request without end")


@pytest.mark.quick
@pytest.mark.parametrize("is_permanent", [True, False])
def test_a_permanent_loop_that_dies_counts_as_stuck(is_permanent):
    """One that belongs to a shard or a consumer doesn't: another takes its place."""
    watched = dispatch_data.Watchdog()
    with contextlib.suppress(MemoryError), watched.watching("a loop", is_permanent):
        raise MemoryError
    assert list(watched.stuck(-1.0)) == ["a loop"] * is_permanent
