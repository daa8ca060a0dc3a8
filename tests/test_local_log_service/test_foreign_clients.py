"""Programs that nobody here wrote, against the local Log Service: the vendor's command line, its Node SDK, its
OpenAPI SDKs, and what else writes logs.

They are no requirements of the tests: where one is not installed, its tests are skipped, unless the variable
FOREIGN_CLIENTS says "required", as it does in CI. Installed they are when

* the command line (``pip install aliyun-log-cli``, in a virtual environment of its own) is ``aliyunlog`` on the PATH,
* ``node`` is on the PATH, and its packages are in a folder that NODE_PATH names,
* FOREIGN_PYTHON names the interpreter of a virtual environment of its own with the OpenAPI SDK and what writes logs.

`.ci/run` has all of their names and releases.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import harness
import pytest
from aliyun.log.proto import LogGroup
from assertions import assert_delivered_once
from local_log_service import LocalLogService

PROJECT = "foreign-project"
LIMIT = 120.0  # seconds that any program may take on a slow machine
NODE_SCRIPT = Path(__file__).resolve().parent / "foreign_client.js"
numbers = itertools.count()


@pytest.fixture(scope="module")
def log_service():
    with LocalLogService() as running:
        yield running


@pytest.fixture
def logstore(log_service):
    """Name of a new logstore of two shards."""
    name = "logstore-%d" % next(numbers)
    log_service.create_logstore(PROJECT, name, 2)
    return name


def log_group(value, topic="nginx"):
    group = LogGroup(Topic=topic, Source="10.0.0.1")
    log = group.Logs.add(Time=1700000000)
    log.Contents.add(Key="key", Value=value)
    return group.SerializeToString()


def position(cursor):
    return int(base64.b64decode(cursor))


def skip_or_fail(reason):
    if os.environ.get("FOREIGN_CLIENTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def foreign_python():
    program = os.environ.get("FOREIGN_PYTHON")
    if not program:
        skip_or_fail("FOREIGN_PYTHON names no interpreter that has the OpenAPI SDK")
    return program


def foreign_node(package):
    program = shutil.which("node")
    if program is None:
        skip_or_fail("node is not on the PATH")
    resolved = subprocess.run([program, "-e", "require.resolve('%s')" % package], capture_output=True, cwd="/")
    if resolved.returncode != 0:
        skip_or_fail("node finds no %s in the folders that NODE_PATH names" % package)
    return program


# ---- the command line


class Refused(Exception):
    """The command line ended with an error of the service: its code and message."""

    def __init__(self, error):
        super().__init__(error["errorCode"], error["errorMessage"])
        self.code = error["errorCode"]
        self.request_id = error["requestId"]


@pytest.fixture
def aliyunlog(log_service, tmp_path):
    """Runs a subcommand of ``aliyunlog log`` and returns what it prints, read as JSON. Raises Refused."""
    program = shutil.which("aliyunlog")
    if program is None:
        skip_or_fail("aliyunlog, of the package aliyun-log-cli, is not on the PATH")

    def run(subcommand, key_id="local-id", key="local-secret", **parameters):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
        environment.update(log_service.environment())
        environment["ALIYUN_LOG_CLI_ENDPOINT"] = log_service.endpoint
        environment["ALIYUN_LOG_CLI_ACCESSID"] = key_id
        environment["ALIYUN_LOG_CLI_ACCESSKEY"] = key
        options = ["--%s=%s" % (name.replace("__", "-"), value) for name, value in parameters.items()]
        ended = subprocess.run(
            [program, "log", subcommand, *options], env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        if ended.returncode == 3:  # its exit status for what the service refuses
            raise Refused(json.loads(ended.stdout))
        assert ended.returncode == 0, ended.stdout + ended.stderr
        documents = [json.loads(line) for line in ended.stdout.splitlines() if line]
        return documents[0] if len(documents) == 1 else documents

    return run


def test_command_line_projects_and_logstores(log_service, aliyunlog):
    project, logstore = "made-by-command-line", "access-log"
    aliyunlog("create_project", project_name=project, project_des="a description")
    shown = aliyunlog("get_project", project_name=project)
    assert (shown["projectName"], shown["description"], shown["status"]) == (project, "a description", "Normal")
    assert time.strptime(shown["createTime"], "%Y-%m-%d %H:%M:%S")
    listed = aliyunlog("list_project", project_name_pattern="made-by-command")
    assert (listed["count"], listed["total"]) == (1, 1)
    assert listed["projects"][0]["projectName"] == project and int(listed["projects"][0]["createTime"]) > 0

    aliyunlog("create_logstore", project_name=project, logstore_name=logstore, ttl=7, shard_count=3)
    assert aliyunlog("list_logstore", project_name=project) == {"count": 1, "total": 1, "logstores": [logstore]}
    aliyunlog("update_logstore", project_name=project, logstore_name=logstore, ttl=14, append_meta="true")
    shown = aliyunlog("get_logstore", project_name=project, logstore_name=logstore)
    assert (shown["logstoreName"], shown["ttl"], shown["shardCount"]) == (logstore, 14, 3)
    assert (shown["appendMeta"], shown["autoSplit"], shown["maxSplitShard"]) == (True, True, 64)
    assert log_service.ledger(project, logstore) == []

    aliyunlog("delete_logstore", project_name=project, logstore_name=logstore)
    with pytest.raises(Refused, match="LogStoreNotExist"):
        aliyunlog("get_logstore", project_name=project, logstore_name=logstore)
    aliyunlog("delete_project", project_name=project)
    with pytest.raises(Refused, match="ProjectNotExist"):
        aliyunlog("get_project", project_name=project)


def shapes(shards):
    return [
        (shard["shardID"], shard["status"], shard["inclusiveBeginKey"], shard["exclusiveEndKey"]) for shard in shards
    ]


def test_command_line_shards(log_service, logstore, aliyunlog):
    zero, quarter, half, end = ("0" * 32, "4" + "0" * 31, "8" + "0" * 31, "f" * 32)
    of_logstore = dict(project_name=PROJECT, logstore_name=logstore)
    shards = aliyunlog("list_shards", **of_logstore)
    assert shapes(shards) == [(0, "readwrite", zero, half), (1, "readwrite", half, end)]
    assert all(abs(shard["createTime"] - time.time()) < LIMIT for shard in shards)

    split = aliyunlog("split_shard", shardId=0, split_hash=quarter, **of_logstore)
    assert shapes(split) == [
        (0, "readonly", zero, half),
        (2, "readwrite", zero, quarter),
        (3, "readwrite", quarter, half),
    ]
    merged = aliyunlog("merge_shard", shardId=3, **of_logstore)
    assert shapes(merged) == [
        (4, "readwrite", quarter, end),
        (3, "readonly", quarter, half),
        (1, "readonly", half, end),
    ]
    after = aliyunlog("list_shards", **of_logstore)
    assert [shard["shardID"] for shard in after if shard["status"] == "readwrite"] == [2, 4]

    aliyunlog("arrange_shard", project=PROJECT, logstore=logstore, count=5)  # splits until there are so many
    writable = [shard for shard in aliyunlog("list_shards", **of_logstore) if shard["status"] == "readwrite"]
    assert len(writable) == 5
    ranges = sorted((shard["inclusiveBeginKey"], shard["exclusiveEndKey"]) for shard in writable)
    assert [begin for begin, _ in ranges] == [zero] + [range_end for _, range_end in ranges[:-1]]


def test_command_line_consumer_groups(log_service, logstore, aliyunlog):
    of_logstore = dict(project=PROJECT, logstore=logstore)
    of_group = dict(consumer_group="operators", **of_logstore)
    aliyunlog("create_consumer_group", timeout=30, in_order="true", **of_group)
    assert aliyunlog("list_consumer_group", **of_logstore) == [{"name": "operators", "timeout": 30, "order": True}]
    aliyunlog("update_consumer_group", timeout=60, in_order="false", **of_group)
    assert aliyunlog("list_consumer_group", **of_logstore) == [{"name": "operators", "timeout": 60, "order": False}]
    group = log_service.consumer_group(PROJECT, logstore, "operators")
    assert (group["timeout"], group["in_order"]) == (60, False)

    log_service.put(PROJECT, logstore, [log_group(text) for text in "abc"], shard=1)
    begin = aliyunlog("get_begin_cursor", project_name=PROJECT, logstore_name=logstore, shard_id=1)["cursor"]
    third = base64.b64encode(b"%d" % (position(begin) + 2)).decode()
    aliyunlog("update_check_point", shard=1, check_point=third, consumer="hand", **of_group)
    unset = {"shard": 0, "checkpoint": "", "updateTime": 0, "consumer": ""}
    shown = aliyunlog("get_check_point", **of_group)
    assert abs(shown[1].pop("updateTime") / 1e6 - time.time()) < LIMIT
    assert shown == [unset, {"shard": 1, "checkpoint": third, "consumer": "hand"}]
    assert log_service.consumer_group(PROJECT, logstore, "operators")["shards"][1]["next"] == 2
    assert log_service.lag(PROJECT, logstore, "operators") == 1

    aliyunlog("delete_consumer_group", **of_group)
    assert aliyunlog("list_consumer_group", **of_logstore) == []


def test_command_line_cursors_count_log_groups(log_service, logstore, aliyunlog):
    entries = log_service.put(PROJECT, logstore, [log_group(text) for text in "abc"], shard=0)
    of_shard = dict(project_name=PROJECT, logstore_name=logstore, shard_id=0)
    begin = aliyunlog("get_begin_cursor", **of_shard)["cursor"]
    end = aliyunlog("get_end_cursor", **of_shard)["cursor"]
    assert position(end) == position(begin) + 3
    arrival = int(entries[0].received_at)
    assert aliyunlog("get_cursor", start_time=arrival, **of_shard)["cursor"] == begin
    assert aliyunlog("get_cursor", start_time=arrival + 1000, **of_shard)["cursor"] == end
    assert aliyunlog("get_cursor_time", cursor=begin, **of_shard) == {"cursor_time": arrival}
    assert aliyunlog("get_previous_cursor_time", cursor=end, **of_shard) == {"cursor_time": int(entries[2].received_at)}

    first = aliyunlog("pull_logs", cursor=begin, count=2, **of_shard)
    assert position(first["next_cursor"]) == position(begin) + 2
    assert first["count"] == 2
    assert first["logs"] == [
        {"__time__": 1700000000, "__topic__": "nginx", "__source__": "10.0.0.1", "key": text} for text in "ab"
    ]
    rest = aliyunlog("pull_logs", cursor=first["next_cursor"], compress="false", **of_shard)
    assert [log["key"] for log in rest["logs"]] == ["c"] and rest["next_cursor"] == end
    last = aliyunlog("pull_logs", cursor=end, **of_shard)
    assert (last["count"], last["logs"], last["next_cursor"]) == (0, [], end)

    pages = aliyunlog("pull_log", from_time=arrival, to_time="end", batch_size=2, **of_shard)
    assert [log["key"] for page in pages for log in page["logs"]] == ["a", "b", "c"]


def test_command_line_copies_and_dumps_what_is_in_a_logstore(log_service, logstore, aliyunlog, tmp_path):
    fed = log_service.put(PROJECT, logstore, [log_group(str(number), "topic-%d" % number) for number in range(6)])
    target = logstore + "-copy"
    log_service.create_logstore(PROJECT, target, 2)
    since = int(fed[0].received_at)
    copied = aliyunlog("copy_data", project=PROJECT, logstore=logstore, from_time=since, to_logstore=target)
    assert copied == {"total_count": 6, "shards": {"0": 3, "1": 3}}
    taken = [entry.log_group for entry in log_service.ledger(PROJECT, target)]
    assert sorted(taken) == sorted(entry.log_group for entry in fed)

    aliyunlog(
        "pull_log_dump",
        project_name=PROJECT,
        logstore_name=target,
        from_time=since,
        to_time="end",
        file_path=tmp_path / "dump_{}",
    )
    dumped = [json.loads(line) for path in tmp_path.glob("dump_*") for line in path.read_text().splitlines()]
    assert sorted(log["key"] for log in dumped) == [str(number) for number in range(6)]


def test_command_line_with_signature_version_4(log_service, logstore, aliyunlog):
    signed = dict(project_name=PROJECT, sign__version="v4")
    assert logstore in aliyunlog("list_logstore", region__id=log_service.region, **signed)["logstores"]
    with pytest.raises(Refused, match="SignatureNotMatch"):
        aliyunlog("list_logstore", region__id="elsewhere", **signed)


IN_LOGSTORE = {"project_name": PROJECT, "logstore_name": "LOGSTORE"}
QUERY = {"project": PROJECT, "logstore": "LOGSTORE", "from_time": 1700000000}


@pytest.mark.parametrize(
    "code, subcommand, parameters",
    [
        ("ProjectNotExist", "list_logstore", {"project_name": "no-project"}),
        ("LogStoreNotExist", "list_shards", {"project_name": PROJECT, "logstore_name": "no-logstore"}),
        ("ShardNotExist", "get_begin_cursor", {**IN_LOGSTORE, "shard_id": 9}),
        ("InvalidCursor", "pull_logs", {**IN_LOGSTORE, "shard_id": 0, "cursor": "MTQ0NzI5OTYwNjg5NjYzMjM1Ng=="}),
        ("ParameterInvalid", "pull_logs", {**IN_LOGSTORE, "shard_id": 0, "cursor": "no cursor"}),
        ("ParameterInvalid", "merge_shard", {**IN_LOGSTORE, "shardId": 1}),
        (
            "ConsumerGroupNotExist",
            "get_check_point",
            {"project": PROJECT, "logstore": "LOGSTORE", "consumer_group": "no-group"},
        ),
        ("Unauthorized", "list_logstore", {"project_name": PROJECT, "key_id": "nobody"}),
        ("SignatureNotMatch", "list_logstore", {"project_name": PROJECT, "key": "another secret"}),
        ("IndexConfigNotExist", "get_log", {**QUERY, "to_time": 1700000100, "query": "*"}),
        ("InvalidTimeRange", "get_log", {**QUERY, "to_time": 1700000000}),
        ("IndexConfigNotExist", "get_index_config", IN_LOGSTORE),
        ("InvalidAPI", "list_machine_group", {"project_name": PROJECT}),
    ],
)
def test_command_line_is_refused_with_the_code_of_the_service(logstore, aliyunlog, code, subcommand, parameters):
    parameters = {name: logstore if text == "LOGSTORE" else text for name, text in parameters.items()}
    with pytest.raises(Refused) as caught:
        aliyunlog(subcommand, **parameters)
    assert caught.value.code == code
    assert len(caught.value.request_id) == 24


# ---- the Node SDK


@pytest.fixture
def node(log_service):
    """Makes calls of the Node SDK, each (method, arguments...), and returns their outcomes."""
    program = foreign_node("@alicloud/log")

    def run(*calls, key="local-secret"):
        settings = {
            "endpoint": "%s:%d" % (log_service.endpoint, log_service.port),
            "accessKeyId": "local-id",
            "accessKeySecret": key,
        }
        document = json.dumps({"settings": settings, "calls": calls})
        ended = subprocess.run(
            [program, str(NODE_SCRIPT), document], capture_output=True, text=True, timeout=LIMIT, cwd="/"
        )
        assert ended.returncode == 0 and ended.stdout, ended.stderr
        outcomes = json.loads(ended.stdout)
        assert len(outcomes) == len(calls)
        return outcomes

    return run


def answers(outcomes):
    assert all("answer" in outcome for outcome in outcomes), outcomes
    return [outcome["answer"] for outcome in outcomes]


def codes(outcomes):
    assert all(len(outcome["error"]["requestid"]) == 24 for outcome in outcomes), outcomes
    return [outcome["error"]["code"] for outcome in outcomes]


def test_node_projects_and_logstores(log_service, node):
    """What the SDK's own integration tests expect of the service."""
    project, logstore = "made-by-node", "access-log"
    created, shown, made, first, listed, page, updated, second = answers(
        node(
            ("createProject", project, {"description": "test"}),
            ("getProject", project),
            ("createLogStore", project, logstore, {"ttl": 10, "shardCount": 2}),
            ("getLogStore", project, logstore),
            ("listLogStore", project),
            ("listLogStore", project, {"logstoreName": "access", "offset": 1, "size": 10}),
            ("updateLogStore", project, logstore, {"ttl": 20, "shardCount": 2}),
            ("getLogStore", project, logstore),
        )
    )
    assert (created, made, updated) == ("", "", "")
    assert (shown["projectName"], shown["description"]) == (project, "test")
    assert (first["logstoreName"], first["ttl"], first["shardCount"]) == (logstore, 10, 2)
    assert listed == {"count": 1, "total": 1, "logstores": [logstore]}
    assert page == {"count": 0, "total": 1, "logstores": []}
    assert (second["ttl"], second["createTime"]) == (20, first["createTime"])

    deleted, gone, removed, missing = node(
        ("deleteLogStore", project, logstore),
        ("getLogStore", project, logstore),
        ("deleteProject", project),
        ("getProject", project),
    )
    assert answers([deleted, removed]) == ["", ""]
    assert codes([gone, missing]) == ["LogStoreNotExist", "ProjectNotExist"]


