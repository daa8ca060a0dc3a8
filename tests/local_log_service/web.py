"""The HTTP side of the service: from a request to an action and from its answer to a response."""

import asyncio
import itertools
import logging
import os
import ssl
import time
from collections import Counter
from typing import Callable, Dict, List, Optional, Tuple
from urllib.parse import parse_qsl, unquote

from aiohttp import HttpVersion11, web

from . import quick_acknowledgement, routing, signature
from .actions import ACTIONS, Answer, Call, Limits
from .errors import ServiceError
from .faults import Fault, Faults, ForeignAnswer
from .sending import RawResponse
from .state import State

logger = logging.getLogger(__name__)

_HOLD_POLL_INTERVAL = 0.005  # seconds


class _Cut(Exception):
    """The connection is to be broken off without an answer."""


class _Intercepted(Exception):
    """Something in between answers in the service's place."""

    def __init__(self, answer: ForeignAnswer) -> None:
        super().__init__(answer)
        self.answer = answer


class _Connection(web.RequestHandler):
    """One connection; what is no HTTP is answered in the service's form too."""

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - what aiohttp hands over
        status: int = 500,
        exc: Optional[BaseException] = None,
        message: Optional[str] = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Answer what aiohttp cannot read, with the status that it gives it, and close the connection."""
        if status >= 500:
            logger.error("aiohttp failed to serve a request", exc_info=exc)
        error = ServiceError("InternalServerError" if status >= 500 else "BadRequest", status=status)
        response = _error_response(error)
        response.headers["x-log-requestid"] = self._manager.new_request_id()
        response.force_close()
        return response


class _Server(web.Server):
    """aiohttp's server of single requests, acknowledging from the first segment on."""

    def __init__(self, *arguments, new_request_id: Callable[[], str], **named) -> None:
        super().__init__(*arguments, **named)
        self.new_request_id = new_request_id

    def __call__(self) -> web.RequestHandler:
        """Return the handler of a new connection."""
        # Bodies are signed as they are sent, so they are not decompressed on the way in.
        return _Connection(self, loop=asyncio.get_running_loop(), access_log=None, auto_decompress=False)

    def connection_made(self, handler, transport: asyncio.Transport) -> None:
        quick_acknowledgement.arm(transport)
        super().connection_made(handler, transport)


