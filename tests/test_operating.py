"""What an operator meets: --check, --status, refusals to start, the words for trouble, the summary, first contact."""

import concurrent.futures
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
import requests
from aliyun.log.proto import LogGroup
from assertions import assert_all_delivered_once, assert_delivered_once
from harness import (
    AND_A_CATCH_ALL,
    GROUP,
    LIMIT,
    PROGRAM,
    PROJECT,
    SOURCE,
    SteadyFeed,
    feed,
    free_port,
    get,
    group_shards,
    make_log_group,
    program_with,
    run_program,
    settings_for,
    wait_until_begun,
    wait_until_delivered,
    wait_until_joined,
    wait_until_shared,
)
from local_log_service import ForeignAnswer

import dispatch_data
from dispatch_data import PROBE_CONCURRENCY


def run(service, *arguments, program=PROGRAM, **changes):
    """Runs the program to its end; its exit status and the lines of both streams."""
    ended = run_program(settings_for(service, **changes), *arguments, program=program)
    assert "Traceback" not in ended.stderr + ended.stdout
    assert "local-secret" not in ended.stderr + ended.stdout
    return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()


# ---- first contact


def test_with_nothing_set_it_says_what_is_missing_and_where_to_look(tmp_path):
    ended = run_program({}, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    lines = ended.stderr.splitlines()
    missing = [re.match(r"dispatch_data\.py: (\w+) is missing: ", line).group(1) for line in lines[:-1]]
    assert missing == [
        "SLS_ENDPOINT",
        "SLS_AK_ID",
        "SLS_AK_KEY",
        "SLS_PROJECT",
        "SLS_LOGSTORE",
        "SLS_CG",
        "SLS_LOGSTORE_TO1",
    ]
    assert ".env.example" in lines[-1] and "tests.local_log_service demo" in lines[-1]
    assert list(tmp_path.iterdir()) == []
    command = lines[-1].partition("without a cloud account: ")[2]
    shown = subprocess.run(["sh", "-c", command + " --help"], cwd=str(tmp_path), env={}, capture_output=True, text=True)
    assert shown.returncode == 0 and "--seconds" in shown.stdout


def test_alone_it_points_to_no_demonstration(tmp_path):
    """As in a container, where nothing lies beside it."""
    shutil.copy(str(PROGRAM), str(tmp_path))
    ended = run_program({}, program=tmp_path / PROGRAM.name)
    assert ended.stderr.splitlines()[-1].endswith("explained in .env.example")


@pytest.mark.parametrize(
    "arguments",
    [["--json"], ["--max-lag", "5"], ["--status", "--max-lag", "soon"], ["--check", "--status"], ["start"]]
    + [["--offline"], ["--status", "--offline"], ["--route"], ["--route", "a", "--check"]],
)
def test_arguments_that_make_no_sense_are_refused(service, arguments):
    status, stdout, stderr = run(service, *arguments)
    assert (status, stdout) == (2, [])
    assert stderr[-1].startswith("dispatch_data.py: error: ")


# ---- --check


def calls_that_change_something(service):
    return {
        name: count
        for name, count in service.calls().items()
        if name not in ("ListShards", "ListConsumerGroup", "GetCheckPoint", "GetCursor", "GetCursorTime")
    }


def test_check_of_what_is_right(service):
    status, stdout, stderr = run(service, "--check")
    assert (status, stderr) == (0, [])
    (fingerprint,) = re.findall(r"(?m)^routes +([0-9a-f]{6})$", "\n".join(stdout))
    assert [re.sub(r" +", " ", line) for line in stdout] == [
        "source test-project/source fine: 4 shards, consumer group dispatch will be made, beside 0 others",
        "TO1 test-project/nginx fine: 2 shards",
        "TO2 test-project/sql-audit fine: 2 shards",
        "TO3 test-project/click fine: 2 shards",
        'TO1 test-project/nginx takes "ngnix", "nginx"',
        'TO2 test-project/sql-audit takes "sql_audit"',
        'TO3 test-project/click takes "click"',
        "what no target takes is left out, and counted",
        "routes " + fingerprint,
        "SLS_CURSOR_START, where a group without checkpoints begins: begin",
        "no SLS_TOPIC_TO<n> is set: the default topics apply",
    ]
    assert calls_that_change_something(service) == {}


def test_check_of_a_group_that_exists(service):
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 40, False)
    assert run(service, "--check", SLS_HEARTBEAT_INTERVAL="20")[1][0].endswith(
        "fine: 4 shards, consumer group dispatch exists"
    )


def test_check_says_how_it_finds_the_group(service):
    """Its timeout, its order, and whether another program uses it; a start leaves all that as it is and says it too."""
    client = service.client()
    client.create_consumer_group(PROJECT, SOURCE, GROUP, 300, True)
    client.heart_beat(PROJECT, SOURCE, GROUP, "somebody-elses-consumer", [])
    begin = client.get_begin_cursor(PROJECT, SOURCE, 0).get_cursor()
    client.update_check_point(PROJECT, SOURCE, GROUP, 0, begin, "somebody-elses-consumer", False)
    line = run(service, "--check", SLS_HEARTBEAT_INTERVAL="20")[1][0]
    assert "keeps its timeout of 300 s, where SLS_HEARTBEAT_INTERVAL=20 would make it 40" in line
    assert "consumes in order, and keeps that" in line
    assert "another program (somebody-elses-consumer)" in line


