"""`live.py`, which is made for a real account, run against a local service in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_log_service import LocalLogService

LIVE = Path(__file__).resolve().parent / "tools" / "live.py"
PROJECT = "somebodys-project"
LIMIT = 240.0  # seconds that all probes may take on a slow machine


def run_live(service, *probes, **changes):
    """Run it with this service for an account; return the exit status and what it has printed."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLS_")}
    environment.update(service.environment())
    environment.update(
        SLS_LIVE_ENDPOINT=service.endpoint,
        SLS_LIVE_AK_ID="local-id",
        SLS_LIVE_AK_KEY=service.access_keys["local-id"],
        SLS_LIVE_PROJECT=PROJECT,
        SLS_LIVE_GROUP_TIMEOUT="2",
        SLS_LIVE_HEARTBEAT_INTERVAL="2",
    )
    environment.update(changes)
    ended = subprocess.run(
        [sys.executable, str(LIVE), *probes],
        env={name: text for name, text in environment.items() if text},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    return ended.returncode, ended.stdout


def different(printed):
    """The probes that found something else than the local service has."""
    return [line[2:].replace(" ", "_") for line in printed.splitlines() if line.startswith("! ")]


def test_the_local_service_is_as_it_has_it_and_left_as_it_was():
    with LocalLogService(check_log_times=True) as service:
        service.create_logstore(PROJECT, "their-own")
        status, printed = run_live(service)
        assert (status, different(printed)) == (0, []), printed
        assert "failed" not in printed and "no answer" not in printed
        assert printed.count("the same") == len(
            [line for line in printed.splitlines() if "as the local service has it" in line]
        )
        assert "0 lost, 0 foreign, copies ended with [0, 0]" in printed
        assert service.client().list_logstore(PROJECT).get_logstores() == ["their-own"]


@pytest.mark.parametrize(
    "settings, probes, expected",
    [
        ({"max_put_bytes": 30 * 1024 * 1024}, ["put_of_11_mb", "put_of_31_mb"], ["put_of_11_mb"]),
        ({"log_time_status": 400}, ["logs_of_8_days_ago", "put_of_one_log"], ["logs_of_8_days_ago"]),
        ({"unknown_consumer": "ConsumerNotExist"}, ["check_points_of_others", "pulls"], ["check_points_of_others"]),
    ],
)
def test_what_is_otherwise_is_shown(settings, probes, expected):
    with LocalLogService(**{"check_log_times": True, **settings}) as service:
        service.create_logstore(PROJECT, "their-own")
        status, printed = run_live(service, *probes)
    assert (status, different(printed)) == (1, expected), printed


def test_a_service_that_fails_is_different_and_its_logstores_are_removed():
    with LocalLogService() as service:
        service.create_logstore(PROJECT, "their-own")
        service.add_fault("GetCursor", code="ShardReadQuotaExceed", share=0.5)
        service.add_fault("PullLogs", code="ReadQuotaExceed")
        status, printed = run_live(service, "cursor_arithmetic")
        assert (status, different(printed)) == (1, ["cursor_arithmetic"]), printed
        assert "failed: " in printed
        assert service.client().list_logstore(PROJECT).get_logstores() == ["their-own"]


def test_a_temporary_key_has_its_token():
    with LocalLogService(security_tokens={"local-id": "the token"}, check_log_times=True) as service:
        service.create_logstore(PROJECT, "their-own")
        status, printed = run_live(service, "dead_token", "put_of_one_log", SLS_LIVE_STS_TOKEN="the token")
    assert (status, different(printed)) == (0, []), printed


def test_settings_and_probes_that_are_missing_are_named():
    with LocalLogService() as service:
        assert run_live(service, SLS_LIVE_PROJECT="") == (2, "SLS_LIVE_PROJECT is not set; see the head of this file\n")
        status, printed = run_live(service, "no_such_probe")
        assert status == 2 and "no such probe: no_such_probe" in printed
