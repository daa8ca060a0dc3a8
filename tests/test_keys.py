"""Keys that renew themselves: from where they come, while they do, when they can't, and what is said of them.

The copies are processes whose keys live for a few seconds. KEYS_SECONDS=60 in the environment lets each delivery under
renewal last so long, and takes each source with each signature.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from assertions import assert_all_delivered_once, assert_nothing_lost, logs_in_flight, puts_arrived, verdict
from conftest import logstore_config
from harness import (
    LIMIT,
    PROJECT,
    Copies,
    SteadyFeed,
    feed,
    feed_separately,
    free_port,
    get,
    make_group,
    program_with,
    run_program,
    settings_for,
    wait_until_begun,
    wait_until_delivered,
)
from local_log_service.key_services import Answer, KeyServices
from test_settings import GOOD

import dispatch_data
from dispatch_data import (
    CallError,
    CredentialSource,
    CredentialSources,
    ErrorKind,
    RedactingFormatter,
    Redactor,
    SettingsError,
    describe_error,
    parse_credentials,
    read_settings,
    redactor,
)

LIFE = 6.0  # seconds
SECONDS = float(os.environ.get("KEYS_SECONDS", "0"))
KEYS = {"ecs": 4, "oidc": 6, "uri": 4, "file": 6}  # as many have to be given out while logs are delivered
NO_KEY = {"SLS_AK_ID": None, "SLS_AK_KEY": None}
SOURCES = {"ecs": "metadata", "oidc": "STS", "uri": "agent", "file": "file"}  # -> who gives the keys out


@pytest.fixture
def key_services(service):
    with KeyServices(service, LIFE) as running:
        yield running


class Sidecar:
    """Writes a new key into a file each time the half of a key's life is over."""

    def __init__(self, key_services, path):
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(key_services, str(path)))
        key_services.write_key(str(path))

    def run(self, key_services, path):
        while not self.ended.wait(key_services.life / 2):
            key_services.write_key(path)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.ended.set()
        self.thread.join()


def environment_for(key_services, source, directory):
    """The changes of the settings with which copies take their key from a source."""
    value = "file:%s" % (directory / "key") if source == "file" else source
    return dict(NO_KEY, SLS_CREDENTIALS=value, **key_services.environment())


def constants_for(key_services):
    """The address of the metadata service is no setting, as it must not be."""
    return {"ECS_METADATA_URL": key_services.metadata}