def test_node_puts_logs(log_service, logstore, node):
    seconds = int(time.time())
    logs = [
        {"content": {"level": "debug", "message": "täglich"}, "timestamp": seconds, "timestampNsPart": 123456789},
        {"content": {"level": "info", "message": ""}, "timestamp": seconds},
    ]
    group = {"logs": logs, "tags": [{"__pack_id__": "1-1"}], "topic": "nginx", "source": "10.0.0.1"}
    assert answers(node(("postLogStoreLogs", PROJECT, logstore, group))) == [""]

    (entry,) = log_service.ledger(PROJECT, logstore)
    parsed = entry.parse()
    assert (parsed.Topic, parsed.Source) == ("nginx", "10.0.0.1")
    assert [(tag.Key, tag.Value) for tag in parsed.LogTags] == [("__pack_id__", "1-1")]
    assert [{content.Key: content.Value for content in log.Contents} for log in parsed.Logs] == [
        log["content"] for log in logs
    ]
    assert [log.Time for log in parsed.Logs] == [seconds, seconds]
    assert parsed.Logs[0].Time_ns == 123456789 and not parsed.Logs[1].HasField("Time_ns")


def test_node_is_refused_with_the_code_of_the_service(log_service, logstore, node):
    day = ({"seconds": 1700000000}, {"seconds": 1700086400})
    refused = node(
        ("getProject", "no-project"),
        ("getLogStore", PROJECT, "no-logstore"),
        ("postLogStoreLogs", PROJECT, "no-logstore", {"logs": []}),
        ("createProject", PROJECT, {}),
        ("createLogStore", PROJECT, logstore, {"ttl": 1, "shardCount": 1}),
        ("createLogStore", PROJECT, "another", {"ttl": 0, "shardCount": 1}),
        ("getIndexConfig", PROJECT, logstore),
        ("createIndex", PROJECT, logstore, {}),
        ("getLogs", PROJECT, logstore, *day),
        ("getHistograms", PROJECT, logstore, *day),
        ("getLogs", PROJECT, logstore, *reversed(day)),
        ("getProjectLogs", PROJECT, {"query": "select 1 from x"}),
    )
    assert codes(refused) == [
        "ProjectNotExist",
        "LogStoreNotExist",
        "LogStoreNotExist",
        "ProjectAlreadyExist",
        "LogStoreAlreadyExist",
        "LogStoreInfoInvalid",
        "IndexConfigNotExist",
        "InvalidAPI",
        "IndexConfigNotExist",
        "IndexConfigNotExist",
        "InvalidTimeRange",
        "InvalidAPI",
    ]
    assert log_service.ledger(PROJECT, logstore) == []
    assert codes(node(("getLogStore", PROJECT, logstore), key="another secret")) == ["SignatureNotMatch"]


