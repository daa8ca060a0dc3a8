"""The soak that answers for each LogGroup that arrives again: its verdict, its schedule, and a short run of it."""

import os

import event_ledger
import event_soak
import pytest
from event_ledger import Checkpoint, Event, Handover, Ledger, LogGroup, Pull, Put, judge
from event_soak import EFFECTS, GENTLE_EFFECTS, UNHEARD, Feed, schedule, soak

TIMEOUT = 6.0
KILL = Event("#1 kill a", "kill", 15.0, 15.0, "a")
REFUSED = Event("#2 PutLogs click refused", "calls", 12.0, 18.0, "", "PutLogs", "click", "refused", 0.5)


def ledger(puts, handovers=(), events=(), checkpoints=(), pulls=None):
    """Of a shard with ten LogGroups for nginx and a last one for click, which copy "a" pulled at once, then "b"."""
    log_groups = [LogGroup(0, index, "nginx") for index in range(10)] + [LogGroup(0, 10, "click")]
    if pulls is None:
        pulls = [Pull(10.0, "a", 0, 0, 11), Pull(30.0, "b", 0, 0, 11)]
    return Ledger(TIMEOUT, log_groups, list(puts), pulls, list(checkpoints), list(handovers), list(events), [])


def delivery(at, copy, numbers, unheard=""):
    puts = [Put(at, copy, "nginx", (number,), unheard) for number in numbers if number < 10]
    return puts + [Put(at, copy, "click", (number,), unheard) for number in numbers if number == 10]


ALL = range(11)
ONCE = delivery(11.0, "a", ALL)
LOST_BY_A = Handover(20.0, "a", 0, 0, True)
LET_GO_BY_A = Handover(20.0, "a", 0, 0, False)


def of_kinds(account):
    return {(cause.kind, cause.event): count for cause, count in account.repeated.items()}


@pytest.mark.quick
def test_what_arrives_once_where_it_belongs_is_fine():
    account = judge(ledger(ONCE), is_gentle=True)
    assert (account.problems, of_kinds(account)) == ([], {})


@pytest.mark.quick
def test_lost_is_told():
    account = judge(ledger(ONCE[1:]))
    assert account.lost == 1
    assert ["1 LogGroups lost" in problem for problem in account.problems] == [True]


@pytest.mark.quick
def test_astray_is_told():
    astray = ONCE[0]._replace(target="click")
    for puts in ([astray, *ONCE], [astray, *ONCE[1:]]):
        account = judge(ledger(puts))
        assert account.astray == 1
        assert any("1 LogGroups astray" in problem for problem in account.problems)


@pytest.mark.quick
def test_altered_is_told():
    assert judge(ledger(ONCE)._replace(altered=["a put"])).problems == ["a put"]


@pytest.mark.quick
def test_a_repeat_without_an_event_is_told():
    twice = [*ONCE, *delivery(31.0, "b", [3])]
    assert judge(ledger(twice)).unattributed == 1
    # Nor does a handover do without something that befell the copy, nor what befell another one, or it later.
    forgotten = judge(ledger(twice, [LOST_BY_A]))
    assert forgotten.unattributed == 1 and any("was forgotten" in problem for problem in forgotten.problems)
    assert judge(ledger(twice, [LET_GO_BY_A])).unattributed == 1
    assert judge(ledger(twice, [LOST_BY_A], [KILL._replace(copy="b")])).unattributed == 1
    assert judge(ledger(twice, [LOST_BY_A], [KILL._replace(begin=21.0, end=21.0)])).unattributed == 1
    assert judge(ledger([*ONCE, *delivery(12.0, "a", [3])], [LOST_BY_A], [KILL])).unattributed == 1


@pytest.mark.quick
def test_a_kill_allows_for_each_log_group_in_the_air_once():
    again = [*ONCE, *delivery(31.0, "b", ALL)]
    account = judge(ledger(again, [LOST_BY_A], [KILL]))
    assert (account.problems, of_kinds(account)) == ([], {("kill", KILL.name): 11})
    assert list(account.in_the_air.values()) == [11]
    third = judge(ledger([*again, *delivery(32.0, "b", [0])], [LOST_BY_A], [KILL]))
    assert third.unattributed == 1
    # What the checkpoint had passed was not in the air, nor what was no part of the batch in flight.
    assert judge(ledger(again, [LOST_BY_A._replace(checkpoint=4)], [KILL])).unattributed == 4
    pulls = [Pull(10.0, "a", 0, 0, 4), Pull(10.0, "a", 0, 4, 11), Pull(30.0, "b", 0, 0, 11)]
    assert judge(ledger(again, [LOST_BY_A], [KILL], pulls=pulls)).unattributed == 7
    # A batch that is ended early is no smaller for that its beginning is pulled once more, to find the cursor there.
    pulls = [Pull(10.0, "a", 0, 0, 11), Pull(14.0, "a", 0, 0, 4), Pull(30.0, "b", 0, 0, 11)]
    assert judge(ledger(again, [LOST_BY_A], [KILL], pulls=pulls)).unattributed == 0
    assert judge(ledger(again, [LOST_BY_A], [KILL]), is_gentle=True).problems