def test_check_names_the_variable_to_mend(service):
    service.access_keys["other-id"] = "other-secret"
    status, stdout, stderr = run(
        service,
        "--check",
        SLS_LOGSTORE_TO1="ngix",
        SLS_PROJECT_TO2="no-such-project",
        SLS_AK_ID_TO="other-id",
        SLS_AK_KEY_TO="wrong-secret",
        SLS_AK_ID_TO1="local-id",
        SLS_AK_KEY_TO1="local-secret",
        SLS_AK_ID_TO2="local-id",
        SLS_AK_KEY_TO2="local-secret",
    )
    assert (status, stderr) == (1, [])
    assert re.search("fine", stdout[0])
    for line, words in zip(
        stdout[1:],
        (
            ("TO1 test-project/ngix", "wrong: 404 LogStoreNotExist: ", "SLS_LOGSTORE_TO1 must exist in the project"),
            ("TO2 no-such-project/", "wrong: 404 ProjectNotExist: ", "SLS_PROJECT_TO2 must exist", "of SLS_ENDPOINT"),
            ("TO3 ", "wrong: 401 SignatureNotMatch: ", "SLS_AK_KEY_TO must be the secret of SLS_AK_ID_TO"),
        ),
    ):
        assert all(word in line for word in words), line
        assert "wrong-secret" not in line


def test_check_does_not_blame_a_key_that_may_only_write(service):
    """A target needs log:PostLogStoreLogs alone; that the key may not look says nothing of that."""
    with service.add_fault("ListShards", logstore="click", status=401, code="Unauthorized"):
        status, stdout, _ = run(service, "--check")
    assert status == 0
    assert re.search("TO3 .* could not verify: ", stdout[3])


def test_check_of_a_service_that_is_not_there(service):
    with service.add_fault("*", cut="before"):
        status, stdout, _ = run(service, "--check")
    assert status == 1
    assert all("not reachable now: " in line and "SLS_ENDPOINT must be reachable" in line for line in stdout[:4])


def test_check_tells_of_a_logstore_full_of_groups(service):
    client = service.client()
    for number in range(10):
        client.create_consumer_group(PROJECT, SOURCE, "group-%d" % number, 20)
    status, stdout, _ = run(service, "--check")
    assert status == 0  # newer logstores take 30
    assert "fine: " in stdout[0] and "beside 10 others, which may be as many as the logstore takes" in stdout[0]


def test_check_does_not_blame_a_key_that_may_not_list_groups(service):
    with service.add_fault("ListConsumerGroup", status=401, code="Unauthorized"):
        status, stdout, _ = run(service, "--check")
    assert status == 0
    assert "fine: 4 shards, could not verify the consumer group" in stdout[0]


@pytest.mark.parametrize("code, verdict", [("Unauthorized", "wrong: "), ("ServerBusy", "not reachable now: ")])
def test_a_key_that_may_not_list_groups_is_no_reason_to_overlook_the_rest(service, code, verdict):
    """That the group's checkpoints can't be read, which a copy could not work without."""
    with service.add_fault("ListConsumerGroup", status=401, code="Unauthorized"):
        with service.add_fault("GetCheckPoint", status=401 if code == "Unauthorized" else 503, code=code):
            status, stdout, _ = run(service, "--check")
    assert status == 1
    assert verdict in stdout[0] and code in stdout[0]