# ---- the OpenAPI SDKs of Python and Node


def plain(answer):
    """An answer with its names in one spelling: the SDKs have camels here, underscores there."""
    if isinstance(answer, dict):
        return {name.lower().replace("_", ""): plain(value) for name, value in answer.items()}
    return [plain(each) for each in answer] if isinstance(answer, list) else answer


@pytest.fixture(params=["Python", "Node"])
def openapi(request, log_service):
    """Makes calls of an OpenAPI SDK, and returns the answers in `plain` form, or the texts of errors."""
    here = Path(__file__).resolve().parent
    if request.param == "Python":
        command = [foreign_python(), str(here / "openapi_client.py")]
    else:
        command = [foreign_node("@alicloud/sls20201230"), str(here / "openapi_client.js")]

    def run(version, *calls):
        settings = {
            "endpoint": log_service.endpoint[len("http://") :],
            "access_key_id": "local-id",
            "access_key_secret": "local-secret",
            "region_id": log_service.region,
            "signature_version": version,
        }
        document = json.dumps([settings, log_service.environment()["http_proxy"], calls])
        environment = {name: os.environ[name] for name in ("PATH", "NODE_PATH") if name in os.environ}
        ended = subprocess.run(
            [*command, document], env=environment, capture_output=True, text=True, timeout=LIMIT, cwd="/"
        )
        assert ended.returncode == 0 and ended.stdout, ended.stderr
        outcomes = json.loads(ended.stdout)
        assert len(outcomes) == len(calls)
        return [outcome["error"] if "error" in outcome else plain(outcome["answer"]) for outcome in outcomes]

    return run


