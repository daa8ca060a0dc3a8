"""The code itself: linted, formatted and type-checked."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent


def assert_clean(module, *arguments):
    if importlib.util.find_spec(module) is None:
        pytest.skip("%s is installed on CPython 3.10 and newer only, see tests/requirements.txt" % module)
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ended.returncode == 0, ended.stdout.decode()


def test_lint():
    assert_clean("ruff", "check", "--no-cache", ".")


def test_format():
    assert_clean("ruff", "format", "--no-cache", "--diff", ".")


def test_types():
    assert_clean("mypy", "--config-file", "tests/mypy.ini", "--cache-dir", os.devnull)