def test_check_tells_what_the_settings_came_to(service, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    changes = {"SLS_TOPIC_TO%d" % number: None for number in (2, 3)}
    changes.update({"SLS_LOGSTORE_TO%d" % number: None for number in (2, 3)})
    stdout = run(service, "--check", SLS_TOPIC_TO1="a[1]", SLS_X="x", SLS_CURSOR_START="2018-12-26", **changes)[1]
    note, unknown, brackets, offset = stdout[5:]
    assert note.endswith("a group without checkpoints begins: 2018-12-26 00:00:00 +0800 (2018-12-25 16:00:00 UTC)")
    assert unknown == "warning: SLS_X is not a setting of this program; did you mean SLS_CG?"
    assert brackets.startswith("warning: SLS_TOPIC_TO1: 'a[1]' is a pattern")
    assert offset.startswith("warning: SLS_CURSOR_START: '2018-12-26' has no offset")


def test_check_shows_who_takes_what_and_offline_asks_nobody(service):
    changes = {**AND_A_CATCH_ALL, "SLS_TOPIC_TO1": "nginx,access_*,a[*]b", "SLS_TOPIC_TO2": "[],sql_audit,b?,c[ ]"}
    routes = [
        'TO1 test-project/nginx takes "nginx", "a*b", what is like access_*',
        r'TO2 test-project/sql-audit takes "sql_audit", "c\u0020", what has no topic, what is like b?',
        'TO3 test-project/click takes "click"',
        "TO4 test-project/rest takes what is left",
    ]
    for options in (["--check"], ["--check", "--offline"]):
        before = sum(service.calls().values())
        status, stdout, _ = run(service, *options, **changes)
        lines = [re.sub(r" +", " ", line) for line in stdout]
        assert [line for line in lines if " takes " in line] == routes
        assert "left out" not in "".join(lines)
    assert status == 0 and sum(service.calls().values()) == before
    assert run(service, "--check", "--offline", SLS_WRITERS="0")[0] == 2
    agent = "http://%s" % service.endpoint.rpartition("//")[2]
    assert run(service, "--check", "--offline", SLS_AK_ID=None, SLS_AK_KEY=None, SLS_CREDENTIALS=agent)[0] == 0
    assert sum(service.calls().values()) == before


def test_route_says_where_a_topic_goes_and_by_which_variable(service):
    changes = {"SLS_TOPIC_TO1": "nginx,access_*", "SLS_TOPIC_TO2": "access_sql,[]", "SLS_TOPIC_TO3": "\u65e5\u5fd7"}
    status, stdout, stderr = run(service, "--route", "access_x", "access_sql", "", "\u65e5\u5fd7", **changes)
    assert (status, stderr) == (0, [])
    assert [re.sub(r" +", " ", line) for line in stdout] == [
        "access_x TO1 test-project/nginx SLS_TOPIC_TO1=nginx,access_*",
        "access_sql TO2 test-project/sql-audit SLS_TOPIC_TO2=access_sql,[]",
        "[] TO2 test-project/sql-audit SLS_TOPIC_TO2=access_sql,[]",
        "\u65e5\u5fd7 TO3 test-project/click SLS_TOPIC_TO3=\u65e5\u5fd7",
    ]
    status, (here, nowhere), _ = run(service, "--route", "nginx", "Nginx", **changes)
    assert status == 1 and "TO1" in here
    assert nowhere.split() == ["Nginx", "nowhere", "no", "SLS_TOPIC_TO<n>", "has", "it"]
    assert service.calls() == {}


def test_a_start_that_the_group_s_checkpoints_override_is_said(service, copies):
    first = copies.start(SLS_CURSOR_START="begin")
    wait_until_begun(service)
    assert first.stop() == 0
    words = "consumer group dispatch has checkpoints and goes on from these, whatever SLS_CURSOR_START says"
    assert words not in first.log()
    second = copies.start(SLS_CURSOR_START="end")
    wait_until_joined(service, second)
    assert words in second.log()
    assert words in run(service, "--check", SLS_CURSOR_START="end")[1]


# ---- a start that makes no sense


REFUSALS = [
    ({"SLS_AK_KEY": "wrong-secret"}, "SignatureNotMatch", "SLS_AK_KEY must be the secret of SLS_AK_ID", 4),
    ({"SLS_AK_ID": "nobody"}, "AccessKeyId not found", "SLS_AK_ID must be a key that exists", 4),
    (
        {"SLS_PROJECT": "no-such-project", "SLS_PROJECT_TO": PROJECT},
        "ProjectNotExist",
        "SLS_PROJECT must exist in the region of SLS_ENDPOINT",
        1,
    ),
    ({"SLS_LOGSTORE": "no-such-logstore"}, "LogStoreNotExist", "SLS_LOGSTORE must exist in the project", 1),
    ({"SLS_LOGSTORE_TO2": "no-such-logstore"}, "LogStoreNotExist", "SLS_LOGSTORE_TO2 must exist in the project", 1),
]


@pytest.mark.parametrize("changes, code, advice, places", REFUSALS, ids=[" ".join(row[0]) for row in REFUSALS])
def test_what_is_certainly_wrong_is_said_in_one_line_and_nothing_starts(
    service, tmp_path, changes, code, advice, places
):
    program = program_with(tmp_path, constants={"START_PATIENCE": LIMIT})
    status, stdout, stderr = run(service, program=program, SLS_LOG_DIR="", **changes)
    assert (status, stdout) == (1, [])
    (line,) = stderr
    assert code in line and advice in line and "wrong-secret" not in line
    assert len(re.findall(r"(source|TO\d) [\w-]+/[\w-]+", line)) == places
    assert calls_that_change_something(service) == {}


def test_a_key_that_may_not_read_the_source_is_certainly_wrong(service):
    with service.add_fault("ListShards", logstore=SOURCE, status=401, code="Unauthorized"):
        status, _, (line,) = run(service, SLS_LOG_DIR="")
    assert status == 1
    assert "source test-project/source: 401 Unauthorized: " in line and "RAM policy" in line


def test_one_group_too_many_says_how_to_make_room(service):
    client = service.client()
    for number in range(30):
        client.create_consumer_group(PROJECT, SOURCE, "group-%d" % number, 20)
    status, _, (line,) = run(service, SLS_LOG_DIR="")
    assert status == 1
    assert "ConsumerGroupQuotaExceed" in line and "delete_consumer_group" in line
    assert "SLS_CG" not in line  # another group is somebody else's


def test_a_target_that_cannot_be_reached_yet_does_not_stop_the_start(service, copies):
    with service.add_fault("ListShards", logstore="click", cut="before") as fault:
        copy = copies.start()
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a look at the target")
    feed(service, 20)
    wait_until_delivered(service)
    assert "TO3 test-project/click: not reachable now: " in copy.stderr()
    assert copy.stop() == 0


# ---- whom a failed call blames


def test_a_machine_that_forbids_md5_is_told_what_does_without(service, copies, tmp_path):
    """As OpenSSL does in FIPS mode: calls with a body would fail before anything was sent."""
    program = program_with(tmp_path, no_md5)
    for option in ((), ("--check",), ("--status",)):
        ended = run_program(settings_for(service), *option, program=program)
        assert (ended.returncode, ended.stdout) == (2, "")
        (line,) = ended.stderr.splitlines()
        assert "SLS_REGION must be set: OpenSSL forbids MD5" in line
    ended = run_program(settings_for(service, SLS_REGION_TO=service.region), program=program)
    assert ended.returncode == 2  # for the source's sake
    copy = copies.start(patch=no_md5, SLS_REGION=service.region, SLS_HEARTBEAT_INTERVAL="20")
    feed(service, 40)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0 and copy.stderr() == ""


def no_md5(program):
    import hashlib

    def md5(*_, **__):
        raise ValueError("[digital envelope routines] unsupported")

    hashlib.md5 = md5


def failing_calls(program, method, error, switch=""):
    """Whatever is called so fails before anything is sent; with `switch`, while there is a file of that name."""
    import os

    original = getattr(program.LogClient, method)

    def failing(self, *arguments, **named):
        if not switch or os.path.exists(switch):
            raise getattr(__import__("builtins"), error)("ours")
        return original(self, *arguments, **named)

    setattr(program.LogClient, method, failing)


@pytest.mark.parametrize("method", ["list_shards", "list_consumer_group", "create_consumer_group"])
def test_a_defect_of_the_program_blames_nobody_else_and_ends_a_start(service, tmp_path, method):
    program = program_with(tmp_path, functools.partial(failing_calls, method, "TypeError"))
    ended = run_program(settings_for(service, SLS_LOG_DIR=""), program=program)
    assert ended.returncode == 1
    assert "LocalFailure: TypeError('ours'" in ended.stderr and "within this process" in ended.stderr
    assert "NotTheService" not in ended.stderr and "Traceback" not in ended.stderr


OF_A_START = ("get_check_point", "get_cursor", "list_shards", "create_consumer_group")
OF_A_RUN = ("heart_beat", "pull_logs", "update_check_point")


@pytest.mark.parametrize(
    "method, error, code",
    [(method, "ValueError", "LocalFailure") for method in OF_A_RUN]
    + [(method, "MemoryError", "OutOfMemory") for method in (*OF_A_RUN, *OF_A_START)],
)
def test_what_fails_within_the_program_is_told_as_such_and_tried_again(service, copies, tmp_path, method, error, code):
    """At a start, too, if it may pass."""
    switch = tmp_path / "fails"
    is_start = method in OF_A_START
    if is_start:
        switch.touch()
    copy = copies.start(
        patch=functools.partial(failing_calls, method, error, str(switch)),
        SLS_HEARTBEAT_INTERVAL="5" if method == "heart_beat" else "20",
    )
    if not is_start:
        wait_until_begun(service)
        switch.touch()
    feed(service, 20)
    service.wait_for(lambda: code in copy.stderr(), LIMIT, "a word about it")
    assert "NotTheService" not in copy.stderr() and "NoAnswer" not in copy.stderr()
    switch.unlink()
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


@pytest.mark.parametrize("logstore, place", [(SOURCE, "SLS_LOGSTORE"), ("nginx", "SLS_LOGSTORE_TO1")])
def test_a_logstore_whose_shards_are_not_there_yet_is_waited_for(service, copies, logstore, place):
    """As for a moment after it was made."""
    none_yet = ForeignAnswer(200, {}, b"[]", request_id=True)
    with service.add_fault("ListShards", logstore=logstore, answer=none_yet) as fault:
        assert "NoShards: " in "".join(run(service, "--check")[1])
        hits = fault.hits
        copy = copies.start(SLS_CURSOR_START="end")
        service.wait_for(lambda: fault.hits > hits and "NoShards: " in copy.stderr(), LIMIT, "a word about it")
        assert "%s has no shards yet" % place in copy.stderr()
        assert "NotTheService" not in copy.stderr()
    wait_until_begun(service)
    feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)


