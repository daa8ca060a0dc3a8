"""The API of the service, one function an action.

An action gets the service's settings, its state and the call, holds the state's lock while it works, and
returns the answer or raises a ``ServiceError``: beside those named, ProjectNotExist, LogStoreNotExist and
ConsumerGroupNotExist for whatever the call names in vain.
"""

import json
import time
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from . import compression, validation, wire_format
from .consumer_groups import ConsumerGroup, ConsumerNotHolder, ConsumerUnknown
from .errors import ServiceError
from .quotas import Quotas
from .state import Logstore, Project, Shard, State


class Limits(NamedTuple):
    """Limits of the service.

    Attributes:
        consumer_groups: how many a logstore may have.
        pull_bytes: most raw bytes a pull answers with, unless its first LogGroup alone is larger.
        put_bytes: most raw bytes a put may bring.
        region: where the projects say that they are.
        check_log_times: whether puts are refused that bring logs of long ago or of the future.
        log_time_status: with which HTTP status they are.
        unknown_consumer: the code for a checkpoint of a consumer that the group does not know.
    """

    consumer_groups: int
    pull_bytes: int
    put_bytes: int
    region: str = ""
    check_log_times: bool = False
    log_time_status: int = 499
    unknown_consumer: str = "ConsumerNotExsit"


class Call(NamedTuple):
    """One authenticated call.

    Attributes:
        action: API name.
        project: from the Host header.
        logstore: from the path, "" when the action needs none.
        item: what the path names within the logstore: a shard id or a consumer group, "" when nothing.
        query: the query parameters.
        headers: names in lower case.
        body: as sent.
        request_id: unique.
    """

    action: str
    project: str
    logstore: str
    item: str
    query: Dict[str, str]
    headers: Dict[str, str]
    body: bytes
    request_id: str


class Answer(NamedTuple):
    """What to answer with status 200: the body and headers of its own."""

    body: bytes = b""
    headers: Dict[str, str] = {}


_NOTHING = Answer()


def _json(document: Any) -> Answer:
    return Answer(json.dumps(document).encode("ascii"), {"Content-Type": "application/json"})


# Projects


def create_project(limits: Limits, state: State, call: Call) -> Answer:
    """Create a project named by the body. Raises ParameterInvalid, ProjectAlreadyExist."""
    try:
        settings = validation.json_body(call.body, dict)
    except ServiceError:
        raise ServiceError("ParameterInvalid", "The body is not valid json string")
    name = validation.project_name(settings.get("projectName"))
    with state.lock:
        state.create_project(name, _description(settings))
    return _NOTHING


def _description(settings: Dict[str, Any]) -> str:
    description = settings.get("description") or ""
    if not isinstance(description, str):
        raise ServiceError("ParameterInvalid", "description is invalid")
    return description


def _project_document(limits: Limits, project: Project) -> Dict[str, str]:
    return {
        "projectName": project.name,
        "status": "Normal",
        "owner": "",
        "description": project.description,
        "region": limits.region,
    }


def get_project(limits: Limits, state: State, call: Call) -> Answer:
    """Answer what is known of a project; its times are dates here."""
    with state.lock:
        project = state.project(call.project)
        document = _project_document(limits, project)
        for name, at in (("createTime", project.create_time), ("lastModifyTime", project.last_modify_time)):
            document[name] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
        return _json(document)


def update_project(limits: Limits, state: State, call: Call) -> Answer:
    """Change the description of a project."""
    settings = validation.json_body(call.body, dict)
    with state.lock:
        state.project(call.project).describe(_description(settings))
    return _NOTHING


def delete_project(limits: Limits, state: State, call: Call) -> Answer:
    """Delete a project with everything in it."""
    with state.lock:
        state.delete_project(call.project)
    return _NOTHING


def list_project(limits: Limits, state: State, call: Call) -> Answer:
    """Answer a page of the projects, those whose names contain ``projectName``; their times are unix seconds here."""
    wanted = call.query.get("projectName", "")
    offset, size = validation.page(call.query, 100)
    with state.lock:
        names = sorted(name for name in state.projects if wanted in name)
        documents = []
        for project in (state.projects[name] for name in names[offset : offset + size]):
            document = _project_document(limits, project)
            document.update(createTime=str(project.create_time), lastModifyTime=str(project.last_modify_time))
            documents.append(document)
    return _json({"count": len(documents), "total": len(names), "projects": documents})


