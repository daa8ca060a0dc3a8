"""What happened in a soak, and the verdict on it: a ledger of the logs beside a ledger of the events.

A LogGroup that arrived n times needs n - 1 causes, of these kinds, each with its event:

    unheard put             a target took it, and an event kept the answer from the copy, which put it again
    kill, freeze,           the shard went from a copy to another (a *handover*) in the middle of a batch; what that
    heartbeats              batch had delivered was *in the air*: its checkpoint was not saved
    held up batch           the same at a stop or a move, while a target took no puts,
    cancelled batch         took some of them,
    cancelled slow batch    or took them all, slowly
    unsaved checkpoint      the same, where all of the batch was delivered and its checkpoint could not be saved
    late checkpoint         a checkpoint that was given up, applied late, had set the shard's back by then
    stall                   the machine had no time for the copy, or for the service, as when others use it

Each cause counts once for a LogGroup, and a handover only for what was in the air of that shard at that time: what lies
at or beyond its checkpoint, within the batch in flight. Whatever has no cause left is a problem, and so is a checkpoint
that goes back by other than a late call, and a consumer that the service forgets although nothing befell it.
"""

from collections import Counter, defaultdict
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

# Most LogGroups that may be repeated since a batch was broken off at a stop or a move, while a target took some puts,
# and while all took theirs, if slowly; as a share of all that arrived.
MOST_CANCELLED = {"cancelled batch": 0.01, "cancelled slow batch": 0.0}

GRACE = 7.0  # seconds, the program's, for a batch in flight of a shard that moves
SAVED_ALL_THE_SAME = [("UpdateCheckPoint", "lost"), ("UpdateCheckPoint", "gateway")]  # without an answer
SLACK = 3.0  # seconds that anything may take longer on a busy machine


class LogGroup(NamedTuple):
    """One that was fed to the source."""

    shard: int
    index: int  # within the shard
    target: str  # logstore; "" where no route matches


class Put(NamedTuple):
    """One that a target has taken."""

    at: float  # seconds, as everywhere here
    copy: str
    target: str
    log_groups: Tuple[int, ...]  # numbers of LogGroups, as fed
    unheard: str = ""  # name of the event that kept the answer from the copy


class Pull(NamedTuple):
    """One that was answered, with LogGroups `first` to `next` - 1 of the shard."""

    at: float
    copy: str
    shard: int
    first: int
    next: int


class Checkpoint(NamedTuple):
    """One that was saved; `before` and `after` are indexes within the shard."""

    at: float
    copy: str
    shard: int
    before: int
    after: int
    late: str = ""  # name of the event by which it was saved when the copy no longer waited for it


class Handover(NamedTuple):
    """A copy no longer holds a shard."""

    at: float
    copy: str
    shard: int
    checkpoint: int  # of the shard, then
    is_forgotten: bool  # for its consumer was silent; else it has let go of it


class Event(NamedTuple):
    """Something that befell the copies."""

    name: str  # unlike any other's
    kind: str  # "kill", "stop", "freeze", "calls" or "stall"
    begin: float
    end: float
    copy: str = ""  # of which; "" for all
    action: str = ""  # the calls befallen, "*" for all
    logstore: str = ""  # only those to this one
    effect: str = ""  # on them
    share: float = 1.0  # of them

    def overlaps(self, begin: float, end: float) -> bool:
        return self.begin <= end and begin <= self.end

    def lasts(self, seconds: float) -> bool:
        return self.end - self.begin >= seconds


class Ledger(NamedTuple):
    """All that is known of a run; each list in the order of time."""

    timeout: float  # seconds, the group's
    log_groups: List[LogGroup]
    puts: List[Put]
    pulls: List[Pull]
    checkpoints: List[Checkpoint]
    handovers: List[Handover]
    events: List[Event]
    altered: List[str]  # a line for each put that is no LogGroups of the source, byte for byte


class Cause(NamedTuple):
    """Why LogGroups arrived once more."""

    kind: str
    event: str


class Account(NamedTuple):
    """The verdict. Numbers count LogGroups."""

    problems: List[str]
    lost: int
    astray: int
    set_back: int  # checkpoints
    repeated: "Counter[Cause]"
    in_the_air: "Counter[Cause]"  # at the handovers of these causes
    unattributed: int


def judge(ledger: Ledger, is_gentle: bool = False) -> Account:
    """The verdict on a run; on one without crashes and lost answers, if `is_gentle`."""
    return Judge(ledger).judge(is_gentle)


