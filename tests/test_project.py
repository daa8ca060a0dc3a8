"""The project's own shape: one pinned dependency, an example that works, a README that is complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dispatch_data
from dispatch_data import read_settings

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
# The variables of all settings, those of targets without their number.
VARIABLES = [
    *[setting.variable for setting in (*dispatch_data.SOURCE_SETTINGS, *dispatch_data.TUNING_SETTINGS.values())],
    *[setting.variable + "_TO" for setting in (dispatch_data.TARGET_LOGSTORE, dispatch_data.TARGET_TOPICS)],
]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_requirements_and_inline_metadata_name_the_same_release():
    """PEP 723, so that `uv run dispatch_data.py` and the like install what is tested."""
    block = re.search(r"(?m)^# /// script\n((?:# .*\n)+?)# ///$", text_of("dispatch_data.py")).group(1)
    listed = re.search(r"dependencies = \[(.*)\]", block).group(1)
    inline = [entry.strip().strip('"') for entry in listed.split(",")]
    required = [line for line in text_of("requirements.txt").splitlines() if line and not line.startswith("#")]
    assert inline == required
    assert [re.match(r"aliyun-log-python-sdk==[\d.]+$", line) is not None for line in required] == [True]


def test_the_release_that_is_installed_is_the_one_that_is_pinned():
    from aliyun.log.version import __version__

    assert text_of("requirements.txt").strip().endswith("==" + __version__)


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=str(ROOT), stdout=subprocess.PIPE, text=True)
    visible = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    assert visible <= {"dispatch_data.py", "README.md", "requirements.txt", "tests"}


def example_in_full():
    """.env.example filled in, and with every line that is commented out."""
    text = re.sub(r"(?m)^# (SLS_)", r"\1", text_of(".env.example"))
    return re.sub(r"(?m)^(SLS_AK_ID|SLS_AK_KEY)(_TO)?=$", r"\1\2=of-\1\2", text)


def test_the_example_exports_settings_that_work(tmp_path):
    (tmp_path / "example").write_text(example_in_full(), encoding="utf-8")
    script = "set -a; . ./example; set +a; env"
    output = subprocess.run(
        ["sh", "-c", script],
        cwd=str(tmp_path),
        env={"PATH": "/usr/bin:/bin"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    environment = dict(line.split("=", 1) for line in output.splitlines() if line.startswith("SLS_"))
    environment.update(SLS_REJECTED_DIR=str(tmp_path))
    names = {name.rstrip("0123456789") for name in environment}
    assert environment.pop("SLS_CREDENTIALS") == "ecs"  # stands in the place of id and secret
    settings = read_settings(environment)
    assert settings.warnings == ()
    assert [target.config.project for target in settings.targets] == ["other-project", "audit-project"] + [
        "other-project"
    ] * 3
    topics = [tuple(topic.spelling for topic in target.topics) for target in settings.targets]
    assert topics == [("ngnix", "nginx"), ("sql_audit",), ("click",)] + [("[]",), ("*",)]
    assert set(VARIABLES) <= names


def test_the_program_runs_where_only_the_sdk_is_missing():
    """One line instead of a traceback."""
    ended = subprocess.run(
        [sys.executable, "-S", str(ROOT / "dispatch_data.py"), "--version"], env={}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [ended.stderr.strip()]
    assert "pip install -r requirements.txt" in ended.stderr


def test_the_demonstration_says_what_to_install():
    """The program points to it, also where there is no more than the program needs."""
    command = [sys.executable, "-S", "-m", "tests.local_log_service", "demo"]
    ended = subprocess.run(command, cwd=str(ROOT), env={}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [ended.stderr.strip()]
    assert "pip install -r requirements.txt -r tests/requirements.txt" in ended.stderr


def test_the_page_on_the_tests_names_each_file():
    """What it says of them is for people to keep true."""
    page = text_of("tests/README.md")
    files = [
        path.name
        for folder in ("tests", "tests/tools", "tests/test_local_log_service")
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".js")
    ]
    assert len(files) > 30
    assert [name for name in files if "`%s`" % name not in page] == []
    named = re.findall(r"`(?:\w+/)?(\w+\.(?:py|js))`", page)
    assert set(named) - set(files) <= {"dispatch_data.py", "faults.py", "demo.py", "sample_logs.py"}