# Logstores


def create_logstore(limits: Limits, state: State, call: Call) -> Answer:
    """Create a logstore named by the body. Raises LogStoreInfoInvalid, LogStoreAlreadyExist."""
    document = validation.json_body(call.body, dict)
    name = validation.logstore_name(document.get("logstoreName"))
    shard_count = document.get("shardCount")
    if type(shard_count) is not int:
        raise ServiceError("LogStoreInfoInvalid", "shardCount is invalid")
    settings = validation.logstore_settings(document)
    with state.lock:
        state.create_logstore(call.project, name, shard_count)
        state.logstore(call.project, name).change_settings(settings)
    return _NOTHING


def update_logstore(limits: Limits, state: State, call: Call) -> Answer:
    """Change the settings of a logstore, all but the number of its shards. Raises LogStoreInfoInvalid."""
    settings = validation.logstore_settings(validation.json_body(call.body, dict))
    with state.lock:
        state.logstore(call.project, call.logstore).change_settings(settings)
    return _NOTHING


def delete_logstore(limits: Limits, state: State, call: Call) -> Answer:
    """Delete a logstore with everything in it."""
    with state.lock:
        state.delete_logstore(call.project, call.logstore)
    return _NOTHING


def get_logstore(limits: Limits, state: State, call: Call) -> Answer:
    """Answer the settings of a logstore."""
    with state.lock:
        logstore = state.logstore(call.project, call.logstore)
        return _json(
            {
                "logstoreName": logstore.name,
                "shardCount": sum(not shard.readonly for shard in logstore.shards.values()),
                "createTime": logstore.create_time,
                "lastModifyTime": logstore.last_modify_time,
                **logstore.settings,
            }
        )


def list_logstores(limits: Limits, state: State, call: Call) -> Answer:
    """Answer a page of the names of logstores, those that contain ``logstoreName``."""
    wanted = call.query.get("logstoreName", "")
    offset, size = validation.page(call.query, 500)
    with state.lock:
        names = sorted(name for name in state.logstores(call.project) if wanted in name)
    page = names[offset : offset + size]
    return _json({"count": len(page), "total": len(names), "logstores": page})


# Queries: no logstore of this service has an index, and this is what the service says of such logstores.


def _refuse_query(state: State, call: Call, from_time: int, to_time: int) -> Answer:
    with state.lock:
        state.logstore(call.project, call.logstore)
    if from_time >= to_time:
        raise ServiceError("InvalidTimeRange")
    raise ServiceError("IndexConfigNotExist")


def get_logs(limits: Limits, state: State, call: Call) -> Answer:
    """Refuse a query. Raises IndexConfigNotExist; ParameterInvalid, InvalidTimeRange."""
    validation.page({"offset": call.query.get("offset", "")}, 100)
    from_time, to_time = (validation.unix_time(call.query, name) for name in ("from", "to"))
    return _refuse_query(state, call, from_time, to_time)


def get_logs_v2(limits: Limits, state: State, call: Call) -> Answer:
    """Refuse a query that is in the body. Raises as ``get_logs`` does."""
    if call.headers.get("x-log-compresstype") or call.headers.get("x-log-bodyrawsize"):
        body = _raw_body(limits, call)
    else:
        body = call.body
    document = validation.json_body(body, dict)
    times = {name: str(document[name]) for name in ("from", "to") if name in document}
    from_time, to_time = (validation.unix_time(times, name) for name in ("from", "to"))
    return _refuse_query(state, call, from_time, to_time)


def get_index(limits: Limits, state: State, call: Call) -> Answer:
    """Say that there is no index, as there never is. Raises IndexConfigNotExist."""
    with state.lock:
        state.logstore(call.project, call.logstore)
    raise ServiceError("IndexConfigNotExist", "index config doesn't exist")


# Shards