@pytest.mark.parametrize("version", ["v1", "v4"])
def test_openapi_sdks_get_along(log_service, logstore, openapi, version):
    """With all that these SDKs get right of what a consumer calls; the local service's README says what they don't."""
    entries = log_service.put(PROJECT, logstore, [log_group(text) for text in "abc"], shard=0)
    end = log_service.client().get_end_cursor(PROJECT, logstore, 0).get_cursor()
    made = logstore + "-made"
    of_shard, of_group = (PROJECT, logstore, "0"), (PROJECT, logstore, "operators")
    group = {"consumer_group": "operators", "order": False, "timeout": 60}
    checkpoint = {"consumer": "hand", "force_success": True, "shard": 0, "checkpoint": end}
    # fmt: off
    outcomes = openapi(
        version,
        ("create_log_store", PROJECT, {"CreateLogStoreRequest": {"logstore_name": made, "ttl": 3, "shard_count": 1}}),
        ("get_log_store", PROJECT, made),
        ("list_log_stores", PROJECT, {"ListLogStoresRequest": {"logstore_name": made}}),
        ("list_shards", PROJECT, made),
        ("split_shard", PROJECT, made, "0", {"SplitShardRequest": {}}),
        ("merge_shard", PROJECT, made, "1"),
        ("update_log_store", PROJECT, made, {"UpdateLogStoreRequest": {"logstore_name": made, "ttl": 9}}),
        ("delete_log_store", PROJECT, made),
        ("get_log_store", PROJECT, made),
        ("get_logs", PROJECT, logstore, {"GetLogsRequest": {"from_": 1, "to": 2}}),
        ("get_cursor", *of_shard, {"GetCursorRequest": {"from_": "end"}}),
        ("get_cursor_time", *of_shard, {"GetCursorTimeRequest": {"cursor": end}}),
        ("create_consumer_group", PROJECT, logstore, {"CreateConsumerGroupRequest": group}),
        ("list_consumer_group", PROJECT, logstore),
        ("update_consumer_group", *of_group, {"UpdateConsumerGroupRequest": {"order": True, "timeout": 30}}),
        ("consumer_group_heart_beat", *of_group, {"ConsumerGroupHeartBeatRequest": {"consumer": "c", "body": []}}),
        ("consumer_group_update_check_point", *of_group, {"ConsumerGroupUpdateCheckPointRequest": checkpoint}),
        ("get_check_point", *of_group, {"GetCheckPointRequest": {}}),
        ("get_check_point", *of_group, {"GetCheckPointRequest": {"shard": 0}}),
        ("delete_consumer_group", *of_group),
        ("get_check_point", *of_group, {"GetCheckPointRequest": {}}),
    )
    # fmt: on
    created, shown, listed, shards, split, merged, updated, removed, gone, no_index = outcomes[:10]
    assert (created, updated, removed) == (None, None, None)
    assert "LogStoreNotExist" in gone and "IndexConfigNotExist" in no_index
    assert (shown["logstorename"], shown["ttl"], shown["shardcount"], shown["autosplit"]) == (made, 3, 1, False)
    assert listed == {"count": 1, "total": 1, "logstores": [made]}
    assert [shard["status"] for shard in shards] == ["readwrite"]
    assert [shard["shardid"] for shard in split] == [0, 1, 2] and merged[0]["shardid"] == 3

    cursor, time_of, created, groups, updated, owned, saved, checkpoints, one, deleted, gone = outcomes[10:]
    assert (created, updated, saved, deleted) == (None, None, None, None) and "ConsumerGroupNotExist" in gone
    assert cursor == {"cursor": end} and groups == [{"name": "operators", "timeout": 60, "order": False}]
    assert int(time_of["cursortime"]) >= int(entries[0].received_at)  # the Node SDK has it as a text
    assert owned == [0, 1] and [(shard["shard"], shard["checkpoint"]) for shard in checkpoints] == [(0, end), (1, "")]
    assert one == checkpoints[:1] and one[0]["consumer"] == "hand"


