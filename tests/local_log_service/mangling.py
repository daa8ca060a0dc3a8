"""What may become of a right answer on its way: for ``LocalLogService.add_fault(..., mangle=...)``.

Each takes the right answer and the call that it answers, and returns what the client gets instead. The call has taken
effect by then.
"""

from typing import Callable, Dict, Tuple

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
