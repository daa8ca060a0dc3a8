"""LogGroups that a target refuses for good: held by default, set aside as files where SLS_REJECTED_DIR is set."""

import base64
import contextlib
import errno
import functools
import os
import random
import re
import stat
import threading
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
    run_program,
    settings_for,
    wait_until_begun,
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


@pytest.mark.slow
def test_by_default_the_shard_waits_and_says_so_and_no_other_does(service, copies):
    """What the batch has for other targets is delivered, and checkpointed as far as nothing waits before it; behind the
    batch nothing of the shard is."""
    first = feed(service, 8, shard=0)
    service.put(PROJECT, SOURCE, [POISON], shard=0)
    copy = copies.start(SLS_HEARTBEAT_INTERVAL="20")
    service.wait_for(lambda: "PostBodyInvalid" in copy.stderr(), LIMIT, "a word about the refusal")
    others = feed(service, 40, shard=1)
    service.wait_for(lambda: next_indexes(service).get(1) == 40, LIMIT, "the other shard delivered")
    service.wait_for(
        lambda: compare(first + others, arrived_in_targets(service)).ok, LIMIT, "the rest of the batch delivered"
    )
    behind = feed(service, 4, shard=0)
    service.wait_for(lambda: "failed tries in" in copy.stderr(), LIMIT, "another word, after a while")
    assert next_indexes(service)[0] == 8
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
    place = position_of(service, 0, 8)
    assert re.fullmatch(r"TO3-test-project-click-0-%d-[0-9a-f]{32}-PostBodyInvalid\.loggroup" % place, path.name)
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
        service.wait_for(lambda: fault.hits >= 8, LIMIT, "puts that fail")
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
        copies.start(constants={"MAX_BACKOFF": 0.5}, SLS_REJECTED_DIR=str(rejected_dir))
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
        first = copies.start(constants={"LONGEST_BATCH": LIMIT}, SLS_REJECTED_DIR=str(rejected_dir))
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


# What @alicloud/log 1.2.6 sends for a timestamp of 1700000000000: it takes seconds, and keeps 32 bits of them.
OF_2080 = b'\n\x0e\x08\x80\xd0\x95\xff\x0c\x12\x06\n\x01a\x12\x01b\x1a\x05nginx"\x02ms'


def test_logs_too_old_or_of_years_to_come_are_set_aside_and_hold_up_no_others(tmp_path, rejected_dir):
    """The service refuses logs of more than 7 days ago, which a long backlog may have, or 15 minutes ahead."""
    (log,) = LogGroupMessage.FromString(OF_2080).Logs
    assert time.gmtime(log.Time).tm_year == 2080
    old = LogGroupMessage(Topic="click")
    old.Logs.add(Time=int(time.time()) - 8 * 24 * 3600).Contents.add(Key="number", Value="old")
    with LocalLogService(check_log_times=True) as service:
        create_logstores(service)
        service.put(PROJECT, SOURCE, [old.SerializeToString(), OF_2080], shard=0)
        sent = feed(service, 20)
        with Copies(service, tmp_path) as copies:
            copy = copies.start(SLS_REJECTED_DIR=str(rejected_dir))
            wait_until_delivered(service)
        assert_delivered_once(sent, arrived_in_targets(service))
        assert {path.read_bytes() for path in files_in(rejected_dir)} == {old.SerializeToString(), OF_2080}
        assert len(re.findall("is refused for good and set aside .*: 499 PostBodyInvalid", copy.stderr())) == 2


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


# ---- whose fault it is


