"""From an HTTP request's method, path and query to the action of the API it calls."""

from typing import Dict, NamedTuple, Optional, Tuple


class Route(NamedTuple):
    """An action and what the path names.

    Attributes:
        action: API name, a key of ``actions.ACTIONS``.
        logstore: "" when the path names none.
        item: the shard or consumer group within the logstore, "" when the path names none.
    """

    action: str
    logstore: str
    item: str


# (method, what the path names, the parameter "type" or "action", "" without one) -> API name.
_ROUTES: Dict[Tuple[str, str, str], str] = {
    ("POST", "project", ""): "CreateProject",
    ("GET", "project", ""): "GetProject",
    ("PUT", "project", ""): "UpdateProject",
    ("DELETE", "project", ""): "DeleteProject",
    ("GET", "endpoint", ""): "ListProject",
    ("POST", "endpoint", ""): "CreateProject",
    ("POST", "logstores", ""): "CreateLogStore",
    ("GET", "logstores", ""): "ListLogStores",
    ("POST", "logstore", ""): "PutLogs",
    ("GET", "logstore", ""): "GetLogStore",
    ("PUT", "logstore", ""): "UpdateLogStore",
    ("DELETE", "logstore", ""): "DeleteLogStore",
    ("GET", "logstore", "log"): "GetLogs",
    ("GET", "logstore", "histogram"): "GetHistograms",
    ("POST", "logs", ""): "GetLogsV2",
    ("GET", "index", ""): "GetIndex",
    ("DELETE", "index", ""): "DeleteIndex",
    ("GET", "shards", ""): "ListShards",
    ("POST", "shard", ""): "PutLogs",
    ("POST", "track", ""): "PutWebtracking",
    ("POST", "shard", "split"): "SplitShard",
    ("POST", "shard", "merge"): "MergeShard",
    ("GET", "shard", "log"): "PullLogs",
    ("GET", "shard", "logs"): "PullLogs",
    ("GET", "shard", "cursor"): "GetCursor",
    ("GET", "shard", "cursor_time"): "GetCursorTime",
    ("POST", "consumergroups", ""): "CreateConsumerGroup",
    ("GET", "consumergroups", ""): "ListConsumerGroup",
    ("PUT", "consumergroup", ""): "UpdateConsumerGroup",
    ("DELETE", "consumergroup", ""): "DeleteConsumerGroup",
    ("GET", "consumergroup", ""): "GetCheckPoint",
    ("POST", "consumergroup", "heartbeat"): "HeartBeat",
    ("POST", "consumergroup", "checkpoint"): "UpdateCheckPoint",
}


# What the third segment of a path is called -> what a fourth one names.
_ITEMS = {"shards": "shard", "consumergroups": "consumergroup"}


def find(method: str, project: str, path: str, query: Dict[str, str]) -> Optional[Route]:
    """Return the route of a request, None when the API has no such call.

    Args:
        method: HTTP method.
        project: from the Host header, "" when that names the endpoint alone.
        path: the path, not percent-encoded.
        query: the query parameters.
    """
    logstore = item = ""
    segments = path.strip("/").split("/")
    if path == "/":
        named = "project" if project else "endpoint"
    elif segments[0] != "logstores" or len(segments) > 4:
        return None
    elif len(segments) == 1:
        named = "logstores"
    else:
        logstore = segments[1]
        if len(segments) == 2:
            named = "logstore"
        elif len(segments) == 3:
            named = segments[2]
        else:
            named = _ITEMS.get(segments[2], "")
            item = segments[3]
    selector = query.get("type") or query.get("action") or ""
    action = _ROUTES.get((method, named, selector))
    return Route(action, logstore, item) if action else None
