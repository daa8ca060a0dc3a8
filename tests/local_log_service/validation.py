"""Checks of what a request says, apart from its signature. Each raises a ``ServiceError``."""

import json
import re
from typing import Any, Dict, List, Optional, Tuple

from .errors import ServiceError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_PROJECT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_LOGSTORE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]")
_KEY = re.compile(r"[0-9A-Fa-f]{32}")


def integer(text: str, what: str, lowest: int, highest: Optional[int] = None) -> int:
    """Return a parameter as an integer; ParameterInvalid when it is none or out of range."""
    if text.isdigit() and text.isascii() and len(text) < 20:
        value = int(text)
        if lowest <= value and (highest is None or value <= highest):
            return value
    raise ServiceError("ParameterInvalid", "{} is invalid".format(what))


def page(query: Dict[str, str], default_size: int) -> Tuple[int, int]:
    """Return the offset and the size of a page of a list; a client that leaves them empty means the defaults."""
    offset = integer(query.get("offset") or "0", "offset : {} pair".format(query.get("offset")), 0)
    size = integer(query.get("size") or str(default_size), "size : {} pair".format(query.get("size")), 0, 500)
    return offset, size


def boolean(text: str, what: str) -> bool:
    """Return a parameter as a truth value; SDKs write it "True" or "true"."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise ServiceError("ParameterInvalid", "{} is invalid".format(what))


def required(query: Dict[str, str], name: str) -> str:
    """Return a parameter that has to be given; MissingParameter when it is not."""
    try:
        return query[name]
    except KeyError:
        raise ServiceError("MissingParameter", "the parameter {} is missing".format(name))


def shard_id(text: str) -> int:
    """Return a shard id from a path or a parameter."""
    return integer(text, "shard", 0)


def key(text: str) -> int:
    """Return an MD5 key, 32 hexadecimal digits, as an integer."""
    if not _KEY.fullmatch(text):
        raise ServiceError("ParameterInvalid", "key is invalid")
    return int(text, 16)


def member_name(text: Any, what: str) -> str:
    """Check the name of a consumer or a consumer group: letters, digits, ``_ . -``."""
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ServiceError("ParameterInvalid", "{} is invalid".format(what))
    return text


def project_name(text: Any) -> str:
    """Check the name of a project to create: 3 to 63 lower-case letters, digits and, within, ``-``."""
    if not isinstance(text, str) or not _PROJECT_NAME.fullmatch(text):
        raise ServiceError("ParameterInvalid", "the name of the project is invalid: {}".format(text))
    return text


def logstore_name(text: Any) -> str:
    """Check the name of a logstore to create: 3 to 63 lower-case letters, digits and, within, ``_ -``."""
    if not isinstance(text, str) or not _LOGSTORE_NAME.fullmatch(text):
        raise ServiceError("LogStoreInfoInvalid", "logstore name is invalid: {}".format(text))
    return text


def json_body(body: bytes, kind: type) -> Any:
    """Return the JSON document of a body; PostBodyInvalid unless it is one of this Python type."""
    try:
        document = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ServiceError("PostBodyInvalid", "The request body is not valid JSON")
    if not isinstance(document, kind):
        raise ServiceError("PostBodyInvalid", "The request body is not the expected JSON document")
    return document


def shard_list(body: bytes) -> List[int]:
    """Return the shard ids that a heartbeat lists; an empty body lists none."""
    shards = json_body(body or b"[]", list)
    if not all(type(shard) is int for shard in shards):
        raise ServiceError("PostBodyInvalid", "The request body is not a list of shards")
    return shards


def group_name(value: Any) -> str:
    """Check the name of a consumer group to create."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ServiceError("JsonInfoInvalid", "consumerGroup is of error format")
    return value


def group_timeout(value: Any) -> int:
    """Check the timeout of a consumer group, whole seconds."""
    if type(value) is not int or value < 1:
        raise ServiceError("JsonInfoInvalid", "timeout is of error value type")
    return value


def group_order(value: Any) -> bool:
    """Check whether a consumer group is to consume in order."""
    if type(value) is not bool:
        raise ServiceError("JsonInfoInvalid", "order is of error value type")
    return value


def logstore_settings(document: Dict[str, Any]) -> Dict[str, Any]:
    """Return what a document says of the settings of a logstore; LogStoreInfoInvalid when that makes no sense.

    What is not a setting that this service keeps is passed over.
    """
    settings: Dict[str, Any] = {}
    for name, lowest, highest in (("ttl", 1, 3650), ("maxSplitShard", 1, 256)):
        if document.get(name) is not None:
            if type(document[name]) is not int or not lowest <= document[name] <= highest:
                raise ServiceError(
                    "LogStoreInfoInvalid", "{} must be within range [{}, {}]".format(name, lowest, highest)
                )
            settings[name] = document[name]
    for name, kind in (
        ("enable_tracking", bool),
        ("appendMeta", bool),
        ("autoSplit", bool),
        ("telemetryType", str),
        ("mode", str),
    ):
        if document.get(name) is not None:
            if type(document[name]) is not kind:
                raise ServiceError("LogStoreInfoInvalid", "{} is invalid".format(name))
            settings[name] = document[name]
    return settings


def unix_time(query: Dict[str, str], name: str) -> int:
    """Return a parameter that has to be given and to be a time in unix seconds."""
    text = required(query, name)
    return integer(text, "{} : {} pair".format(name, text), 0)
