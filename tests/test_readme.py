"""The README: its tables against the program's own, its links, and its recipes, run as far as they can be here."""

import configparser
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from assertions import assert_all_delivered_once, assert_delivered_once
from conftest import logstore_config
from harness import (
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
    wait_until_shared,
)
from test_monitoring import free_port, get
from test_project import ROOT, VARIABLES, text_of

import dispatch_data

README = text_of("README.md")
ENGLISH, CHINESE = README.split("\n## 中文说明\n")
IDEOGRAPH = re.compile("[\u4e00-\u9fff]")


def recipe(name):
    """The block of code that follows a comment with a recipe's name."""
    return re.search(r"<!-- recipe: %s -->\n```\w+\n(.*?)```" % re.escape(name), README, re.DOTALL).group(1)


# ---- tables


def table(heading):
    """The rows of the table that begins so, each as its cells."""
    lines = ENGLISH[ENGLISH.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def codes(cell):
    return re.findall(r"`(\w+)`", cell)


def listed_settings():
    """The settings as the README lists them: names, default, English, Chinese."""
    entry = re.compile(r"^- (`SLS_.*?) · (.*)\\\n  ((?:.*\n)*?.*)\\\n  (.*)$", re.MULTILINE)
    entries = entry.findall(section("Configuration"))
    assert len(entries) == section("Configuration").count("\n- `SLS_") > 10
    return entries


@pytest.mark.quick
def test_every_setting_has_its_entry_in_both_languages_and_its_default():
    rows = listed_settings()
    tuning = {setting.variable: setting for setting in dispatch_data.TUNING_SETTINGS.values()}
    for variable in VARIABLES:
        row = next((cells for cells in rows if variable in cells[0]), None)
        assert row, variable
        if variable in tuning:
            default, expected = row[1].replace("default: ", "").strip("`"), tuning[variable].default
            assert default == expected or (default == "none" and not expected), variable
    for _, _, english, chinese in rows:
        assert english and IDEOGRAPH.search(chinese) and not IDEOGRAPH.search(english)
    known = set(VARIABLES)
    assert {name.rstrip("_") for name in re.findall(r"\bSLS_[A-Z_]+", README)} <= known | {
        name + "_TO" for name in known
    }


@pytest.mark.quick
def test_every_error_code_has_its_row_in_both_languages():
    rows = table("| code | what to do |")
    listed = {code for cells in rows for code in codes(cells[0])}
    assert (
        set(dispatch_data.ERROR_BY_CODE) - {"ConsumerNotExsit"} <= listed
    )  # which is a misspelling of ConsumerNotExist
    for _, english, chinese in rows:
        assert english and IDEOGRAPH.search(chinese) and not IDEOGRAPH.search(english)


def test_every_key_of_the_summary_and_every_metric_has_its_row(service, copies):
    copy = copies.start()
    wait_until_joined(service, copy)
    assert copy.stop() == 0
    written = set(re.findall(r" (\w+)=", "".join(line for line in copy.log().splitlines() if " summary " in line)))
    rows = table("| key | metric")
    assert {key for cells in rows for key in codes(cells[0])} == written
    assert {name for cells in rows for name in codes(cells[1])} == {metric[1] for metric in dispatch_data.METRICS}


def shape(line):
    """A line of the log without what differs from run to run: names of places and consumers, and numbers."""
    line = re.sub(r"^\S+ \S+ \d+ (?=[A-Z]+ )", "", line)
    line = re.sub(r"[\w-]+-\d+-[0-9a-f]{20}", "CONSUMER", re.sub(r"[\w-]+-project/[\w-]+", "PLACE", line))
    return re.sub(r"\d+(,\d+)*", "0", line)


def test_the_log_reads_as_shown(service, copies):
    """At a start, when a copy comes and goes, in trouble and at a stop."""
    quick = {"RetryLog.RECOVERY_QUIET": 0.3, "REPORT_LOOP_INTERVAL": 0.05}
    start = functools.partial(copies.start, SLS_HEARTBEAT_INTERVAL="3")  # a busy machine is to cost no lease
    copy = start(constants=quick)
    feed(service, 40)
    service.wait_for(lambda: copy.log().count("has taken its first") == 3, LIMIT, "the first logs taken")
    wait_until_shared(service, copy)
    other = start()
    service.wait_for(lambda: "holds shards 0,1,2,3, before: none" in copy.log(), LIMIT, "a word about the shards")
    wait_until_shared(service, copy, other)
    service.wait_for(lambda: re.search(r"holds shards \d,\d, before", copy.log()), LIMIT, "a word about the others")
    other.process.kill()
    wait_until_shared(service, copy)
    with service.add_fault(
        "PutLogs", logstore="nginx", code="ShardWriteQuotaExceed", message="Shard write quota exceed"
    ):
        feed(service, 8)
        service.wait_for(lambda: "ShardWriteQuotaExceed" in copy.log(), LIMIT, "trouble")
    service.wait_for(lambda: "nginx: puts recovered" in copy.log(), LIMIT, "its end")
    assert copy.stop() == 0
    written = [shape(line) for line in copy.log().splitlines()]
    samples = re.findall(r"<!-- log: [\w-]+ -->\n```\n(.*?)```", README, re.DOTALL)
    assert len(samples) == 4
    for line in "".join(samples).splitlines():  # in what order, threads decide
        assert shape(line) in written, line


@pytest.mark.quick
def test_the_guarantee_names_tests_that_exist():
    for heading, at_least in (("| guarantee | tests |", 10), ("| cause | logs that arrive twice | tests |", 8)):
        rows = [re.findall(r"`(test_\w+\.py)`", cells[-1]) for cells in table(heading)]
        assert all(rows), "a line that nothing proves"
        named = [name for names in rows for name in names]
        assert len(named) >= at_least
        assert all((ROOT / "tests" / name).exists() for name in named)


@pytest.mark.quick
def test_figures_name_the_command_that_prints_them():
    assert "tests/tools/benchmark.py" in ENGLISH and (ROOT / "tests" / "tools" / "benchmark.py").exists()


# ---- sections, links and the picture


def headings(text):
    """The level and the words of each heading; what stands in blocks of code is none."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    return [(len(level), words) for level, words in re.findall(r"(?m)^(#+) (.+)$", prose)]


def anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def section(name):
    return README.split("\n## %s\n" % name)[1].split("\n## ")[0]


@pytest.mark.quick
def test_links_lead_somewhere():
    anchors = [anchor(words) for _, words in headings(README)]
    assert len(set(anchors)) == len(anchors), "two headings share an anchor, and a link would lead to the first"
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


@pytest.mark.quick
def test_sections_are_named_as_people_look_for_them():
    """And the line of contents names each, in the order they come in."""
    sections = [words for level, words in headings(ENGLISH) if level == 2]
    looked_for = ["Quick start", "How it works", "Configuration", "Deployment", "Upgrade and replay", "Monitoring"]
    looked_for += ["Order and duplicates", "Dead letters", "Performance", "Security", "Troubleshooting"]
    assert [name for name in sections if name in looked_for] == looked_for
    contents = re.findall(r"\]\(#([^)]+)\)", ENGLISH.split("\n## ")[0])
    assert contents == [anchor("中文说明")] + [anchor(name) for name in sections]


@pytest.mark.quick
def test_the_chinese_part_says_where_each_command_stands():
    """And every option of the command line stands in both parts."""
    links = set(re.findall(r"\]\(#([\w-]+)\)", CHINESE))
    assert links >= {"deployment", "ram-policy", "upgrade-and-replay", "dead-letters", "monitoring", "changes"}
    usage = dispatch_data.__dict__["read_arguments"].__code__.co_consts
    options = {text for text in usage if isinstance(text, str) and re.fullmatch(r"--[a-z-]+", text)} - {"--version"}
    assert {"--check", "--status", "--drain", "--put-rejected", "--until"} <= options
    assert [name for name in options - {"--json"} if name not in CHINESE] == []
    assert [name for name in options if name not in ENGLISH] == []


@pytest.mark.quick
def test_the_changes_name_the_release():
    assert "**%s**" % dispatch_data.__version__ in section("Changes")


@pytest.mark.quick
def test_a_newcomer_first_sees_what_needs_no_account_and_no_tests():
    steps = ["local_log_service demo", "dispatch_data.py --check", "PyPy, put", "## How it works", "<!-- test command"]
    assert [ENGLISH.count(step) for step in steps] == [1] * len(steps)
    assert sorted(steps, key=ENGLISH.index) == steps


@pytest.mark.quick
def test_the_test_command_is_the_one_that_ci_runs():
    """`.ci/run` takes the line that begins with python3 from the block after the comment."""
    block = re.search(r"(?ms)^<!-- test command -->$(.*?)^```$", README).group(1)
    (command,) = re.findall(r"(?m)^python3 .*", block)
    assert command.endswith(" -m pytest tests")


@pytest.mark.quick
def test_the_picture_of_how_it_works_is_a_flowchart():
    """Not all that mermaid looks at, but the common slips: every arrow's ends are declared, all is closed."""
    (picture,) = re.findall(r"(?ms)^```mermaid\n(.*?)^```$", README)
    assert picture in section("How it works")
    first, *lines = [line.strip() for line in picture.splitlines()]
    assert re.fullmatch(r"flowchart (LR|TB|TD)", first)
    assert sum(line.startswith("subgraph ") for line in lines) == lines.count("end")
    declared, used = [], set()
    for line in lines:
        plain = re.sub(r'"[^"]+"', "TEXT", line)
        assert '"' not in plain, line
        if re.search(r"-->", plain):
            ends = re.split(r" -- TEXT --> | --> ", plain)
            assert all(re.fullmatch(r"\w+", end) for end in ends), line
            used.update(ends)
        elif plain != "end":
            node = re.fullmatch(r"(?:subgraph )?(\w+) ?(?:\[TEXT\]|\[\(TEXT\)\])", plain)
            assert node, line
            declared.append(node.group(1))
    assert len(set(declared)) == len(declared)
    assert used <= set(declared) and "end" not in declared
    assert used | {"copy"} == set(declared), "a node that no arrow touches"


@pytest.mark.quick
def test_how_it_works_says_what_a_batch_in_flight_is_given():
    assert len(re.findall(r"(?m)^\d\. \*\*", section("How it works"))) == 5
    assert "%g s more" % dispatch_data.GRACE in " ".join(section("How it works").split())


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


@pytest.mark.slow
def test_nohup_starts_copies_and_kill_stops_them(service, installation):
    started = run_shell(recipe("nohup"), installation, service, SLS_HEARTBEAT_INTERVAL="3")
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


@pytest.mark.quick
def test_the_systemd_unit_gives_it_time_and_its_journal():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(recipe("systemd"))
    service = unit["Service"]
    assert float(service["TimeoutStopSec"]) > dispatch_data.SHUTDOWN_TIMEOUT + 5
    assert service["RestartPreventExitStatus"] == "2"  # settings that are wrong don't mend themselves
    # The file of settings would win over these, so they are not to be in it.
    unit_sets = dict(pair.split("=") for pair in service["Environment"].replace("%i", "3").split(" "))
    names = ("AK_ID", "AK_KEY", "PROJECT", "LOGSTORE", "CG", "LOGSTORE_TO1", "TOPIC_TO1")
    environment = {"SLS_" + name: "xyz" for name in names}
    environment.update({"SLS_ENDPOINT": "e", "SLS_LOGSTORE": "source", **unit_sets})
    settings = dispatch_data.read_settings(environment)
    assert (settings.log_dir, settings.metrics_port, settings.warnings) == ("", 9463, ())


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_finds_nothing_wrong_with_its_unit(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = re.sub("(?m)^ExecStart=.*", "ExecStart=%s" % program, recipe("systemd"))
    (tmp_path / "dispatch_data@.service").write_text(unit, encoding="utf-8")
    command = ["systemd-analyze", "verify", "dispatch_data@.service"]
    ended = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True, timeout=LIMIT)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


@pytest.mark.quick
def test_the_settings_file_suits_the_shell_systemd_and_containers():
    """Only the shell would take exports and substitutions, and all is one word to it, without quotes: of a quoted word
    xargs makes several. test_env_example.py has it read by all of them."""
    settings = []
    for line in re.sub(r"(?m)^# (SLS_)", r"\1", text_of(".env.example")).splitlines():
        assert re.fullmatch(r"(#.*|SLS_\w+=[^\s\"'$`]*|)", line), line
        if not line.startswith("#") and line and not line.endswith("="):
            settings.append(line)
    # A directory that need not exist here, and a key in the place of the other ways to get one, which are examples.
    rest = {"SLS_REJECTED_DIR": "", "SLS_CREDENTIALS": "", "SLS_AK_ID": "id", "SLS_AK_KEY": "key"}
    as_docker_hands_them_on = dict(line.split("=", 1) for line in settings)
    as_a_shell_does = dict(shlex.split(line)[0].split("=", 1) for line in settings)
    assert as_docker_hands_them_on == as_a_shell_does
    read = [dispatch_data.read_settings({**way, **rest}) for way in (as_docker_hands_them_on, as_a_shell_does)]
    assert read[0] == read[1]


@pytest.mark.quick
def test_the_container_brings_what_the_program_needs():
    lines = recipe("Dockerfile").splitlines()
    copied = next(line for line in lines if line.startswith("COPY")).split()[1:-1]
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["python", "dispatch_data.py"]' in lines


def test_the_probe_of_the_deployment_probes(service, copies):
    """Before the group can be joined too; and nothing but the process is asked of a pod."""
    deployment = yaml.safe_load(recipe("kubernetes"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > dispatch_data.SHUTDOWN_TIMEOUT + 5
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert "readinessProbe" not in container
    assert pod["enableServiceLinks"] is False  # else a Service named sls-metrics sets SLS_METRICS_PORT
    probe = container["livenessProbe"]["httpGet"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert environment["SLS_METRICS_PORT"] == str(ports[probe["port"]]) == annotations["prometheus.io/port"]
    environment["SLS_METRICS_PORT"] = str(free_port())  # another test may have that one
    with service.add_fault("*", hold=True):
        copies.start(**environment)
        service.wait_for(lambda: get(environment["SLS_METRICS_PORT"], probe["path"]), LIMIT, "an answer to the probe")
        assert get(environment["SLS_METRICS_PORT"], probe["path"])[0] == 200


def test_the_replay_fills_one_target_with_what_arrived_in_that_time(service, installation):
    for logstore in ("sql-audit", "click"):
        service.create_logstore("their-project", logstore)
    feed(service, 8)
    entries = feed_in_another_second(service)
    feed_in_another_second(service)
    script = recipe("replay")
    for time_of_example, seconds in (("2026-11-23T10:00:00+08:00", 0), ("2026-11-23T11:00:00+08:00", 1)):
        there = time.gmtime(int(entries[0].received_at) + seconds)
        script = script.replace(time_of_example, time.strftime("%Y-%m-%dT%H:%M:%SZ", there))
    assert "2026-11-23" not in script
    changes = {"SLS_PROJECT_TO2": "their-project", "SLS_PROJECT_TO3": "their-project", "SLS_HEARTBEAT_INTERVAL": "20"}
    ended = run_shell(script, installation, service, **changes)
    assert ended.returncode == 0, ended.stderr
    arrived = [entry.log_group for entry in service.ledger("their-project", "sql-audit")]
    assert_delivered_once([entry.log_group for entry in entries if entry.parse().Topic == "sql_audit"], arrived)
    assert service.calls("PutLogs") and not service.ledger("their-project", "click")


def feed_in_another_second(service):
    """LogGroups that arrive in a second of their own; what the ledger has of them."""
    last = max(entry.received_at for entry in service.ledger(PROJECT, SOURCE))
    service.wait_for(lambda: int(time.time()) > int(last), LIMIT, "another second")
    log_groups = [make_log_group(topic) for topic in ("nginx", "sql_audit", "click")]
    return service.put(PROJECT, SOURCE, log_groups, shard=1)


# ---- alarms


@pytest.mark.quick
def test_the_alarms_are_on_metrics_that_there_are():
    served = {"dispatch_data_" + metric[1] for metric in dispatch_data.METRICS if metric[0] in ("target", "copy")}
    (group,) = yaml.safe_load(recipe("alarm rules"))["groups"]
    named = [set(re.findall(r"dispatch_data_\w+", rule["expr"])) for rule in group["rules"]]
    assert all(named) and set.union(*named) <= served
    assert {"dispatch_data_lag_seconds", "dispatch_data_puts_failing"} <= set.union(*named)


DASHBOARD = json.loads(text_of("tests/grafana_dashboard.json"))


def expressions():
    """Those of the dashboard, as Grafana sends them."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$job", ".*").replace("$__rate_interval", "2m")


@pytest.mark.quick
def test_the_dashboard_shows_every_metric_there_is_and_no_other():
    served = {"dispatch_data_" + metric.name for metric in dispatch_data.METRICS}
    named = {re.sub("_bucket$", "", name) for text in expressions() for name in re.findall(r"dispatch_data_\w+", text)}
    assert named == served
    assert "(tests/grafana_dashboard.json)" in section("Monitoring")
    job = DASHBOARD["templating"]["list"][1]["query"]
    assert set(re.findall(r"dispatch_data_\w+", job)) <= served


@pytest.mark.quick
def test_the_labels_of_the_dashboard_are_those_that_are_served():
    """`job` and `instance` are Prometheus' own."""
    served = {"target", "logstore", "source", "version", "python", "le", "job", "instance"}
    text = json.dumps(DASHBOARD["panels"])
    used = {name for names in re.findall(r"by \(([^)]*)\)", text) for name in names.split(", ")}
    assert used | set(re.findall(r"{{(\w+)}}", text)) <= served
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            grouped = re.search(r" by \(([^)]*)\)", target["expr"]).group(1).split(", ")
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == set(grouped) - {"le"}, panel["title"]


@pytest.mark.quick
def test_the_panels_of_the_dashboard_lie_side_by_side():
    covered = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in covered and x < 24
                covered.add((x, y))
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool, of Debian's package prometheus, is not in the PATH")
def test_what_the_dashboard_asks_is_promql(tmp_path):
    rules = [{"record": "panel:%d" % number, "expr": text} for number, text in enumerate(expressions())]
    groups = {"groups": [{"name": "dashboard", "rules": rules}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(groups), encoding="utf-8")
    command = ["promtool", "check", "rules", "rules.yml"]
    ended = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool, of Debian's package prometheus, is not in the PATH")
def test_the_alarms_are_rules_to_prometheus_and_ring(tmp_path):
    (tmp_path / "rules.yml").write_text(recipe("alarm rules"), encoding="utf-8")
    series = "dispatch_data_%s{job='logs'%s}"
    now_and_then = {
        "lag_seconds": ("0x10 400x20", "", "DispatchDataBehind", ""),
        "routes_differ": ("0x10 1x40", "", "DispatchDataRoutesDiffer", ""),
        "puts_failing": ("0x10 3x20", ", target='2', logstore='p/l'", "DispatchDataPutsFailing", "p/l"),
        "last_heartbeat_timestamp_seconds": ("0+60x10 600x20", "", "DispatchDataNotConsuming", ""),
    }
    tests = []
    for name, (values, labels, alarm, shown) in now_and_then.items():
        inputs = [{"series": series % (name, labels), "values": values}]
        if name != "lag_seconds":
            inputs.append({"series": series % ("lag_seconds", ""), "values": "0x30"})
        labels_of_alarm = {"job": "logs", **({"target": "2", "logstore": "p/l"} if shown else {})}
        rings = {"eval_time": "30m", "alertname": alarm, "exp_alerts": [{"exp_labels": labels_of_alarm}]}
        quiet = {"eval_time": "9m", "alertname": alarm, "exp_alerts": []}
        tests.append({"interval": "1m", "input_series": inputs, "alert_rule_test": [quiet, rings]})
    rules = yaml.safe_load(recipe("alarm rules"))
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # whose words are not what is tested
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["plain.yml"], "tests": tests}), encoding="utf-8")
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "tests.yml"]):
        ended = subprocess.run(["promtool", *command], cwd=str(tmp_path), capture_output=True, text=True, timeout=LIMIT)
        assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("kubernetes-validate"), reason="kubernetes-validate, of PyPI, is not in the PATH")