@pytest.mark.quick
def test_an_answer_that_was_not_heard_allows_for_one_repeat():
    late = delivery(12.0, "a", [3], unheard="#3 PutLogs late")
    account = judge(ledger([*ONCE, *late]))
    assert (account.problems, of_kinds(account)) == ([], {("unheard put", "#3 PutLogs late"): 1})
    assert judge(ledger([*ONCE, *late, *delivery(13.0, "a", [3])])).unattributed == 1
    assert judge(ledger([*ONCE, *late]), is_gentle=True).problems


@pytest.mark.quick
def test_what_keeps_a_copy_silent_allows_for_repeats_where_it_was_forgotten():
    again = [*ONCE, *delivery(31.0, "b", [0, 1])]
    freeze = Event("#4 freeze a", "freeze", 14.0, 23.0, "a")
    heartbeats = Event("#5 HeartBeat hang", "calls", 14.0, 18.0, "", "HeartBeat", "", "hang")
    stall = Event("stall at 14.0 s", "stall", 14.0, 18.0)
    for event in (freeze, heartbeats, stall):
        account = judge(ledger(again, [LOST_BY_A], [event]))
        assert (account.problems, account.repeated[account.repeated.most_common()[0][0]]) == ([], 2)
        assert judge(ledger(again, [LET_GO_BY_A], [event])).unattributed == (0 if event is stall else 2)
        assert bool(judge(ledger(again, [LOST_BY_A], [event]), is_gentle=True).problems) == (event is not stall)
    assert judge(ledger(again, [LOST_BY_A], [freeze._replace(end=15.0)])).unattributed == 2


@pytest.mark.quick
@pytest.mark.parametrize(
    "event, kind",
    [
        (REFUSED, "cancelled batch"),
        (REFUSED._replace(effect="rate", share=1.0), "cancelled batch"),
        (REFUSED._replace(effect="slow"), "cancelled slow batch"),
        (REFUSED._replace(share=1.0), "held up batch"),
    ],
)
def test_a_batch_that_a_target_held_up_may_be_broken_off(monkeypatch, event, kind):
    limits = event_ledger.MOST_CANCELLED
    monkeypatch.setattr(event_ledger, "MOST_CANCELLED", dict.fromkeys(limits, 1.0))
    partly, again = delivery(11.0, "a", range(10)), delivery(31.0, "b", ALL)
    account = judge(ledger([*partly, *again], [LET_GO_BY_A], [event]))
    assert (account.problems, of_kinds(account)) == ([], {(kind, event.name): 10})
    for other in (event._replace(logstore="sql-audit"), event._replace(action="PullLogs", logstore="")):
        assert judge(ledger([*partly, *again], [LET_GO_BY_A], [other])).unattributed == 10
    monkeypatch.setattr(event_ledger, "MOST_CANCELLED", limits)
    mended = judge(ledger([*partly, *again], [LET_GO_BY_A], [event]))
    assert bool(mended.problems) == (kind != "held up batch")


@pytest.mark.quick
def test_a_machine_without_time_excuses_no_batch_that_a_target_partly_took():
    stall = Event("stall at 14.0 s a", "stall", 14.0, 18.0, "a")
    puts = [*delivery(11.0, "a", range(10)), *delivery(31.0, "b", ALL)]
    for events, cause in (
        ([stall], ("stall", stall.name)),
        ([stall, REFUSED._replace(share=1.0)], ("stall", stall.name)),
        ([stall, REFUSED], ("cancelled batch", REFUSED.name)),
    ):
        account = judge(ledger(puts, [LET_GO_BY_A], events))
        assert of_kinds(account) == {cause: 10}
        assert bool(account.problems) == (cause[0] == "cancelled batch")  # of which so few may be repeated
    assert judge(ledger(puts, [LET_GO_BY_A], [stall._replace(copy="b")])).unattributed == 10