def _shard_document(shard: Shard) -> Dict[str, Any]:
    # The last key is written as the largest one of 32 digits.
    return {
        "shardID": shard.shard_id,
        "status": "readonly" if shard.readonly else "readwrite",
        "inclusiveBeginKey": "{:032x}".format(shard.begin_key),
        "exclusiveEndKey": "{:032x}".format(min(shard.end_key, (1 << 128) - 1)),
        "createTime": shard.create_time,
    }


def _shard_documents(shards: List[Shard]) -> Answer:
    return _json([_shard_document(shard) for shard in shards])


def list_shards(limits: Limits, state: State, call: Call) -> Answer:
    """Answer every shard of a logstore, readonly ones too."""
    with state.lock:
        return _shard_documents(list(state.logstore(call.project, call.logstore).shards.values()))


def _shard_to_change(logstore: Logstore, call: Call) -> int:
    """Return the shard that is to be split or merged; one that does not exist is ParameterInvalid to these calls."""
    shard_id = validation.shard_id(call.item)
    if shard_id not in logstore.shards:
        raise ServiceError("ParameterInvalid", "invalid shard id")
    return shard_id


def split_shard(limits: Limits, state: State, call: Call) -> Answer:
    """Split a readwrite shard at ``key``; answer it and its two children."""
    key = validation.key(call.query["key"]) if call.query.get("key") else None
    with state.lock:
        logstore = state.logstore(call.project, call.logstore)
        return _shard_documents(logstore.split(_shard_to_change(logstore, call), key))


def merge_shard(limits: Limits, state: State, call: Call) -> Answer:
    """Merge a readwrite shard with its right neighbour; answer the new shard and its two parents."""
    with state.lock:
        logstore = state.logstore(call.project, call.logstore)
        return _shard_documents(logstore.merge(_shard_to_change(logstore, call)))


# Logs

# How far the time of a log may be from now, in seconds: into the past and into the future.
_LOG_AGE = 7 * 24 * 3600
_LOG_LEAD = 15 * 60


def _raw_body(limits: Limits, call: Call) -> bytes:
    """Return the uncompressed body of a put."""
    size_text = call.headers.get("x-log-bodyrawsize", "")
    if not size_text:
        raise ServiceError("MissingBodyRawSize")
    try:
        raw_size = validation.integer(size_text, "x-log-bodyrawsize", 0)
    except ServiceError:
        raise ServiceError("InvalidBodyRawSize")
    if raw_size > limits.put_bytes:
        raise ServiceError("PostBodyTooLarge", "body size {} must little than {}".format(raw_size, limits.put_bytes))
    body = compression.decompress(call.headers.get("x-log-compresstype", ""), call.body, raw_size)
    if len(body) != raw_size:
        raise ServiceError("PostBodyInvalid", "x-log-bodyrawsize is not the size of the body")
    return body


def _check_log_times(log_group: bytes, status: int) -> None:
    now = time.time()
    if not all(now - _LOG_AGE <= log_time <= now + _LOG_LEAD for log_time in wire_format.log_times(log_group)):
        raise ServiceError("PostBodyInvalid", "The post data time is out of range", status=status)


def put_logs(limits: Limits, state: State, call: Call) -> Answer:
    """Take one LogGroup, the whole of it or nothing, into the next, the named or the key's shard.

    Raises MissingBodyRawSize, InvalidBodyRawSize, InvalidCompressType, PostBodyInvalid, PostBodyTooLarge,
    PostBodyUncompressError; ParameterInvalid, ShardNotExist; with quotas WriteQuotaExceed, ShardWriteQuotaExceed.
    """
    body = _raw_body(limits, call)
    try:
        wire_format.validate_log_group(body)
        if limits.check_log_times:
            _check_log_times(body, limits.log_time_status)
    except ValueError as error:
        raise ServiceError("PostBodyInvalid", "Protobuf content cannot parse: {}".format(error))
    _append(state, call, body)
    return _NOTHING


