"""What may become of a right answer on its way: for ``LocalLogService.add_fault(..., mangle=...)``.

Each takes the right answer and the call that it answers, and returns what the client gets instead. The call has taken
effect by then.
"""

import json
from typing import Any, Callable, Dict, List, Tuple

from . import compression, wire_format
from .actions import Answer, Call


def wrong_raw_size(answer: Answer, call: Call) -> Answer:
    """Announce of a pull one byte more than its LogGroups have."""
    return _with_headers(answer, {"x-log-bodyrawsize": str(int(answer.headers["x-log-bodyrawsize"]) + 1)})


def undecodable(answer: Answer, call: Call) -> Answer:
    """Bring with a pull what is said to be lz4, and is not."""
    headers = {"x-log-compresstype": "lz4", "x-log-bodyrawsize": "100"}
    return _with_headers(answer._replace(body=b"\xff" * 20), headers)


def unknown_compression(answer: Answer, call: Call) -> Answer:
    """Name for a pull a compression that no client asks for."""
    return _with_headers(answer, {"x-log-compresstype": "snappy"})


def without(header: str) -> Callable[[Answer, Call], Answer]:
    """Leave a header out."""

    def mangle(answer: Answer, call: Call) -> Answer:
        return answer._replace(headers={name: text for name, text in answer.headers.items() if name != header})

    return mangle


def announcing(**headers: str) -> Callable[[Answer, Call], Answer]:
    """Give headers other values, where LogGroups come at all; their names with "_" for "-", without "x-log-".

    One that is spelt with a capital comes in addition to the right one.
    """

    def mangle(answer: Answer, call: Call) -> Answer:
        if answer.headers["x-log-count"] == "0":
            return answer
        return _with_headers(answer, {"x-log-" + name.replace("_", "-"): text for name, text in headers.items()})

    return mangle


def bringing(change: Callable[[List[bytes]], List[bytes]]) -> Callable[[Answer, Call], Answer]:
    """Bring with a pull other LogGroups, of the size that is announced, and count those that there were."""

    def mangle(answer: Answer, call: Call) -> Answer:
        groups = [bytes(log_group) for _, log_group in wire_format.fields(_raw_body(answer))]
        return _with_raw_body(answer, wire_format.log_group_list(change(groups)))

    return mangle


def broken_off(answer: Answer, call: Call) -> Answer:
    """Break off the LogGroupList of a pull within its last LogGroup, and announce what is left of it."""
    return _with_raw_body(answer, _raw_body(answer)[:-3])


def checkpoints(**fields: Any) -> Callable[[Answer, Call], Answer]:
    """Have the entries of shard 0 in an answer to GetCheckPoint other fields."""

    def mangle(answer: Answer, call: Call) -> Answer:
        entries = [{**entry, **(fields if entry["shard"] == 0 else {})} for entry in json.loads(answer.body)]
        return answer._replace(body=json.dumps(entries).encode("ascii"))

    return mangle


class Earlier:
    """In the place of each answer, the one before it to the same action; the first remains right."""

    def __init__(self) -> None:
        self._last: Dict[Tuple[str, str, str], Answer] = {}

    def __call__(self, answer: Answer, call: Call) -> Answer:
        """Return the answer of the call before, its request id included."""
        answer = _with_headers(answer, {"x-log-requestid": call.request_id})
        key = (call.action, call.project, call.logstore)
        earlier = self._last.get(key, answer)
        self._last[key] = answer
        return earlier


class OfAnotherShard:
    """In the place of each answer, the last one that concerned another shard; right while there is none."""

    def __init__(self) -> None:
        self._last: Dict[Tuple[str, str, str], Dict[str, Answer]] = {}

    def __call__(self, answer: Answer, call: Call) -> Answer:
        """Return an answer that another shard had, its request id included."""
        answer = _with_headers(answer, {"x-log-requestid": call.request_id})
        by_shard = self._last.setdefault((call.action, call.project, call.logstore), {})
        by_shard.pop(call.item, None)  # so that the last one comes last
        others = list(by_shard.values())
        by_shard[call.item] = answer
        return others[-1] if others else answer


def _with_headers(answer: Answer, headers: Dict[str, str]) -> Answer:
    return answer._replace(headers={**answer.headers, **headers})


def _raw_body(answer: Answer) -> bytes:
    size = int(answer.headers["x-log-bodyrawsize"])
    return compression.decompress(answer.headers.get("x-log-compresstype", ""), answer.body, size)


def _with_raw_body(answer: Answer, body: bytes) -> Answer:
    headers = {name: text for name, text in answer.headers.items() if name != "x-log-compresstype"}
    return answer._replace(body=body, headers={**headers, "x-log-bodyrawsize": str(len(body))})