@pytest.mark.quick
def test_a_batch_that_was_delivered_needs_a_checkpoint_that_could_not_be_saved():
    again = delivery(31.0, "b", ALL)
    saving = Event("#6 UpdateCheckPoint failed", "calls", 12.0, 18.0, "", "UpdateCheckPoint", "", "failed")
    account = judge(ledger([*ONCE, *again], [LET_GO_BY_A], [saving]))
    assert (account.problems, of_kinds(account)) == ([], {("unsaved checkpoint", saving.name): 11})
    assert judge(ledger([*ONCE, *again], [LET_GO_BY_A], [saving._replace(begin=1.0, end=2.0)])).unattributed == 11


@pytest.mark.quick
def test_a_checkpoint_that_goes_back_is_told_unless_the_call_was_late():
    back = Checkpoint(12.0, "a", 0, 11, 4)
    there = Checkpoint(11.5, "a", 0, 0, 11)
    account = judge(ledger(ONCE, checkpoints=[there, back]))
    assert account.set_back == 1 and any("was set back" in problem for problem in account.problems)
    late = [there, back._replace(late="#7 UpdateCheckPoint late"), Checkpoint(13.0, "a", 0, 4, 11)]
    assert judge(ledger(ONCE, checkpoints=late)).problems == []
    again = [*ONCE, *delivery(31.0, "b", range(4, 11))]
    account = judge(ledger(again, [LET_GO_BY_A._replace(checkpoint=4)], checkpoints=late))
    assert (account.problems, of_kinds(account)) == ([], {("late checkpoint", "#7 UpdateCheckPoint late"): 7})
    assert judge(ledger(again, [LET_GO_BY_A._replace(checkpoint=4)])).unattributed == 7
    assert any("stays set back" in problem for problem in judge(ledger(ONCE, checkpoints=late[:-1])).problems)


@pytest.mark.quick
def test_log_groups_are_recognised_by_their_bytes_joined_or_not():
    feed = Feed(1)
    made = [feed.make() for _ in range(300)]
    for number, raw in enumerate(made):
        assert feed.recognise(raw) == (number,)
    joined = {}
    for number, (_, rest) in enumerate(feed.parts):
        if made[number].endswith(rest):
            joined.setdefault(rest, []).append(number)
    numbers = max(joined.values(), key=len)[:3]
    rest = feed.parts[numbers[0]][1]
    parts = [made[number][: len(made[number]) - len(rest)] for number in numbers]
    raw = b"".join(parts) + rest
    assert feed.recognise(raw) == tuple(numbers) and len(numbers) == 3
    assert feed.recognise(b"".join(reversed(parts)) + rest) == tuple(reversed(numbers))
    log = b"\n%c" % len(feed.parts[numbers[0]][0][0]) + feed.parts[numbers[0]][0][0]
    for wrong in (raw + b"\x1a\x05nginx", rest + b"".join(parts), parts[0] + log + rest, raw.replace(b"text", b"test")):
        with pytest.raises(ValueError):
            feed.recognise(wrong)


@pytest.mark.quick
def test_a_seed_says_what_happens():
    assert schedule(7, 300) == schedule(7, 300) != schedule(8, 300)


@pytest.mark.quick
@pytest.mark.parametrize("is_gentle", [False, True])
def test_every_event_has_its_turn_and_copies_are_there_when_it_comes(is_gentle):
    kinds, effects = set(), set()
    for seed in range(30):
        running = {0, 1, 2}
        for event in schedule(seed, 300, 3, is_gentle):
            if event.kind == "join":
                assert event.copy not in running
                running.add(event.copy)
            elif event.copy >= 0:
                assert event.copy in running
                running -= {event.copy} if event.kind != "freeze" else set()
            assert 1 <= len(running) <= 3
            kinds.add(event.kind)
            effects.add(event.effect)
    assert kinds == {"join", "stop", "freeze", "split", "merge", "burst", "calls", *([] if is_gentle else ["kill"])}
    assert effects == {"", *(GENTLE_EFFECTS if is_gentle else EFFECTS), "rate", "mangled", "truncated"}
    assert not set(GENTLE_EFFECTS) & set(UNHEARD)


def test_a_short_and_gentle_soak_repeats_nothing(monkeypatch, tmp_path):
    """SEED=<number> in the environment makes other events of it."""
    monkeypatch.setattr(event_soak, "HEARTBEAT_INTERVAL", 4)
    seed = int(os.environ.get("SEED", "231"))
    assert soak(6, seed, tmp_path, print, copies=2, is_gentle=True) == [], "SEED=%d" % seed
