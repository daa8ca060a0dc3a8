"""--put-rejected: what was set aside gets into its targets, and no file is deleted before."""

import functools
import os
import signal

import pytest
from assertions import assert_delivered_once
from conftest import logstore_config
from harness import LIMIT, PROJECT, make_log_group, run_program, settings_for
from local_log_service import ForeignAnswer

from dispatch_data import DeadLetterDirectory, LogGroup

POISON = make_log_group("click") + b"\x28\x01"  # a field that the service's parser won't have


@pytest.fixture
def rejected_dir(tmp_path):
    path = tmp_path / "rejected"
    path.mkdir()
    return path


def set_aside(directory, log_groups, number=3, logstore="click", code="PostBodyInvalid"):
    """Paths of files, as a copy would have made them."""
    kept, place = DeadLetterDirectory(str(directory)), logstore_config(PROJECT, logstore)
    return [
        kept.save(number, place, LogGroup("", 5, log_group, b""), "0-%d" % index, code)
        for index, log_group in enumerate(log_groups)
    ]


def put_again(service, directory, **changes):
    """The exit status, the last line of stdout, and the lines of stderr."""
    ended = run_program(settings_for(service, SLS_LOG_DIR="", **changes), "--put-rejected", str(directory))
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout.splitlines()[-1:], ended.stderr.splitlines()


def arrived(service, logstore="click"):
    return [entry.log_group for entry in service.ledger(PROJECT, logstore)]


def test_what_is_taken_is_deleted_and_what_is_refused_is_kept(service, rejected_dir):
    """Also what a gateway won't let pass, or whose target is gone; what may pass by itself is tried again. Other files
    are nobody's business."""
    good = [make_log_group("click") for _ in range(5)]
    set_aside(rejected_dir, good)
    of_old = set_aside(rejected_dir, [make_log_group("nginx")], 1, "nginx", code="")
    poison = set_aside(rejected_dir, [POISON], 3, "click")[0]
    too_large = set_aside(rejected_dir, [make_log_group("sql_audit")], 2, "sql-audit")[0]
    others = [rejected_dir / name for name in ("notes.txt", os.path.basename(poison) + ".5f2e.unfinished")]
    for other in others:
        other.write_text("something else")
    assert "PostBodyInvalid" not in of_old[0]
    with service.add_fault("PutLogs", logstore="nginx", status=503, code="ServerBusy", share=0.5):
        with service.add_fault("PutLogs", logstore="sql-audit", answer=ForeignAnswer(413, {}, b"too large")):
            status, stdout, stderr = put_again(service, rejected_dir)
    assert (status, stdout) == (1, ["6 LogGroups put and deleted, 2 refused still and kept, 0 left"])
    assert sorted(rejected_dir.iterdir()) == sorted([*others, *map(type(rejected_dir), (poison, too_large))])
    assert any("%s is refused still, and kept: 400 PostBodyInvalid" % poison in line for line in stderr)
    os.remove(poison)
    with service.add_fault("PutLogs", logstore="sql-audit", code="LogStoreNotExist"):
        status, stdout, stderr = put_again(service, rejected_dir)
    assert (status, stdout) == (1, ["0 LogGroups put and deleted, 1 refused still and kept, 0 left"])
    assert any("404 LogStoreNotExist" in line and "SLS_LOGSTORE_TO2 must exist" in line for line in stderr)
    status, stdout, _ = put_again(service, rejected_dir)
    assert (status, stdout) == (0, ["1 LogGroups put and deleted, 0 refused still and kept, 0 left"])
    assert_delivered_once(good, arrived(service))
    assert [len(arrived(service, name)) for name in ("nginx", "sql-audit")] == [1, 1]
    assert sorted(rejected_dir.iterdir()) == sorted(others)


RENUMBERED = {"SLS_LOGSTORE_TO3": "sql-audit", "SLS_LOGSTORE_TO2": "click"}
GONE = {"SLS_LOGSTORE_TO3": None}
MOVED = {"SLS_PROJECT_TO3": "their-project"}


@pytest.mark.parametrize("changes", [RENUMBERED, GONE, MOVED], ids=["renumbered", "gone", "moved"])
def test_where_a_name_and_the_settings_differ_nothing_is_put(service, rejected_dir, changes):
    """Else it would come into a logstore that it is not of, and its file be deleted."""
    set_aside(rejected_dir, [make_log_group("nginx")], 1, "nginx")
    (path,) = set_aside(rejected_dir, [make_log_group("click")])
    status, stdout, stderr = put_again(service, rejected_dir, **changes)
    assert (status, stdout) == (1, []) and service.calls("PutLogs") == 0
    assert any(path in line for line in stderr) and "nothing is put" in stderr[-1]
    assert len(os.listdir(str(rejected_dir))) == 2


def test_killed_or_told_to_stop_it_has_deleted_what_was_taken_and_no_more(service, copies, rejected_dir):
    """And two of them don't put all of it twice."""
    log_groups = [make_log_group("click") for _ in range(12)]
    set_aside(rejected_dir, log_groups)
    start = functools.partial(
        copies.start, arguments=["--put-rejected", str(rejected_dir)], SLS_LOG_DIR="", SLS_WRITERS="4"
    )
    with service.add_fault("PutLogs", hold=True) as fault:
        killed = start()
        service.wait_for(lambda: fault.hits > 0, LIMIT, "a put")
        second = start()
        assert second.process.wait(LIMIT) == 1
        assert "another --put-rejected works on it" in second.stderr()
        killed.process.kill()
        killed.process.wait()
    assert len(os.listdir(str(rejected_dir))) == 12
    with service.add_fault("PutLogs", hold=True) as fault:
        stopped = start()
        service.wait_for(lambda: fault.hits == 4, LIMIT, "as many puts as there are writers")
        stopped.send(signal.SIGTERM)
        service.wait_for(lambda: "told to stop" in stopped.stderr(), LIMIT, "a word about the signal")
    assert stopped.process.wait(LIMIT) == 1
    assert len(os.listdir(str(rejected_dir))) == 8, "what was in flight was taken, and nothing begun"
    status, _, _ = put_again(service, rejected_dir)
    assert status == 0
    assert_delivered_once(log_groups, arrived(service))


def test_a_target_that_is_down_holds_up_no_other(service, copies, rejected_dir):
    """However many files are for it."""
    set_aside(rejected_dir, [make_log_group("nginx") for _ in range(60)], 1, "nginx")
    good = [make_log_group("click") for _ in range(60)]
    set_aside(rejected_dir, good)
    with service.add_fault("PutLogs", logstore="nginx", status=503, code="ServerBusy"):
        copy = copies.start(arguments=["--put-rejected", str(rejected_dir)], SLS_LOG_DIR="", SLS_WRITERS="4")
        service.wait_for(lambda: len(arrived(service)) == len(good), LIMIT, "all that the other target takes")
    assert copy.process.wait(LIMIT) == 0
    assert_delivered_once(good, arrived(service))
    assert os.listdir(str(rejected_dir)) == []


def test_a_directory_that_is_not_there_is_said(service, rejected_dir):
    status, stdout, stderr = put_again(service, rejected_dir / "elsewhere")
    assert (status, stdout) == (2, []) and "--put-rejected: " in stderr[-1]
