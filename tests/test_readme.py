"""The README: its tables against the program's own, its links, and its recipes, run as far as they can be here."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from copies import (
    LIMIT,
    PROGRAM,
    PROJECT,
    SOURCE,
    feed,
    group_shards,
    is_running,
    make_log_group,
    settings_for,
    wait_until_delivered,
    wait_until_joined,
)
from ledgers import assert_all_delivered_once
from test_project import ROOT, SETTINGS, text_of

import dispatch_data

README = text_of("README.md")
ENGLISH, CHINESE = README.split("\n## 中文说明\n")


def recipe(name):
    """The block of code that follows a comment with a recipe's name."""
    return re.search(r"<!-- recipe: %s -->\n```\w+\n(.*?)```" % re.escape(name), README, re.DOTALL).group(1)


# ---- tables


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_every_setting_has_its_row_and_its_default(text):
    for setting in SETTINGS:
        row = next((line for line in text.splitlines() if line.startswith("| ") and setting.name in line), None)
        assert row, setting.name
        if setting in dispatch_data.TUNING_SETTINGS:
            default = row.split("|")[-2].strip().strip("`")
            assert default == setting.default or (default in ("none", "无") and not setting.default), setting.name
    named = set(re.findall(r"\bSLS_[A-Z_]+", text))
    known = {setting.name for setting in SETTINGS}
    named = {name.rstrip("_") for name in named if not name.startswith("SLS_LIVE_")}  # which are tests/live.py's
    assert named <= known | {name + "_TO" for name in known}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_every_error_code_has_its_row(text):
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    assert set(dispatch_data.CODES) - {"ConsumerNotExsit"} <= listed  # which is a misspelling of ConsumerNotExist


