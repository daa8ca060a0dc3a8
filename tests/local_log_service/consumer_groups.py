"""Which consumer of a consumer group holds which shard: the service's assignment state machine.

There is no HTTP, no clock and no lock in here: every method that depends on time takes ``now``.

Each shard of the logstore is in one state per group:

* ``not_alloc``: free.
* ``already_alloc``: one consumer holds it.
* ``transfer``: it is to move. Its holder is no longer told of it, and it is freed once the holder's own
  heartbeat no longer lists it, so that the holder can save its checkpoint first.
* ``wait``: groups that consume in order only; an ancestor of the shard is not ``over``.
* ``over``: a readonly shard whose checkpoint has reached its end.
"""

from typing import Dict, Iterable, List, Mapping, NamedTuple, Set, Tuple

NOT_ALLOC = "not_alloc"
ALREADY_ALLOC = "already_alloc"
TRANSFER = "transfer"
WAIT = "wait"
OVER = "over"

_HELD = (ALREADY_ALLOC, TRANSFER)
_UNASSIGNABLE = (WAIT, OVER)


class ConsumerUnknown(Exception):
    """The consumer has sent no heartbeat yet, or none for longer than the group's timeout."""


class ConsumerNotHolder(Exception):
    """The consumer does not hold the shard."""


class ShardView(NamedTuple):
    """What the state machine needs to know of a shard.

    Attributes:
        parents: ids of the shards it came from by a split or a merge.
        finished: whether it is readonly and the group's checkpoint is at its end.
    """

    parents: Tuple[int, ...] = ()
    finished: bool = False


class Assignment:
    """State of one shard in a group.

    Attributes:
        state: one of the five states.
        consumer: name of the holder, "" in a state without one.
        checkpoint: cursor, "" until one was saved.
        checkpoint_consumer: name of the consumer that saved it.
        update_time: when it was saved, unix time in microseconds, 0 until then.
    """

    __slots__ = ("checkpoint", "checkpoint_consumer", "consumer", "state", "update_time")

    def __init__(self) -> None:
        self.state = NOT_ALLOC
        self.consumer = ""
        self.checkpoint = ""
        self.checkpoint_consumer = ""
        self.update_time = 0

    def free(self) -> None:
        """Take the shard away from its holder."""
        self.state = NOT_ALLOC
        self.consumer = ""


