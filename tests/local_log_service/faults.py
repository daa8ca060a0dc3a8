"""Faults to order: errors, delays, broken connections, calls that hang, and something in between that answers.

``LocalLogService.add_fault`` puts them into force, for the calls of an action, all or a share of them::

    service.add_fault("PutLogs", code="ShardWriteQuotaExceed", share=0.3)  # an error of the service
    service.add_fault("PutLogs", cut="after")                      # taken, and the connection broken off
    service.add_fault("*", answer=ForeignAnswer(200, {}, b"{}"))   # something in between says it is fine
    service.add_fault("*", answer=ForeignAnswer(302, {"Location": "http://portal.test/"}))
    service.add_fault("PutLogs", answer=ForeignAnswer(502, {"Content-Type": "text/html"}, b"<p>"), takes_effect=True)
    service.add_fault("HeartBeat", answer=ForeignAnswer(200, body=b"null", request_id=True))
    service.add_fault("PutLogs", close=True)                       # the right answer, then closed without a word
    service.add_fault("PutLogs", interim=ForeignAnswer(103, {"Link": "</>"}))     # 103, then the right answer
    service.add_fault("PutLogs", stray=ForeignAnswer(request_id=True), share=0.5)  # the right answer, and one more
    service.add_fault("PutLogs", stray=ForeignAnswer(request_id=True), stray_pause=0.1)  # in a segment of its own
    service.add_fault("PullLogs", cut_short=10)                    # the last 10 bytes of the body never come
    service.add_fault("PullLogs", mangle=mangling.wrong_raw_size)  # or undecodable, unknown_compression, without(...)
    service.add_fault("PullLogs", mangle=mangling.OfAnotherShard())  # or Earlier(): a reply to another request
    service.add_fault("PullLogs", cut_head="x-log-cursor")         # the head ends within the value of this header
    service.add_fault("HeartBeat", endless="chunks")               # or "interims": 103 after 103, and never an answer
    service.add_fault("*", trickle=0.01)                           # the right answer, byte by byte

Those that concern how an answer is sent (close, interim, stray, cut_short, cut_head, endless, trickle) go together with
each other and with any answer: the right one, an error of the service, a foreign one.
"""

import math
import threading
from fractions import Fraction
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional

from .actions import Answer, Call
from .errors import ServiceError


class ForeignAnswer(NamedTuple):
    """An answer that is not the service's: what something in between says, to the byte.

    Attributes:
        status: HTTP status, any.
        headers: all that it bears, but for Content-Length, which is added where it is due and missing.
        body: any bytes.
        request_id: whether it bears an ``x-log-requestid`` nevertheless, a new one.
    """

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes = b""
    request_id: bool = False