NO_CAS = {"empty": b"", "no PEM": b"\x30\x82\x01", "cut short": b"-----BEGIN CERTIFICATE-----\nMIIB\n"}


@pytest.mark.parametrize("content", NO_CAS.values(), ids=list(NO_CAS))
@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_file_without_cas_ends_a_start_and_is_named(service, tmp_path, variable, content):
    path = tmp_path / "cas.pem"
    path.write_bytes(content)
    for option in ((), ("--check",)):
        changes = {"REQUESTS_CA_BUNDLE": None, variable: str(path)}
        status, stdout, (line,) = run(service, *option, **changes)
        assert (status, stdout) == (2, [])
        assert "%s: %r is wrong; right would be a file of CA certificates in PEM" % (variable, str(path)) in line


def test_a_directory_in_which_openssl_finds_no_ca_ends_a_start(service, tmp_path):
    (tmp_path / "ca.pem").write_bytes(pathlib.Path(requests.certs.where()).read_bytes())
    status, _, (line,) = run(service, REQUESTS_CA_BUNDLE=str(tmp_path))
    assert status == 2
    assert "REQUESTS_CA_BUNDLE: " in line and "`openssl rehash`" in line


def test_a_file_of_cas_that_cannot_be_read_ends_a_start(service, tmp_path):
    path = tmp_path / "cas.pem"
    path.write_bytes(pathlib.Path(requests.certs.where()).read_bytes())
    assert run(service, "--check", REQUESTS_CA_BUNDLE=str(path))[0] == 0
    path.chmod(0)
    unreadable = "/proc/self/mem" if os.access(path, os.R_OK) else str(path)  # root may read the other
    status, _, (line,) = run(service, REQUESTS_CA_BUNDLE=unreadable)
    assert status == 2 and "REQUESTS_CA_BUNDLE: " in line


# ---- --status


def test_status_of_a_group_that_nobody_has_made(service):
    status, stdout, (line,) = run(service, "--status")
    assert (status, stdout) == (1, [])
    assert "consumer group dispatch: 404 ConsumerGroupNotExist" in line
    assert "not made yet" in line and "deleted" not in line


def test_status_shows_shards_holders_and_lag(service, copies):
    first, second = copies.start(), copies.start()
    wait_until_shared(service, first, second)
    feed(service, 40)
    wait_until_delivered(service)
    service.split_shard(PROJECT, SOURCE, 0)
    assert [first.stop(), second.stop()] == [0, 0]
    (late,) = service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.wait_for(lambda: time.time() > late.received_at + 2, LIMIT, "two seconds of lag")

    service.access_keys["reader"] = "reader-secret"
    status, stdout, stderr = run(service, "--status", SLS_AK_ID="reader", SLS_AK_KEY="reader-secret")
    assert (status, stderr) == (0, [])
    header, *rows, total = stdout
    assert header.split() == ["shard", "status", "holder", "checkpoint", "behind", "updated"]
    columns = [header.index(name) for name in header.split()]
    cells = [[row[begin:end].strip() for begin, end in zip(columns, columns[1:] + [None])] for row in rows]
    assert [row[0] for row in cells] == [str(shard) for shard in range(len(rows))] and len(rows) >= 4
    assert [row[1] for row in cells[:4]] == ["readonly", "readwrite", "readwrite", "readwrite"]
    for row in cells[:4]:
        assert row[2].startswith("dispatch-")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row[3])
        assert re.fullmatch(r"\d+ s ago", row[5])
    assert [row[4] for row in cells[:2]] == ["0 s", "0 s"]
    assert int(cells[2][4].split()[0]) >= 2
    assert total.split()[0] == "all"

    status, stdout, _ = run(service, "--status", "--json")
    document = json.loads("\n".join(stdout))
    assert status == 0
    assert (document["project"], document["logstore"], document["consumer_group"]) == (PROJECT, SOURCE, GROUP)
    by_shard = {shard["shard"]: shard for shard in document["shards"]}
    assert by_shard[2]["behind_seconds"] >= 2 and by_shard[1]["behind_seconds"] == 0
    assert by_shard[2]["checkpoint_time"] == int(late.received_at)
    assert abs(by_shard[2]["updated_time"] - time.time()) < 3600
    assert document["behind_seconds"] == by_shard[2]["behind_seconds"]


