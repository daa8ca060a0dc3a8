"""What must not leak, and what hostile logs and full disks must not do."""

import hashlib
import html
import json
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import hypothesis
import pytest
from assertions import assert_all_delivered_once, verdict
from conftest import create_logstores
from harness import (
    AND_A_CATCH_ALL,
    LIMIT,
    PROGRAM,
    PROJECT,
    SOURCE,
    Copies,
    feed,
    make_log_group,
    run_program,
    settings_for,
    wait_until_begun,
    wait_until_delivered,
    wait_until_joined,
)
from local_log_service import LocalLogService
from local_log_service.faults import ForeignAnswer

from dispatch_data import LogGroup as RoutedLogGroup
from dispatch_data import (
    RedactingFormatter,
    Redactor,
    Routes,
    UnmatchedCounter,
    parse_topics,
    read_settings,
    redactor,
    secret_values,
)

SECRET = "Very/Secret+Key0"
TOKEN = "Very/Secret+Token1"


@pytest.fixture
def secret_service():
    with LocalLogService({"local-id": SECRET}, {"local-id": TOKEN}) as service:
        create_logstores(service)
        yield service


def everything_written(copy):
    return copy.stderr() + copy.log()


def test_keys_appear_nowhere_while_all_goes_wrong(secret_service, tmp_path):
    """The SDK's DEBUG output included, and the words for every kind of failure."""
    service = secret_service
    with Copies(service, tmp_path) as copies:
        copy = copies.start(SLS_LOG_LEVEL="DEBUG", SLS_STS_TOKEN=TOKEN)
        wait_until_joined(service, copy)
        assert SECRET not in Path("/proc/%d/cmdline" % copy.process.pid).read_text()
        assert TOKEN not in Path("/proc/%d/cmdline" % copy.process.pid).read_text()
        for failure in (dict(status=401, code="SignatureNotMatch"), dict(status=500), dict(cut="before")):
            with service.add_fault("*", **failure) as fault:
                feed(service, 8)
                service.wait_for(lambda fault=fault: fault.hits >= 8, LIMIT, "calls that fail")
        wait_until_delivered(service)
        assert_all_delivered_once(service)
        assert copy.stop() == 0
        written = everything_written(copy)
    assert " DEBUG " in written
    assert SECRET not in written and TOKEN not in written


def test_keys_appear_in_no_answer_of_check_and_status(secret_service):
    environment = settings_for(secret_service, SLS_STS_TOKEN=TOKEN + "x", SLS_LOGSTORE_TO1="nowhere")
    for arguments in (["--check"], ["--status"], []):
        ended = run_program(environment, *arguments)
        assert ended.returncode == 1
        assert SECRET not in ended.stdout + ended.stderr and TOKEN not in ended.stdout + ended.stderr


def settings_of_nobody():
    return {
        "SLS_ENDPOINT": "e",
        "SLS_AK_ID": "id",
        "SLS_AK_KEY": SECRET,
        "SLS_PROJECT": "project",
        "SLS_LOGSTORE": "l",
        "SLS_CG": "g",
        "SLS_LOGSTORE_TO1": "t",
    }


@pytest.mark.quick
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_password_of_a_proxy_is_a_secret(monkeypatch, scheme):
    monkeypatch.setenv("https_proxy", scheme + "user:p%40ss-word@proxy.test:3128")
    monkeypatch.setenv("ftp_proxy", "http://[no URL that anything here reads")
    settings = read_settings(settings_of_nobody())
    text = "cannot reach http://user:p%40ss-word@proxy.test:3128 or p@ss-word with " + SECRET
    redactor = Redactor()
    redactor.add(float("inf"), *secret_values(settings))
    assert redactor.redact(text) == "cannot reach http://user:***@proxy.test:3128 or *** with ***"


