"""Faults to order: errors, delays, broken connections and calls that hang."""

import math
import threading
from fractions import Fraction
from typing import Callable, List, Optional

from .errors import ServiceError


class Fault:
    """A fault that befalls a share of the calls of an action. Remove it, or use it as a context manager.

    Attributes:
        hits: how many calls it has befallen so far.
        delay: seconds to wait before a call is handled.
        error: what to answer instead of handling it, if anything.
        cut: "before" or "after" the call takes effect, the connection is broken off without an answer.
        hold: calls are neither answered nor taken until the fault is removed.
        trickle: seconds between the bytes of the answer.
        removed: whether it was removed.
    """

    def __init__(
        self,
        on_remove: Callable[["Fault"], None],
        action: str,
        project: Optional[str],
        logstore: Optional[str],
        error: Optional[ServiceError],
        share: float,
        delay: float,
        cut: Optional[str],
        hold: bool,
        trickle: float,
    ) -> None:
        self.hits = 0
        self.delay = delay
        self.error = error
        self.cut = cut
        self.hold = hold
        self.trickle = trickle
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
        self,
        action: str,
        project: Optional[str] = None,
        logstore: Optional[str] = None,
        status: Optional[int] = None,
        code: Optional[str] = None,
        share: float = 1.0,
        delay: float = 0.0,
        cut: Optional[str] = None,
        hold: bool = False,
        trickle: float = 0.0,
    ) -> Fault:
        """Put a fault into force; see ``LocalLogService.add_fault``.

        Raises:
            ValueError: the arguments make no fault.
        """
        if not 0 <= share <= 1:
            raise ValueError("share has to be within 0 and 1")
        if delay < 0 or trickle < 0:
            raise ValueError("delay and trickle are seconds")
        if cut not in (None, "before", "after"):
            raise ValueError('cut has to be None, "before" or "after"')
        error = None
        if code is not None:
            error = ServiceError(code, status=status)
        elif status is not None:
            error = ServiceError.of_status(status)
        if error is None and cut is None and not delay and not hold and not trickle:
            raise ValueError("name a status, a code, a delay, cut, hold or trickle")
        if error is not None and cut is not None:
            raise ValueError("a call is either answered with an error or cut off")
        fault = Fault(self._remove, action, project, logstore, error, share, delay, cut, hold, trickle)
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