def put_webtracking(limits: Limits, state: State, call: Call) -> Answer:
    """Take the logs of a web page as one LogGroup, into the next shard. Nothing is signed.

    Raises PostBodyInvalid, PostBodyTooLarge; Unauthorized unless the logstore has enable_tracking.
    """
    document = validation.json_body(call.body, dict)
    logs, tags = document.get("__logs__"), document.get("__tags__", {})
    texts = [document.get(name, "") for name in ("__topic__", "__source__")]
    if not isinstance(logs, list) or not all(map(_is_flat, [*logs, tags, dict(enumerate(texts))])):
        raise ServiceError("PostBodyInvalid", "The request body is not what web tracking sends")
    with state.lock:
        if not state.logstore(call.project, call.logstore).settings["enable_tracking"]:
            raise ServiceError("Unauthorized", "web tracking of logstore {} is not enabled".format(call.logstore))
    now = int(time.time())
    body = b"".join(wire_format.delimited(1, wire_format.log_of(now, log)) for log in logs)
    body += b"".join(wire_format.delimited(number, wire_format.text(each)) for number, each in zip((3, 4), texts))
    for name, value in tags.items():
        pair = wire_format.delimited(1, wire_format.text(name)) + wire_format.delimited(2, wire_format.text(value))
        body += wire_format.delimited(6, pair)
    if len(body) > limits.put_bytes:
        raise ServiceError("PostBodyTooLarge")
    _append(state, call, body)
    return _NOTHING


def _is_flat(document: Any) -> bool:
    return isinstance(document, dict) and all(isinstance(value, str) for value in document.values())


def _append(state: State, call: Call, body: bytes) -> None:
    with state.lock:
        logstore = state.logstore(call.project, call.logstore)
        if call.item in ("", "lb"):
            shard = logstore.next_writable_shard()
        elif call.item == "route":
            shard = logstore.shard_of_key(validation.key(validation.required(call.query, "key")))
        else:
            shard = logstore.writable_shard(validation.shard_id(call.item))
        if state.quotas is not None:
            _meter_write(state.quotas, state.project(call.project), shard, len(body))
        logstore.append(shard, body, call.request_id, state.next_sequence())


def _meter_write(quotas: Quotas, project: Project, shard: Shard, size: int) -> None:
    project.meter.check_write("WriteQuotaExceed", quotas.project_write_bytes)
    shard.meter.check_write("ShardWriteQuotaExceed", quotas.shard_write_bytes, quotas.shard_writes)
    for meter in (project.meter, shard.meter):
        meter.count_write(size)


def _meter_read(quotas: Quotas, project: Project, shard: Shard, size: int) -> None:
    project.meter.check_read("ReadQuotaExceed", quotas.project_read_bytes)
    shard.meter.check_read("ShardReadQuotaExceed", quotas.shard_read_bytes, quotas.shard_reads)
    for meter in (project.meter, shard.meter):
        meter.count_read(size)


def pull_logs(limits: Limits, state: State, call: Call) -> Answer:
    """Answer the LogGroups from a cursor on, as many as count and size allow, and the next cursor.

    Raises InvalidCursor, ShardNotExist, ParameterInvalid; with quotas ReadQuotaExceed, ShardReadQuotaExceed.
    """
    shard_id = validation.shard_id(call.item)
    cursor = validation.required(call.query, "cursor")
    count = validation.integer(validation.required(call.query, "count"), "count", 1, 1000)
    if "query" in call.query or "processor" in call.query:
        raise ServiceError("ParameterInvalid", "the local Log Service does not process SPL")
    with state.lock:
        shard = state.logstore(call.project, call.logstore).shard(shard_id)
        first = shard.readable_index_of(cursor)
        last = end = len(shard.entries)
        if call.query.get("end_cursor"):
            last = shard.readable_index_of(call.query["end_cursor"])
        taken, next_index = shard.readable_from(first, min(last, first + count), limits.pull_bytes)
        body = wire_format.log_group_list(entry.log_group for entry in taken)
        if state.quotas is not None:
            _meter_read(state.quotas, state.project(call.project), shard, len(body))
        headers = {
            "Content-Type": "application/x-protobuf",
            "x-log-cursor": shard.cursor(next_index),
            "x-log-count": str(len(taken)),
            "x-log-bodyrawsize": str(len(body)),
            "x-log-end-of-cursor": "1" if next_index == end else "0",
        }
        if taken:
            headers["x-log-read-last-cursor"] = shard.cursor(next_index - 1)
            headers["x-log-cursor-time"] = str(int(taken[-1].received_at))
    kind = compression.accepted(call.headers.get("accept-encoding", ""))
    if body and kind:
        headers["x-log-compresstype"] = kind
        body = compression.compress(kind, body)
    return Answer(body, headers)


