"""LogGroups that a target refuses for good: held by default, set aside as files where SLS_REJECTED_DIR is set."""

import base64
import contextlib
import errno
import os
import re
import stat
import time

import pytest
from aliyun.log.proto import LogGroup as LogGroupMessage
from assertions import arrived_in_targets, assert_delivered_once
from conftest import create_logstores, logstore_config
from harness import (
    GROUP,
    LIMIT,
    PROJECT,
    SOURCE,
    Copies,
    feed,
    group_shards,
    make_log_group,
    pulled_at_once,
    wait_until_delivered,
)
from local_log_service import LocalLogService
from local_log_service.verdict import compare

import dispatch_data
from dispatch_data import DeadLetterDirectory, LogGroup

# A MachineUUID that is a number: the service won't take it, and a dispatcher that doesn't parse can't know.
POISON = make_log_group("click") + b"\x28\x01"


@pytest.fixture
def rejected_dir(tmp_path):
    path = tmp_path / "rejected"
    path.mkdir()
    return path


def next_indexes(service):
    return {shard: state["next"] for shard, state in group_shards(service).items()}


def files_in(directory):
    return sorted(path for path in directory.iterdir())


def position_of(service, shard, index):
    """Of a LogGroup in a shard, by the service's cursors, which are numbers in base64."""
    begin = service.client().get_begin_cursor(PROJECT, SOURCE, shard).get_cursor()
    return int(base64.b64decode(begin)) + index


def test_by_default_the_shard_waits_and_says_so_and_no_other_does(service, copies):
    """What the batch has for other targets is delivered; behind the batch nothing of the shard is."""
    first = feed(service, 8, shard=0)
    service.put(PROJECT, SOURCE, [POISON], shard=0)
    copy = copies.start()
    service.wait_for(lambda: "PostBodyInvalid" in copy.stderr(), LIMIT, "a word about the refusal")
    others = feed(service, 40, shard=1)
    service.wait_for(lambda: next_indexes(service).get(1) == 40, LIMIT, "the other shard delivered")
    service.wait_for(
        lambda: compare(first + others, arrived_in_targets(service)).ok, LIMIT, "the rest of the batch delivered"
    )
    behind = feed(service, 4, shard=0)
    service.wait_for(lambda: "failed tries in" in copy.stderr(), LIMIT, "another word, after a while")
    assert next_indexes(service)[0] == 0
    lines = copy.stderr().splitlines()
    assert all("TO3 test-project/click: a put failed" in line and "SLS_REJECTED_DIR" in line for line in lines)
    assert copy.stop() == 0
    assert "target=3" in copy.log() and compare(behind, arrived_in_targets(service)).lost == 20