class Effects(NamedTuple):
    """What befalls a call.

    Attributes:
        error: what to answer instead of handling it, if anything.
        delay: seconds to wait before a call is handled.
        cut: "before" or "after" the call takes effect, the connection is broken off without an answer.
        hold: calls are neither answered nor taken until the fault is removed.
        trickle: seconds between the bytes of the answer; then the connection is closed, as announced.
        answer: what is answered in the service's place.
        takes_effect: whether the call takes effect although ``answer`` is what its client gets.
        mangle: makes of a right answer what the client gets.
        interim: an answer that is sent before the one that is due.
        stray: an answer that is sent after the one that was due.
        stray_pause: seconds between the two, 0 for the same segment.
        cut_short: bytes of the announced body that never come; then the connection is closed.
        cut_head: the head ends in the middle of this header's value; then the connection is closed.
        endless: "chunks", the body goes on for ever, or "interims", the answers before it do.
        close: the connection is closed after the answer, which did not announce it.
    """

    error: Optional[ServiceError] = None
    delay: float = 0.0
    cut: Optional[str] = None
    hold: bool = False
    trickle: float = 0.0
    answer: Optional[ForeignAnswer] = None
    takes_effect: bool = False
    mangle: Optional[Callable[[Answer, Call], Answer]] = None
    interim: Optional[ForeignAnswer] = None
    stray: Optional[ForeignAnswer] = None
    stray_pause: float = 0.0
    cut_short: int = 0
    cut_head: str = ""
    endless: str = ""
    close: bool = False

    @property
    def concern_sending(self) -> bool:
        """Whether an answer is sent in another way than usual."""
        ways = self.trickle, self.interim, self.stray, self.cut_short, self.cut_head, self.endless, self.close
        return any(bool(way) for way in ways)

    def check(self) -> None:
        """Raise ValueError where they make no fault."""
        if min(self.delay, self.trickle, self.stray_pause, self.cut_short) < 0:
            raise ValueError("delay, trickle and stray_pause are seconds, cut_short bytes")
        if self.cut not in (None, "before", "after"):
            raise ValueError('cut has to be None, "before" or "after"')
        if self.endless not in ("", "chunks", "interims"):
            raise ValueError('endless has to be "chunks" or "interims"')
        if self.interim is not None and not 100 <= self.interim.status < 200:
            raise ValueError("the status of an interim answer is 1xx")
        if sum(reply is not None for reply in (self.error, self.cut, self.answer, self.mangle)) > 1:
            raise ValueError("a call is either answered with an error, cut off, answered by another or mangled")
        if (self.takes_effect and self.answer is None) or (self.stray_pause and self.stray is None):
            raise ValueError("takes_effect goes with an answer, stray_pause with a stray one")
        if self == Effects():
            raise ValueError("name what is to befall the calls")


class Fault:
    """A fault that befalls a share of the calls of an action. Remove it, or use it as a context manager.

    Attributes:
        hits: how many calls it has befallen so far.
        struck: request id of each of these -> when it came, by the monotonic clock.
        effects: what befalls them.
        removed: whether it was removed.
    """

    def __init__(
        self,
        on_remove: Callable[["Fault"], None],
        action: str,
        project: Optional[str],
        logstore: Optional[str],
        share: float,
        effects: Effects,
    ) -> None:
        self.hits = 0
        self.struck: Dict[str, float] = {}
        self.effects = effects
        self.removed = False
        self._on_remove = on_remove
        self._action = action
        self._project = project
        self._logstore = logstore
        self._share = Fraction(share).limit_denominator(1000000)
        self._matches = 0
        self._lock = threading.Lock()

    def strikes(self, action: str, project: str, logstore: Optional[str]) -> bool:
        """Tell whether the fault befalls this call, and count it."""
        if self._action not in ("*", action):
            return False
        if self._project not in (None, project) or self._logstore not in (None, logstore):
            return False
        with self._lock:
            # Of the first n matching calls, ceil(n * share) are hit: evenly spread, the first one among them.
            before = math.ceil(self._matches * self._share)
            self._matches += 1
            if math.ceil(self._matches * self._share) == before:
                return False
            self.hits += 1
            return True

    def remove(self) -> None:
        """End the fault; calls held by it go on. Removing it twice does nothing more."""
        self.removed = True
        self._on_remove(self)

    def __enter__(self) -> "Fault":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


class Faults:
    """The faults in force, in the order in which they were added."""

    def __init__(self) -> None:
        self._faults: List[Fault] = []
        self._lock = threading.Lock()

    def add(
        self, action: str, project: Optional[str], logstore: Optional[str], share: float, effects: Effects
    ) -> Fault:
        """Put a fault into force; see ``LocalLogService.add_fault``.

        Raises:
            ValueError: the arguments make no fault.
        """
        if not 0 <= share <= 1:
            raise ValueError("share has to be within 0 and 1")
        effects.check()
        fault = Fault(self._remove, action, project, logstore, share, effects)
        with self._lock:
            self._faults = self._faults + [fault]
        return fault

    def striking(self, action: str, project: str, logstore: Optional[str]) -> List[Fault]:
        """Return the faults that befall this call."""
        return [fault for fault in self._faults if fault.strikes(action, project, logstore)]

    def clear(self) -> None:
        """Remove every fault."""
        for fault in self._faults:
            fault.remove()

    def _remove(self, fault: Fault) -> None:
        with self._lock:
            self._faults = [other for other in self._faults if other is not fault]