class ConsumerGroup:
    """One consumer group of a logstore.

    Attributes:
        name: the group's name.
        timeout: seconds after which a silent consumer is removed.
        in_order: whether shards wait for their ancestors.
        consumers: name -> ``now`` of the last heartbeat, unix s.
        assignments: shard id -> Assignment.
    """

    def __init__(self, name: str, timeout: float, in_order: bool = False) -> None:
        self.name = name
        self.timeout = timeout
        self.in_order = in_order
        self.consumers: Dict[str, float] = {}
        self.assignments: Dict[int, Assignment] = {}

    def checkpoint(self, shard: int) -> str:
        """Return the checkpoint of a shard, "" when there is none."""
        assignment = self.assignments.get(shard)
        return assignment.checkpoint if assignment else ""

    def refresh(self, shards: Mapping[int, ShardView], now: float) -> None:
        """Bring the group up to date: remove silent consumers, take in new and finished shards."""
        silent = [name for name, last in self.consumers.items() if now - last > self.timeout]
        for name in silent:
            del self.consumers[name]
        for assignment in self.assignments.values():
            if assignment.consumer in silent:
                assignment.free()
        for shard in shards:
            if shard not in self.assignments:
                self.assignments[shard] = Assignment()
        for shard in [shard for shard in self.assignments if shard not in shards]:
            del self.assignments[shard]
        for shard, view in shards.items():
            assignment = self.assignments[shard]
            if view.finished:
                assignment.free()
                assignment.state = OVER
            elif assignment.state not in _HELD:
                blocked = self.in_order and not _ancestors_finished(shard, shards)
                assignment.state = WAIT if blocked else NOT_ALLOC

    def heartbeat(self, consumer: str, listed: Iterable[int], shards: Mapping[int, ShardView], now: float) -> List[int]:
        """Take a consumer's heartbeat and return the ids of the shards it may hold, ascending.

        Args:
            consumer: name; the first heartbeat of a name makes it a consumer of the group.
            listed: ids of the shards the consumer says it still holds.
            shards: all shards of the logstore.
            now: unix time in seconds.

        Raises:
            ConsumerUnknown: it lists shards, but the group does not know it (any more): it has to let go of them and
                to join anew with an empty list.
        """
        self.refresh(shards, now)
        still_listed = set(listed)
        if still_listed and consumer not in self.consumers:
            raise ConsumerUnknown(consumer)
        self.consumers[consumer] = now
        for shard, assignment in self.assignments.items():
            if assignment.state == TRANSFER and assignment.consumer == consumer and shard not in still_listed:
                assignment.free()
        self._balance(consumer)
        return self._held_by(consumer)

    def update_checkpoint(self, consumer: str, shard: int, checkpoint: str, now: float, force: bool = False) -> None:
        """Save the checkpoint of a shard.

        Without ``force`` only the holder may (also while the shard is in ``transfer``: that is what the state
        is for). With it anybody may, a consumer that has long lost the shard included.

        Raises:
            ConsumerUnknown: not forced, and the group does not know the consumer.
            ConsumerNotHolder: not forced, and the consumer does not hold the shard.
        """
        assignment = self.assignments[shard]
        if not force:
            if consumer not in self.consumers:
                raise ConsumerUnknown(consumer)
            if assignment.state not in _HELD or assignment.consumer != consumer:
                raise ConsumerNotHolder(consumer)
        assignment.checkpoint = checkpoint
        assignment.checkpoint_consumer = consumer
        assignment.update_time = int(now * 1000000)

    def _held_by(self, consumer: str) -> List[int]:
        return sorted(
            shard
            for shard, assignment in self.assignments.items()
            if assignment.state == ALREADY_ALLOC and assignment.consumer == consumer
        )

    def _balance(self, sender: str) -> None:
        """Mark the surplus of every consumer for transfer, then give free shards to the sender."""
        shares = self._fair_shares(sender)
        for consumer, share in shares.items():
            for shard in self._held_by(consumer)[share:]:
                self.assignments[shard].state = TRANSFER
        missing = shares[sender] - len(self._held_by(sender))
        free = sorted(shard for shard, assignment in self.assignments.items() if assignment.state == NOT_ALLOC)
        for shard in free[:missing]:
            assignment = self.assignments[shard]
            assignment.state = ALREADY_ALLOC
            assignment.consumer = sender

    def _fair_shares(self, sender: str) -> Dict[str, int]:
        """Return how many shards each consumer is to have; no two differ by more than one.

        Who has most keeps the shards that do not divide evenly, so that nothing moves without need.
        """
        held: Dict[str, int] = dict.fromkeys(self.consumers, 0)
        shard_count = 0
        for assignment in self.assignments.values():
            if assignment.state in _UNASSIGNABLE:
                continue
            shard_count += 1
            if assignment.state == ALREADY_ALLOC:
                held[assignment.consumer] += 1
        ranked = sorted(held, key=lambda consumer: (-held[consumer], consumer != sender, consumer))
        share, remainder = divmod(shard_count, len(ranked))
        return {consumer: share + (rank < remainder) for rank, consumer in enumerate(ranked)}


def _ancestors_finished(shard: int, shards: Mapping[int, ShardView]) -> bool:
    """Tell whether every ancestor that still exists is finished."""
    seen: Set[int] = set()
    to_visit = list(shards[shard].parents)
    while to_visit:
        ancestor = to_visit.pop()
        if ancestor in seen or ancestor not in shards:
            continue
        if not shards[ancestor].finished:
            return False
        seen.add(ancestor)
        to_visit.extend(shards[ancestor].parents)
    return True