def test_kubernetes_knows_every_field(tmp_path):
    """The Deployment, the service account, and the two merged as the README says."""
    deployment = yaml.safe_load(recipe("kubernetes"))
    account, patch = yaml.safe_load_all(recipe("RRSA"))
    merged = yaml.safe_load(recipe("kubernetes"))
    pod, added = merged["spec"]["template"], patch["spec"]["template"]
    pod["metadata"]["labels"].update(added["metadata"].pop("labels"))
    pod["spec"]["containers"][0]["env"] += added["spec"]["containers"][0].pop("env")
    assert [added["metadata"], added["spec"].pop("containers")] == [{}, [{"name": "dispatch-data"}]]  # that was all
    pod["spec"].update(added["spec"])
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all([deployment, account, merged]), encoding="utf-8")
    command = ["kubernetes-validate", "--strict", "all.yaml"]
    ended = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (ended.stdout + ended.stderr).count("passed for resource") == 3


@pytest.mark.quick
def test_the_service_account_is_the_same_in_all_recipes():
    account, patch = yaml.safe_load_all(recipe("RRSA"))
    pod = patch["spec"]["template"]["spec"]
    deployment = yaml.safe_load(recipe("kubernetes"))
    name = deployment["metadata"]["name"]
    assert name == patch["metadata"]["name"] == account["metadata"]["name"] == pod["serviceAccountName"]
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert labels.items() < patch["spec"]["template"]["metadata"]["labels"].items()
    assert pod["containers"][0]["name"] == deployment["spec"]["template"]["spec"]["containers"][0]["name"]
    for trusted in ("ECS", "RRSA"):
        (statement,) = json.loads(recipe("trust policy for " + trusted))["Statement"]
        assert statement["Action"] == "sts:AssumeRole"
    assert statement["Condition"]["StringEquals"]["oidc:sub"] == "system:serviceaccount:default:" + name


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
        copy = copies.start(constants={"SUMMARY_INTERVAL": 0.2})
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
    place = logstore_config(logstore="click")
    rejected = dispatch_data.DeadLetterDirectory(str(directory))
    for number, log_group in enumerate(log_groups):
        rejected.save(3, place, dispatch_data.LogGroup("click", 5, log_group, b""), "0-%d" % number)
    poison = dispatch_data.LogGroup("click", 5, make_log_group("click") + b"\x28\x01", b"")
    refused = rejected.save(3, place, poison, "0-3")
    ended = run_shell(recipe("put again"), installation, service)
    assert ended.returncode == 1 and "PostBodyInvalid" in ended.stderr, "one is refused still"
    assert os.path.exists(refused)
    os.remove(refused)
    assert run_shell(recipe("put again"), installation, service).returncode == 0
    assert list(directory.iterdir()) == []
    assert sorted(entry.log_group for entry in service.ledger(PROJECT, "click")) == sorted(log_groups)