class Web:
    """Answers HTTP requests, in the event loop's thread.

    Attributes:
        arrived: (action, project, logstore) -> number of calls that arrived; guarded by the state's lock.
    """

    def __init__(
        self,
        state: State,
        faults: Faults,
        limits: Limits,
        keys: Callable[[], signature.Keys],
        endpoint_host: str,
        region: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Prepare to serve ``<project>.<endpoint_host>``.

        ``keys`` returns who may call at the time of a call, ``now`` the unix time that a request's own is compared
        with.
        """
        self.arrived: Counter[Tuple[str, str, str]] = Counter()
        self._state = state
        self._faults = faults
        self._limits = limits
        self._keys = keys
        self._host_suffix = "." + endpoint_host
        self._region = region
        self._now = now
        self._request_id_prefix = os.urandom(8).hex().upper()
        self._request_numbers = itertools.count(1)
        self._server: Optional[_Server] = None
        self._listener: Optional[asyncio.AbstractServer] = None

    async def start(self, host: str, port: int, tls: Optional[ssl.SSLContext] = None) -> int:
        """Listen; return the port, which is a free one for ``port`` 0."""
        self._server = _Server(self._handle, request_factory=self._make_request, new_request_id=self.new_request_id)
        self._listener = await asyncio.get_running_loop().create_server(self._server, host, port, ssl=tls, backlog=1024)
        return self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and break off what is under way."""
        self._listener.close()
        await self._server.shutdown(timeout=0.01)

    def new_request_id(self) -> str:
        """Return a unique request id: 24 hexadecimal digits, as the service writes it."""
        return "{}{:08X}".format(self._request_id_prefix, next(self._request_numbers))

    def _make_request(self, message, payload, protocol, writer, task) -> web.BaseRequest:
        if message.version > HttpVersion11:  # aiohttp's parser in Python takes any, and would answer with the same
            message = message._replace(version=HttpVersion11)
        # Compression may make a body a little larger; what is much too large need not be kept in memory.
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            asyncio.get_running_loop(),
            client_max_size=2 * self._limits.put_bytes + 65536,
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        request_id = self.new_request_id()
        faults: List[Fault] = []
        try:
            answer = await self._answer(request, request_id, faults)
            response = web.Response(body=answer.body, headers=answer.headers)
        except web.RequestPayloadError:
            response = _error_response(ServiceError("BadRequest", "the body is not framed as its headers say"))
        except _Intercepted as interception:
            response = RawResponse.foreign(interception.answer, self.new_request_id)
        except (_Cut, ConnectionError):  # the latter: the client went away
            if request.transport is not None:
                request.transport.abort()
            return web.Response()  # goes nowhere
        except ServiceError as error:
            response = _error_response(error)
        except Exception:
            logger.exception("the local Log Service failed to handle %s %s", request.method, request.raw_path)
            response = _error_response(ServiceError("InternalServerError"))
        if not isinstance(response, RawResponse):
            response.headers.setdefault("x-log-requestid", request_id)
        if any(fault.effects.concern_sending for fault in faults):
            response = RawResponse.altered(response, [fault.effects for fault in faults], self.new_request_id)
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            pass  # the client did not wait for the answer
        quick_acknowledgement.arm(request.transport)
        return response

    async def _answer(self, request: web.BaseRequest, request_id: str, faults: List[Fault]) -> Answer:
        """Handle a request; ``faults`` takes those that befall it."""
        path, query = _parse_target(request.raw_path)
        headers = {name.lower(): value for name, value in request.headers.items()}
        if headers.get("expect", "").lower() == "100-continue":
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ServiceError("PostBodyTooLarge")
        project = self._project(headers.get("host", ""))
        route = routing.find(request.method, project, path, query)
        if route is None:
            self._verify(request.method, path, query, headers, body)
            raise ServiceError("InvalidAPI", "{} {} is no call of the API".format(request.method, path))
        with self._state.lock:
            self.arrived[route.action, project, route.logstore] += 1
        faults += self._faults.striking(route.action, project, route.logstore)
        for fault in faults:
            fault.struck[request_id] = time.monotonic()
        for fault in faults:
            await _suffer(fault, request)
        try:
            if route.action != "PutWebtracking":  # a browser has no key
                self._verify(request.method, path, query, headers, body)
            call = Call(route.action, project, route.logstore, route.item, query, headers, body, request_id)
            answer = ACTIONS[route.action](self._limits, self._state, call)
        except ServiceError:
            _intercept(faults)
            raise
        return _befall_answer(faults, answer, call)

    def _project(self, host: str) -> str:
        """Return the project that a Host header names, "" for the endpoint alone."""
        name = "." + host.partition(":")[0]
        if not name.endswith(self._host_suffix):
            raise ServiceError("InvalidHost", "Host header {} is invalid".format(host))
        return name[1 : -len(self._host_suffix)]

    def _verify(self, method: str, path: str, query: Dict[str, str], headers: Dict[str, str], body: bytes) -> None:
        signature.verify(method, path, query, headers, body, self._keys(), self._region, self._now())


def _parse_target(target: str) -> Tuple[str, Dict[str, str]]:
    """Return the path, not percent-encoded, and the query of a request line's target.

    A client that takes the service for its proxy writes the whole URL there.
    """
    if not target.startswith("/"):
        slash = target.find("/", target.find("://") + 3)
        target = target[slash:] if slash >= 0 else "/"
    path, _, query = target.partition("?")
    return unquote(path), dict(parse_qsl(query, keep_blank_values=True))


async def _suffer(fault: Fault, request: web.BaseRequest) -> None:
    """Let a fault befall a request before it is handled."""
    effects = fault.effects
    if effects.hold:
        while not fault.removed:
            await asyncio.sleep(_HOLD_POLL_INTERVAL)
        if request.transport is None or request.transport.is_closing():
            raise _Cut  # the client gave up waiting, so the call is not taken any more
    if effects.delay:
        await asyncio.sleep(effects.delay)
    if effects.error is not None:
        raise effects.error
    if effects.cut == "before":
        raise _Cut
    if effects.answer is not None and not effects.takes_effect:
        raise _Intercepted(effects.answer)


def _intercept(faults: List[Fault]) -> None:
    """Let the first fault that has something in between answer do so, whatever the service says."""
    for fault in faults:
        if fault.effects.answer is not None:
            raise _Intercepted(fault.effects.answer)


def _befall_answer(faults: List[Fault], answer: Answer, call: Call) -> Answer:
    """Return what faults make of a right answer."""
    _intercept(faults)
    for fault in faults:
        if fault.effects.mangle is not None:
            answer = fault.effects.mangle(answer, call)
    if any(fault.effects.cut == "after" for fault in faults):
        raise _Cut
    return answer


def _error_response(error: ServiceError) -> web.Response:
    return web.Response(status=error.status, body=error.body(), headers={"Content-Type": "application/json"})