def test_every_key_of_the_summary_has_its_row(service, copies):
    copy = copies.start()
    wait_until_joined(service, copy)
    assert copy.stop() == 0
    written = set(re.findall(r" (\w+)=", "".join(line for line in copy.log().splitlines() if " summary " in line)))
    table = ENGLISH[ENGLISH.index("| key | meaning |") :].split("\n\n")[0]
    documented = {key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert written == documented


def test_links_lead_somewhere():
    headings = re.findall(r"(?m)^#+ (.+)$", README)
    anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_the_guarantee_names_tests_that_exist():
    table = ENGLISH[ENGLISH.index("| guarantee | tests |") :].split("\n\n")[0]
    named = re.findall(r"`(test_\w+\.py)`", table)
    assert len(named) >= 10
    assert all((ROOT / "tests" / name).exists() for name in named)


def test_figures_name_the_command_that_prints_them():
    assert "tests/benchmark.py" in ENGLISH and (ROOT / "tests" / "benchmark.py").exists()


# ---- recipes


@pytest.fixture
def installation(tmp_path):
    """A directory with the program, and `python` and `python3` in the PATH that are this interpreter."""
    shutil.copy(str(PROGRAM), str(tmp_path))
    for name in ("python", "python3"):
        wrapper = tmp_path / "bin" / name
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text('#!/bin/sh\nexec %s "$@"\n' % shlex.quote(sys.executable))
        wrapper.chmod(0o755)
    return tmp_path


def environment_of(installation, service, **changes):
    environment = settings_for(service, **changes)
    environment["PATH"] = "%s:%s" % (installation / "bin", os.environ.get("PATH", "/usr/bin:/bin"))
    return environment


def run_shell(script, installation, service, **changes):
    return subprocess.run(
        ["bash", "-c", script],
        cwd=str(installation),
        env=environment_of(installation, service, **changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_nohup_starts_copies_and_kill_stops_them(service, installation):
    started = run_shell(recipe("nohup"), installation, service)
    assert started.returncode == 0
    process_ids = [int(line) for line in (installation / "dispatch_data.pids").read_text().split()]
    try:
        assert len(process_ids) == 3

        def is_shared():
            holders = [state["consumer"] for state in group_shards(service).values()]
            return len(holders) == 4 and all(
                any("-%d-" % number in holder for holder in holders) for number in process_ids
            )

        service.wait_for(is_shared, LIMIT, "the shards shared")
        feed(service, 40)
        wait_until_delivered(service)
        stopped = run_shell(recipe("nohup, stop"), installation, service)
        assert (stopped.returncode, stopped.stderr) == (0, "")
        service.wait_for(lambda: not any(map(is_running, process_ids)), LIMIT, "all copies gone")
    finally:
        for process_id in filter(is_running, process_ids):
            os.kill(process_id, 9)
    assert_all_delivered_once(service)
    assert not (installation / "dispatch_data.pids").exists()
    for process_id in process_ids:
        assert " summary " in (installation / ("dispatch_data_%d.log" % process_id)).read_text().splitlines()[-1]


def test_the_systemd_unit_gives_it_time_and_its_journal():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(recipe("systemd"))
    service = unit["Service"]
    assert float(service["TimeoutStopSec"]) > dispatch_data.STOP_TIME + 5
    assert service["RestartPreventExitStatus"] == "2"  # settings that are wrong don't mend themselves
    name, value = service["Environment"].split("=")
    environment = {"SLS_" + key: "xyz" for key in ("AK_ID", "AK_KEY", "PROJECT", "LOGSTORE", "CG", "LOGSTORE_TO1")}
    environment.update({"SLS_ENDPOINT": "e", "SLS_LOGSTORE": "source", name: value})
    assert dispatch_data.read_settings(environment).log_dir == ""


def test_the_settings_file_suits_the_shell_systemd_and_containers():
    """Only the shell would take exports and substitutions, and what isn't quoted must be one word to it.

    systemd takes quotes away as the shell does; docker and kubectl hand them on, and the program takes them away.
    """
    settings = []
    for line in re.sub(r"(?m)^# (SLS_)", r"\1", text_of(".env.example")).splitlines():
        assert re.fullmatch(r"(#.*|SLS_\w+=([^\s\"'$`]*|\"[^\"$`]*\")|)", line), line
        if not line.startswith("#") and line and not line.endswith("="):
            settings.append(line)
    # A directory that need not exist here, and keys, which the example leaves out.
    rest = {"SLS_REJECTED_DIR": "", "SLS_AK_ID": "id", "SLS_AK_KEY": "key"}
    as_docker_hands_them_on = dict(line.split("=", 1) for line in settings)
    as_a_shell_does = dict(shlex.split(line)[0].split("=", 1) for line in settings)
    assert as_docker_hands_them_on != as_a_shell_does
    read = [dispatch_data.read_settings({**way, **rest}) for way in (as_docker_hands_them_on, as_a_shell_does)]
    assert read[0] == read[1]


def test_the_container_brings_what_the_program_needs():
    lines = recipe("Dockerfile").splitlines()
    copied = next(line for line in lines if line.startswith("COPY")).split()[1:-1]
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["python", "dispatch_data.py"]' in lines


def test_the_probes_of_the_deployment_probe(service, copies, installation):
    deployment = yaml.safe_load(recipe("kubernetes"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > dispatch_data.STOP_TIME + 5
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]

    def probe(name):
        command = container[name]["exec"]["command"]
        script = " ".join(map(shlex.quote, command)).replace("/tmp", str(installation))
        return run_shell(script, installation, service).returncode

    assert probe("livenessProbe") == 1, "no log yet"
    assert probe("readinessProbe") == 1, "no group yet"
    copy = copies.start(SLS_LOG_DIR=str(installation))
    service.wait_for(lambda: len(group_shards(service)) == 4, LIMIT, "a group")
    wait_until_delivered(service)
    assert probe("livenessProbe") == 0
    assert probe("readinessProbe") == 0
    assert copy.stop() == 0
    (log,) = installation.glob("dispatch_data_*.log")
    os.utime(str(log), (0, 0))
    assert probe("livenessProbe") == 1, "nothing written for long"


RAM_ACTIONS = {
    "ListShards": "log:ListShards",
    "GetCursor": "log:GetCursorOrData",
    "GetCursorTime": "log:GetCursorOrData",
    "PullLogs": "log:GetCursorOrData",
    "ListConsumerGroup": "log:ListConsumerGroup",
    "CreateConsumerGroup": "log:CreateConsumerGroup",
    "UpdateConsumerGroup": "log:UpdateConsumerGroup",
    "HeartBeat": "log:ConsumerGroupHeartBeat",
    "UpdateCheckPoint": "log:ConsumerGroupUpdateCheckPoint",
    "GetCheckPoint": "log:GetConsumerGroupCheckPoint",
    "PutLogs": "log:PostLogStoreLogs",
}


def test_the_ram_policy_is_what_the_program_calls_and_no_more(service, copies):
    for _ in range(2):  # the second one finds the group made
        copy = copies.start(before="SUMMARY_INTERVAL = 0.2")
        feed(service, 20)
        wait_until_delivered(service)
        service.wait_for(lambda copy=copy: " lag_seconds=0" in copy.log(), LIMIT, "a summary")
        assert copy.stop() == 0
    called = {"source": set(), "target": set()}
    for action, _, logstore in service.calls_by_logstore:
        called["source" if logstore == SOURCE else "target"].add(RAM_ACTIONS[action])
    allowed = {"source": set(), "target": set()}
    for statement in json.loads(recipe("RAM policy"))["Statement"]:
        assert statement["Effect"] == "Allow"
        allowed["source" if "SOURCE_LOGSTORE" in statement["Resource"] else "target"].update(statement["Action"])
    assert called == allowed


def test_log_groups_that_were_set_aside_can_be_put_again(service, installation):
    directory = installation / "rejected"
    directory.mkdir()
    log_groups = [make_log_group("click") for _ in range(3)]
    place = dispatch_data.Place("", "", "", "", "", PROJECT, "click", {})
    rejected = dispatch_data.RejectedLogGroups(str(directory))
    for log_group in log_groups:
        rejected.keep(3, place, dispatch_data.LogGroup("click", 5, log_group, b""))
    refused = rejected.keep(3, place, dispatch_data.LogGroup("click", 5, make_log_group("click") + b"\x28\x01", b""))
    ended = run_shell(recipe("put again"), installation, service)
    assert ended.returncode == 1 and "PostBodyInvalid" in ended.stderr, "one is refused still"
    assert os.path.exists(refused)
    os.remove(refused)
    run_shell(recipe("put again"), installation, service)
    assert list(directory.iterdir()) == []
    assert sorted(entry.log_group for entry in service.ledger(PROJECT, "click")) == sorted(log_groups)
