"""Answers that are sent to the byte as they were ordered, where aiohttp would see to it that they are right."""

import asyncio
import http
from typing import Callable, Mapping, Sequence

from aiohttp import web

from .faults import Effects, ForeignAnswer

#: What an answer without end is made of, sent again and again.
_ENDLESS = {
    "": b"",
    "chunks": b"10000\r\n" + b" " * 0x10000 + b"\r\n",
    "interims": b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" * 100,
}
_MOST_UNSENT = 1000 * 1000  # bytes that may wait for a client to read them


class RawResponse(web.StreamResponse):
    """An answer of given bytes."""

    def __init__(
        self,
        answer: ForeignAnswer,
        parts: Sequence[bytes],
        pause: float = 0.0,
        close: bool = False,
        for_ever: bytes = b"",
    ) -> None:
        """Prepare to send.

        Args:
            answer: the one that is due, without what else is sent with it.
            parts: what to send, each with a write of its own.
            pause: seconds between them.
            close: whether to close the connection then.
            for_ever: what to send then, until the client has had enough.
        """
        super().__init__(status=answer.status)
        self._answer = answer
        self._parts = parts
        self._pause = pause
        self._for_ever = for_ever
        self._close = close or answer.headers.get("Connection", "").lower() == "close"

    @classmethod
    def foreign(cls, answer: ForeignAnswer, new_request_id: Callable[[], str]) -> "RawResponse":
        """Return what sends an answer that is not the service's."""
        answer = _identified(answer, new_request_id)
        return cls(answer, [_to_bytes(answer)])

    @classmethod
    def altered(
        cls, response: web.StreamResponse, effects: Sequence[Effects], new_request_id: Callable[[], str]
    ) -> "RawResponse":
        """Return what sends a response in the way that these effects of faults make of it."""
        if isinstance(response, RawResponse):
            answer = response._answer
        else:
            answer = ForeignAnswer(response.status, dict(response.headers), response.body or b"")
        trickle = max(effect.trickle for effect in effects)
        missing = max(effect.cut_short for effect in effects)
        close = bool(trickle or missing or any(effect.close or effect.cut_head for effect in effects))
        endless = next((effect.endless for effect in effects if effect.endless), "")
        if endless:
            head = {"Transfer-Encoding": "chunked", **answer.headers}
            head.pop("Content-Length", None)
            due = _to_bytes(answer._replace(headers=head, body=b"")) if endless == "chunks" else b""
            return cls(answer, [due], close=True, for_ever=_ENDLESS[endless])
        if trickle:
            answer = answer._replace(headers={"Connection": "close", **answer.headers})
        interim = [_to_bytes(_identified(effect.interim, new_request_id)) for effect in effects if effect.interim]
        stray = [_to_bytes(_identified(effect.stray, new_request_id)) for effect in effects if effect.stray]
        due = b"".join(interim) + _to_bytes(answer, missing)
        for name in (effect.cut_head for effect in effects if effect.cut_head):
            due = _cut_within(due, name)
        pause = max(effect.stray_pause for effect in effects)
        parts = [due, b"".join(stray)] if pause else [due + b"".join(stray)]
        if trickle:
            pause = trickle
            parts = [bytes([byte]) for byte in b"".join(parts)]
        return cls(answer, parts, pause, close)

    @property
    def keep_alive(self) -> bool:
        """Whether aiohttp is to wait for another request on the connection."""
        return not self._close

    async def prepare(self, request: web.BaseRequest) -> None:
        """Send all of it, once."""
        parts, self._parts = self._parts, []
        transport = request.transport
        for number, part in enumerate(parts):
            if number:
                await asyncio.sleep(self._pause)
            if transport is None or transport.is_closing():
                return  # the client did not wait for the end
            transport.write(part)
        while self._for_ever and not transport.is_closing():
            if transport.get_write_buffer_size() < _MOST_UNSENT:
                transport.write(self._for_ever)
            await asyncio.sleep(0.001)

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing more."""


def _identified(answer: ForeignAnswer, new_request_id: Callable[[], str]) -> ForeignAnswer:
    if not answer.request_id:
        return answer
    return answer._replace(headers={**answer.headers, "x-log-requestid": new_request_id()})


def _to_bytes(answer: ForeignAnswer, missing: int = 0) -> bytes:
    """Return an answer as it is sent, without the last ``missing`` bytes of the body that it announces."""
    headers = dict(answer.headers)
    if _has_length(answer.status, headers):
        headers["Content-Length"] = str(max(len(answer.body), missing))
    head = ["HTTP/1.1 {} {}".format(answer.status, _reason(answer.status))]
    head.extend("{}: {}".format(*pair) for pair in headers.items())
    return "\r\n".join(head + ["", ""]).encode("latin-1") + answer.body[: max(0, len(answer.body) - missing)]


def _cut_within(sent: bytes, name: str) -> bytes:
    """Return an answer up to the middle of the value of a header, or all of it where it has none of that name."""
    start = sent.lower().find(b"\r\n" + name.lower().encode("ascii") + b": ")
    if start < 0:
        return sent
    value = sent.index(b": ", start) + 2
    return sent[: (value + sent.index(b"\r\n", value)) // 2]


def _has_length(status: int, headers: Mapping[str, str]) -> bool:
    names = {name.lower() for name in headers}
    return status >= 200 and status not in (204, 304) and not names & {"content-length", "transfer-encoding"}


def _reason(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:  # one that only something in between knows
        return "Unknown"