class Judge:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.problems: List[str] = list(ledger.altered)
        self.arrivals: Dict[int, List[Put]] = defaultdict(list)
        for put in sorted(ledger.puts):
            for number in put.log_groups:
                self.arrivals[number].append(put)
        self.by_shard: Dict[int, List[int]] = defaultdict(list)
        for number, log_group in enumerate(ledger.log_groups):
            self.by_shard[log_group.shard].append(number)
        self.handovers: Dict[int, List[Handover]] = defaultdict(list)
        for handover in sorted(ledger.handovers):
            self.handovers[handover.shard].append(handover)
        self.ends = {handover: self.end_of_batch(handover) for handover in ledger.handovers}
        self.causes: Dict[Handover, Optional[Cause]] = {}
        self.set_back = 0
        self.repeated: Counter = Counter()
        self.in_the_air: Counter = Counter()
        self.unattributed: List[str] = []

    def judge(self, is_gentle: bool) -> Account:
        lost = [n for n, one in enumerate(self.ledger.log_groups) if one.target and n not in self.arrivals]
        self.report(lost, "lost", lambda number: "%s" % (self.ledger.log_groups[number],))
        astray = [
            (number, put)
            for number, puts in self.arrivals.items()
            for put in puts
            if put.target != self.ledger.log_groups[number].target
        ]
        self.report(astray, "astray", lambda one: "%s: %s" % (self.ledger.log_groups[one[0]], one[1]))
        self.look_at_checkpoints()
        self.look_at_leases()
        for number, puts in sorted(self.arrivals.items()):
            self.attribute(number, puts)
        self.report(self.unattributed, "arrived again for no cause", str)
        for handover, cause in self.causes.items():
            if cause:
                self.in_the_air[cause] += len(self.air_of(handover))
        self.look_at_limits(is_gentle)
        return Account(
            self.problems, len(lost), len(astray), self.set_back, self.repeated, self.in_the_air, len(self.unattributed)
        )

    def report(self, found: Sequence, what: str, describe) -> None:
        if found:
            self.problems.append("%d LogGroups %s: %s" % (len(found), what, "; ".join(map(describe, found[:5]))))

    # What is wrong whether LogGroups were repeated or not

    def look_at_checkpoints(self) -> None:
        latest: Dict[int, Checkpoint] = {}
        furthest: Dict[int, int] = defaultdict(int)
        for one in self.ledger.checkpoints:
            latest[one.shard] = one
            furthest[one.shard] = max(furthest[one.shard], one.after)
            if one.after < one.before:
                self.set_back += not one.late
                if not one.late:
                    self.problems.append("a checkpoint was set back: %s" % (one,))
        for shard, one in latest.items():
            if one.after < furthest[shard]:
                self.problems.append("a checkpoint stays set back, from %d: %s" % (furthest[shard], one))

    def look_at_leases(self) -> None:
        for one in self.ledger.handovers:
            if one.is_forgotten and not self.stop_before(one) and not self.cause_of_silence(one):
                self.problems.append("%s was forgotten, though nothing befell it: %s" % (one.copy, one))

    def look_at_limits(self, is_gentle: bool) -> None:
        arrived = sum(map(len, self.arrivals.values()))
        kinds: Counter = Counter()
        for cause, count in self.repeated.items():
            kinds[cause.kind] += count
        for kind, count in sorted(kinds.items()):
            share = MOST_CANCELLED.get(kind, 0.0 if is_gentle and kind != "stall" else float("inf"))
            if count > share * arrived:
                self.problems.append("%d of %d LogGroups arrived again by a %s" % (count, arrived, kind))

    # Causes

    def attribute(self, number: int, puts: Sequence[Put]) -> None:
        """Finds a cause for each time but the first that this LogGroup arrived."""
        log_group = self.ledger.log_groups[number]
        unheard = [put for put in puts if put.unheard]
        handovers = [
            one for one in self.handovers[log_group.shard] if one.checkpoint <= log_group.index < self.ends[one]
        ]
        for count, put in enumerate(puts[1:], 2):
            so_far = puts[:count]
            cause = None
            for one in unheard:
                if one in so_far:
                    unheard.remove(one)
                    cause = Cause("unheard put", one.unheard)
                    break
            for handover in [] if cause else handovers:
                if handover.at <= put.at and any(each.copy == handover.copy for each in so_far):
                    cause = self.cause_of(handover)
                    if cause:
                        handovers.remove(handover)
                        break
            if cause:
                self.repeated[cause] += 1
            else:
                when = ", ".join("%.3f s by %s" % (each.at, each.copy) for each in so_far)
                near = [one for one in self.handovers[log_group.shard] if puts[0].at - SLACK <= one.at <= put.at]
                self.unattributed.append("%d, %s: %s; %s" % (number, log_group, when, near))

    def cause_of(self, handover: Handover) -> Optional[Cause]:
        """Why the copy that held the shard then left a batch in the air."""
        if handover not in self.causes:
            ways = [self.cause_of_silence, self.cause_of_late_checkpoint, self.cause_of_unfinished_batch]
            if self.stop_before(handover):  # it is forgotten for that, whatever befalls heartbeats afterwards
                ways.reverse()
            self.causes[handover] = next(filter(None, (way(handover) for way in ways)), None)
        return self.causes[handover]

    def events(self, kind: str, begin: float, end: float, copy: str = "") -> Iterator[Event]:
        """Those of a kind that befell this copy, among others, at some time between the two."""
        for event in self.ledger.events:
            if event.kind == kind and event.overlaps(begin, end) and event.copy in ("", copy):
                yield event

    def calls(self, actions: Sequence[str], begin: float, end: float) -> List[Event]:
        return [event for event in self.events("calls", begin, end) if event.action in (*actions, "*")]

    def stop_before(self, handover: Handover) -> Optional[Event]:
        """The stop by which the copy was forgotten, where it was."""
        stops = self.events("stop", 0.0, handover.at, handover.copy)
        return next(stops, None) if handover.is_forgotten else None

    def cause_of_silence(self, handover: Handover) -> Optional[Cause]:
        at, timeout, copy = handover.at, self.ledger.timeout, handover.copy
        for event in self.events("kill", 0.0, at, copy):
            return Cause("kill", event.name)
        for event in self.events("freeze", at - timeout - SLACK, at, copy):
            if handover.is_forgotten and event.lasts(timeout / 2 - 1):
                return Cause("freeze", event.name)
        for event in self.events("stall", at - timeout - SLACK, at, copy):
            if handover.is_forgotten:
                return Cause("stall", event.name)
        for event in self.calls(["HeartBeat"], at - timeout - SLACK, at):
            if handover.is_forgotten or event.effect == "late":  # a late heartbeat may let go of a shard
                return Cause("heartbeats", event.name)
        return None

    def cause_of_late_checkpoint(self, handover: Handover) -> Optional[Cause]:
        late = self.set_back_at(handover)
        return Cause("late checkpoint", late.late) if late else None

    def set_back_at(self, handover: Handover) -> Optional[Checkpoint]:
        """What had set the shard's checkpoint back, if it still was so at the handover."""
        found = None
        for one in self.ledger.checkpoints:
            if one.shard == handover.shard and one.at <= handover.at and one.late and one.after < one.before:
                found = one if not found or handover.checkpoint < one.before else found
        return found if found and handover.checkpoint < found.before else None

    def cause_of_unfinished_batch(self, handover: Handover) -> Optional[Cause]:
        """A stop or a move that could not wait: for puts that the copy had no answer to, or for the checkpoint."""
        stop = self.stop_before(handover)
        began, ended = (stop.begin, stop.end) if stop else (handover.at - GRACE, handover.at)
        began -= GRACE + SLACK  # what is retried may wait for so long
        numbers = self.batch_of(handover)
        unanswered = [number for number in numbers if not self.is_answered(handover.copy, number, ended)]
        targets = {self.ledger.log_groups[number].target for number in unanswered or numbers}
        putting = [e for e in self.calls(["PutLogs"], began, ended) if not e.logstore or e.logstore in targets]
        saving = self.calls(["UpdateCheckPoint", "GetCheckPoint"], began, ended)
        saving = [e for e in saving if e.effect != "slow" and (e.action, e.effect) not in SAVED_ALL_THE_SAME]
        is_partly = any(event.effect == "rate" or event.share < 1 for event in putting) and unanswered
        for event in self.events("stall", began, ended, handover.copy):
            if not is_partly:
                return Cause("stall", event.name)
        if saving and not unanswered:
            return Cause("unsaved checkpoint", saving[-1].name)
        whole = [e for e in putting if e.share == 1.0 and e.effect not in ("rate", "slow") and e.lasts(GRACE - 1)]
        if whole:
            return Cause("held up batch", whole[-1].name)
        if all(event.effect == "slow" for event in putting):
            return Cause("cancelled slow batch", putting[-1].name) if putting else None
        longest = max((event.end - event.begin, event.name) for event in putting if event.effect != "slow")
        return Cause("cancelled batch", longest[1])

    # What was in the air

    def end_of_batch(self, handover: Handover) -> int:
        """The index behind the batch that was in flight; with a checkpoint set back, behind all that it had passed."""
        end = late_end = handover.checkpoint
        late = self.set_back_at(handover)
        if late:
            late_end = max(one.after for one in self.ledger.checkpoints if one.shard == handover.shard)
        for pull in self.ledger.pulls:
            if pull.at <= handover.at and (pull.copy, pull.shard) == (handover.copy, handover.shard):
                # A copy that ends a batch early pulls the beginning of it once more, to find the cursor there.
                if pull.first <= handover.checkpoint < pull.next:
                    end = max(end, pull.next)
                elif late and pull.first <= late_end < pull.next:
                    late_end = pull.next
        return max(end, late_end)

    def batch_of(self, handover: Handover) -> List[int]:
        """Numbers of the LogGroups of the batch in flight, those without a route aside."""
        numbers = self.by_shard[handover.shard][handover.checkpoint : self.ends[handover]]
        return [number for number in numbers if self.ledger.log_groups[number].target]

    def air_of(self, handover: Handover) -> List[int]:
        return [number for number in self.batch_of(handover) if self.is_delivered_by(handover, number)]

    def is_delivered_by(self, handover: Handover, number: int) -> bool:
        return any(put.copy == handover.copy for put in self.arrivals.get(number, ()))

    def is_answered(self, copy: str, number: int, end: float) -> bool:
        """Whether this copy had heard, by then, that the LogGroup was taken."""
        puts = self.arrivals.get(number, ())
        return any(put.copy == copy and put.at <= end and not put.unheard for put in puts)