def get_cursor(limits: Limits, state: State, call: Call) -> Answer:
    """Answer the cursor of the begin, the end or the first LogGroup that arrived at or after a second."""
    shard_id = validation.shard_id(call.item)
    position = validation.required(call.query, "from")
    with state.lock:
        shard = state.logstore(call.project, call.logstore).shard(shard_id)
        if position == "begin":
            index = shard.expired
        elif position == "end":
            index = len(shard.entries)
        else:
            index = shard.index_at(validation.integer(position, "from", 0))
        return _json({"cursor": shard.cursor(index)})


def get_cursor_time(limits: Limits, state: State, call: Call) -> Answer:
    """Answer when the LogGroup at a cursor arrived, in unix seconds. Raises InvalidCursor."""
    shard_id = validation.shard_id(call.item)
    cursor = validation.required(call.query, "cursor")
    with state.lock:
        shard = state.logstore(call.project, call.logstore).shard(shard_id)
        index = shard.readable_index_of(cursor)
        # At the end there is no LogGroup yet; the next one arrives now or later.
        arrival = shard.entries[index].received_at if index < len(shard.entries) else time.time()
        return _json({"cursor_time": int(arrival)})


# Consumer groups


def _group(state: State, call: Call) -> Tuple[Logstore, ConsumerGroup]:
    logstore = state.logstore(call.project, call.logstore)
    return logstore, logstore.consumer_group(call.item)


def create_consumer_group(limits: Limits, state: State, call: Call) -> Answer:
    """Create a consumer group.

    Raises ConsumerGroupAlreadyExist, ConsumerGroupQuotaExceed, JsonInfoInvalid.
    """
    settings = validation.json_body(call.body, dict)
    name = validation.group_name(settings.get("consumerGroup"))
    timeout = validation.group_timeout(settings.get("timeout"))
    in_order = validation.group_order(settings.get("order"))
    with state.lock:
        groups = state.logstore(call.project, call.logstore).consumer_groups
        if name in groups:
            raise ServiceError("ConsumerGroupAlreadyExist", "consumer group already exist: {}".format(name))
        if len(groups) >= limits.consumer_groups:
            raise ServiceError("ConsumerGroupQuotaExceed")
        groups[name] = ConsumerGroup(name, timeout, in_order)
    return _NOTHING


def list_consumer_group(limits: Limits, state: State, call: Call) -> Answer:
    """Answer every consumer group of a logstore with its settings."""
    with state.lock:
        groups = state.logstore(call.project, call.logstore).consumer_groups
        return _json(
            [{"name": name, "timeout": group.timeout, "order": group.in_order} for name, group in groups.items()]
        )


def update_consumer_group(limits: Limits, state: State, call: Call) -> Answer:
    """Change the timeout, the order or both of a consumer group. Raises JsonInfoInvalid."""
    settings = validation.json_body(call.body, dict)
    if "timeout" not in settings and "order" not in settings:
        raise ServiceError("JsonInfoInvalid", "neither timeout nor order is given")
    with state.lock:
        _, group = _group(state, call)
        timeout = validation.group_timeout(settings.get("timeout", group.timeout))
        in_order = validation.group_order(settings.get("order", group.in_order))
        group.timeout, group.in_order = timeout, in_order
    return _NOTHING


def delete_consumer_group(limits: Limits, state: State, call: Call) -> Answer:
    """Delete a consumer group with its checkpoints."""
    with state.lock:
        logstore, group = _group(state, call)
        del logstore.consumer_groups[group.name]
    return _NOTHING


