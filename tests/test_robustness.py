"""No log is lost: stops, kills, moves and refusals, with real processes and real signals."""

import time

import pytest
from copies import GROUP, LIMIT, PROJECT, SOURCE, feed, group_shards, logs_in, wait_until_delivered, wait_until_shared
from test_dispatch import assert_all_delivered_once


def test_the_last_summary_counts_what_was_delivered(service, copies):
    feed(service, 40)
    copy = copies.start()
    wait_until_delivered(service)
    wait_until_shared(service, copy)
    assert copy.stop() == 0
    summary = copy.log().splitlines()[-1]
    for part in (
        "summary:",
        "TO1 test-project/nginx 20 groups 100 logs",
        "TO2 test-project/sql-audit 10 groups 50 logs",
        "TO3 test-project/click 10 groups 50 logs",
        "0 retries",
        "unmatched 0 groups",
        "shards held: 0 1 2 3",
    ):
        assert part in summary
    assert time.strftime("%Y-%m-%d") in summary


def test_bytes_that_nobody_can_read_are_neither_skipped_nor_checkpointed(service, copies):
    feed(service, 40)
    copy = copies.start()
    wait_until_delivered(service)
    service.put(PROJECT, SOURCE, [b"\x0a\x7fcut short"], shard=0)
    service.wait_for(lambda: "shard 0: a pull of 13 bytes is no LogGroupList" in copy.stderr(), LIMIT, "a loud refusal")
    behind = feed(service, 10, shard=0)
    service.wait_for(
        lambda: service.calls("PullLogs") > 0 and copy.stderr().count("shard 0: a pull of") >= 2, LIMIT, "another try"
    )
    assert service.lag(PROJECT, SOURCE, GROUP) == 1 + len(behind)
    assert copy.stop() == 0
    service.expire(PROJECT, SOURCE, 0, 11)  # the only way past it: its retention time ends
    copies.start()
    wait_until_delivered(service)
    assert logs_in(service, "nginx") + logs_in(service, "sql-audit") + logs_in(service, "click") == 50 * 5


REFUSALS = [
    (dict(SLS_AK_KEY="wrong-secret"), "check SLS_AK_KEY: ", "SignatureNotMatch"),
    (dict(SLS_AK_ID="nobody"), "check SLS_AK_ID: ", "InvalidAccessKeyId"),
    (dict(SLS_PROJECT="no-such-project", SLS_PROJECT_TO=PROJECT), "check SLS_PROJECT ", "ProjectNotExist"),
    (dict(SLS_LOGSTORE="no-such-logstore"), "check SLS_LOGSTORE: ", "LogStoreNotExist"),
]


@pytest.mark.parametrize("changes, advice, code", REFUSALS, ids=[code for _, _, code in REFUSALS])
def test_a_copy_that_may_not_join_says_why_and_ends(service, copies, changes, advice, code):
    copy = copies.start(**changes)
    assert copy.process.wait(LIMIT) == 1
    (line,) = copy.stderr().splitlines()
    assert advice in line and code in line
    assert "Traceback" not in line and "local-secret" not in line and "wrong-secret" not in line


def test_one_group_too_many_is_said_in_one_line(service, copies):
    client = service.client()
    for number in range(10):
        client.create_consumer_group(PROJECT, SOURCE, "group-%d" % number, 20)
    copy = copies.start()
    assert copy.process.wait(LIMIT) == 1
    (line,) = copy.stderr().splitlines()
    assert "check SLS_CG: " in line and "ConsumerGroupQuotaExceed" in line


def test_a_source_that_cannot_be_reached_yet_is_tried_until_it_can(service, copies):
    with service.add_fault("*", cut="before") as fault:
        copy = copies.start()
        service.wait_for(lambda: fault.hits > 1, LIMIT, "tries")
        feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_without_a_log_directory_everything_goes_to_stderr(service, copies):
    feed(service, 20)
    copy = copies.start(SLS_LOG_DIR="")
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert copy.log() == ""
    assert "summary: TO1 test-project/nginx 10 groups 50 logs" in copy.stderr()


def test_with_a_log_file_a_shared_nohup_out_gets_only_warnings(service, copies):
    feed(service, 20)
    copy = copies.start()
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert copy.stderr() == ""
    assert "summary: TO1 test-project/nginx 10 groups 50 logs" in copy.log()
    (path,) = copy.directory.glob("*.log")
    assert path.name == "dispatch_data_%d.log" % copy.process.pid


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