def check(service, key_services, directory, **changes):
    """(exit status, lines) of --check."""
    program = program_with(directory, constants=constants_for(key_services))
    ended = subprocess.run(
        [sys.executable, str(program), "--check"],
        env=settings_for(service, **changes),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.stderr == ""
    return ended.returncode, ended.stdout.splitlines()


def wait_for_word(flow, copy, words):
    flow.wait_for(lambda: re.search(words, copy.log()) is not None, "a word about %s" % words)


# ---- delivery under renewal ---------------------------------------------------------------------------------------


WAYS = [(source, region) for source in SOURCES for region in (None, "local")]
SOME_WAYS = [("ecs", None), ("oidc", "local"), ("uri", "local"), ("file", None)]  # a source doesn't know who signs how


@pytest.mark.slow
@pytest.mark.parametrize("source, region", WAYS if SECONDS else SOME_WAYS)
def test_nothing_is_lost_or_repeated_while_keys_come_and_go(service, key_services, copies, tmp_path, source, region):
    """Copies join and leave under load, for more than two lives of a key."""
    # A busy machine takes seconds to get a copy another key; and who gives everybody the same one gives it once more at
    # half its life, so that a quarter is left at the next try.
    key_services.life = 10.0 if source in ("ecs", "uri") else LIFE
    if platform.python_implementation() == "PyPy":
        key_services.life *= 1.5
    constants = dict(constants_for(key_services), REFRESH_POLL=0.1)
    make_group(service, 8)
    with Sidecar(key_services, tmp_path / "key") as sidecar:
        changes = dict(environment_for(key_services, source, tmp_path), SLS_REGION=region)
        flow = SteadyFeed(service)
        begin = time.monotonic()

        def start():
            return copies.start(constants=constants, **changes)

        def have_passed(keys):
            given_out = key_services.given_out[SOURCES[source]]
            return given_out >= keys and time.monotonic() - begin > SECONDS * keys / KEYS[source]

        first, second = start(), start()
        flow.wait_until_shared(first, second)
        flow.wait_for(lambda: have_passed(2), "keys renewed")
        third = start()
        flow.wait_until_shared(first, second, third)
        assert first.stop() == 0
        flow.wait_until_shared(second, third)
        flow.wait_for(lambda: have_passed(KEYS[source]), "keys renewed again and again")
        wait_until_delivered(service)
        assert_all_delivered_once(service)
        assert [second.stop(), third.stop()] == [0, 0]
        print("%d keys given out: %s" % (key_services.given_out[SOURCES[source]], verdict(service)))
        assert sidecar.thread.is_alive()
    assert key_services.through_proxy == []
    for copy in copies.started:
        assert not re.search(r" (WARNING|ERROR) .*(Unauthorized|Key)", copy.log())


def test_metrics_say_when_a_key_ends(service, key_services, copies, tmp_path):
    port = free_port()
    changes = environment_for(key_services, "uri", tmp_path)
    copies.start(constants=constants_for(key_services), SLS_METRICS_PORT=str(port), SLS_AK_ID_TO1="local-id",
                 SLS_AK_KEY_TO1="local-secret", **changes)  # fmt: skip
    ends = []

    def has_come():
        line = r'(?m)^dispatch_data_credentials_expire_timestamp_seconds{source="(.+)"} (.+)$'
        found = re.findall(line, (get(port, "/metrics") or (0, ""))[1])
        assert [name for name, _ in found] in ([], ["SLS_CREDENTIALS"])
        ends.extend(float(end) for _, end in found)
        return bool(ends) and ends[-1] > ends[0]

    service.wait_for(has_come, LIMIT, "another key")
    assert max(ends) <= time.time() + LIFE + 1


@pytest.mark.parametrize("form", ["hardened", "hardened alone", "older"])
def test_both_forms_of_the_metadata_service(service, key_services, copies, tmp_path, form):
    key_services.has_hardened_form = form != "older"
    key_services.wants_hardened_form = form == "hardened alone"
    copy = copies.start(
        constants=constants_for(key_services), **environment_for(key_services, "ecs:dispatch-data", tmp_path)
    )
    feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_targets_in_another_account_have_a_source_of_their_own(service, key_services, copies, tmp_path):
    """The source has a static key, target 1 one from a file, the others that of the instance."""
    key_services.life = 3600
    key_services.write_key(str(tmp_path / "key"))
    changes = dict(SLS_CREDENTIALS_TO="ecs", SLS_CREDENTIALS_TO1="file:%s" % (tmp_path / "key"))
    status, lines = check(service, key_services, tmp_path, **changes)
    assert status == 0
    ends = r"ends \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} \(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)"
    assert re.fullmatch(r"SLS_CREDENTIALS_TO1 +file:\S+/key, " + ends, lines[4])
    assert re.fullmatch(r"SLS_CREDENTIALS_TO +ecs, role dispatch-data, " + ends, lines[5])
    assert not any(line.startswith("SLS_CREDENTIALS ") for line in lines), "the source's key does not end"
    copy = copies.start(constants=constants_for(key_services), **changes)
    wait_until_begun(service)
    key_services.role = ""
    key_services.revoke()
    key_services.write_key(str(tmp_path / "key"))
    flow = SteadyFeed(service)
    wait_for_word(flow, copy, "TO2 test-project/sql-audit: a put failed")
    wait_for_word(flow, copy, "TO3 test-project/click: a put failed")
    before = len(service.ledger(PROJECT, "nginx"))
    feed(service, 40, ["nginx"])
    service.wait_for(lambda: len(service.ledger(PROJECT, "nginx")) > before, LIMIT, "puts to target 1")
    assert "source test-project/source" not in copy.stderr()
    key_services.role = "dispatch-data"
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


@pytest.mark.parametrize("options", [[], ["--https"]], ids=["http", "https"])
def test_the_local_service_as_a_command_hands_out_keys(options):
    command = [sys.executable, "-m", "local_log_service", "serve", "--key-life", "3600", *options]
    with subprocess.Popen(
        command, cwd=str(Path(__file__).parent), stdout=subprocess.PIPE, universal_newlines=True
    ) as process:
        try:
            lines = list(itertools.takewhile(lambda line: "The service runs" not in line, process.stdout))
            exports = dict(shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export "))
            environment = dict({name: text for name, text in os.environ.items() if "SLS_" not in name}, **exports)
            for source in ["uri"] if options else ["uri", "oidc"]:
                ended = run_program(dict(environment, SLS_CREDENTIALS=source), "--check")
                assert ended.returncode == 0, ended.stdout
                assert re.search("SLS_CREDENTIALS +(http://127|oidc, role)", ended.stdout)
        finally:
            process.terminate()
        assert process.wait(LIMIT) == 0


# ---- when keys can't be renewed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["ecs", "oidc"])
def test_a_source_that_is_gone_for_longer_than_a_key_lives_is_waited_for(
    service, key_services, copies, tmp_path, source
):
    key_services.life = 10.0  # of which half is left for the word that comes first
    changes = environment_for(key_services, source, tmp_path)
    flow = SteadyFeed(service)
    copy = copies.start(constants=dict(constants_for(key_services), REFRESH_POLL=0.1), **changes)
    flow.wait_until_shared(copy)
    key_services.stop()
    wait_for_word(flow, copy, r"SLS_CREDENTIALS: no new key yet, trying again: NoKey: the key at hand: .*ends ")
    wait_for_word(flow, copy, r" failed and is tried again.*: NoKey: the key at hand: .*ended ")
    key_services.start()
    wait_for_word(flow, copy, "SLS_CREDENTIALS: renewals recovered after ")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.process.poll() is None and copy.stop() == 0
    assert key_services.through_proxy == []


def test_a_start_waits_for_a_source_that_is_not_there_yet(service, key_services, copies, tmp_path):
    changes = environment_for(key_services, "uri", tmp_path)
    key_services.stop()
    copy = copies.start(**changes)
    service.wait_for(lambda: "can't join the consumer group yet" in copy.log(), LIMIT, "a word about joining")
    assert "NoKey: NewConnectionError: " in copy.log() and "what SLS_CREDENTIALS names must be reach" in copy.log()
    key_services.start()
    feed(service, 20)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


REFUSED = {
    "ecs": ("role", "", "404 KeyRefused: ", "127.0.0.1/latest/meta-data/ram/security-credentials/"),
    "oidc": (
        "trusts",
        False,
        "400 KeyRefused: ",
        "aliyuncs.com/: AuthenticationFail.NoPermission: There is no permission",
    ),
}


@pytest.mark.parametrize("source", list(REFUSED))
def test_a_role_that_was_taken_away_is_named_and_comes_back(service, key_services, copies, tmp_path, source):
    attribute, value, code, words = REFUSED[source]
    changes = environment_for(key_services, source, tmp_path)
    before = getattr(key_services, attribute)
    flow = SteadyFeed(service)
    copy = copies.start(constants=constants_for(key_services), **changes)
    flow.wait_until_shared(copy)
    setattr(key_services, attribute, value)
    wait_for_word(flow, copy, "ERROR SLS_CREDENTIALS: no new key yet, trying again: %s.*%s" % (code, words))
    status, lines = check(service, key_services, tmp_path, **changes)
    assert status == 1
    for line in lines[:4]:
        assert "wrong: %s" % code in line and words in line and "is the RAM role attached to this" in line
    assert re.search("SLS_CREDENTIALS +%s, no key yet" % source, lines[4])
    ended = copies.start(constants=constants_for(key_services), **changes)
    assert ended.process.wait(LIMIT) == 1, "what somebody has to mend is no reason to wait at the start"
    assert words in ended.stderr()
    wait_for_word(flow, copy, " failed and is tried again.*KeyRefused: the key at hand: .*ended ")
    setattr(key_services, attribute, before)
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


def test_a_permission_taken_from_the_role_is_named(service, key_services, tmp_path):
    message = "denied by sts or ram, action: log:ListShards"
    with service.add_fault("ListShards", status=401, code="Unauthorized", message=message):
        status, lines = check(service, key_services, tmp_path, **environment_for(key_services, "ecs", tmp_path))
    assert status == 1
    assert "the account of SLS_CREDENTIALS needs the permission" in lines[0]


@pytest.mark.parametrize("source", ["uri", "file"])
def test_a_key_that_the_service_forgets_early_is_replaced(service, key_services, copies, tmp_path, source):
    """As when it is revoked, or the clocks disagree: long before it would be renewed."""
    key_services.life = 3600
    key_services.write_key(str(tmp_path / "key"))
    copy = copies.start(**environment_for(key_services, source, tmp_path))
    wait_until_begun(service)
    key_services.revoke()
    feed(service, 40)
    service.wait_for(lambda: "SLS_CREDENTIALS is asked for another key" in copy.log(), LIMIT, "a word about the key")
    if source == "file":
        key_services.write_key(str(tmp_path / "key"))
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert key_services.given_out["agent"] == (2 if source == "uri" else 0)
    assert copy.stop() == 0


@pytest.mark.parametrize("under_load", [False, True])
def test_a_token_that_has_run_out_ends_the_copy(service, key_services, copies, under_load):
    """It can't renew itself; whoever starts it again may have another.

    Repeated is only what was in the targets already when the key ended, and the checkpoint, which needs the key, not.
    """
    key = key_services.new_key("hand", 3600)
    changes = dict(SLS_AK_ID=key["AccessKeyId"], SLS_AK_KEY=key["AccessKeySecret"])
    flow = SteadyFeed(service)
    copy = copies.start(SLS_STS_TOKEN=key["SecurityToken"], **changes)
    flow.wait_until_shared(copy)
    assert "WARNING SLS_STS_TOKEN can't renew itself" in copy.log() and "SLS_CREDENTIALS" in copy.log()
    if not under_load:
        wait_until_delivered(service)
    service.token_ends[key["AccessKeyId"]] = 0.0
    wait_for = flow.wait_for if under_load else lambda *what: service.wait_for(what[0], LIMIT, what[1])
    wait_for(lambda: copy.process.poll() is not None, "a copy that ends by itself")
    assert copy.process.returncode == 1
    assert "ERROR SLS_STS_TOKEN has run out, says the service: this copy ends" in copy.stderr()
    in_flight = logs_in_flight(service)
    assert under_load or in_flight == 0
    copies.start()
    feed(service, 40)
    wait_until_delivered(service)
    assert_nothing_lost(service, most_repeated=in_flight)


def test_starts_with_a_token_of_one_target_that_has_run_out_deliver_nothing(service, key_services, copies):
    """A supervisor starts the copy again and again: each time the other targets would get the first batch anew."""
    key = key_services.new_key("hand", 3600)
    changes = {
        "SLS_AK_ID_TO3": key["AccessKeyId"],
        "SLS_AK_KEY_TO3": key["AccessKeySecret"],
        "SLS_STS_TOKEN_TO3": key["SecurityToken"],
    }
    copy = copies.start(**changes)
    feed(service, 40)
    wait_until_delivered(service)
    service.token_ends[key["AccessKeyId"]] = 0.0
    feed_separately(service, 80)
    service.wait_for(lambda: copy.process.poll() is not None, LIMIT, "a copy that ends by itself")
    arrived = puts_arrived(service)
    for _ in range(2):
        copy = copies.start(**changes)
        assert copy.process.wait(LIMIT) == 1
        assert "ERROR SLS_STS_TOKEN_TO3 has run out, says the service: this copy ends" in copy.stderr()
    assert puts_arrived(service) == arrived


def test_a_permanent_key_that_is_refused_does_not_end_the_copy(service, copies):
    message = "The security token you provided has expired"
    copy = copies.start()
    wait_until_begun(service)
    with service.add_fault("PutLogs", status=401, code="Unauthorized", message=message) as fault:
        feed(service, 8)
        service.wait_for(lambda: fault.hits > 20, LIMIT, "puts refused")
    wait_until_delivered(service)
    assert_all_delivered_once(service)
    assert copy.stop() == 0


# ---- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["ecs:dispatch-data", "oidc", "uri", "file"])
def test_no_secret_is_written_anywhere_while_all_goes_wrong(service, key_services, tmp_path, source):
    """At DEBUG, which the SDK takes for telling much; nor into any file of the copy's.

    In the end the source answers with all that was ever sent to it or came from it.
    """
    key_services.password = "Very-secret-0" if source == "uri" else ""
    if source != "oidc":
        key_services.secrets.clear()
    (tmp_path / "copies").mkdir()
    with contextlib.ExitStack() as stack:
        if source == "file":
            stack.enter_context(Sidecar(key_services, tmp_path / "key"))
        copies = stack.enter_context(Copies(service, tmp_path / "copies"))
        changes = environment_for(key_services, source, tmp_path)
        copy = copies.start(constants=constants_for(key_services), SLS_LOG_LEVEL="DEBUG", **changes)
        flow = SteadyFeed(service)
        flow.wait_until_shared(copy)
        for failure in (dict(status=401, code="SignatureNotMatch"), dict(status=500), dict(cut="before")):
            with service.add_fault("*", **failure) as fault:
                flow.wait_for(lambda fault=fault: fault.hits >= 8, "calls that fail")
        echo = " ".join([*key_services.secrets, key_services.password])
        for answer in (Answer(200, "<html>%s</html>" % echo), Answer(403, '{"Code": "No", "Message": "%s"}' % echo)):
            for request in (("GET", "/latest/meta-data/"), ("GET", "/agent"), ("POST", "/")):
                key_services.ordered[request] = answer
            if source != "file":
                words = "NoKey: .*what came isn't JSON" if answer.status == 200 else "403 KeyRefused: .*: No: "
                wait_for_word(flow, copy, words)
        key_services.ordered.clear()
        wait_until_delivered(service)
        assert copy.stop() == 0
        secrets = [secret for secret in [*key_services.secrets, key_services.password] if secret]
        written = "".join(path.read_text() for path in copy.directory.iterdir() if path.suffix != ".py")
    assert " DEBUG " in written and len(secrets) >= 2
    assert [secret for secret in secrets if secret in written] == []


@pytest.mark.quick
def test_what_came_at_run_time_is_hidden_from_lines_formatted_later():
    formatter = RedactingFormatter("%(levelname)s %(message)s")
    record = dispatch_data.logging.LogRecord("x", 20, "", 0, "new-secret-of-today", (), None)
    assert "new-secret-of-today" in formatter.format(record)
    redactor.add(time.time(), "new-secret-of-today", "", None)
    assert formatter.format(record).endswith("INFO ***")


# ---- the sources' odd answers ---------------------------------------------------------------------------------------

NAMES = {"SLS_CREDENTIALS": "SLS_CREDENTIALS_TO"}


def place_with(source):
    return logstore_config("p", "l", endpoint="e", credentials=source, variables=NAMES)


def keys_from(source):
    """Keys that nobody renews but who calls `renew`."""
    return CredentialSource(place_with(source))


@pytest.fixture
def sources(key_services, monkeypatch, tmp_path):
    """Returns the CredentialSource of a source, played by `key_services`."""
    for name, text in key_services.environment().items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:%d" % key_services.port)
    monkeypatch.setattr(dispatch_data, "ECS_METADATA_URL", key_services.metadata)

    def keys(source):
        return keys_from({"uri": key_services.agent, "file": "file:%s" % (tmp_path / "key")}.get(source, source))

    return keys


def failure_of(keys):
    with pytest.raises(CallError) as caught:
        keys.refresh()
    assert keys.key is None and keys.failure.code == caught.value.code
    return caught.value


def key_in(key_services, **changes):
    key = dict(key_services.new_key("test"), **changes)
    return json.dumps({name: value for name, value in key.items() if value is not None})


ODD = [
    # status, body (a function of key_services where it has a key), code, words, whether it may pass
    (200, "<html>Log in here</html>", "NoKey", "what came isn't JSON with AccessKeyId, ", True),
    (200, "", "NoKey", "isn't JSON", True),
    (200, "[]", "NoKey", "isn't JSON", True),
    (200, "null", "NoKey", "isn't JSON", True),
    (200, lambda it: key_in(it, Code="Failed", Message="no"), "KeyRefused", "Failed: no", False),
    (200, lambda it: key_in(it, AccessKeyId=None), "NoKey", "isn't JSON .*; look at AccessKeyId; ", True),
    (200, lambda it: key_in(it, AccessKeyId=7), "NoKey", "isn't JSON .*; look at AccessKeyId; ", True),
    (200, lambda it: key_in(it, SecurityToken=""), "NoKey", "isn't JSON .*; look at SecurityToken; ", True),
    (200, lambda it: key_in(it, AccessKeySecret="a\r\nb"), "NoKey", "isn't JSON .*; look at AccessKeySecret; ", True),
    (200, lambda it: key_in(it, Expiration=None), "NoKey", "isn't JSON .*; look at Expiration, a time with ", True),
    (200, lambda it: key_in(it, Expiration="tomorrow"), "NoKey", "isn't JSON .*; look at Expiration, ", True),
    (200, lambda it: key_in(it, Expiration="2020-01-01T00:00:00Z"), "NoKey", "dead: .*ended .*2020-01-01 00:00", True),
    (302, "", "KeyRefused", "302 KeyRefused: ", False),
    (401, "", "KeyRefused", "401 KeyRefused: ", False),
    (429, "", "NoKey", "429 NoKey: ", True),
    (500, '{"Code": "InternalError"}', "KeyRefused", "500 KeyRefused: .*: InternalError; ", True),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("source", ["ecs:dispatch-data", "uri", "oidc"])
@pytest.mark.parametrize("status, body, code, words, is_transient", ODD)
def test_odd_answers(key_services, sources, source, status, body, code, words, is_transient):
    text = body if isinstance(body, str) else body(key_services)
    if source == "oidc" and status == 200 and text.startswith("{"):
        text = '{"Credentials": %s}' % text
    path = {"uri": "/agent", "oidc": "/"}.get(source, "/latest/meta-data")
    answer = Answer(status, text, {"Location": key_services.agent} if status == 302 else {})
    key_services.ordered["POST" if source == "oidc" else "GET", path] = answer
    failure = failure_of(sources(source))
    assert (failure.code, failure.is_transient()) == (code, is_transient)
    assert re.search(words, describe_error(failure, logstore_config("", "", variables=NAMES)))
    assert failure.hint
    assert key_services.asked["agent"] == (source == "uri"), "no redirect is followed"


@pytest.mark.quick
@pytest.mark.parametrize("disabled, gets_a_key", [("", True), ("false", True), ("true", False), ("1", False)])
@pytest.mark.parametrize("status", [404, 405])
def test_the_older_form_where_the_hardened_one_does_not_exist(
    key_services, sources, monkeypatch, status, disabled, gets_a_key
):
    monkeypatch.setenv("ALIBABA_CLOUD_IMDSV1_DISABLED", disabled)
    key_services.ordered["PUT", "/latest/api/token"] = Answer(status, "<html>no</html>")
    keys = sources("ecs")
    if gets_a_key:
        keys.refresh()
        assert keys.key.role == "dispatch-data"
    else:
        assert "%d KeyRefused: 127.0.0.1/latest/api/token" % status in str(failure_of(keys))
        assert key_services.asked["metadata"] == 1


@pytest.mark.quick
@pytest.mark.parametrize(
    "status, body, words",
    [
        (403, "", "403 KeyRefused: 127.0.0.1/latest/api/token"),
        (500, "", "500 KeyRefused: 127.0.0.1/latest/api/token"),
        (302, "", "302 KeyRefused: 127.0.0.1/latest/api/token"),
        (200, "a b\r\nc: d", "InvalidHeader"),
    ],
)
def test_the_older_form_is_not_for_other_failures_of_the_hardened_one(key_services, sources, status, body, words):
    key_services.ordered["PUT", "/latest/api/token"] = Answer(status, body)
    failure = failure_of(sources("ecs"))
    assert words in str(failure)
    assert key_services.asked["metadata"] == 1


@pytest.mark.quick
def test_what_is_no_role_gives_no_key(key_services, sources):
    key_services.ordered["GET", "/latest/meta-data"] = Answer(200, "<html>no role</html>")
    assert "isn't JSON" in str(failure_of(sources("ecs")))


@pytest.mark.quick
@pytest.mark.parametrize(
    "expiration",
    [
        "2033-05-18T03:33:20Z",
        "2033-05-18T03:33:20.000Z",  # what JavaScript's toISOString writes
        "2033-05-18T03:33:20.123456789+00:00",
        "2033-05-18T11:33:20+08:00",
        "2033-05-17T23:33:20.5-0400",
        "2033-05-18 03:33:20z",
        2000000000,
        2000000000.25,
        "2000000000",
        2000000000000,
    ],
)
def test_the_end_of_a_key_in_any_form_that_says_one(key_services, expiration):
    assert int(parse_credentials(key_in(key_services, Expiration=expiration)).end) == 2000000000


@pytest.mark.quick
@pytest.mark.parametrize(
    "expiration",
    [
        "2033-05-18T03:33:20",  # in which zone?
        "2033-05-18",
        "2033-05-18T03:33Z",
        "05/18/2033 03:33:20Z",
        "2033-05-18T03:33:20 CST",
        "2033-05.18-18T03:33:20Z",
        "",
        20330518033320,
        "20330518",
        3600,
        True,
        [2000000000],
        float("nan"),
        float("inf"),
        10**400,
    ],
)
def test_what_may_be_any_time_is_none(key_services, expiration):
    with pytest.raises(CallError, match=r"NoKey: .*; look at Expiration, a time with its zone such as ") as caught:
        parse_credentials(key_in(key_services, Expiration=expiration))
    assert "20330518" not in str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize("zone", ["Asia/Shanghai", "America/New_York"])
def test_an_end_beyond_all_calendars_can_be_shown(key_services, monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert str(parse_credentials(key_in(key_services, Expiration="9999-12-31T23:59:59Z"))).startswith("ends 2286-")
    finally:
        monkeypatch.undo()
        time.tzset()


STS_REFUSALS = {
    "no such role": (dict(role_exists=False), "404 KeyRefused: sts.aliyuncs.com/: EntityNotExist.Role: "),
    "no trust": (dict(trusts=False), "400 KeyRefused: sts.aliyuncs.com/: AuthenticationFail.NoPermission: "),
    "a token that has expired": (dict(oidc_tokens={"another"}), ": AuthenticationFail.OIDCToken.Expired: "),
    "another provider": (dict(provider_arn="another"), ": AuthenticationFail.NoPermission: No such OIDC Provider"),
}


@pytest.mark.quick
@pytest.mark.parametrize("refusal", list(STS_REFUSALS))
def test_what_sts_says_is_shown(key_services, sources, refusal):
    attributes, words = STS_REFUSALS[refusal]
    for name, value in attributes.items():
        setattr(key_services, name, value)
    failure = failure_of(sources("oidc"))
    assert words in str(failure) and failure.kind == ErrorKind.CONFIG and "does it trust" in failure.hint


@pytest.mark.quick
def test_errors_in_xml_and_throttling(key_services, sources):
    body = "<?xml version='1.0'?><Error><Code>Throttling.User</Code><Message>slow</Message></Error>"
    key_services.ordered["POST", "/"] = Answer(400, body)
    failure = failure_of(sources("oidc"))
    assert "400 NoKey: sts.aliyuncs.com/: Throttling.User: slow" in str(failure) and failure.is_transient()


@pytest.mark.quick
def test_the_token_of_the_service_account_is_read_anew_each_time(key_services, sources):
    keys = sources("oidc")
    keys.refresh()
    key_services.oidc_tokens = {"the next token"}
    with pytest.raises(CallError):
        keys.refresh()
    key_services.write_oidc_token("the next token")
    keys.refresh()
    assert key_services.given_out["STS"] == 2


@pytest.mark.quick
@pytest.mark.parametrize("host", ["", "sts-vpc.cn-hangzhou.aliyuncs.com"])
def test_the_host_of_sts(key_services, sources, monkeypatch, host):
    monkeypatch.setenv("ALIBABA_CLOUD_STS_ENDPOINT", host)
    key_services.trusts = False
    assert "KeyRefused: %s/: " % (host or "sts.aliyuncs.com") in str(failure_of(sources("oidc")))
    key_services.trusts = True
    sources("oidc").refresh()


@pytest.mark.quick
def test_passwords_for_others_are_not_sent(key_services, sources, monkeypatch, tmp_path):
    """As requests does with the default of ~/.netrc, for each host that it doesn't know."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password for-others\n")
    monkeypatch.setenv("NETRC", str(netrc))
    sources("oidc").refresh()
    sources("uri").refresh()
    assert set(key_services.last_headers) == {"STS", "agent"}
    assert not any("authorization" in headers for headers in key_services.last_headers.values())


@pytest.mark.quick
def test_sts_must_be_who_it_says(key_services, sources, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    failure = failure_of(sources("oidc"))
    assert "CERTIFICATE_VERIFY_FAILED" in str(failure)
    assert failure.code == "CertificateNotTrusted" and failure.is_transient()
    assert key_services.asked["STS"] == 0


@pytest.mark.quick
def test_the_password_of_an_agent(key_services, sources):
    key_services.password = "secret-0"
    keys = sources("uri")
    keys.refresh()
    assert str(keys).startswith("http://127.0.0.1:%d, ends " % key_services.port)
    key_services.password = "secret-1"
    with pytest.raises(CallError, match="401 KeyRefused"):
        keys.refresh()
    assert keys.key, "the key before stays"


@pytest.mark.quick
@pytest.mark.parametrize("beginning", ["", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"])
def test_a_source_that_never_comes_to_an_end_is_given_up_soon(monkeypatch, beginning):
    """It takes the connection and says nothing, or answers byte by byte for as long as anybody listens."""
    monkeypatch.setattr(dispatch_data, "LOCAL_TIMEOUT", 2.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)

        def answer():
            connection = listening.accept()[0]
            with connection, contextlib.suppress(OSError):
                connection.sendall(beginning.encode())
                while beginning:
                    connection.sendall(b" ")
                    time.sleep(0.1)
                connection.recv(100000)
                connection.recv(1)  # until the other side gives up

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        failure = failure_of(keys_from("http://127.0.0.1:%d/" % listening.getsockname()[1]))
        thread.join(LIMIT)
    assert failure.code == "NoKey" and ("the answer has no end" if beginning else "timed out") in str(failure)
    assert not thread.is_alive(), "the connection is still open"


@pytest.mark.quick
@pytest.mark.parametrize("mode, is_refused", [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_a_file_that_others_can_read_is_refused(key_services, sources, tmp_path, mode, is_refused):
    key_services.write_key(str(tmp_path / "key"), mode)
    keys = sources("file")
    if is_refused:
        failure = failure_of(keys)
        assert failure.code == "KeyFileExposed" and failure.kind == ErrorKind.CONFIG
        words = describe_error(failure, logstore_config("", "", variables=NAMES))
        assert "chmod 600" in words and "defaultMode: 0400" in words and "role" not in words
    else:
        keys.refresh()
        assert keys.key.role == ""


@pytest.mark.quick
@pytest.mark.parametrize("text", [None, "", "{", '{"AccessKeyId": "x"}', b"\xff"])
def test_a_file_that_is_none_or_half_a_key(sources, tmp_path, text):
    if text is not None:
        (tmp_path / "key").write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "key").chmod(0o600)
    failure = failure_of(sources("file"))
    assert failure.code == "NoKey" and failure.is_transient()


# ---- renewal --------------------------------------------------------------------------------------------------------


class Source:
    """A source that the test holds the strings of."""

    def __init__(self, monkeypatch):
        self.life = 3600.0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = self.asking = self.most_at_once = 0
        self.error = None
        self.lock = threading.Lock()
        monkeypatch.setitem(dispatch_data.KEY_FETCHERS, "ecs", self)
        monkeypatch.setattr(dispatch_data, "REFRESH_POLL", 0.01)

    def __call__(self, _):
        with self.lock:
            self.asked += 1
            self.asking += 1
            self.most_at_once = max(self.most_at_once, self.asking)
            number = self.asked
        assert self.may_answer.wait(LIMIT)
        with self.lock:
            self.asking -= 1
        if self.error:
            raise self.error
        return dispatch_data.AccessKey(
            "id-%d" % number, "secret-%d" % number, "token-%d" % number, time.time() + self.life
        )


@pytest.fixture
def source(monkeypatch):
    it = Source(monkeypatch)
    yield it
    it.life = 3600.0
    it.may_answer.set()


@pytest.mark.quick
@pytest.mark.parametrize("life, ahead", [(36000, 900), (3600, 900), (1800, 900), (600, 300), (10, 5)])
def test_a_key_is_renewed_a_quarter_of_an_hour_ahead_or_at_half_its_life(source, life, ahead):
    source.life = life
    keys = keys_from("ecs")
    keys.refresh()
    assert keys.key.end - keys.refresh_at == pytest.approx(ahead, abs=1)


@pytest.mark.quick
def test_one_thread_renews_and_nobody_waits_for_it(source, service):
    """The renewal hangs; whoever asks goes on with the key there is, and fails at once when that has ended."""
    source.life = 3.0
    keys = CredentialSource(place_with("ecs")).start()
    first = keys.get_credentials()
    source.may_answer.clear()
    service.wait_for(lambda: source.asking == 1, LIMIT, "a renewal that hangs")
    outcomes = []

    def call():
        try:
            outcomes.append(keys.get_credentials())
        except CallError as failure:
            outcomes.append(failure)

    threads = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(outcomes) == 20, "somebody waits"
    service.wait_for(lambda: time.time() >= first.end, LIMIT, "the end of the key")
    with pytest.raises(CallError, match=r"NoKey: the key at hand: ended .*; another is on its way") as caught:
        keys.get_credentials()
    assert caught.value.is_transient()
    source.life = 3600.0
    source.may_answer.set()
    service.wait_for(lambda: keys.key is not first, LIMIT, "another key")
    assert keys.get_credentials().get_access_key_id() == "id-2"
    assert source.most_at_once == 1


def test_who_has_waited_in_vain_for_the_first_key_has_done_so_for_all(source, monkeypatch):
    """One thread sends the puts of all targets: it would wait for each put to the one whose source hangs."""
    source.may_answer.clear()
    keys = CredentialSource(place_with("ecs")).start()
    monkeypatch.setattr(dispatch_data, "FIRST_CREDENTIALS_TIMEOUT", 0.1)
    with pytest.raises(CallError, match="NoKey"):
        keys.get_credentials()
    monkeypatch.setattr(dispatch_data, "FIRST_CREDENTIALS_TIMEOUT", 10 * LIMIT)
    told = []

    def ask():
        try:
            keys.get_credentials()
        except CallError as error:
            told.append(error.code)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LIMIT / 4)
    assert told == ["NoKey"]


@pytest.mark.quick
def test_many_who_ask_first_get_the_first_key(source):
    keys = CredentialSource(place_with("ecs")).start()
    source.may_answer.clear()
    got = []
    threads = [threading.Thread(target=lambda: got.append(keys.get_credentials())) for _ in range(20)]
    for thread in threads:
        thread.start()
    source.may_answer.set()
    for thread in threads:
        thread.join(LIMIT)
    assert {key.get_access_key_id() for key in got} == {"id-1"} and len(got) == 20
    assert (source.asked, source.most_at_once) == (1, 1)


@pytest.mark.quick
def test_renewals_that_fail_are_tried_again_for_ever_whatever_the_reason(source, service):
    source.error = RuntimeError("a defect")
    keys = CredentialSource(place_with("ecs")).start()
    with pytest.raises(CallError, match="NoKey: RuntimeError: a defect"):
        keys.get_credentials()
    service.wait_for(lambda: source.asked >= 3, LIMIT, "further tries")
    source.error = None
    service.wait_for(lambda: keys.key is not None, LIMIT, "a key after all")
    assert keys.get_credentials() is keys.key


BLAMING = [
    # code, message, whether that blames the key
    ("Unauthorized", "AccessKeyId not found: id-1", True),
    ("Unauthorized", "AccessKeyId is disabled: id-1", True),
    ("Unauthorized", "The security token you provided has expired", True),
    ("Unauthorized", "The security token you provided is invalid", True),
    ("InvalidAccessKeyId", "", True),
    ("SignatureNotMatch", "", True),
    ("SecurityTokenExpired", "", True),
    ("Unauthorized", "Your SLS service has been forbidden", False),
    ("Unauthorized", "denied by sts or ram, action: log:PostLogStoreLogs", False),
    ("Unauthorized", "denied by sts or ram, action: log:ListShards, resource: acs:log:x:1:project/expired", False),
    ("ProjectNotExist", "", False),
    ("InternalServerError", "", False),
]


@pytest.mark.quick
@pytest.mark.parametrize("code, message, blames_key", BLAMING)
def test_a_key_that_is_refused_is_replaced_but_not_without_end(source, code, message, blames_key):
    keys = keys_from("ecs")
    keys.refresh()
    due = keys.refresh_at
    refused = CallError(code, message, 500 if code == "InternalServerError" else 401)
    keys.on_auth_failure(refused, keys.key.security_token)
    assert keys.refresh_at == due, "one that has just come is not to blame at once"
    keys.refreshed_at -= 60
    keys.on_auth_failure(refused, "token of the key before")
    assert keys.refresh_at == due
    keys.on_auth_failure(CallError(code, message, 401), keys.key.security_token)
    assert (keys.refresh_at == 0.0) == blames_key
    assert ("is asked for another key" in refused.hint) == blames_key
    assert refused.is_transient() == (blames_key or code == "InternalServerError")


@pytest.mark.quick
@pytest.mark.parametrize("code, message, blames_key", BLAMING)
@pytest.mark.parametrize("token", ["token", ""])
def test_only_a_token_that_has_run_out_is_the_end(code, message, blames_key, token):
    config = logstore_config(access_key_id="id", access_key="secret", security_token=token, variables=NAMES)
    keys = CredentialSource(config)
    refused = CallError(code, message, 401)
    keys.on_auth_failure(refused, token)
    assert keys.is_expired == (bool(token and blames_key) and "expired" in (code + message).lower())
    assert refused.hint == CallError(code, message, 401).hint


@pytest.mark.quick
def test_secrets_stay_hidden_until_they_are_of_no_use(monkeypatch):
    redactor = Redactor()
    redactor.add(float("inf"), "password")
    redactor.add(time.time() - 3600 - 1, "long ago")
    redactor.add(time.time() + 60, "key", "token")
    redactor.add(time.time(), "dead, if this clock is right", "", None)
    assert set(redactor.secrets) == {"password", "key", "token", "dead, if this clock is right"}


@pytest.mark.quick
def test_places_with_one_source_share_one_key(monkeypatch):
    monkeypatch.setattr(CredentialSource, "refresh_loop", lambda _: None)
    one = place_with("file:/one")
    same = dataclasses.replace(one, endpoint="f", region="r", project="q", logstore="m")
    other = dataclasses.replace(one, credentials="file:/two")
    sources = CredentialSources()
    assert sources.of(one) is sources.of(same)
    assert sources.of(one) is not sources.of(other)


# ---- settings -------------------------------------------------------------------------------------------------------

TRIO = dict.fromkeys(dispatch_data.OIDC_VARIABLES, "/x")


def read(**changes):
    environment = dict(GOOD, SLS_AK_ID=None, SLS_AK_KEY=None)
    environment.update(changes)
    return read_settings({name: text for name, text in environment.items() if text is not None})


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, credentials",
    [
        (dict(SLS_CREDENTIALS="ecs"), "ecs"),
        (dict(SLS_CREDENTIALS="ecs:a.Role-1_"), "ecs:a.Role-1_"),
        (dict(SLS_CREDENTIALS="oidc", **TRIO), "oidc"),
        (dict(SLS_CREDENTIALS="http://localhost:8080/key?a=b"), "http://localhost:8080/key?a=b"),
        (dict(SLS_CREDENTIALS="uri", ALIBABA_CLOUD_CREDENTIALS_URI="http://1.2.3.4"), "http://1.2.3.4"),
        (dict(SLS_CREDENTIALS="file:/no/such/file"), "file:/no/such/file"),
        (dict(SLS_CREDENTIALS="ecs", SLS_AK_ID="", SLS_AK_KEY="", SLS_STS_TOKEN=""), "ecs"),
    ],
)
def test_each_form_of_the_setting(changes, credentials):
    place = read(**changes).source
    assert (place.credentials, place.access_key_id, place.access_key, place.security_token) == (credentials, "", "", "")


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(SLS_CREDENTIALS="ECS"), r"SLS_CREDENTIALS: its value \(not shown\) is wrong; right would be ecs, "),
        (dict(SLS_CREDENTIALS="ecs:a/b"), "SLS_CREDENTIALS: "),
        (dict(SLS_CREDENTIALS="https://agent"), "SLS_CREDENTIALS: "),
        (dict(SLS_CREDENTIALS="http://a b"), "SLS_CREDENTIALS: "),
        (dict(SLS_CREDENTIALS="file:relative"), "SLS_CREDENTIALS: "),
        (dict(SLS_CREDENTIALS="uri"), "ALIBABA_CLOUD_CREDENTIALS_URI is missing: SLS_CREDENTIALS=uri takes it"),
        (
            dict(SLS_CREDENTIALS="uri", ALIBABA_CLOUD_CREDENTIALS_URI="ftp://secret"),
            r"ALIBABA_CLOUD_CREDENTIALS_URI: its value \(not shown\) is wrong",
        ),
        (dict(SLS_CREDENTIALS="ecs", SLS_AK_ID="id"), "SLS_AK_ID: SLS_CREDENTIALS stands in its place; leave out one"),
        (dict(SLS_CREDENTIALS="ecs", SLS_STS_TOKEN="t"), "SLS_STS_TOKEN: SLS_CREDENTIALS stands in its place"),
        *[
            (dict(TRIO, SLS_CREDENTIALS="oidc", **{name: None}), name + " is missing: SLS_CREDENTIALS=oidc takes it")
            for name in TRIO
        ],
    ],
)  # fmt: skip
def test_mistakes_get_one_line(changes, line):
    with pytest.raises(SettingsError) as caught:
        read(**changes)
    (problem,) = caught.value.args
    assert re.match(line, problem) and "secret" not in problem


@pytest.mark.quick
def test_source_id_secret_and_token_are_taken_from_one_line():
    settings = read(
        SLS_CREDENTIALS="ecs",
        SLS_LOGSTORE_TO2="b",
        SLS_LOGSTORE_TO3="c",
        SLS_AK_ID_TO2="id",
        SLS_AK_KEY_TO2="key",
        SLS_CREDENTIALS_TO3="ecs:other",
    )
    one, two, three = [target.config for target in settings.targets]
    assert (one.credentials, one.access_key_id) == ("ecs", "")
    assert (two.credentials, two.access_key_id, two.access_key) == ("", "id", "key")
    assert (three.credentials, three.access_key_id) == ("ecs:other", "")
    assert [place.variables["SLS_AK_ID"] for place in (one, two, three)] == [
        "SLS_CREDENTIALS",
        "SLS_AK_ID_TO2",
        "SLS_CREDENTIALS_TO3",
    ]


@pytest.mark.quick
def test_passwords_in_the_url_of_an_agent_are_secrets():
    keys_from("http://user:p%40ss@localhost/key?sesame")
    assert {"p%40ss", "p@ss", "sesame"} <= set(redactor.secrets)


def test_a_mistake_in_the_settings_is_status_2(service):
    ended = run_program(settings_for(service, SLS_CREDENTIALS="oidc", **NO_KEY))
    assert ended.returncode == 2
    assert all(" is missing: SLS_CREDENTIALS=oidc takes it" in line for line in ended.stderr.splitlines()[:3])