def test_max_lag_is_an_alarm(service, copies):
    copy = copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert run(service, "--status", "--max-lag", "3600")[0] == 0
    assert copy.stop() == 0
    (late,) = service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.wait_for(lambda: time.time() > late.received_at + 2, LIMIT, "two seconds of lag")
    assert run(service, "--status", "--max-lag", "3600")[0] == 0
    assert run(service, "--status", "--json", "--max-lag", "1")[0] == 1
    service.expire(PROJECT, SOURCE, 2, 11)
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    status, stdout, _ = run(service, "--status", "--max-lag", "3600")
    assert status == 1 and "expired" in stdout[3], "nobody knows how far behind it is"
    with service.add_fault("GetCheckPoint", status=403, code="ReadQuotaExceed"):
        status, stdout, (line,) = run(service, "--status", "--max-lag", "3600")
    assert (status, stdout) == (1, []) and "403 ReadQuotaExceed" in line


def test_a_group_that_has_delivered_everything_is_never_of_unknown_lag(service, copies):
    """Shards that hold nothing have nothing to deliver, whatever their checkpoints."""
    service.split_shard(PROJECT, SOURCE, 0)  # never had a log
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=1)
    service.split_shard(PROJECT, SOURCE, 1)
    service.expire(PROJECT, SOURCE, 1, 1)  # had none any more when the group began
    copy = copies.start(constants={"SUMMARY_INTERVAL": 0.5})
    feed(service, 40)
    wait_until_delivered(service)
    service.wait_for(lambda: " lag_seconds=0 " in copy.log(), LIMIT, "a summary without lag")
    assert copy.stop() == 0
    assert run(service, "--status", "--max-lag", "60")[0] == 0
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.set_ttl(PROJECT, SOURCE, 0)  # the checkpoint expires, and nothing is left behind it
    status, stdout, stderr = run(service, "--status", "--json", "--max-lag", "0")
    shards = {shard["shard"]: shard for shard in json.loads("\n".join(stdout))["shards"]}
    assert (status, stderr) == (0, [])
    assert {shard["behind_seconds"] for shard in shards.values()} == {0}
    assert [shards[number]["checkpoint"] for number in (0, 1)] == ["", ""]
    assert shards[2]["checkpoint"] and shards[2]["checkpoint_time"] is None


def test_a_group_that_has_not_begun_is_of_unknown_lag_where_there_are_logs(service):
    service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 20)
    assert run(service, "--status", "--max-lag", "3600")[0] == 0
    service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    status, stdout, _ = run(service, "--status", "--max-lag", "3600")
    assert status == 1 and stdout[3].split()[2:5] == ["-", "none", "-"] and "unknown" in stdout[-1]


def test_many_shards_are_asked_at_a_time(service, tmp_path):
    program = program_with(tmp_path, constants={"CHECK_TIMEOUT": LIMIT})
    service.create_logstore(PROJECT, "wide", 128)
    service.client().create_consumer_group(PROJECT, "wide", GROUP, 20)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        with service.add_fault("GetCursor", hold=True):
            running = thread.submit(run, service, "--status", program=program, SLS_LOGSTORE="wide")
            service.wait_for(lambda: service.calls("GetCursor") == PROBE_CONCURRENCY, LIMIT, "calls at a time")
        status, stdout, _ = running.result()
    assert status == 0
    assert [line.split()[0] for line in stdout] == ["shard", *map(str, range(128)), "all"]


def clock_ahead(program, seconds):
    import time

    right_time = time.time
    time.time = lambda: right_time() + seconds


@pytest.mark.parametrize("ahead", [-600, 600])
def test_a_clock_that_is_wrong_is_said_and_does_not_hide_the_lag(service, copies, tmp_path, ahead):
    copy = copies.start()
    wait_until_begun(service)
    assert copy.stop() == 0
    (late,) = service.put(PROJECT, SOURCE, [make_log_group("nginx")], shard=2)
    service.wait_for(lambda: time.time() > late.received_at + 4, LIMIT, "four seconds of lag")
    program = program_with(tmp_path, functools.partial(clock_ahead, ahead))
    for max_lag, expected in (("1", 1), ("300", 0)):
        arguments = "--status", "--json", "--max-lag", max_lag
        ended = run_program(settings_for(service), *arguments, program=program)
        document = json.loads(ended.stdout)
        assert ended.returncode == expected
        assert 2 <= document["behind_seconds"] < 300
        assert abs(document["time"] - time.time()) < 60
        words = r"this machine's clock is \d+ s %s the service's, " % ("ahead of" if ahead > 0 else "behind")
        assert re.match(words, ended.stderr)