def heart_beat(limits: Limits, state: State, call: Call) -> Answer:
    """Take a consumer's list of the shards it holds; answer those it may hold. Raises NotExistConsumerWithBody."""
    consumer = validation.member_name(validation.required(call.query, "consumer"), "consumer")
    listed = validation.shard_list(call.body)
    with state.lock:
        logstore, group = _group(state, call)
        try:
            return _json(group.heartbeat(consumer, listed, logstore.views(group), time.time()))
        except ConsumerUnknown:
            raise ServiceError("NotExistConsumerWithBody")


def update_check_point(limits: Limits, state: State, call: Call) -> Answer:
    """Save the checkpoint of a shard.

    Raises InvalidShardCheckPoint, ConsumerNotExsit (or ConsumerNotExist), ConsumerNotMatch, ShardNotExist.
    """
    force = validation.boolean(call.query.get("forceSuccess", "false"), "forceSuccess")
    consumer = call.query.get("consumer", "")
    if consumer or not force:
        validation.member_name(consumer, "consumer")
    document = validation.json_body(call.body, dict)
    shard_id, checkpoint = document.get("shard"), document.get("checkpoint")
    if type(shard_id) is not int or not isinstance(checkpoint, str):
        raise ServiceError("PostBodyInvalid", "shard or checkpoint is missing")
    with state.lock:
        logstore, group = _group(state, call)
        if shard_id not in logstore.shards:
            raise ServiceError("ShardNotExist", "shard not exist: {}".format(shard_id), status=404)
        shard = logstore.shard(shard_id)
        try:
            checkpoint = shard.cursor(shard.index_of(checkpoint))
        except ValueError as error:
            raise ServiceError("InvalidShardCheckPoint", "the checkpoint is no cursor: {}".format(error))
        now = time.time()
        group.refresh(logstore.views(group), now)
        try:
            group.update_checkpoint(consumer, shard_id, checkpoint, now, force)
        except ConsumerUnknown:
            raise ServiceError(limits.unknown_consumer, "consumer not exist: {}".format(consumer))
        except ConsumerNotHolder:
            raise ServiceError("ConsumerNotMatch")
    return _NOTHING


def get_check_point(limits: Limits, state: State, call: Call) -> Answer:
    """Answer the checkpoint of every shard, or of one: nothing when there is no such shard."""
    wanted = validation.shard_id(call.query["shard"]) if call.query.get("shard") else None
    with state.lock:
        logstore, group = _group(state, call)
        group.refresh(logstore.views(group), time.time())
        shards = sorted(shard for shard in logstore.shards if wanted in (None, shard))
        return _json(
            [
                {
                    "shard": shard,
                    "checkpoint": group.assignments[shard].checkpoint,
                    "updateTime": group.assignments[shard].update_time,
                    "consumer": group.assignments[shard].checkpoint_consumer,
                }
                for shard in shards
            ]
        )


#: API name -> the function that performs it
ACTIONS: Dict[str, Callable[[Limits, State, Call], Answer]] = {
    "CreateProject": create_project,
    "GetProject": get_project,
    "UpdateProject": update_project,
    "DeleteProject": delete_project,
    "ListProject": list_project,
    "CreateLogStore": create_logstore,
    "UpdateLogStore": update_logstore,
    "DeleteLogStore": delete_logstore,
    "GetLogStore": get_logstore,
    "ListLogStores": list_logstores,
    "GetLogs": get_logs,
    "GetLogsV2": get_logs_v2,
    "GetHistograms": get_logs,
    "GetIndex": get_index,
    "DeleteIndex": get_index,
    "ListShards": list_shards,
    "SplitShard": split_shard,
    "MergeShard": merge_shard,
    "PutLogs": put_logs,
    "PutWebtracking": put_webtracking,
    "PullLogs": pull_logs,
    "GetCursor": get_cursor,
    "GetCursorTime": get_cursor_time,
    "CreateConsumerGroup": create_consumer_group,
    "ListConsumerGroup": list_consumer_group,
    "UpdateConsumerGroup": update_consumer_group,
    "DeleteConsumerGroup": delete_consumer_group,
    "HeartBeat": heart_beat,
    "UpdateCheckPoint": update_check_point,
    "GetCheckPoint": get_check_point,
}