def test_where_a_directory_is_set_it_is_set_aside_whole_and_the_shard_goes_on(service, copies, rejected_dir):
    before, after = feed(service, 8, shard=0), []
    service.put(PROJECT, SOURCE, [POISON], shard=0)
    after = feed(service, 8, shard=0)
    copy = copies.start(SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    assert_delivered_once(before + after, arrived_in_targets(service))
    (path,) = files_in(rejected_dir)
    assert path.read_bytes() == POISON
    assert re.fullmatch(r"TO3-test-project-click-0-%d-[0-9a-f]{32}\.loggroup" % position_of(service, 0, 8), path.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert copy.stop() == 0
    assert "is refused for good and set aside as " + str(path) in copy.stderr()
    assert re.search(r"summary target=3 .* failing=0 set_aside=1$", copy.log(), re.MULTILINE)


def test_a_refusal_after_an_outage_counts_against_nothing_but_what_it_refused(service, copies, rejected_dir):
    """What waits for a target that takes nothing is not tried: no other's refusal may come to be its own."""
    others = [make_log_group("click", Source="10.0.0.%d" % number) for number in range(19)]
    with service.add_fault("PutLogs", status=503, code="ServerBusy") as fault:
        service.put(PROJECT, SOURCE, [POISON, *others], shard=0)
        copy = copies.start(SLS_REJECTED_DIR=str(rejected_dir), SLS_WRITERS="1")
        service.wait_for(lambda: fault.hits >= dispatch_data.BREAKER_THRESHOLD, LIMIT, "puts that fail")
    wait_until_delivered(service)
    assert_delivered_once(others, arrived_in_targets(service))
    assert [path.read_bytes() for path in files_in(rejected_dir)] == [POISON]
    assert copy.stop() == 0


def test_of_a_joined_put_only_the_log_group_at_fault_is_set_aside(service, copies, rejected_dir):
    """The three poisoned ones are alike but for their logs, so they are joined, and are set aside apart."""
    poisons = [make_log_group("nginx") + b"\x28\x01" for _ in range(3)]
    good = [make_log_group("nginx") for _ in range(5)]
    service.put(PROJECT, SOURCE, poisons + good, shard=2)
    copies.start(SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    assert sorted(path.read_bytes() for path in files_in(rejected_dir)) == sorted(poisons)
    assert_delivered_once(good, arrived_in_targets(service))


@pytest.mark.parametrize(
    "status, code",
    [
        (403, "ShardWriteQuotaExceed"),
        (401, "Unauthorized"),
        (404, "LogStoreNotExist"),
        (400, "RequestTimeExpired"),
        (500, "PostBodyInvalid"),
    ],
)
def test_what_may_pass_is_never_set_aside(service, copies, rejected_dir, status, code):
    with service.add_fault("PutLogs", status=status, code=code) as fault:
        sent = feed(service, 4, shard=0)
        copies.start(SLS_REJECTED_DIR=str(rejected_dir))
        service.wait_for(lambda: fault.hits >= 12, LIMIT, "puts refused more often than would do")
    wait_until_delivered(service)
    assert_delivered_once(sent, arrived_in_targets(service))
    assert files_in(rejected_dir) == []


def test_set_aside_again_after_a_crash_it_is_the_same_file(service, copies, rejected_dir):
    """Killed with the file on disk and the checkpoint not yet saved."""
    client = service.client()
    client.create_consumer_group(PROJECT, SOURCE, GROUP, 2)
    for shard in range(4):  # else the first checkpoint would be the start, not the batch's
        begin = client.get_begin_cursor(PROJECT, SOURCE, shard).get_cursor()
        client.update_check_point(PROJECT, SOURCE, GROUP, shard, begin)
    with pulled_at_once(service):
        service.put(PROJECT, SOURCE, [POISON, make_log_group("click")], shard=0)
    with service.add_fault("UpdateCheckPoint", cut="before") as fault:
        first = copies.start(SLS_REJECTED_DIR=str(rejected_dir))
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a checkpoint that can't be saved")
        before = files_in(rejected_dir)
        first.process.kill()
        first.process.wait()
    copies.start(SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    assert files_in(rejected_dir) == before
    assert [path.read_bytes() for path in before] == [POISON]


def test_without_the_directory_it_waits_and_nothing_is_lost(service, copies, rejected_dir):
    """As on a full disk: the trouble is told, the shard waits, and goes on once there is room."""
    rejected_dir.rename(rejected_dir.with_name("elsewhere"))
    rejected_dir.with_name("gone").mkdir()
    directory = rejected_dir.with_name("gone")
    copy = copies.start(SLS_REJECTED_DIR=str(directory))
    service.wait_for(lambda: len(group_shards(service)) == 4, LIMIT, "a copy that has begun")
    directory.rmdir()
    with pulled_at_once(service):
        service.put(PROJECT, SOURCE, [POISON, make_log_group("click")], shard=0)
    service.wait_for(lambda: "can't be set aside yet" in copy.stderr(), LIMIT, "a word about the directory")
    assert next_indexes(service)[0] in (None, 0)
    directory.mkdir()
    wait_until_delivered(service)
    (path,) = files_in(directory)
    assert path.read_bytes() == POISON


def log_group_of(data):
    return LogGroup("click", 1, b"", data, mergeable=False)


PLACE = logstore_config(logstore="click")


def test_the_directory_is_bounded_in_total(tmp_path, monkeypatch):
    monkeypatch.setattr(DeadLetterDirectory, "MAX_BYTES", 100)
    rejected = DeadLetterDirectory(str(tmp_path))
    path = rejected.save(3, PLACE, log_group_of(b"a" * 60), "0-1")
    assert rejected.save(3, PLACE, log_group_of(b"a" * 60), "0-1") == path  # the same again takes no more room
    with pytest.raises(OSError, match="as many as are kept; make room"):
        rejected.save(3, PLACE, log_group_of(b"b" * 60), "0-2")
    assert os.listdir(str(tmp_path)) == [os.path.basename(path)]


def test_a_file_that_cannot_be_finished_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        DeadLetterDirectory(str(tmp_path)).save(3, PLACE, log_group_of(b"a"), "0-1")
    assert os.listdir(str(tmp_path)) == []


def test_logs_too_old_to_be_put_are_set_aside_and_hold_up_no_others(tmp_path, rejected_dir):
    """The service refuses logs of more than 7 days ago; a long backlog may have some."""
    old = LogGroupMessage(Topic="click")
    old.Logs.add(Time=int(time.time()) - 8 * 24 * 3600).Contents.add(Key="number", Value="old")
    with LocalLogService(check_log_times=True) as service:
        create_logstores(service)
        service.put(PROJECT, SOURCE, [old.SerializeToString()], shard=0)
        sent = feed(service, 20)
        with Copies(service, tmp_path) as copies:
            copies.start(SLS_REJECTED_DIR=str(rejected_dir))
            wait_until_delivered(service)
        assert_delivered_once(sent, arrived_in_targets(service))
        assert [path.read_bytes() for path in files_in(rejected_dir)] == [old.SerializeToString()]


@pytest.mark.parametrize("number, is_kept", [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_a_file_system_may_know_no_fsync_of_directories(monkeypatch, rejected_dir, number, is_kept):
    """As some over a network do, by PostgreSQL's long experience; a disk that fails is another thing."""
    real = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    rejected = DeadLetterDirectory(str(rejected_dir))
    place = logstore_config(logstore="click")
    with contextlib.nullcontext() if is_kept else pytest.raises(OSError):
        rejected.save(3, place, LogGroup("click", 5, POISON, b""), "0-1")
    assert [path.read_bytes() for path in files_in(rejected_dir)] == [POISON]