@pytest.mark.parametrize("arguments", [["--status", "--json"], ["--status"], ["--check"]])
def test_who_takes_the_first_lines_alone_hears_nothing_of_it(service, arguments):
    """As `head` does; what comes after them, it would not have read either."""
    if "--status" in arguments:
        service.client().create_consumer_group(PROJECT, SOURCE, GROUP, 20)
    taker, giver = os.pipe()
    os.close(taker)
    with open(giver, "wb") as stdout:
        command = [sys.executable, str(PROGRAM), *arguments]
        ended = subprocess.run(command, env=settings_for(service), stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_status_changes_nothing(service, copies):
    copy = copies.start()
    wait_until_delivered(service)
    assert copy.stop() == 0
    for _ in range(2):  # once these are answered, none of its own is left unread
        service.client().list_shards(PROJECT, SOURCE)
    before = calls_that_change_something(service)
    run(service, "--status")
    assert calls_that_change_something(service) == before


# ---- trouble, told once, then in sums


CODES = [
    ("PutLogs", 401, "Unauthorized", "RAM policy"),
    ("PutLogs", 401, "SignatureNotMatch", "SLS_AK_KEY must be the secret of SLS_AK_ID"),
    ("PutLogs", 401, "InvalidAccessKeyId", "SLS_AK_ID must be a key that exists"),
    ("PutLogs", 403, "WriteQuotaExceed", "ask for more"),
    ("PutLogs", 403, "ShardWriteQuotaExceed", "split some"),
    ("PutLogs", 404, "LogStoreNotExist", "SLS_LOGSTORE_TO3 must exist"),
    ("PutLogs", 404, "ProjectNotExist", "SLS_PROJECT must exist"),
    ("PutLogs", 400, "RequestTimeExpired", "clock"),
    ("PutLogs", 400, "PostBodyInvalid", "SLS_REJECTED_DIR"),
    ("PutLogs", 400, "PostBodyTooLarge", "SLS_REJECTED_DIR"),
    ("PutLogs", 400, "ParameterInvalid", "SLS_REJECTED_DIR"),
    ("PutLogs", 500, "InternalServerError", "should pass"),
    ("PutLogs", 503, "ServerBusy", "should pass"),
    ("PutLogs", 502, "BadGateway", "should pass"),
    ("PullLogs", 403, "ReadQuotaExceed", "ask for more"),
    ("PullLogs", 403, "ShardReadQuotaExceed", "read at its limit"),
    ("HeartBeat", 404, "ConsumerGroupNotExist", "start the copies again"),
    ("UpdateCheckPoint", 400, "InvalidShardCheckPoint", "a checkpoint is not saved yet"),
]


@pytest.mark.parametrize("action, status, code, advice", CODES, ids=[row[2] for row in CODES])
def test_every_refusal_is_told_in_a_line_that_says_what_to_do(service, copies, action, status, code, advice):
    copy = copies.start()
    wait_until_begun(service)
    logstore = "click" if action == "PutLogs" else SOURCE
    with service.add_fault(action, logstore=logstore, status=status, code=code) as fault:
        feed(service, 8, topics=("click",))
        service.wait_for(lambda: fault.hits >= 4 and code in copy.stderr(), LIMIT, "a word about the refusal")
    wait_until_delivered(service)
    service.wait_for(lambda: "recovered after" in copy.stderr(), LIMIT, "a word about its end")
    assert copy.stop() == 0
    told, *rest = [line for line in copy.stderr().splitlines() if code in line]
    subject = "TO3 test-project/click: " if action == "PutLogs" else "source test-project/source: "
    assert subject in told and "%d %s: " % (status, code) in told and advice in told
    assert len(rest) <= 1, "a flood"
    assert "Traceback" not in copy.stderr()
    assert re.search(re.escape(subject) + r"\w+ recovered after \d+ failed tries in \d+ s", copy.stderr())


# ---- the summary, as documented in the README


def pairs(line):
    return dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line))


def test_the_summary_is_key_value_pairs(service, copies):
    feed(service, 30, topics=("nginx", "sql_audit", 'debug "x"'))
    copy = copies.start(constants={"SUMMARY_INTERVAL": 1e9}, SLS_HEARTBEAT_INTERVAL="20")  # there is but the last
    wait_until_delivered(service)
    wait_until_shared(service, copy)
    assert copy.stop() == 0
    lines = [line.partition(" INFO summary ")[2] for line in copy.log().splitlines() if " INFO summary " in line]
    first, second, third, source = map(pairs, lines)
    size = sum(len(entry.log_group) for entry in service.ledger(PROJECT, SOURCE) if entry.parse().Topic == "nginx")
    assert first == {
        "target": "1",
        "logstore": "test-project/nginx",
        "groups": "10",
        "logs": "50",
        "bytes": first["bytes"],
        "retries": "0",
        "failing": "0",
        "set_aside": "0",
    }
    assert 0 < int(first["bytes"]) <= size
    assert (second["target"], second["logs"], third["logs"]) == ("2", "50", "0")
    assert source["shards"] == "0,1,2,3" and source["group"] == GROUP
    assert (source["unmatched_groups"], source["unmatched_logs"]) == ("10", "50")
    assert json.loads(source["unmatched_topics"]) == 'debug "x" 10'
    assert LogGroup.FromString(service.ledger(PROJECT, "nginx")[0].log_group).Topic == "nginx"


def test_the_summary_comes_with_the_lag(service, copies):
    copy = copies.start(constants={"SUMMARY_INTERVAL": 0.5})
    wait_until_delivered(service)
    with service.add_fault("PutLogs", hold=True):
        service.put(PROJECT, SOURCE, [make_log_group("nginx")])
        service.wait_for(
            lambda: re.search(r"lag_seconds=([2-9]|\d\d)\b", copy.log()),
            LIMIT,
            "a summary with the lag of a held batch",
        )
    wait_until_delivered(service)
    service.wait_for(lambda: pairs(copy.log().splitlines()[-1]).get("lag_seconds") == "0", LIMIT, "a lag of 0")


# ---- where it logs, and under which name


def test_without_a_log_directory_everything_goes_to_stderr(service, copies):
    feed(service, 20)
    copy = copies.start(SLS_LOG_DIR="")
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert copy.log() == ""
    assert "INFO summary target=1 logstore=test-project/nginx groups=10 logs=50 " in copy.stderr()


def test_with_a_log_file_a_shared_nohup_out_gets_only_warnings(service, copies):
    feed(service, 20)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert copy.stderr() == ""
    assert "INFO summary target=1 logstore=test-project/nginx groups=10 logs=50 " in copy.log()
    (path,) = copy.directory.glob("*.log")
    assert path.name == "dispatch_data_%d.log" % copy.process.pid
    assert all(line.startswith(time.strftime("%Y-")) for line in copy.log().splitlines())


def test_an_entry_of_a_shard_without_its_checkpoint_is_one_of_a_shard_that_has_none(service, copies):
    """The service's pages don't say that it is there before there is one."""
    copy = copies.start()
    wait_until_begun(service)
    assert copy.stop() == 0

    def without_its_checkpoint(answer, _):
        entries = [{"shard": entry["shard"], "updateTime": 0} for entry in json.loads(answer.body)]
        return answer._replace(body=json.dumps(entries).encode())

    with service.add_fault("GetCheckPoint", mangle=without_its_checkpoint):
        for action in ("--check", "--status"):
            assert run(service, action)[0] == 0


