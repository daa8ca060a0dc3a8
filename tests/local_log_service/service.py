"""The service as tests use it: its life cycle and what they order, feed and look at."""

import asyncio
import gc
import os
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Set, Tuple, Union

from aliyun.log import LogClient

from . import validation
from .actions import ACTIONS, Answer, Call, Limits
from .errors import ServiceError
from .faults import Effects, Fault, Faults, ForeignAnswer
from .quotas import Quotas
from .signature import Keys
from .state import Entry, State
from .tunnel import Tunnel
from .web import Web

_HOST = "127.0.0.1"
_POLL_INTERVAL = 0.005  # seconds


class LocalLogService:
    """An in-memory double of Simple Log Service that answers over real HTTP or HTTPS on the loopback interface.

    Use it as a context manager, or call ``start`` and ``stop``. What it remembers outlives ``stop``: started
    again it listens on the same port and goes on, as after an outage.

    Methods that name a project, logstore, shard or consumer group raise ``errors.ServiceError`` with the code
    that the HTTP API answers with when it does not exist.

    Attributes:
        access_keys: access key id -> secret; may be changed at any time.
        security_tokens: access key id -> STS token that has to come with it; may be changed at any time.
        token_ends: access key id -> unix time at which its STS token expires, never by default; may be changed at any
            time, as what follows here.
        disabled_keys: ids of ``access_keys`` that are disabled.
        in_arrears: whether the account has not paid its bills, so that every call is refused.
        clock_offset: seconds added to what the service takes for now when it checks the time of a request, which
            may be 15 minutes off; to the service a client's clock is wrong by as much the other way. May be changed
            at any time.
        endpoint: the endpoint to give to clients; it names no address, see ``environment``.
        region: what signatures of version 4 have to name.
        port: where clients find their proxy; once started never 0.
    """

    def __init__(
        self,
        access_keys: Mapping[str, str] = {"local-id": "local-secret"},
        security_tokens: Optional[Mapping[str, str]] = None,
        https: bool = False,
        port: int = 0,
        max_consumer_groups: int = 30,
        max_pull_bytes: int = 10 * 1024 * 1024,
        max_put_bytes: int = 10 * 1024 * 1024,
        endpoint_host: str = "local-log-service.test",
        region: str = "local",
        check_log_times: bool = False,
        log_time_status: int = 499,
        unknown_consumer: str = "ConsumerNotExsit",
    ) -> None:
        """Prepare a service; nothing listens yet.

        Args:
            access_keys: access key id -> secret.
            security_tokens: access key id -> STS token that has to come with it.
            https: speak HTTPS behind a CONNECT proxy instead of HTTP.
            port: the port to listen on, 0 for a free one.
            max_consumer_groups: how many consumer groups a logstore may have.
            max_pull_bytes: most raw bytes a pull answers with, unless its first LogGroup alone is larger.
            max_put_bytes: most raw bytes a put may bring: 10 MB in the documentation, 30 MB in the newest SDKs.
            endpoint_host: clients call ``<project>.<endpoint_host>``.
            region: what signatures of version 4 have to name.
            check_log_times: refuse puts with logs of more than 7 days ago or 15 minutes ahead, as the service does.
            log_time_status: with which HTTP status: 499, or 400, as some releases of the documentation have it.
            unknown_consumer: the code for a checkpoint of a consumer that the group does not know: ConsumerNotExsit,
                which consumer libraries look for, or ConsumerNotExist, which the documentation has.
        """
        self.access_keys = dict(access_keys)
        self.security_tokens = dict(security_tokens or {})
        self.token_ends: Dict[str, float] = {}
        self.disabled_keys: Set[str] = set()
        self.in_arrears = False
        self.endpoint = "{}://{}".format("https" if https else "http", endpoint_host)
        self.region = region
        self.port = port
        self.clock_offset = 0.0
        self._https = https
        self._endpoint_host = endpoint_host
        self._state = State()
        self._faults = Faults()
        limits = Limits(
            consumer_groups=max_consumer_groups,
            pull_bytes=max_pull_bytes,
            put_bytes=max_put_bytes,
            region=region,
            check_log_times=check_log_times,
            log_time_status=log_time_status,
            unknown_consumer=unknown_consumer,
        )
        self._web = Web(
            self._state,
            self._faults,
            limits,
            lambda: Keys(self.access_keys, self.disabled_keys, self.security_tokens, self.token_ends, self.in_arrears),
            endpoint_host,
            region,
            lambda: time.time() + self.clock_offset,
        )
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread: Optional[threading.Thread] = None
        self._to_close = AsyncExitStack()
        self._ca_file: Optional[str] = None
        self._certificates: Any = None  # certificates.Certificates, from the first start with HTTPS on

    # Life cycle

    def start(self) -> None:
        """Start to listen, in a thread of this process.

        Raises:
            RuntimeError: it runs already.
            OSError: the port is taken.
        """
        if self._loop is not None:
            raise RuntimeError("the local Log Service runs already")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="local-log-service", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    async def _listen(self) -> None:
        async with AsyncExitStack() as started:
            if self._https:
                await self._listen_https(started)
            else:
                self.port = await self._web.start(_HOST, self.port)
                started.push_async_callback(self._web.stop)
            self._to_close = started.pop_all()

    async def _listen_https(self, started: AsyncExitStack) -> None:
        from . import certificates  # here, so that HTTP needs none of the libraries for certificates

        if self._certificates is None:
            self._certificates = certificates.Certificates(self._endpoint_host)
            self._ca_file = os.path.join(tempfile.gettempdir(), "local-log-service-{}.pem".format(uuid.uuid4().hex))
        with open(self._ca_file, "xb") as file:
            started.callback(os.unlink, self._ca_file)
            file.write(self._certificates.authority)
        tls_port = await self._web.start(_HOST, 0, self._certificates.context)
        started.push_async_callback(self._web.stop)
        tunnel = Tunnel(_HOST, self._endpoint_host, tls_port)
        self.port = await tunnel.start(self.port)
        started.push_async_callback(tunnel.stop)

    def stop(self) -> None:
        """Stop listening and break off what is under way. Stopping twice does nothing more."""
        if self._loop is None:
            return
        asyncio.run_coroutine_threadsafe(self._to_close.aclose(), self._loop).result()
        self._end_loop()

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None
        # A connection that nobody answers any more has to be closed: left to itself, PyPy does that much later.
        gc.collect()

    def __enter__(self) -> "LocalLogService":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def present_certificate(self, trusted: bool) -> None:
        """With HTTPS, choose the certificate for connections made from now on.

        Args:
            trusted: one that the CA file of ``environment`` vouches for, as from the start; else another's.

        Raises:
            RuntimeError: it speaks HTTP, or was never started.
        """
        if self._certificates is None:
            raise RuntimeError("there are certificates with https=True only, once it was started")
        self._certificates.present(trusted)

    def authority(self, trusted: bool) -> bytes:
        """Return the CA certificate (PEM) that vouches for what ``present_certificate`` presents then.

        Raises:
            RuntimeError: it speaks HTTP, or was never started.
        """
        if self._certificates is None:
            raise RuntimeError("there are certificates with https=True only, once it was started")
        return self._certificates.authority if trusted else self._certificates.other_authority

    # How clients reach it

    @property
    def _proxies(self) -> Dict[str, str]:
        return {"https" if self._https else "http": "http://{}:{}".format(_HOST, self.port)}

    def environment(self) -> Dict[str, str]:
        """Return the environment variables with which a client process reaches the service.

        The endpoint names a host that does not exist; clients get there by taking the service for their proxy.
        """
        variables = {"no_proxy": "", "NO_PROXY": ""}
        for scheme in ("http", "https"):
            proxy = self._proxies.get(scheme, "")
            variables[scheme + "_proxy"] = proxy
            variables[scheme.upper() + "_PROXY"] = proxy
        if self._ca_file is not None:
            variables["REQUESTS_CA_BUNDLE"] = self._ca_file
        return variables

    def client(self, access_key_id: Optional[str] = None) -> LogClient:
        """Return an SDK client for this process that reaches the service whatever the environment says.

        Args:
            access_key_id: one of ``access_keys``, by default the first.
        """
        if access_key_id is None:
            access_key_id = next(iter(self.access_keys))
        client = LogClient(
            self.endpoint,
            access_key_id,
            self.access_keys[access_key_id],
            self.security_tokens.get(access_key_id),
            source="localhost",  # without one the SDK asks the name server for the endpoint
            region=self.region,
        )
        client._session.trust_env = False
        client._session.proxies = self._proxies
        if self._ca_file is not None:
            client._session.verify = self._ca_file
        return client

    # Logstores

    def create_logstore(self, project: str, logstore: str, shard_count: int = 1) -> None:
        """Create a logstore, and its project when that is missing.

        Raises:
            ServiceError: LogStoreAlreadyExist; LogStoreInfoInvalid unless there are 1 to 256 shards; ParameterInvalid
                or LogStoreInfoInvalid for names that the service does not allow.
        """
        validation.project_name(project)
        validation.logstore_name(logstore)
        with self._state.lock:
            if project not in self._state.projects:
                self._state.create_project(project)
            self._state.create_logstore(project, logstore, shard_count)

    def delete_logstore(self, project: str, logstore: str) -> List[Entry]:
        """Delete a logstore with everything in it; return what was its ledger."""
        with self._state.lock:
            ledger = self._state.logstore(project, logstore).ledger
            self._state.delete_logstore(project, logstore)
            return ledger

    def put(self, project: str, logstore: str, log_groups: Iterable[bytes], shard: Optional[int] = None) -> List[Entry]:
        """Feed serialized LogGroups without HTTP; return their entries.

        Args:
            project: name.
            logstore: name.
            log_groups: serialized LogGroups, uncompressed, taken as they are.
            shard: id of a readwrite shard; None takes the readwrite shards in turn.

        Raises:
            ServiceError: also when the shard is readonly.
        """
        entries = []
        for log_group in log_groups:  # the lock is not held while the iterable works
            with self._state.lock:
                store = self._state.logstore(project, logstore)
                target = store.next_writable_shard() if shard is None else store.writable_shard(shard)
                entries.append(store.append(target, log_group, self._web.new_request_id(), self._state.next_sequence()))
        return entries

    def ledger(self, project: str, logstore: str) -> List[Entry]:
        """Return every entry the logstore ever took, in order of arrival, expired ones too; a snapshot."""
        with self._state.lock:
            return list(self._state.logstore(project, logstore).ledger)

    def split_shard(self, project: str, logstore: str, shard: int, key: Optional[str] = None) -> List[int]:
        """Split a readwrite shard; return the ids of the two new ones.

        Args:
            project: name.
            logstore: name.
            shard: id.
            key: where, an MD5 key of 32 hexadecimal digits; in the middle by default.

        Raises:
            ServiceError: ParameterInvalid when the shard is readonly or the key is not inside it.
        """
        with self._state.lock:
            shards = self._state.logstore(project, logstore).split(shard, None if key is None else int(key, 16))
            return [child.shard_id for child in shards[1:]]

    def merge_shards(self, project: str, logstore: str, shard: int) -> int:
        """Merge a readwrite shard with its right neighbour; return the id of the new one.

        Raises:
            ServiceError: ParameterInvalid when the shard is readonly or has no readwrite neighbour.
        """
        with self._state.lock:
            return self._state.logstore(project, logstore).merge(shard)[0].shard_id

    def expire(self, project: str, logstore: str, shard: int, count: int) -> None:
        """Drop the oldest ``count`` LogGroups of a shard, as the retention time does.

        Cursors before the oldest one left are answered InvalidCursor. The ledger keeps the dropped ones.
        """
        with self._state.lock:
            self._state.logstore(project, logstore).expire(shard, count)

    def leave_gap(self, project: str, logstore: str, shard: int, count: int) -> None:
        """Let positions follow at the end of a shard that have no LogGroup: pulls that meet but such bring none, and
        a cursor that has moved on.
        """
        with self._state.lock:
            self._state.logstore(project, logstore).shard(shard).leave_gap(count)

    @property
    def quotas(self) -> Optional[Quotas]:
        """What may be written and read in a second, None for any amount, as it is at first; may be set at any time."""
        with self._state.lock:
            return self._state.quotas

    @quotas.setter
    def quotas(self, quotas: Optional[Quotas]) -> None:
        with self._state.lock:
            self._state.quotas = quotas

    def set_ttl(self, project: str, logstore: str, seconds: Optional[float]) -> None:
        """Set how long a logstore keeps what arrives, None for ever.

        LogGroups that arrived longer ago than that expire, as with ``expire``. GetLogStore goes on to answer the days
        that CreateLogStore or UpdateLogStore have set, and UpdateLogStore with a ttl overrides this.
        """
        with self._state.lock:
            self._state.logstore(project, logstore).retention = seconds

    # Faults and calls

    def add_fault(
        self,
        action: str,
        project: Optional[str] = None,
        logstore: Optional[str] = None,
        status: Optional[int] = None,
        code: Optional[str] = None,
        message: Optional[str] = None,
        share: float = 1.0,
        delay: float = 0.0,
        cut: Optional[str] = None,
        hold: bool = False,
        trickle: float = 0.0,
        answer: Optional[ForeignAnswer] = None,
        takes_effect: bool = False,
        mangle: Optional[Callable[[Answer, Call], Answer]] = None,
        interim: Optional[ForeignAnswer] = None,
        stray: Optional[ForeignAnswer] = None,
        stray_pause: float = 0.0,
        cut_short: int = 0,
        cut_head: str = "",
        endless: str = "",
        close: bool = False,
    ) -> Fault:
        """Put a fault into force until it is removed. Where several apply to a call, they do in turn.

        Args:
            action: API name of the calls to befall, for instance "PutLogs", or "*" for all.
            project: only calls to this project.
            logstore: only calls to this logstore.
            status: answer with this HTTP status, before the call takes any effect.
            code: answer with this error code; status and code find each other when only one is given.
            message: with this text, by default the one that is documented for the code.
            share: which share of the matching calls, 0 to 1: evenly spread and the first one among them.
            delay: seconds to wait before the call is handled, or fails if it is to.
            cut: break the connection off without an answer, "before" or "after" the call takes effect.
            hold: neither answer nor take calls until the fault is removed. A client that has gone by then
                has its call not taken.
            trickle: send the answer byte by byte, so many seconds apart; then the connection is closed.
            answer: answer with this, which is not the service's, whether the call was a good one or not.
            takes_effect: with ``answer``, perform the call all the same.
            mangle: makes of a right answer the one that is sent; see ``mangling``.
            interim: send this first, and then the answer that is due.
            stray: send this after the answer, unasked for.
            stray_pause: with ``stray``, so many seconds after the answer, and before the next request on the connection
                is looked at; by default with the same segment, which a client reads that reads ahead.
            cut_short: keep back so many bytes of the body that Content-Length announces (of a shorter body it
                announces so many), then close the connection.
            cut_head: end the head in the middle of this header's value, then close the connection.
            endless: send a body that never ends ("chunks"), or answers 103 without end before it ("interims").
            close: close the connection after the answer, without having announced it.

        Raises:
            ValueError: no such action, or the arguments make no fault.
        """
        _check_action(action)
        error = None
        if code is not None:
            error = ServiceError(code, message, status)
        elif status is not None:
            error = ServiceError.of_status(status, message)
        effects = Effects(
            error=error,
            delay=delay,
            cut=cut,
            hold=hold,
            trickle=trickle,
            answer=answer,
            takes_effect=takes_effect,
            mangle=mangle,
            interim=interim,
            stray=stray,
            stray_pause=stray_pause,
            cut_short=cut_short,
            cut_head=cut_head,
            endless=endless,
            close=close,
        )
        return self._faults.add(action, project, logstore, share, effects)

    def clear_faults(self) -> None:
        """Remove every fault."""
        self._faults.clear()

    def calls(self, action: Optional[str] = None) -> Union[int, "Counter[str]"]:
        """Return how many calls arrived, failed ones included: of one action, or by action.

        Raises:
            ValueError: no such action.
        """
        by_action: Counter[str] = Counter()
        for (name, _, _), count in self.calls_by_logstore.items():
            by_action[name] += count
        if action is None:
            return by_action
        _check_action(action)
        return sum(by_action.values()) if action == "*" else by_action[action]

    @property
    def calls_by_logstore(self) -> "Counter[Tuple[str, str, str]]":
        """How many calls arrived by (action, project, logstore); a snapshot."""
        with self._state.lock:
            return self._web.arrived.copy()

    # Consumer groups

    def consumer_group(self, project: str, logstore: str, group: str) -> Dict[str, Any]:
        """Return a snapshot of a consumer group.

        It has "timeout" (s), "in_order", "consumers" (name -> seconds since its last heartbeat) and "shards"
        (id -> "state", "consumer" (the holder or ""), "checkpoint" (a cursor or "") and "next": the index in
        its shard of the LogGroup the checkpoint points at, or None without one).
        """
        with self._state.lock:
            store = self._state.logstore(project, logstore)
            consumer_group = store.consumer_group(group)
            now = time.time()
            consumer_group.refresh(store.views(consumer_group), now)
            shards = {}
            for shard_id, assignment in sorted(consumer_group.assignments.items()):
                checkpoint = assignment.checkpoint
                shards[shard_id] = {
                    "state": assignment.state,
                    "consumer": assignment.consumer,
                    "checkpoint": checkpoint,
                    "next": store.shards[shard_id].index_of(checkpoint) if checkpoint else None,
                }
            return {
                "timeout": consumer_group.timeout,
                "in_order": consumer_group.in_order,
                "consumers": {name: now - last for name, last in consumer_group.consumers.items()},
                "shards": shards,
            }

    def set_checkpoint(
        self, project: str, logstore: str, group: str, shard: int, checkpoint: str, consumer: str = ""
    ) -> None:
        """Set the checkpoint of a shard as somebody does in the console, whoever holds it, to any text.

        Which consumer the service names then is not documented: ``consumer``.
        """
        with self._state.lock:
            store = self._state.logstore(project, logstore)
            consumer_group = store.consumer_group(group)
            consumer_group.refresh(store.views(consumer_group), time.time())
            consumer_group.assignments[shard].set_checkpoint(checkpoint, consumer, time.time())

    def lag(self, project: str, logstore: str, group: str) -> int:
        """Return how many LogGroups of all shards, expired ones aside, are beyond the group's checkpoints."""
        with self._state.lock:
            store = self._state.logstore(project, logstore)
            consumer_group = store.consumer_group(group)
            return sum(
                shard.count_from(shard.next_index(consumer_group.checkpoint(shard_id)))
                for shard_id, shard in store.current_shards().items()
            )

    def wait_for(self, condition: Callable[[], bool], timeout: float = 30.0, what: str = "condition") -> None:
        """Wait until ``condition()`` holds. What it raises ends the wait.

        Raises:
            AssertionError: it did not within ``timeout`` seconds; names ``what``.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError("{} not reached within {} s".format(what, timeout))
            time.sleep(_POLL_INTERVAL)


async def _cancel_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # lets transports that were closed by that say so to their sockets


def _check_action(action: str) -> None:
    if action != "*" and action not in ACTIONS:
        raise ValueError("no action {!r}; there are {}".format(action, ", ".join(sorted(ACTIONS))))
