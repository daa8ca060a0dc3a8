"""A target that is in trouble costs the others nothing; and many targets need few threads."""

from pathlib import Path

import pytest
from assertions import assert_all_delivered_once, assert_delivered_once, logs_in
from harness import LIMIT, PROJECT, SOURCE, group_shards, make_log_group, wait_until_begun, wait_until_delivered
from test_bounds import kernel_says

TROUBLES = {
    "hangs": lambda service: service.add_fault("PutLogs", logstore="click", hold=True),
    "refuses everything": lambda service: service.add_fault("PutLogs", logstore="click", code="WriteQuotaExceed"),
    "is slow": lambda service: service.add_fault("PutLogs", logstore="click", delay=6.0),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=list(TROUBLES))
def test_a_target_in_trouble_costs_another_nothing(service, copies, trouble):
    """Not a put of the other fails, waits in vain or is made twice, and its shard is checkpointed all the while."""
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    wait_until_begun(service)
    with trouble(service):
        service.put(PROJECT, SOURCE, [make_log_group("click", Source="10.0.0.%d" % n) for n in range(40)], shard=0)
        sent = 0
        for _ in range(5):
            sent += 40
            feed_the_other(service, 40)
            service.wait_for(lambda sent=sent: group_shards(service)[1]["next"] == sent, LIMIT, "the other shard")
        assert logs_in(service, "nginx") == sent * 5
        assert group_shards(service)[0]["next"] < 40
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    assert "TO1 " not in copy.stderr()


def feed_the_other(service, count):
    log_groups = [make_log_group("nginx", Source="10.0.0.%d" % number) for number in range(count)]
    service.put(PROJECT, SOURCE, log_groups, shard=1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here to look at")
def test_many_targets_need_few_threads(service, copies):
    settings = {}
    for number in range(1, 301):
        service.create_logstore(PROJECT, "many-%d" % number, 1)
        settings["SLS_LOGSTORE_TO%d" % number] = "many-%d" % number
        settings["SLS_TOPIC_TO%d" % number] = "topic-%d" % number
    sent = [make_log_group("topic-%d" % number) for number in range(1, 301)]
    service.put(PROJECT, SOURCE, sent)
    with service.add_fault("PutLogs", delay=0.05):  # so that many are in the air
        copy = copies.start(**settings)
        wait_until_delivered(service)
    service.wait_for(lambda: service.calls("ListShards") >= 301, LIMIT, "each logstore looked at")
    assert kernel_says(copy, "Threads") <= 60
    arrived = [entry.log_group for n in range(1, 301) for entry in service.ledger(PROJECT, "many-%d" % n)]
    assert_delivered_once(sent, arrived)
    assert copy.stop() == 0