def test_directories_of_the_machine_that_runs_copies_are_no_business_of_those_that_only_look(service, copies):
    """--status from anywhere, and settings that are tried in CI."""
    copy = copies.start()
    wait_until_begun(service)
    elsewhere = {"SLS_LOG_DIR": "/nowhere/logs", "SLS_REJECTED_DIR": "/nowhere/rejected"}
    says = {("--status",): "behind", ("--check", "--offline"): "click", ("--route", "click"): "click"}
    for arguments, word in says.items():
        status, stdout, stderr = run(service, *arguments, **elsewhere)
        assert (status, stderr) == (0, []) and word in "\n".join(stdout)
    for arguments in ([], ["--check"], ["--drain"]):
        status, _, stderr = run(service, *arguments, **elsewhere)
        assert status == 2 and [line.split(":")[1].strip() for line in stderr] == sorted(elsewhere, reverse=True)
    assert copy.stop() == 0


@pytest.mark.quick
def test_a_checkpoint_saved_by_a_clock_ahead_of_this_one_is_not_of_the_future():
    status = dispatch_data.ShardStatus(0, "readwrite", "holder", "MTIz", 1700000000, 0.0, 1700000000.3)
    table = dispatch_data.status_table([status], 0.0, 1700000000.0)
    assert " 0 s ago" in table and "-0" not in table


def no_log_file_at_first(program, switch):
    import errno
    import os

    begin = program.logging.FileHandler._open

    def no_space(self):
        if os.path.exists(switch):
            raise OSError(errno.ENOSPC, "No space left on device")
        return begin(self)

    program.logging.FileHandler._open = no_space


def test_a_disk_that_is_full_at_the_start_stops_nothing(service, copies, tmp_path):
    """The log file begins when there is room."""
    full = tmp_path / "full"
    full.touch()
    copy = copies.start(patch=functools.partial(no_log_file_at_first, str(full)))
    feed(service, 40)
    wait_until_delivered(service)
    service.wait_for(lambda: "can't write the log file" in copy.stderr(), LIMIT, "a word about it")
    assert "No space left on device" in copy.stderr() and copy.log() == ""
    full.unlink()
    assert copy.stop() == 0
    assert "ends with status 0" in copy.log()
    assert_all_delivered_once(service)


def process_1(program):
    program.os.getpid = lambda: 1


def test_two_containers_that_share_a_directory_write_two_files(service, copies, tmp_path):
    """Where each process has the id 1; who comes later takes the place of who has gone."""
    directory = tmp_path / "logs"
    directory.mkdir()

    one, two = directory / "dispatch_data_1.log", directory / "dispatch_data_1-2.log"

    def consumers_in(path):
        return set(re.findall("INFO consumer ([^ ]+)", path.read_text())) if path.exists() else set()

    def start():
        return copies.start(patch=process_1, SLS_LOG_DIR=str(directory))

    first = start()
    service.wait_for(lambda: consumers_in(one), LIMIT, "the first one's file")
    start()
    service.wait_for(lambda: consumers_in(two), LIMIT, "the second one's file")
    assert first.stop() == 0
    before = consumers_in(one)
    start()
    service.wait_for(lambda: consumers_in(one) > before, LIMIT, "the first one's file, gone on with")
    assert not consumers_in(one) & consumers_in(two)
    assert {path.name for path in directory.iterdir()} == {one.name, two.name}


@pytest.mark.quick
def test_a_log_file_that_is_full_goes_on_beside_another_of_its_name(tmp_path):
    files = [dispatch_data.QuietLogFile(str(tmp_path), None) for _ in range(2)]
    for round_number in range(30):
        for number, file in enumerate(files):
            file.maxBytes = 100
            file.handle(
                logging.makeLogRecord({"msg": "line %02d of file %d, of no great length" % (round_number, number)})
            )
    for file in files:
        file.close()
    names = {"dispatch_data_%d%s.log%s" % (os.getpid(), which, old) for which in ("", "-2") for old in ("", ".1", ".5")}
    assert names <= {path.name for path in tmp_path.iterdir()} and len(list(tmp_path.iterdir())) == 12
    for path in tmp_path.iterdir():
        assert set(re.findall(r"of file (\d)", path.read_text())) == {"1" if "-2" in path.name else "0"}


@pytest.mark.quick
def test_log_files_are_bounded_in_number_but_for_those_that_are_written_to(tmp_path):
    live = dispatch_data.QuietLogFile(str(tmp_path), None)
    others = ["nginx.log", "dispatch_data_x.log", "dispatch_data_7.log.gz", "dispatch_data_8.log.d"]
    of_live = [os.path.basename(live.baseFilename), os.path.basename(live.baseFilename) + ".1"]
    ended = [
        name
        for pid in range(1000001, 1000021)
        for name in ("dispatch_data_%d.log.1" % pid, "dispatch_data_%d.log" % pid)
    ]
    for age, name in enumerate([*of_live, *others, *ended]):
        path = tmp_path / name
        path.mkdir() if name.endswith(".d") else path.touch()
        os.utime(str(path), (age, age))
    dispatch_data.QuietLogFile(str(tmp_path), None).close()
    newest = [*ended, os.path.basename(live.stem) + "-2.log"][-live.KEPT :]
    assert {path.name for path in tmp_path.iterdir()} == {*newest, *others, *of_live}
    live.close()


def test_consumer_names_are_unique_and_allowed(service, copies):
    started = [copies.start() for _ in range(3)]
    service.wait_for(lambda: len(consumers(service)) == 3, LIMIT, "three consumers")
    names = consumers(service)
    for copy in started:
        (name,) = [name for name in names if "-%d-" % copy.process.pid in name]
        assert name.startswith(GROUP + "-")
        assert len(name) <= 63 and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def consumers(service):
    return service.consumer_group(PROJECT, SOURCE, GROUP)["consumers"] if group_shards(service) else {}


# ---- all of it


