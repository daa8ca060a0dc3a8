"""What became of the logs: all that was fed to the source, against all that arrived in the targets.

The assertions that several test files share are here, and what they look at.
"""

import contextlib
from collections import Counter
from typing import Dict, Iterable, Iterator, List, Sequence

from harness import PROJECT, SOURCE, TARGET_LOGSTORES, TARGETS, group_shards
from local_log_service import LocalLogService, cursors
from local_log_service.consumer_groups import ConsumerGroup
from local_log_service.verdict import Verdict, compare, log_identities


def arrived_in_targets(service: LocalLogService) -> List[bytes]:
    """The LogGroups, joined ones as one, that the targets have taken."""
    return [entry.log_group for logstore in TARGET_LOGSTORES for entry in service.ledger(PROJECT, logstore)]


def verdict(
    service: LocalLogService, targets: Dict[str, str] = TARGETS, delivered_before: Sequence[bytes] = ()
) -> Verdict:
    """All that was ever put into the source under a routed topic, against all that arrived in the targets.

    `delivered_before` are LogGroups that had arrived in a target which was deleted since, its ledger with it.
    """
    sent = [entry.log_group for entry in service.ledger(PROJECT, SOURCE) if entry.parse().Topic in targets]
    delivered = [entry.log_group for logstore in set(targets.values()) for entry in service.ledger(PROJECT, logstore)]
    return compare(sent, [*delivered_before, *delivered])


def puts_arrived(service: LocalLogService) -> int:
    """Number of LogGroups, joined ones as one, that the targets have taken."""
    return len(arrived_in_targets(service))


def logs_in(service: LocalLogService, logstore: str) -> int:
    return sum(len(entry.parse().Logs) for entry in service.ledger(PROJECT, logstore))


def logs_arrived(service: LocalLogService) -> int:
    """In all the targets together."""
    return sum(logs_in(service, logstore) for logstore in TARGET_LOGSTORES)


def logs_beyond_checkpoints(service: LocalLogService) -> Counter:
    """The logs, by identity, that the checkpoint of their shard is yet to pass."""
    checkpoints = {shard: state["next"] for shard, state in group_shards(service).items()}
    beyond = []
    index_in_shard: Counter = Counter()
    for entry in service.ledger(PROJECT, SOURCE):
        if index_in_shard[entry.shard] >= (checkpoints.get(entry.shard) or 0):
            beyond.append(entry.log_group)
        index_in_shard[entry.shard] += 1
    return Counter(log_identities(beyond))


def logs_in_flight(service: LocalLogService) -> int:
    """Number of logs that are in a target already while the checkpoint of their shard is yet to pass them.

    That is what has to be delivered again if every copy were gone now: of each shard the batch in flight.
    """
    return sum((logs_beyond_checkpoints(service) & Counter(log_identities(arrived_in_targets(service)))).values())


@contextlib.contextmanager
def checkpoints_watched() -> Iterator[List[str]]:
    """Yields a list that gets a line for every checkpoint accepted meanwhile that goes back behind the one before."""
    set_back: List[str] = []
    update = ConsumerGroup.update_checkpoint

    def watched(group, consumer, shard, checkpoint, *others, **named):
        before = group.checkpoint(shard)
        update(group, consumer, shard, checkpoint, *others, **named)
        if before and cursors.decode(checkpoint) < cursors.decode(before):
            set_back.append("%s set shard %d back from %s to %s" % (consumer, shard, before, checkpoint))

    ConsumerGroup.update_checkpoint = watched
    try:
        yield set_back
    finally:
        ConsumerGroup.update_checkpoint = update


def assert_nothing_lost(service: LocalLogService, most_repeated: int) -> None:
    """Asserts that every routed log arrived, nothing else did, and at most so many logs did again."""
    outcome = verdict(service)
    assert (outcome.lost, outcome.foreign) == (0, 0), str(outcome)
    assert outcome.duplicated <= most_repeated, str(outcome)


def assert_delivered_once(sent: Iterable[bytes], delivered: Iterable[bytes]) -> None:
    """Asserts that these LogGroups, joined or not, brought the same logs, each as often."""
    outcome = compare(sent, delivered)
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 0, 0), str(outcome)


def assert_all_delivered_once(service: LocalLogService, targets: Dict[str, str] = TARGETS) -> None:
    """Asserts that every routed log arrived, nothing else did, and none did again."""
    outcome = verdict(service, targets)
    assert outcome.sent > 0
    assert (outcome.lost, outcome.duplicated, outcome.foreign) == (0, 0, 0), str(outcome)