UNUSED_PROXIES = {
    "http://user:p[ss-word@h:1": "p[ss-word",
    "user:p[ss-word@h\uff20x:1": "p[ss-word",
    "http://user:p/[ss-word@h": "p/[ss-word",
    '"http://user:pass-word@h"': "pass-word",
    " http://user:pass-word@h": "pass-word",
    "http+x://user:pass%2Dword@h": "pass-word",
}


@pytest.mark.quick
@pytest.mark.parametrize("proxy", list(UNUSED_PROXIES))
def test_the_password_of_a_proxy_that_is_not_used_is_a_secret_and_no_reason_to_end(monkeypatch, proxy):
    """What nobody uses nobody has checked; a library may take it for no URL, or something else may log it."""
    environment = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
    environment.update(http_proxy="", HTTPS_PROXY=proxy, **settings_of_nobody())
    ended = run_program(environment, "--check", "--offline")
    assert ended.returncode == 0 and "word" not in ended.stdout + ended.stderr
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    redactor = Redactor()
    redactor.add(float("inf"), *secret_values(read_settings(settings_of_nobody())))
    for text in (proxy, UNUSED_PROXIES[proxy]):
        assert "word" not in redactor.redact("cannot reach " + text)


@pytest.mark.quick
def test_a_secret_that_begins_with_a_sign_is_looked_for_in_linear_time():
    """Topics come from whoever writes logs. In a process of its own, which can be ended: quadratic, it takes hours."""
    begin = "import dispatch_data; it = dispatch_data.Redactor(); it.add(float('inf'), '$ecret-password'); "
    code = begin + "text = chr(92) * 10**6; assert it.redact(text) == text"
    assert subprocess.run([sys.executable, "-c", code], cwd=str(PROGRAM.parent), timeout=LIMIT).returncode == 0
    redactor = Redactor()
    redactor.add(float("inf"), "$ecret-password")
    redactor.add(float("inf"), "pass$word-too")
    for depth in (0, 1, 3, 7, 15, 31):
        assert redactor.redact("a" + "\\" * depth + "$ecret-password").endswith("***")
        assert redactor.redact("pass" + "\\" * depth + "$word-too") == "***"


# ---- secrets in what others say, and words that are no secrets

LONG_TOKEN = "CAIS" + hashlib.sha512(b"token").hexdigest() + "+/=" + hashlib.sha512(b"more").hexdigest() * 6


def shown_of(secret, text):
    """The pieces of a secret, 8 characters each, that stand in a text."""
    return [piece for piece in {secret[start : start + 8] for start in range(len(secret) - 7)} if piece in text]


@pytest.fixture
def long_token_service():
    with LocalLogService({"local-id": SECRET}, {"local-id": LONG_TOKEN}) as service:
        create_logstores(service)
        yield service


def echoing_faults(before):
    """What the service says with its code or its message, and something on the way in any place: the secrets."""
    echo = "." * before + " token=" + LONG_TOKEN + "&key=" + quote(SECRET, safe="") + "\n" + SECRET
    return (
        dict(status=401, code="SignatureNotMatch", message=echo),
        dict(status=401, code="Odd" + echo, message="odd"),
        dict(answer=ForeignAnswer(502, {"Content-Type": "text/html"}, echo.encode())),
        dict(answer=ForeignAnswer(200, {}, echo.encode(), request_id=True)),
        dict(answer=ForeignAnswer(200, {}, json.dumps({"count": echo, "shards": [echo]}).encode(), request_id=True)),
        dict(answer=ForeignAnswer(200, {}, json.dumps({echo: {echo: echo}}).encode(), request_id=True)),
    )


@pytest.mark.parametrize("before", [0, 40, 70, 250])
def test_secrets_that_are_echoed_are_shown_by_no_command_wherever_a_text_is_cut(long_token_service, before):
    environment = settings_for(long_token_service, SLS_STS_TOKEN=LONG_TOKEN)
    for fault in echoing_faults(before):
        with long_token_service.add_fault("*", **fault):
            for arguments in (["--check"], ["--status"], ["--status", "--json"]):
                ended = run_program(environment, *arguments)
                said = ended.stdout + ended.stderr
                assert ended.returncode == 1
                assert shown_of(LONG_TOKEN, said) == shown_of(SECRET, said) == shown_of(quote(SECRET), said) == []