@pytest.mark.slow
def test_three_targets_in_two_accounts_five_copies_from_start_to_stop(service, copies):
    """As the README has it: checked, started, watched from outside, stopped; every log once where it belongs."""
    service.access_keys["their-id"] = "their-secret"
    service.create_logstore("their-project", "click")
    changes = {"SLS_PROJECT_TO3": "their-project", "SLS_AK_ID_TO3": "their-id", "SLS_AK_KEY_TO3": "their-secret"}
    status, stdout, _ = run(service, "--check", **changes)
    assert status == 0 and "TO3 their-project/click" in stdout[3]
    started = [copies.start(SLS_HEARTBEAT_INTERVAL="3", **changes) for _ in range(5)]
    service.wait_for(
        lambda: sorted(len(copy.held_shards(service)) for copy in started) == [0, 1, 1, 1, 1],
        LIMIT,
        "the shards shared",
    )
    sent = feed(service, 200)
    wait_until_delivered(service)
    status, stdout, _ = run(service, "--status", "--max-lag", "60", **changes)
    assert status == 0
    assert len({line.split()[2] for line in stdout[1:5]}) == 4, "a holder for each shard"
    assert [copy.stop() for copy in started] == [0] * 5
    places = [(PROJECT, "nginx"), (PROJECT, "sql-audit"), ("their-project", "click")]
    delivered = [entry.log_group for place in places for entry in service.ledger(*place)]
    assert_delivered_once(sent, delivered)
    assert {entry.parse().Topic for entry in service.ledger("their-project", "click")} == {"click"}


# ---- copies of one group whose routes differ


QUICK_LOOKS = {"SUMMARY_INTERVAL": 0.3, "GroupMember.RECENT_SAVE": 0.0}  # "recent" is the group's timeout then
OTHER_ROUTES = {"SLS_TOPIC_TO1": "nginx", "SLS_TOPIC_TO2": "sql_audit", "SLS_TOPIC_TO3": "click"}
SAME_ROUTES = {"SLS_TOPIC_TO1": "click", "SLS_TOPIC_TO2": "sql_audit", "SLS_TOPIC_TO3": "nginx,ngnix",
               "SLS_LOGSTORE_TO1": "click", "SLS_LOGSTORE_TO3": "nginx"}  # fmt: skip


def test_copies_whose_routes_differ_are_told_of_each_other_until_they_agree(service, copies):
    port = free_port()

    def routes_of(copy):
        return re.search("INFO consumer [^ ]+_([0-9a-f]{6})-%d-" % copy.process.pid, copy.log()).group(1)

    first = copies.start(constants=QUICK_LOOKS, SLS_METRICS_PORT=str(port))
    same = copies.start(constants=QUICK_LOOKS, **SAME_ROUTES)
    other = copies.start(constants=QUICK_LOOKS, **OTHER_ROUTES)
    flow = SteadyFeed(service)
    flow.wait_until_shared(first, same, other)
    flow.wait_for(lambda: "dispatch_data_routes_differ 1\n" in get(port, "/metrics")[1], "a metric")
    flow.wait_for(lambda: all("has the routes" in copy.stderr() for copy in (first, same, other)), "a word from all")
    assert routes_of(first) == routes_of(same) != routes_of(other)
    words = r"WARNING source %s/%s: consumer .*-%d-\S+ has the routes %s, this copy has %s: .*SLS_TOPIC_TO<n>"
    for copy in (first, same):
        numbers = other.process.pid, routes_of(other), routes_of(first)
        told = [line for line in copy.stderr().splitlines() if "has the routes" in line]
        assert all(re.search(words % (PROJECT, SOURCE, *numbers), line) for line in told)
    assert "routes " + routes_of(other) in [
        re.sub(" +", " ", line) for line in run(service, "--check", "--offline", **OTHER_ROUTES)[1]
    ]
    assert other.stop() == 0
    flow.wait_until_shared(first, same)
    flow.wait_for(lambda: "dispatch_data_routes_differ 0\n" in get(port, "/metrics")[1], "copies that agree")
    flow.wait_for(lambda: "other routes than this copy any more" in first.stderr(), "a word of that")


@pytest.mark.quick
def test_routes_are_told_apart_by_what_goes_where_alone():
    def fingerprint(**changes):
        environment = {"SLS_" + name: "xyz" for name in ("ENDPOINT", "AK_ID", "AK_KEY", "PROJECT", "CG")}
        environment.update(SLS_LOGSTORE="source", SLS_LOGSTORE_TO1="a", SLS_LOGSTORE_TO2="b")
        environment.update(changes)
        return dispatch_data.routes_fingerprint(dispatch_data.read_settings(environment))

    routes = {"SLS_TOPIC_TO1": "x,y*,z?,[[]", "SLS_TOPIC_TO2": "c,[]"}
    same = fingerprint(**routes)
    assert fingerprint(**{**routes, "SLS_TOPIC_TO1": "z?,y*,[[],x"}) == same
    assert (
        fingerprint(SLS_LOGSTORE_TO7="a", SLS_TOPIC_TO7="x,y*,z?,[[]", SLS_TOPIC_TO2="c,[]", SLS_LOGSTORE_TO1="")
        == same
    )
    assert fingerprint(**routes, SLS_ENDPOINT_TO="https://elsewhere", SLS_AK_ID_TO2="i", SLS_AK_KEY_TO2="k") == same
    others = [{"SLS_TOPIC_TO2": "c"}, {"SLS_PROJECT_TO2": "other"}, {"SLS_LOGSTORE_TO2": "c"}, {"SLS_TOPIC_TO1": "x"}]
    assert same not in [fingerprint(**{**routes, **other}) for other in others]


@pytest.mark.quick
def test_names_of_consumers_of_older_releases_are_read_too():
    read = dispatch_data.CONSUMER_NAME.fullmatch
    for group in ("dispatch", "a_abcdef-1", "d_0a1b2c"):
        assert read(group + "-host-812-dd10cb12ff98").groupdict() == {"routes": None, "start": None}
        assert read(group + "-host-812-5f5e1000dd10cb12ff98").groupdict() == {"routes": None, "start": "5f5e1000"}
        now = read(group + "-host_3f9a1c-812-5f5e1000dd10cb12ff98")
        assert now.groupdict() == {"routes": "3f9a1c", "start": "5f5e1000"}
    assert read("somebody-elses-consumer") is None
