"""Faults that tests order from the local Log Service."""

import threading
import time
from types import SimpleNamespace

import pytest
from aliyun.log import LogException, logclient
from aliyun.log.proto import LogGroup
from local_log_service import Fault, LocalLogService

pytestmark = pytest.mark.quick

PROJECT = "faulty-project"
TARGET = "target"
GROUP = LogGroup(Topic="nginx", Source="10.0.0.1")


@pytest.fixture(scope="module")
def running():
    with LocalLogService() as service:
        service.create_logstore(PROJECT, TARGET)
        service.create_logstore(PROJECT, "other")
        service.create_logstore("other-project", TARGET)
        yield service


@pytest.fixture
def log_service(running):
    yield running
    running.clear_faults()


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Keeps the SDK from pausing for a second before each of its ten attempts."""
    monkeypatch.setattr(logclient, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def put(log_service):
    """Puts once and returns the (status, code) of the refusal, None when it was taken."""
    client = log_service.client()

    def put_once(project=PROJECT, logstore=TARGET):
        try:
            client.put_log_raw(project, logstore, GROUP)
        except LogException as error:
            return error.get_resp_status(), error.get_error_code()

    return put_once


def taken(service, logstore=TARGET):
    return len(service.ledger(PROJECT, logstore))


def test_an_error_is_answered_and_nothing_is_taken(log_service, put):
    before = taken(log_service)
    fault = log_service.add_fault("PutLogs", status=403, code="ShardWriteQuotaExceed")
    assert isinstance(fault, Fault)
    assert put() == (403, "ShardWriteQuotaExceed")
    assert put() == (403, "ShardWriteQuotaExceed")
    assert (fault.hits, taken(log_service)) == (2, before)
    fault.remove()
    fault.remove()
    assert put() is None
    assert (fault.hits, taken(log_service)) == (2, before + 1)


@pytest.mark.parametrize(
    "named, answered",
    [
        ({"code": "WriteQuotaExceed"}, (403, "WriteQuotaExceed")),
        ({"status": 403}, (403, "WriteQuotaExceed")),
        ({"status": 401}, (401, "Unauthorized")),
        ({"status": 400}, (400, "ParameterInvalid")),
        ({"status": 413}, (413, "PostBodyTooLarge")),
        ({"code": "ExceedQuota"}, (403, "ExceedQuota")),
        ({"status": 404, "code": "MadeUp"}, (404, "MadeUp")),
        ({"status": 499, "code": "WriteQuotaExceed"}, (499, "WriteQuotaExceed")),
    ],
)
def test_status_and_code_find_each_other(log_service, put, named, answered):
    with log_service.add_fault("PutLogs", **named):
        assert put() == answered


@pytest.mark.parametrize("status, code", [(500, "InternalServerError"), (502, "BadGateway"), (503, "ServerBusy")])
def test_the_sdk_repeats_what_fails_on_the_side_of_the_service(log_service, put, status, code):
    before = taken(log_service)
    with log_service.add_fault("PutLogs", status=status) as fault:
        assert put() == (status, code)
    assert (fault.hits, taken(log_service)) == (10, before)


@pytest.mark.parametrize("share, hits", [(0.0, ""), (0.1, "0"), (0.3, "036"), (0.5, "02468"), (1.0, "0123456789")])
def test_a_share_of_the_calls_is_hit_evenly(log_service, put, share, hits):
    with log_service.add_fault("PutLogs", code="WriteQuotaExceed", share=share) as fault:
        refused = [str(number) for number in range(10) if put() is not None]
    assert "".join(refused) == hits
    assert fault.hits == len(hits)


def test_a_fault_knows_which_calls_it_has_befallen(log_service, put):
    before = time.monotonic()
    with log_service.add_fault("PutLogs", delay=0.01, share=0.5) as fault:
        assert [put() for _ in range(4)] == [None] * 4
    request_ids = [entry.request_id for entry in log_service.ledger(PROJECT, TARGET)[-4:]]
    assert list(fault.struck) == [request_ids[0], request_ids[2]]
    assert before <= min(fault.struck.values()) <= max(fault.struck.values()) <= time.monotonic()


@pytest.mark.parametrize("share", [0.01, 0.07, 0.29, 1 / 3, 0.55, 0.999])
def test_shares_are_exact_in_the_long_run(share):
    service = LocalLogService()
    fault = service.add_fault("PutLogs", code="WriteQuotaExceed", share=share)
    for _ in range(1000):
        fault.strikes("PutLogs", PROJECT, TARGET)
    assert fault.hits == -(-1000 * share // 1)


def test_a_fault_befalls_only_the_calls_it_is_meant_for(log_service, put):
    refused = (403, "WriteQuotaExceed")
    client = log_service.client()
    with log_service.add_fault("PutLogs", project=PROJECT, logstore=TARGET, code="WriteQuotaExceed"):
        assert put() == refused
        assert put(logstore="other") is None
        assert put(project="other-project") is None
        client.list_shards(PROJECT, TARGET)
    with log_service.add_fault("*", logstore=TARGET, code="WriteQuotaExceed"):
        assert put(project="other-project") == refused
        assert put(logstore="other") is None
        with pytest.raises(LogException, match="WriteQuotaExceed"):
            client.list_shards(PROJECT, TARGET)


def test_an_error_may_have_another_message(log_service):
    denied = "denied by sts or ram, action: log:PostLogStoreLogs, resource: target"
    for named in ({"code": "Unauthorized"}, {"status": 401}):
        with log_service.add_fault("PutLogs", message=denied, **named):
            with pytest.raises(LogException) as raised:
                log_service.client().put_log_raw(PROJECT, TARGET, GROUP)
        assert (raised.value.get_error_code(), raised.value.get_error_message()) == ("Unauthorized", denied)


def test_every_fault_can_be_cleared(log_service, put):
    log_service.add_fault("PutLogs", code="WriteQuotaExceed")
    log_service.add_fault("*", code="ServerBusy")
    log_service.clear_faults()
    assert put() is None


# Behind a proxy some releases of urllib3 report a broken connection in words that make the SDK try again.


def test_a_connection_cut_before_the_call_loses_it(log_service, put):
    before = taken(log_service)
    with log_service.add_fault("PutLogs", cut="before") as fault:
        assert put() == (200, "LogRequestError")  # the SDK's way to say that there was no answer
    assert fault.hits >= 1 and taken(log_service) == before
    assert put() is None


def test_a_connection_cut_after_the_call_leaves_its_effect(log_service, put):
    before = taken(log_service)
    with log_service.add_fault("PutLogs", cut="after") as fault:
        assert put() == (200, "LogRequestError")
    assert fault.hits >= 1 and taken(log_service) == before + fault.hits
    assert put() is None


def test_a_call_that_is_refused_anyway_is_answered_though_it_was_to_be_cut_after(log_service, put):
    with log_service.add_fault("PutLogs", cut="after"):
        assert put(logstore="missing") == (404, "LogStoreNotExist")


def test_a_delay_comes_before_the_call_takes_effect(log_service, put):
    began = time.time()
    with log_service.add_fault("PutLogs", delay=0.2) as fault:
        assert put() is None
    assert fault.hits == 1
    assert log_service.ledger(PROJECT, TARGET)[-1].received_at - began >= 0.2


def test_an_answer_may_trickle_in(log_service, put):
    """Byte by byte, and whole: of a call that is taken as of one that is refused; the next is answered at once."""
    began = time.monotonic()
    with log_service.add_fault("PutLogs", trickle=0.002) as fault:
        before = taken(log_service)
        assert put() is None
        assert time.monotonic() - began > 0.1
        with log_service.add_fault("PutLogs", code="WriteQuotaExceed"):
            assert put() == (403, "WriteQuotaExceed")
        log_service.client().list_shards(PROJECT, TARGET)
    assert put() is None
    assert (fault.hits, taken(log_service)) == (2, before + 2)


def test_a_service_with_a_client_that_waits_for_a_trickle_can_be_stopped():
    with LocalLogService() as service:
        service.create_logstore(PROJECT, TARGET)
        fault = service.add_fault("PutLogs", trickle=30)
        impatient = service.client()
        impatient.timeout = 0.5
        with pytest.raises(LogException):
            impatient.put_log_raw(PROJECT, TARGET, GROUP)
        service.wait_for(lambda: fault.hits == len(service.ledger(PROJECT, TARGET)) == 10)  # the SDK repeats it


def test_held_calls_wait_for_the_fault_to_be_removed(log_service, put):
    before = taken(log_service)
    fault = log_service.add_fault("PutLogs", hold=True)
    callers = [threading.Thread(target=put) for _ in range(3)]
    for caller in callers:
        caller.start()
    log_service.wait_for(lambda: fault.hits == 3, what="three calls held")
    log_service.client().list_shards(PROJECT, TARGET)  # others are not held up
    assert taken(log_service) == before
    assert all(caller.is_alive() for caller in callers)
    fault.remove()
    for caller in callers:
        caller.join()
    assert taken(log_service) == before + 3


def test_a_held_call_whose_client_has_gone_is_not_taken(log_service, put):
    before = taken(log_service)
    fault = log_service.add_fault("PutLogs", hold=True)
    impatient = log_service.client()
    impatient.timeout = 0.5
    with pytest.raises(LogException, match="timed out"):
        impatient.put_log_raw(PROJECT, TARGET, GROUP)
    log_service.wait_for(lambda: fault.hits == 10)  # the SDK repeats it, ten connections in all
    impatient._session.close()
    for _ in range(2):  # once these are answered, the service knows that the client has gone
        log_service.client().list_shards(PROJECT, TARGET)
    fault.remove()
    assert put() is None
    assert taken(log_service) == before + 1


def test_a_service_that_holds_calls_can_be_stopped():
    service = LocalLogService()
    service.create_logstore(PROJECT, TARGET)
    service.start()
    client = service.client()
    failures = []

    def put_once():
        try:
            client.put_log_raw(PROJECT, TARGET, GROUP)
        except LogException as error:
            failures.append(error.get_error_code())

    fault = service.add_fault("PutLogs", hold=True)
    caller = threading.Thread(target=put_once)
    caller.start()
    service.wait_for(lambda: fault.hits == 1)
    service.stop()
    caller.join()
    fault.remove()
    assert failures == ["LogRequestError"]
    assert service.ledger(PROJECT, TARGET) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"action": "PutLog", "status": 403},
        {"action": "PutLogs"},
        {"action": "PutLogs", "code": "MadeUp"},
        {"action": "PutLogs", "status": 403, "share": 1.1},
        {"action": "PutLogs", "status": 403, "share": -0.1},
        {"action": "PutLogs", "trickle": -1},
        {"action": "PutLogs", "cut": "between"},
        {"action": "PutLogs", "status": 403, "cut": "after"},
    ],
)
def test_faults_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError):
        LocalLogService().add_fault(**arguments)


def test_a_deleted_logstore_hands_over_its_ledger(log_service):
    log_service.create_logstore(PROJECT, "passing")
    entries = log_service.put(PROJECT, "passing", [GROUP.SerializeToString()] * 2)
    assert log_service.delete_logstore(PROJECT, "passing") == entries
    log_service.create_logstore(PROJECT, "passing")
    assert log_service.ledger(PROJECT, "passing") == []
