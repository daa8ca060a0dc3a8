"""Which consumer of a consumer group holds which shard: the service's assignment state machine.

There is no HTTP, no clock and no lock in here: every method that depends on time takes ``now``.

Each shard of the logstore is in one state per group:

* ``not_alloc``: free.
* ``already_alloc``: one consumer holds it.
* ``transfer``: it is to move to a consumer that is named already. Its holder is no longer told of it, and it is freed
  once the holder's own heartbeat no longer lists it, so that the holder can save its checkpoint first; then it waits
  for the heartbeat of the one it is to move to. When that one is removed first, the shard stays with its holder.
* ``wait``: groups that consume in order only; an ancestor of the shard is not ``over``.
* ``over``: a readonly shard whose checkpoint has reached its end.
"""

from typing import Container, Dict, Iterable, List, Mapping, NamedTuple, Set, Tuple

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
        next_consumer: name of the consumer that it is to move to, "" when it is to stay, or to go to anybody.
        checkpoint: cursor, "" until one was saved.
        checkpoint_consumer: name of the consumer that saved it.
        update_time: when it was saved, unix time in microseconds, 0 until then.
    """

    __slots__ = ("checkpoint", "checkpoint_consumer", "consumer", "next_consumer", "state", "update_time")

    def __init__(self) -> None:
        self.state = NOT_ALLOC
        self.consumer = ""
        self.next_consumer = ""
        self.checkpoint = ""
        self.checkpoint_consumer = ""
        self.update_time = 0

    @property
    def belongs_to(self) -> str:
        """Name of the consumer that has it or is to get it, "" when there is none."""
        return self.next_consumer or self.consumer

    def give(self, consumer: str) -> None:
        """Give the shard to a consumer."""
        self.state = ALREADY_ALLOC
        self.consumer = consumer
        self.next_consumer = ""

    def free(self) -> None:
        """Take the shard away from its holder; who is to get it remains so."""
        self.state = NOT_ALLOC
        self.consumer = ""

    def forget(self, silent: Container[str]) -> None:
        """Take note that consumers were removed."""
        if self.consumer in silent:
            self.free()
        if self.next_consumer in silent:
            self.next_consumer = ""
            if self.state == TRANSFER:
                self.state = ALREADY_ALLOC

    def set_checkpoint(self, checkpoint: str, consumer: str, now: float) -> None:
        """Take a checkpoint from a consumer, or from whoever says that he is one."""
        self.checkpoint = checkpoint
        self.checkpoint_consumer = consumer
        self.update_time = int(now * 1000000)

    def set_aside(self, state: str) -> None:
        """Let nobody have the shard."""
        self.free()
        self.next_consumer = ""
        self.state = state


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
            assignment.forget(silent)
        for shard in shards:
            if shard not in self.assignments:
                self.assignments[shard] = Assignment()
        for shard in [shard for shard in self.assignments if shard not in shards]:
            del self.assignments[shard]
        for shard, view in shards.items():
            assignment = self.assignments[shard]
            if view.finished:
                assignment.set_aside(OVER)
            elif assignment.state not in _HELD:
                if self.in_order and not _ancestors_finished(shard, shards):
                    assignment.set_aside(WAIT)
                else:
                    assignment.state = NOT_ALLOC

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
        assignment.set_checkpoint(checkpoint, consumer, now)

    def _held_by(self, consumer: str) -> List[int]:
        return sorted(
            shard
            for shard, assignment in self.assignments.items()
            if assignment.state == ALREADY_ALLOC and assignment.consumer == consumer
        )

    def _balance(self, sender: str) -> None:
        """Give the sender what it is to get and what is free, and have the surplus of others move to who lacks it."""
        shares = self._fair_shares(sender)
        counts = self._counts()
        for _, assignment in sorted(self.assignments.items()):
            if assignment.state == NOT_ALLOC and assignment.next_consumer == sender:
                assignment.give(sender)
            elif assignment.state == NOT_ALLOC and not assignment.next_consumer and counts[sender] < shares[sender]:
                assignment.give(sender)
                counts[sender] += 1
        lacking = [consumer for consumer in shares for _ in range(shares[consumer] - counts[consumer])]
        for consumer, share in shares.items():
            # What is on its way to a consumer can't be sent elsewhere: what it holds is.
            held = self._held_by(consumer)
            surplus = min(counts[consumer] - share, len(held), len(lacking))
            for shard in held[len(held) - surplus :] if surplus > 0 else []:
                self.assignments[shard].state = TRANSFER
                self.assignments[shard].next_consumer = lacking.pop(0)

    def _counts(self) -> Dict[str, int]:
        """Return how many shards each consumer has or is to get."""
        counts: Dict[str, int] = dict.fromkeys(self.consumers, 0)
        for assignment in self.assignments.values():
            if assignment.belongs_to:
                counts[assignment.belongs_to] += 1
        return counts

    def _fair_shares(self, sender: str) -> Dict[str, int]:
        """Return how many shards each consumer is to have; no two differ by more than one.

        Who has most keeps the shards that do not divide evenly, so that nothing moves without need.
        """
        counts = self._counts()
        shard_count = sum(assignment.state not in _UNASSIGNABLE for assignment in self.assignments.values())
        ranked = sorted(counts, key=lambda consumer: (-counts[consumer], consumer != sender, consumer))
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
