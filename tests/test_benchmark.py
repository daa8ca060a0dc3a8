"""The benchmark, run as one runs it, with backlogs too small for its figures to mean anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROGRAM

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).resolve().parent / "tools" / "benchmark.py"
LIMIT = 600.0  # seconds, for slow machines
PAIR = r"\d+(?:\.\d+)? / \d+(?:\.\d+)?"


def test_rows_have_figures_and_no_log_is_lost():
    ended = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--only", "merged,backlog,latency"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 0, ended.stdout
    figures = r"(?m)^merged +%s +\d+\.\dx \(\d+\.\d to \d+\.\d\) +%s$" % (PAIR, " +".join([PAIR] * 5))
    assert re.search(figures, ended.stdout), ended.stdout
    for shards in (4, 32):
        figures = r"(?m)^backlog of %d shards +\d+\.\d MB/s, \d+\.\d of each shard; peak \d+ MB$" % shards
        assert re.search(figures, ended.stdout), ended.stdout
    for program in ("naive.py", "dispatch_data.py"):
        figures = r"(?m)^latency %s +median \d+\.\d\d s, 99th percentile \d+\.\d\d s, \d+\.\d\d pulls "
        assert re.search(figures % re.escape(program), ended.stdout), ended.stdout


def test_another_release_takes_the_naive_program_s_place():
    """Here the same one."""
    command = [sys.executable, str(BENCHMARK), "--quick", "--only", "targets", "--beside", str(PROGRAM)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"(?m)^targets +%s +\d+\.\dx " % PAIR, ended.stdout), ended.stdout


def test_an_unknown_row_is_refused():
    ended = subprocess.run(
        [sys.executable, str(BENCHMARK), "--only", "small,tiny"], capture_output=True, text=True, timeout=LIMIT
    )
    assert ended.returncode == 2
    assert (
        "small,agent,merged,large,delay,1 ms,20 ms,backlog,latency,idle, and with --beside shards,targets"
        in ended.stderr
    )


def test_the_service_alone_has_figures():
    ended = subprocess.run(
        [sys.executable, str(BENCHMARK), "--service", "--quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 0, ended.stdout
    for shape in ("small", "agent", "large"):
        row = re.search(r"(?m)^%s +(%s)$" % (shape, " +".join([r"\d+\.\d"] * 5)), ended.stdout)
        assert row and all(float(figure) > 0 for figure in row.group(1).split()), ended.stdout