# ---- what others write goes through the dispatcher


def test_what_foreign_writers_write_is_sorted_and_unchanged(service, copies):
    """Each in its own form and compression, at the same time; the ledger decides."""
    python, node = foreign_python(), foreign_node("@aliyun-sls/web-track-browser")
    here = Path(__file__).resolve().parent
    service.create_logstore(harness.PROJECT, "rest", 2)
    service.client().update_logstore(harness.PROJECT, harness.SOURCE, enable_tracking=True)
    copies.start(**harness.AND_A_CATCH_ALL)
    environment = {name: os.environ[name] for name in ("PATH", "NODE_PATH") if name in os.environ}
    environment.update(service.environment())
    commands = [
        [python, str(here / "foreign_writers.py"), service.endpoint, harness.PROJECT, harness.SOURCE, "5"],
        [
            node,
            str(here / "foreign_writers.js"),
            "%s:%d" % (service.endpoint[len("http://") :], service.port),
            harness.PROJECT,
            harness.SOURCE,
        ],
    ]
    writers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
        for command in commands
    ]
    written = [writer.communicate(timeout=LIMIT) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], written
    assert written[0][0] == "written\n" and json.loads(written[1][0]) == [200] * 8  # 5,000 logs are one POST
    harness.wait_until_delivered(service)
    sent = [entry.log_group for entry in service.ledger(harness.PROJECT, harness.SOURCE)]
    topics = {"nginx": "nginx", "sql-audit": "sql_audit", "click": "click", "rest": ""}
    arrived = {logstore: service.ledger(harness.PROJECT, logstore) for logstore in topics}
    assert_delivered_once(sent, [entry.log_group for entries in arrived.values() for entry in entries])
    assert {name: {entry.parse().Topic for entry in entries} for name, entries in arrived.items()} == {
        name: {topic} for name, topic in topics.items()
    }
    logs = [log for entry in arrived["rest"] for log in entry.parse().Logs]
    assert len([log for log in logs if log.Contents and log.Contents[0].Key == "number"]) == 5000