@pytest.mark.slow
@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_secrets_that_are_echoed_are_in_no_log_wherever_a_text_is_cut(long_token_service, tmp_path, level):
    service = long_token_service
    with Copies(service, tmp_path) as copies:
        copy = copies.start(SLS_LOG_LEVEL=level, SLS_STS_TOKEN=LONG_TOKEN)
        wait_until_joined(service, copy)
        feed(service, 8)
        wait_until_delivered(service)
        for fault in echoing_faults(70):
            with service.add_fault("*", **fault) as force:
                service.wait_for(lambda force=force: force.hits >= 4, LIMIT, "calls that fail")
        feed(service, 8)
        wait_until_delivered(service)
        assert copy.stop() == 0
        written = everything_written(copy)
    assert "***" in written
    assert shown_of(LONG_TOKEN, written) == shown_of(SECRET, written) == []


ENCODINGS = [
    str,
    html.escape,
    quote,
    lambda text: quote(quote(text)),
    lambda text: re.sub("%..", lambda code: code.group().lower(), quote(text, safe="")),
    lambda text: repr(text)[1:-1],
    lambda text: repr(text.encode())[2:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
]
PLACES = ["http://user:%s@proxy.test:3128", "GET /?token=%s&a=b", "x-acs-security-token: %s\r\n", '{"key": "%s"}',
          "%s", "refused: %s: odd", r"a\n%s\n", "%0A%s%0a", r"\x1b%s\x1b", r"\u001b%s\u001b", "<p>%s</p>"]  # fmt: skip
printable = hypothesis.strategies.text("".join(map(chr, range(33, 127))), min_size=6, max_size=40)


@pytest.mark.quick
@hypothesis.given(printable, hypothesis.strategies.sampled_from(ENCODINGS))
@hypothesis.example("Ab1/'\"\\&<+=%~", ENCODINGS[5])
def test_a_secret_that_stands_alone_is_hidden_in_all_that_is_usual(secret, encode):
    redactor = Redactor()
    redactor.add(float("inf"), secret)
    written = encode(secret)
    for text in PLACES:
        before, _, after = text.partition("%s")
        shown = redactor.redact(before + written + after)
        assert shown.startswith(redactor.redact(before) + "***") and len(shown) <= len(before + "***" + after)


@pytest.mark.quick
@hypothesis.given(
    hypothesis.strategies.text("abcDEF0123456789+/=", min_size=20, max_size=600),
    hypothesis.strategies.integers(0, 400),
    hypothesis.strategies.integers(1, 300),
)
def test_no_piece_of_a_secret_is_left_by_a_cut(secret, position, longest):
    """Wherever it stands, in words as well."""
    shown = Redactor()
    shown.add(float("inf"), secret)
    text = shown.cut("." * position + secret + "x" * 20 + secret, longest)
    assert shown_of(secret, text) == [] and len(text) <= longest + 3


@pytest.mark.quick
@pytest.mark.parametrize(
    "secret, text, shown",
    [
        ("group", "groups=29 unmatched_groups=0", "groups=29 unmatched_groups=0"),
        ("s", "groups=29 s=1", "groups=29 ***=1"),
        ("2", "29 of 12 and 2", "29 of 12 and ***"),
        ("dispatch", "dispatch_data and dispatcher", "dispatch_data and dispatcher"),
        ("group", "http://u:group@proxy.test", "http://u:***@proxy.test"),
        ("hunter2", "xhunter2 hunter2", "xhunter2 ***"),
        ("Tr0ub4dor&3", "xTr0ub4dor&3x", "x***x"),
        ("correct-horse-battery-staple", "xcorrect-horse-battery-staplex", "x***x"),
        ("@me", "a@me.test a@mex", "a***.test a@mex"),
    ],
)
def test_words_are_hidden_as_words_and_what_can_be_nothing_else_anywhere(secret, text, shown):
    redactor = Redactor()
    redactor.add(float("inf"), secret)
    assert redactor.redact(text) == shown


@pytest.mark.parametrize("password", ["group", "groups", "summary", "INFO", "1", "shard", "logs"])
def test_a_password_that_is_a_word_of_ours_leaves_what_programs_read(service, copies, password):
    proxies = {"https_proxy": "http://user:%s@127.0.0.1:9" % password}
    copy = copies.start(**proxies)
    feed(service, 20, ["nginx", "password %s" % password])
    wait_until_delivered(service)
    status = json.loads(run_program(settings_for(service, **proxies), "--status", "--json").stdout)
    assert copy.stop() == 0
    assert set(status) == {"project", "logstore", "consumer_group", "time", "behind_seconds", "shards"}
    assert [shard["shard"] for shard in status["shards"]] == [0, 1, 2, 3]
    pattern = r"(?m)^20\S+ [\d:,]+ \d+ INFO summary target=1 logstore=test-project/nginx groups=10 logs=50 bytes="
    assert re.search(pattern, copy.log())
    summary = copy.log().splitlines()[-1]
    assert " INFO summary source=test-project/source group=dispatch shards=" in summary
    assert ' unmatched_topics="password *** 10"' in summary


class HostileConsumers:
    """Of an answer about consumers: names that would do something to a terminal."""

    NAME = "gro\x1b[2J\x1b]0;owned\x07\u202e\nall  4 in all-1-" + 12 * "0"

    def __call__(self, answer, _):
        entries = [dict(entry, consumer=self.NAME) for entry in json.loads(answer.body)]
        return answer._replace(body=json.dumps(entries).encode())


def test_names_of_consumers_do_nothing_to_a_terminal(service, copies):
    copies.start()
    wait_until_begun(service)
    with service.add_fault("GetCheckPoint", mangle=HostileConsumers()):
        for arguments in (["--check"], ["--status"], ["--status", "--json"]):
            ended = run_program(settings_for(service), *arguments)
            assert ended.returncode == 0 and ended.stderr == ""
            assert all(line.isprintable() for line in ended.stdout.split("\n")), ended.stdout
            if arguments == ["--status"]:
                assert len(ended.stdout.splitlines()) == 6
                assert r"\x1b[2J" in ended.stdout
        copy = copies.start()
        wait_until_joined(service, copy)
        service.wait_for(lambda: "has checkpoints of another program" in copy.stderr(), LIMIT, "a word about them")
    assert all(line.isprintable() for line in everything_written(copy).split("\n"))


# ---- hostile logs

HOSTILE_TOPICS = (
    "x\n2026-01-01 00:00:00,000 1 INFO summary target=1 logs=0",
    "x\r\x1b[2J\u2028\u202egpj.exe",
    "../../etc/passwd",
    "%s%d%n",
    "T" * 1000000,
)


def test_hostile_topics_forge_no_line(service, copies):
    """Left out, they are named in the summary; refused, in the words for that."""
    service.put(PROJECT, SOURCE, [make_log_group(topic) for topic in HOSTILE_TOPICS])
    feed(service, 20)
    copy = copies.start(constants={"SUMMARY_INTERVAL": 1e9})  # but for the last
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert_all_delivered_once(service)
    lines = copy.log().splitlines()
    assert len([line for line in lines if re.match(r"\S+ \S+ \d+ INFO summary target=1 ", line)]) == 1
    assert not any(line.startswith("2026-01-01") for line in lines)
    summary = lines[-1]
    assert "unmatched_groups=%d" % len(HOSTILE_TOPICS) in summary
    assert summary.isprintable() and len(summary) < 1000


def test_hostile_topics_and_names_forge_no_path(service, copies, tmp_path):
    directory = tmp_path / "rejected"
    directory.mkdir()
    service.create_logstore(PROJECT, "rest")
    poisons = [make_log_group(topic, 1) + b"\x28\x01" for topic in HOSTILE_TOPICS[:4]]
    service.put(PROJECT, SOURCE, poisons + [make_log_group("other") for _ in range(8)])
    copy = copies.start(SLS_REJECTED_DIR=str(directory), **AND_A_CATCH_ALL)
    wait_until_delivered(service)
    assert copy.stop() == 0
    assert sorted(path.read_bytes() for path in directory.iterdir()) == sorted(poisons)
    assert all(path.name.startswith("TO4-test-project-rest-") for path in directory.iterdir())
    assert all(len(line) < 2000 and line.isprintable() for line in everything_written(copy).split("\n"))


@pytest.mark.quick
def test_huge_topics_are_not_remembered():
    """A shard can bring a new one with each LogGroup; memory must not grow with them."""
    routes, unmatched = Routes({1: parse_topics("T*")}), UnmatchedCounter()
    for number in range(50):
        assert routes.target_of("T" * 10000 + str(number)) == 1
        unmatched.add(RoutedLogGroup("t" * 10000 + str(number), 1, b"", b""))
    assert routes.cached.cache_info().currsize == 0
    assert sum(map(len, unmatched.topics)) < 50 * 100
    assert len(unmatched.summary()) < 1000


@pytest.mark.quick
def test_a_line_is_one_line_whatever_is_in_it():
    redactor.add(float("inf"), SECRET)
    formatter = RedactingFormatter("%(process)d %(levelname)s %(message)s")
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\n2026 forged\x1b[1m %s", (SECRET,), None)
    first, second = formatter.format(record).split("\n")
    assert first.endswith(" INFO a") and second == "    2026 forged\\x1b[1m ***"


# ---- disks


def small_files(program):
    """A limit of the shell's on the size of files stands for a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def test_a_full_disk_for_the_log_file_is_said_and_stops_nothing(service, copies):
    """A limit of the shell's on the size of files stands for the disk."""
    often = {"SUMMARY_INTERVAL": 0.02, "REPORT_LOOP_INTERVAL": 0.02}
    copy = copies.start(patch=small_files, constants=often, SLS_LOG_LEVEL="DEBUG")
    feed(service, 40)
    wait_until_delivered(service)
    feed(service, 40)
    wait_until_delivered(service)
    service.wait_for(lambda: "can't write" in copy.stderr(), LIMIT, "a word about it")
    assert_all_delivered_once(service)
    assert copy.stop() == 0
    told = [line for line in copy.stderr().splitlines() if "can't write the log file" in line]
    assert told and "File too large" in told[0]
    assert len(told) <= 3, "a flood"
    assert os.path.getsize(str(next(copy.directory.glob("*.log")))) <= 4096


def test_a_log_file_that_cannot_be_made_is_said_before_anything_starts(service, tmp_path):
    """Where not even root may write; a directory that is none is found among the settings."""
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc here")
    ended = run_program(settings_for(service, SLS_LOG_DIR="/proc/self"))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("dispatch_data.py: SLS_LOG_DIR: ")
    assert service.calls("*") == 0


def test_a_full_disk_for_refused_log_groups_is_said_and_loses_nothing(service, copies, tmp_path):
    poison = make_log_group("click", 500) + b"\x28\x01"
    directory = tmp_path / "rejected"
    directory.mkdir()
    service.put(PROJECT, SOURCE, [poison, make_log_group("click")], shard=0)
    copy = copies.start(patch=small_files, SLS_REJECTED_DIR=str(directory), SLS_LOG_DIR="")
    service.wait_for(lambda: "File too large" in copy.stderr(), LIMIT, "a word about the disk")
    assert "TO3 test-project/click: a refused LogGroup can't be set aside yet: " in copy.stderr()
    assert copy.stop() == 0
    assert list(directory.iterdir()) == []
    copies.start(SLS_REJECTED_DIR=str(directory))
    wait_until_delivered(service)
    (path,) = directory.iterdir()
    assert path.read_bytes() == poison
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert verdict(service).foreign == 0