def something_that_refuses(program, switch, least, status, headers, body):
    """What answers, while the file `switch` is there, to puts of more than so many raw bytes; the file tells how often.

    In the copy, for nothing but the answer counts: whether it bears the service's id, and what it says.
    """
    import os

    write = program.PutClient.put_log_raw

    def tell(switch):
        """Whether the file is there; if it goes just now, it isn't made anew."""
        try:
            file = os.open(switch, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            return False
        os.write(file, b".")
        os.close(file)
        return True

    def refuse(self, project, logstore, put):
        if put.size > least and tell(switch):
            self.judge(program.Response(status, body, headers, True), True, "")
        return write(self, project, logstore, put)

    program.PutClient.put_log_raw = refuse


def error_body(code):
    return b'{"errorCode": "%s", "errorMessage": "no"}' % code.encode()


OF_THE_SERVICE = {"x-log-requestid": "5B9D1D1D1D1D1D1D"}
SYSTEMATIC = {
    "a gateway, what has more than 100 bytes": (100, 413, {"Content-Type": "text/html"}, b"<html>too large</html>"),
    "the service, what has more than 100 bytes": (100, 413, OF_THE_SERVICE, error_body("PostBodyTooLarge")),
    "the service, all but an empty one": (2, 400, OF_THE_SERVICE, error_body("PostBodyInvalid")),
    "the service, nearly all": (40, 400, OF_THE_SERVICE, error_body("PostBodyInvalid")),
}


@pytest.mark.parametrize("refusal", SYSTEMATIC.values(), ids=list(SYSTEMATIC))
@pytest.mark.parametrize("begins", ["at the start", "later"])
def test_of_what_a_target_refuses_mostly_nothing_is_set_aside(service, copies, rejected_dir, tmp_path, refusal, begins):
    """It takes the small ones, and what came before; neither speaks against those that it refuses."""
    switch = tmp_path / "switch"
    sent = []
    # What a shard has is one batch, however fast the machine is; and its small ones come last, so that at no time more
    # of them are accepted than others are refused.
    one_batch = {"INITIAL_COUNT": 40, "INITIAL_SIZE": 1000, "TARGET_BATCH_SECONDS": 1000.0}
    copy = copies.start(
        patch=functools.partial(something_that_refuses, str(switch), *refusal),
        constants={
            "REJECTION_PATIENCE": 2.0,
            "LONGEST_BATCH": LIMIT,
            **{"ShardConsumer." + name: value for name, value in one_batch.items()},
        },
        SLS_REJECTED_DIR=str(rejected_dir),
        SLS_HEARTBEAT_INTERVAL="20",
    )
    wait_until_begun(service)
    if begins == "later":
        sent += feed(service, 40)
        wait_until_delivered(service)
    switch.touch()
    large = [make_log_group("click", 20, Source="10.0.0.%d" % number) for number in range(120)]
    small = [make_log_group("click", 1) for _ in range(40)]
    assert min(map(len, large)) > 100 and 2 < max(map(len, small)) <= 40
    log_groups = large + small
    with service.add_fault("PullLogs", project=PROJECT, logstore=SOURCE, hold=True) as held:
        service.wait_for(lambda: held.hits >= 4, LIMIT, "a pull of each shard held")
        service.put(PROJECT, SOURCE, log_groups)
    taken = sent + [each for each in small if len(each) <= refusal[0]]
    service.wait_for(lambda: compare(taken, arrived_in_targets(service)).ok, LIMIT, "what it takes delivered")
    service.wait_for(lambda: switch.stat().st_size > 120 * 5, LIMIT, "all of them refused five times")
    assert files_in(rejected_dir) == []
    said = "RequestEntityTooLarge" if refusal[1:3] == (413, {"Content-Type": "text/html"}) else "seems to be wrong"
    service.wait_for(lambda: said in copy.stderr(), LIMIT, "a word about it")
    lines = [line for line in copy.stderr().splitlines() if "seems to be wrong" in line]
    assert all(" ERROR TO3 test-project/click: it refuses " in line and "gateways" in line for line in lines)
    assert len(lines) <= 2, "a flood"
    switch.unlink()
    wait_until_delivered(service)
    assert_delivered_once(sent + log_groups, arrived_in_targets(service))
    assert files_in(rejected_dir) == []


@pytest.mark.parametrize("percent", [1, 10, 25])
def test_refused_ones_among_more_that_are_taken_are_all_set_aside(service, copies, rejected_dir, percent):
    """In any order, in all shards at once, each in a put of its own."""
    choice = random.Random(percent)
    log_groups = [make_log_group("click", Source="10.0.0.%d" % number) for number in range(600)]
    poisons = [log_group + b"\x28\x01" for log_group in log_groups[: 6 * percent]]
    good = log_groups[len(poisons) :]
    mixed = poisons + good
    choice.shuffle(mixed)
    service.put(PROJECT, SOURCE, mixed)
    soon = {"REJECTION_PATIENCE": 1.0, "UNPROVEN_INTERVAL": 1.0}
    copies.start(constants=soon, SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    assert sorted(path.read_bytes() for path in files_in(rejected_dir)) == sorted(poisons)
    assert_delivered_once(good, arrived_in_targets(service))


def test_the_last_of_its_batch_is_set_aside_though_nothing_comes_after_it(service, copies, rejected_dir):
    """A lone shard waits for it: what its target accepted just before has to do."""
    good = [make_log_group("click", Source="10.0.0.%d" % number) for number in range(6)]
    copies.start(constants={"REJECTION_PATIENCE": 1.0}, SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_begun(service)
    service.put(PROJECT, SOURCE, good, shard=0)
    wait_until_delivered(service)
    service.put(PROJECT, SOURCE, [POISON], shard=0)
    wait_until_delivered(service)
    assert [path.read_bytes() for path in files_in(rejected_dir)] == [POISON]
    assert_delivered_once(good, arrived_in_targets(service))


def test_one_that_is_alone_in_its_target_waits_until_others_are_taken(service, copies, rejected_dir):
    """Nobody can know whose fault it is, and the program puts nothing of its own into a target to find out."""
    copy = copies.start(constants={"REJECTION_PATIENCE": 1.0}, SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_begun(service)
    service.put(PROJECT, SOURCE, [POISON], shard=0)
    service.wait_for(lambda: "it refuses 1 LogGroups and has accepted 0 others" in copy.stderr(), LIMIT, "a word")
    assert files_in(rejected_dir) == [] and service.ledger(PROJECT, "click") == []
    good = [make_log_group("click") for _ in range(3)]
    service.put(PROJECT, SOURCE, good, shard=1)
    wait_until_delivered(service)
    assert [path.read_bytes() for path in files_in(rejected_dir)] == [POISON]
    assert_delivered_once(good, arrived_in_targets(service))


@pytest.mark.parametrize("setting", [None, "set"])
def test_one_that_is_refused_after_an_outage_holds_up_no_others_of_its_target(service, copies, rejected_dir, setting):
    """It is tried again before them; the target answers, so they are tried all the same."""
    others = [make_log_group("click", Source="10.0.0.%d" % number) for number in range(19)]
    with service.add_fault("PutLogs", status=503, code="ServerBusy") as fault:
        service.put(PROJECT, SOURCE, [POISON, *others], shard=0)
        copies.start(SLS_REJECTED_DIR=setting and str(rejected_dir), SLS_WRITERS="1")
        service.wait_for(lambda: fault.hits >= 8, LIMIT, "puts that fail")
    service.wait_for(lambda: compare(others, arrived_in_targets(service)).ok, LIMIT, "the others delivered")


def test_equal_ones_are_as_many_files(service, copies, rejected_dir):
    """The same bytes from two shards and twice from one are three LogGroups, each of which may be put again."""
    good = [make_log_group("click") for _ in range(6)]
    with pulled_at_once(service):
        service.put(PROJECT, SOURCE, [POISON, *good[:3], POISON], shard=0)
        service.put(PROJECT, SOURCE, [good[3], POISON, *good[4:]], shard=2)
    copies.start(SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    places = [(0, 0), (0, 4), (2, 1)]
    named = ["%d-%d" % (shard, position_of(service, shard, index)) for shard, index in places]
    files = files_in(rejected_dir)
    assert (
        sorted(
            re.sub("TO3-test-project-click-|-[0-9a-f]{32}-PostBodyInvalid.loggroup", "", path.name) for path in files
        )
        == named
    )
    assert [path.read_bytes() for path in files] == [POISON] * 3


def two_at_a_time(program):
    pull_logs = program.LogstoreApi.pull_logs
    program.LogstoreApi.pull_logs = lambda self, shard, cursor, count, *end: pull_logs(
        self, shard, cursor, min(count, 2), *end
    )


def test_set_aside_again_from_a_pull_that_is_cut_in_another_way_it_is_the_same_file(service, copies, rejected_dir):
    """The first copy pulls all at once; the second, after a crash, two at a time."""
    good = [make_log_group("click") for _ in range(6)]
    client = service.client()
    client.create_consumer_group(PROJECT, SOURCE, GROUP, 2)
    for shard in range(4):
        begin = client.get_begin_cursor(PROJECT, SOURCE, shard).get_cursor()
        client.update_check_point(PROJECT, SOURCE, GROUP, shard, begin)
    service.put(PROJECT, SOURCE, [*good[:3], POISON, *good[3:]], shard=0)
    with service.add_fault("UpdateCheckPoint", cut="before") as fault:
        first = copies.start(constants={"LONGEST_BATCH": LIMIT}, SLS_REJECTED_DIR=str(rejected_dir))
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a checkpoint that can't be saved")
        before = files_in(rejected_dir)
        first.process.kill()
        first.process.wait()
    copies.start(patch=two_at_a_time, constants={"REJECTION_PATIENCE": 1.0}, SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    assert files_in(rejected_dir) == before and len(before) == 1


def test_refused_again_by_another_code_it_is_the_same_file(rejected_dir):
    """Also where it was set aside by a release that had no code in the name."""
    for first, again in (("", "PostBodyInvalid"), ("InvalidKey", "PostBodyInvalid"), ("InvalidKey", "")):
        paths = [
            DeadLetterDirectory(str(rejected_dir)).save(3, PLACE, log_group_of(b"a"), "0-1", code)
            for code in (first, again)
        ]
        assert [str(path) for path in files_in(rejected_dir)] == paths[:1] == paths[1:]
        os.remove(paths[0])


# ---- what is told of it


def refusing_by_two_codes(program):
    """By a code that the bytes decide, as long as they have one."""
    write = program.PutClient.put_log_raw

    def refuse(self, project, logstore, put, *arguments, **named):
        data = put.SerializeToString()
        for code in ("InvalidKey", "PostBodyInvalid"):
            if code.encode() in data:
                raise program.CallError(code, "refused", 400)
        return write(self, project, logstore, put, *arguments, **named)

    program.PutClient.put_log_raw = refuse


def test_there_is_a_line_for_each_code_and_the_name_of_the_file_has_it(service, copies, rejected_dir):
    """Else the second kind of fault would hide behind the first."""
    codes = ["InvalidKey", "PostBodyInvalid"] * 3
    with pulled_at_once(service):
        refused = [make_log_group("click", Source="%s %d" % pair) for pair in zip(codes, range(len(codes)))]
        good = [make_log_group("click", Source="10.0.0.%d" % number) for number in range(20)]
        service.put(PROJECT, SOURCE, [*refused, *good], shard=0)
    copy = copies.start(patch=refusing_by_two_codes, SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    assert copy.stop() == 0
    for code in set(codes):
        assert sum(path.name.endswith("-%s.loggroup" % code) for path in files_in(rejected_dir)) == 3
        (line,) = [line for line in copy.stderr().splitlines() if "set aside as" in line and code in line]
        assert "400 %s: refused" % code in line


def refusing_while(program, switch, what):
    import os

    write = program.PutClient.put_log_raw

    def refuse(self, project, logstore, put, *arguments, **named):
        if what in put.SerializeToString() and os.path.exists(switch):
            raise program.CallError("PostBodyInvalid", "refused", 400)
        return write(self, project, logstore, put, *arguments, **named)

    program.PutClient.put_log_raw = refuse


def test_one_that_cannot_be_set_aside_and_is_taken_after_all_fails_no_longer(service, copies, tmp_path):
    """Its directory is away, then its target takes it: nothing is left that fails."""
    directory, switch = tmp_path / "gone", tmp_path / "switch"
    directory.mkdir()
    switch.touch()
    refused = make_log_group("click", Source="refused")
    copy = copies.start(
        patch=functools.partial(refusing_while, str(switch), b"refused"),
        constants={"RetryLog.RECOVERY_QUIET": 0.5},
        SLS_REJECTED_DIR=str(directory),
    )
    wait_until_begun(service)
    directory.rmdir()
    good = [make_log_group("click") for _ in range(4)]
    service.put(PROJECT, SOURCE, [refused, *good], shard=0)
    service.wait_for(lambda: "can't be set aside yet" in copy.stderr(), LIMIT, "a word about the directory")
    switch.unlink()
    wait_until_delivered(service)
    assert_delivered_once([refused, *good], arrived_in_targets(service))
    service.wait_for(lambda: "click: puts recovered after" in copy.stderr(), LIMIT, "a word about the end of refusals")
    service.wait_for(lambda: "click: setting aside recovered after" in copy.stderr(), LIMIT, "and one about the rest")


# ---- others in the directory


def planting(program, victim, kind):
    """Somebody guesses the name of each file that is about to be made, and is there first, twice."""
    import os

    real, planted = os.open, []

    def plant(path, flags, *mode, **more):
        if str(path).endswith(".unfinished") and len(planted) < 2:
            planted.append(path)
            if kind == "link":
                os.symlink(victim, path)
            else:
                file = real(path, os.O_WRONLY | os.O_CREAT)
                os.fchmod(file, 0o666)
                os.close(file)
        return real(path, flags, *mode, **more)

    os.open = plant


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_others_lay_into_the_directory_is_neither_followed_nor_used(service, copies, rejected_dir, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"of somebody else")
    rejected_dir.chmod(0o777)
    with pulled_at_once(service):
        service.put(PROJECT, SOURCE, [POISON, make_log_group("click")], shard=0)
    copy = copies.start(patch=functools.partial(planting, str(victim), kind), SLS_REJECTED_DIR=str(rejected_dir))
    wait_until_delivered(service)
    (path,) = [path for path in files_in(rejected_dir) if path.name.endswith(".loggroup")]
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 1
    assert path.read_bytes() == POISON
    assert victim.read_bytes() == b"of somebody else"
    assert "can't be set aside yet" in copy.stderr()


@pytest.mark.parametrize("what", ["link", "link to nothing", "file"])
def test_what_lies_in_the_place_of_a_file_is_replaced(tmp_path, rejected_dir, what):
    victim = tmp_path / "victim"
    victim.write_bytes(b"of somebody else")
    rejected = DeadLetterDirectory(str(rejected_dir))
    path = rejected_dir / os.path.basename(rejected.save(3, PLACE, log_group_of(b"a"), "0-1"))
    path.unlink()
    if what == "file":
        path.write_bytes(b"planted")
        path.chmod(0o666)
    else:
        path.symlink_to(victim if what == "link" else tmp_path / "nothing")
    DeadLetterDirectory(str(rejected_dir)).save(3, PLACE, log_group_of(b"a"), "0-1")
    assert path.read_bytes() == b"a" and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert victim.read_bytes() == b"of somebody else" and files_in(rejected_dir) == [path]


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_file_is_for_its_owner_whatever_the_umask(rejected_dir, umask):
    before = os.umask(umask)
    try:
        path = DeadLetterDirectory(str(rejected_dir)).save(3, PLACE, log_group_of(b"a"), "0-1")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.parametrize("mode, is_warned", [(0o700, False), (0o770, False), (0o777, True), (0o1777, True)])
def test_a_directory_that_any_user_can_write_to_earns_a_warning(service, rejected_dir, mode, is_warned):
    """No more than that: an emptyDir volume has mode 0777."""
    rejected_dir.chmod(mode)
    ended = run_program(settings_for(service, SLS_REJECTED_DIR=str(rejected_dir)), "--check")
    assert ended.returncode == 0
    assert ("warning: SLS_REJECTED_DIR: any user can write to %s" % rejected_dir in ended.stdout) == is_warned


@pytest.mark.quick
def test_a_put_that_fails_while_another_is_set_aside_is_tried_again():
    """With nothing else in flight or to be retried the batch would count as delivered, and the put be lost."""
    log_groups = [LogGroup("click", 1, b"", b"refused"), LogGroup("click", 1, b"", b"failing")]
    refused, failing = [dispatch_data.PutRequest(one.envelope).add(one) for one in log_groups]
    tried = []

    class TargetOfTheTest:
        failures = 0

        def split_or_reject(self, *_):
            tried.append("set aside")
            return []

    class LoopOfTheTest:
        def submit(self, batch):
            batch.blamed.append((refused, dispatch_data.CallError("PostBodyInvalid", "", 400)))

        def call(self, method, *arguments):
            method(*arguments)

        def replace(self, batch, put, _):
            batch.unfinished.remove(put)
            assert failing in batch.unfinished, "the put that failed meanwhile is forgotten"
            threading.Timer(0.5, self.accept, [batch]).start()

        def end(self, _):
            raise AssertionError("given up")

        def accept(self, batch):
            tried.append("accepted")
            batch.unfinished.remove(failing)
            batch.is_over = True
            batch.change.set()

    refused.target = failing.target = TargetOfTheTest()
    delivery = object.__new__(dispatch_data.Delivery)
    delivery.loop = LoopOfTheTest()
    delivery.route = lambda _: [refused, failing]
    token = dispatch_data.CancelToken()
    assert delivery.deliver(dispatch_data.PullResult(log_groups, 0, "", 0), token, token, token) == (2, 0)
    assert tried == ["set aside", "accepted"]
