"""A minute of everything failing at random, from a seed; see soak.py."""

import os

import pytest
from soak import EXCLUSIVE, MOST_COPIES, MOST_RESHARDINGS, is_https, schedule, soak


@pytest.mark.slow
def test_a_minute_of_everything_failing_loses_nothing(tmp_path):
    """SEED=<number> in the environment repeats the events."""
    seed = int(os.environ.get("SEED", "7"))
    problems = soak(60, seed, tmp_path, print)
    assert problems == [], "SEED=%d" % seed


@pytest.mark.quick
def test_a_seed_says_what_happens():
    assert schedule(7, 600) == schedule(7, 600) != schedule(8, 600)


@pytest.mark.quick
def test_every_event_has_its_turn_and_ends_in_time():
    for seed in range(50):
        events = schedule(seed, 600)
        assert [event.at for event in events] == sorted(event.at for event in events)
        assert max(event.at + event.seconds for event in events) <= 600
        possible = {"failing calls", "freeze", "join", "leave", "kill", "split", "merge", *EXCLUSIVE}
        if not is_https(seed):
            possible.remove("untrusted certificate")
        assert {event.name for event in events} == possible
        assert sum(event.name in ("split", "merge") for event in events) <= MOST_RESHARDINGS


@pytest.mark.quick
def test_what_would_undo_each_other_does_not_happen_at_once_and_copies_stay_within_bounds():
    for seed in range(50):
        running = 2
        free_at = {}
        for event in schedule(seed, 600):
            running += {"join": 1, "leave": -1, "kill": -1}.get(event.name, 0)
            assert 0 <= running <= MOST_COPIES
            if event.name in EXCLUSIVE:
                assert event.at >= free_at.get(EXCLUSIVE[event.name], 0)
                free_at[EXCLUSIVE[event.name]] = event.at + event.seconds
