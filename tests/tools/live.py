"""What a real account answers, beside what the local Log Service does: run by hand by whoever has one.

    SLS_LIVE_ENDPOINT=https://cn-hangzhou.log.aliyuncs.com SLS_LIVE_AK_ID=... SLS_LIVE_AK_KEY=... \\
        SLS_LIVE_PROJECT=a-project-to-spare python tests/tools/live.py

SLS_LIVE_STS_TOKEN goes with a temporary key, SLS_LIVE_GROUP_TIMEOUT (20) and SLS_LIVE_HEARTBEAT_INTERVAL (10) are
seconds. The project has to exist; in it logstores of its own are made, which keep
their logs for a day, and are removed in the end: some 50 MB are written, for a few minutes. With names of probes as
arguments it runs these alone.

Each probe makes its calls to the local service first, whose answers are the expectation, and to the account then. The
exit status is 0 when they were the same, 1 when not, 2 when a setting is missing.
"""

import argparse
import base64
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from aliyun.log import LogClient, LogException  # noqa: E402
from aliyun.log.proto import LogGroup  # noqa: E402
from harness import HEARTBEAT_INTERVAL, Copies, make_log_group  # noqa: E402
from local_log_service import LocalLogService, cursors  # noqa: E402
from local_log_service.verdict import compare  # noqa: E402

LIMIT = 180.0  # seconds that anything may take: the service takes up to a minute for new logstores and shards
POLL_INTERVAL = 0.2  # seconds
PATIENCE = 60  # seconds for which a consumer may be silent that is not to be forgotten
DAY = 24 * 3600  # seconds
GROUPS_TO_DISPATCH = 200
MIB = 1024 * 1024


class Place:
    """Where the probes call, and what `copies.Copies` has to know of it.

    Attributes:
        endpoint: with the scheme, if it has one.
        access_keys: access key id -> secret, of one key.
        security_token: of a temporary key, else None.
        project: one that exists.
        group_timeout: seconds after which a silent consumer is forgotten, where a probe waits for that.
        heartbeat_interval: seconds between the heartbeats of the copies.
    """

    def __init__(
        self,
        endpoint: str,
        access_key_id: str,
        access_key: str,
        security_token: Optional[str],
        project: str,
        group_timeout: int,
        heartbeat_interval: str,
        local: Optional[LocalLogService] = None,
    ) -> None:
        """Take `local` when the place is one: it is reached in a way of its own."""
        self.endpoint = endpoint
        self.access_keys = {access_key_id: access_key}
        self.security_token = security_token
        self.project = project
        self.group_timeout = group_timeout
        self.heartbeat_interval = heartbeat_interval
        self._local = local

    def environment(self) -> Dict[str, str]:
        """The environment variables without which it can't be reached."""
        return self._local.environment() if self._local else {}

    def client(self, access_key_id: str = "", access_key: str = "", security_token: Optional[str] = None) -> LogClient:
        """A client; what is not given is what is right."""
        ((right_id, right_key),) = self.access_keys.items()
        client = LogClient(
            self.endpoint,
            access_key_id or right_id,
            access_key or right_key,
            security_token or self.security_token,
            source="10.0.0.1",
        )
        if self._local:
            client._session.trust_env = False
            client._session.proxies = {"http": self._local.environment()["http_proxy"]}
        return client


class Live:
    """The calls of the probes to one place, what they were answered, and the logstores that they made."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.project = place.project
        self.client = place.client()
        self.logstores: List[str] = []
        self.names: Dict[str, str] = {place.project: "<project>", next(iter(place.access_keys)): "<key id>"}
        self._run = uuid.uuid4().hex[:8]

    def logstore(self, shard_count: int = 1) -> str:
        """Make a logstore and wait until it takes calls; return its name."""
        name = "dispatch-live-%s-%d" % (self._run, len(self.logstores))
        self.names[name] = "<logstore>"
        self.logstores.append(name)
        self.client.create_logstore(self.project, name, ttl=1, shard_count=shard_count)

        def exists() -> bool:
            with contextlib.suppress(LogException):
                shards = self.client.list_shards(self.project, name).get_shards_info()
                return len(shards) == shard_count and bool(self.begin(name))
            return False

        wait_for(exists, "a new logstore")
        return name

    def group(self, logstore: str, timeout: int = PATIENCE) -> str:
        """Make a consumer group whose consumers may be silent for `timeout` seconds; return its name."""
        self.client.create_consumer_group(self.project, logstore, "live-group", timeout)
        return "live-group"

    def begin(self, logstore: str, shard: int = 0) -> str:
        """The cursor of the begin of a shard."""
        return self.client.get_begin_cursor(self.project, logstore, shard).get_cursor()

    def put(self, logstore: str, log_group: LogGroup, client: Optional[LogClient] = None) -> str:
        """Put, once the logstore is known to whatever takes puts; return what was answered."""
        outcome = ""

        def answered() -> bool:
            nonlocal outcome
            outcome = self.outcome(client or self.client, "put_log_raw", self.project, logstore, log_group)
            return "LogStoreNotExist" not in outcome

        wait_for(answered, "a logstore that takes puts")
        return outcome

    def outcome(self, client: LogClient, call: str, *arguments: Any, **named: Any) -> str:
        """Make a call; return what was answered: status, code, the shape of the message, names of headers."""
        answers: List[Any] = []
        client._session.hooks["response"] = [lambda response, *_, **__: answers.append(response)]
        try:
            getattr(client, call)(*arguments, **named)
        except LogException as error:
            if not answers:
                return "no answer: %s" % error.get_error_code()
        finally:
            client._session.hooks["response"] = []
        answer = answers[-1]
        words = [str(answer.status_code)]
        with contextlib.suppress(ValueError, TypeError, KeyError):
            document = answer.json()
            words += [document["errorCode"], '"%s"' % self.shape(document["errorMessage"])]
        headers = sorted(name.lower() for name in answer.headers if name.lower().startswith("x-log-"))
        return "%s [%s]" % (" ".join(words), " ".join(headers))

    def shape(self, message: str) -> str:
        """A message without what is another one each time: names and numbers."""
        for name, stands_for in sorted(self.names.items(), key=lambda pair: -len(pair[0])):
            message = message.replace(name, stands_for)
        return re.sub(r"[0-9]+", "N", message)

    def log_groups(self, logstore: str) -> List[bytes]:
        """All that a logstore holds."""
        found: List[bytes] = []
        for shard in self.client.list_shards(self.project, logstore).get_shards_info():
            cursor, at_end = self.begin(logstore, shard["shardID"]), False
            while not at_end:
                pulled = self.client.pull_logs(self.project, logstore, shard["shardID"], cursor, 1000)
                found += [group.SerializeToString() for group in pulled.get_loggroup_list().LogGroups]
                at_end = pulled.get_next_cursor() == cursor
                cursor = pulled.get_next_cursor()
        return found

    def clean_up(self) -> None:
        """Remove every logstore that was made."""
        for name in self.logstores:
            with contextlib.suppress(LogException):
                self.client.delete_logstore(self.project, name)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds; raise TimeoutError where it does not within LIMIT."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("%s: not within %d s" % (what, LIMIT))
        time.sleep(POLL_INTERVAL)


def logs(size: int = 0, offset: int = 0, key: str = "key") -> LogGroup:
    """A LogGroup of one log, or of `size` bytes and more; its time is `offset` seconds from now."""
    group = LogGroup(Topic="live", Source="10.0.0.1")
    for _ in range(max(1, -(-size // 100000))):
        group.Logs.add(Time=int(time.time()) + offset).Contents.add(Key=key, Value="x" * (100000 if size else 10))
    return group


# ---- the probes: each returns what was answered, in words


def wrong_id(live: Live) -> str:
    client = live.place.client(access_key_id="LTAInobodyhasthisid")
    live.names["LTAInobodyhasthisid"] = "<key id>"
    return live.outcome(client, "list_shards", live.project, "some-logstore")


def wrong_secret(live: Live) -> str:
    outcome = live.outcome(live.place.client(access_key="wrong"), "list_shards", live.project, "some-logstore")
    return re.sub(r"(?i)(signature) [A-Za-z0-9+/=]+", r"\1 <signature>", outcome)


def dead_token(live: Live) -> str:
    client = live.place.client(security_token="CAISdeadtoken")
    return live.outcome(client, "list_shards", live.project, "some-logstore")


def missing_logstore(live: Live) -> str:
    live.names["no-such-logstore"] = "<logstore>"
    return live.outcome(live.client, "list_shards", live.project, "no-such-logstore")


def put_of_one_log(live: Live) -> str:
    return live.put(live.logstore(), logs())


def put_of_11_mb(live: Live) -> str:
    return live.put(live.logstore(), logs(11 * MIB))


def put_of_31_mb(live: Live) -> str:
    return live.put(live.logstore(), logs(31 * MIB))


def logs_of_8_days_ago(live: Live) -> str:
    return live.put(live.logstore(), logs(offset=-8 * DAY))


def logs_1_hour_ahead(live: Live) -> str:
    return live.put(live.logstore(), logs(offset=3600))


def empty_log_group(live: Live) -> str:
    return live.put(live.logstore(), LogGroup(Topic="live", Source="10.0.0.1"))


def invalid_key(live: Live) -> str:
    return live.put(live.logstore(), logs(key=""))


def pulls(live: Live) -> str:
    logstore = live.logstore()
    begin = live.begin(logstore)
    empty = live.outcome(live.client, "pull_logs", live.project, logstore, 0, begin, 10)
    live.put(logstore, logs())
    wait_for(lambda: bool(live.log_groups(logstore)), "what was put")
    return "without logs %s, with %s" % (
        empty,
        live.outcome(live.client, "pull_logs", live.project, logstore, 0, begin, 10),
    )


def cursor_arithmetic(live: Live) -> str:
    logstore = live.logstore()
    for _ in range(3):
        live.put(logstore, logs())
    wait_for(lambda: len(live.log_groups(logstore)) == 3, "what was put")
    begin = live.begin(logstore)
    one = live.client.pull_logs(live.project, logstore, 0, begin, 1)
    rest = live.client.pull_logs(live.project, logstore, 0, one.get_next_cursor(), 10)
    end = live.client.get_end_cursor(live.project, logstore, 0).get_cursor()
    numbers = [cursors.decode(cursor) for cursor in (begin, one.get_next_cursor(), rest.get_next_cursor(), end)]
    return "counts %s, cursors +%d +%d, end +%d" % (
        [one.get_loggroup_count(), rest.get_loggroup_count()],
        numbers[1] - numbers[0],
        numbers[2] - numbers[1],
        numbers[3] - numbers[2],
    )


def cursor_beyond_the_end(live: Live) -> str:
    logstore = live.logstore()
    beyond = cursors.encode(cursors.decode(live.begin(logstore)) + 1000)
    outcome = live.outcome(live.client, "pull_logs", live.project, logstore, 0, beyond, 10)
    none = base64.b64encode(b"no number").decode()
    return "%s; no cursor: %s" % (outcome, live.outcome(live.client, "pull_logs", live.project, logstore, 0, none, 10))


def group_with_another_timeout(live: Live) -> str:
    logstore = live.logstore()
    group = live.group(logstore)
    live.names[group] = "<group>"
    return live.outcome(live.client, "create_consumer_group", live.project, logstore, group, PATIENCE + 10)


def check_points_of_others(live: Live) -> str:
    """Of a consumer that is not the holder, and of one that is not known: not forced and forced."""
    logstore = live.logstore()
    group, cursor = live.group(logstore), live.begin(logstore)
    wait_for(lambda: heartbeat(live, logstore, "holder") == [0], "the shard")
    heartbeat(live, logstore, "other")
    outcomes = []
    for consumer in ("other", "stranger"):
        live.names[consumer] = "<consumer>"
        for force in (False, True):
            outcomes.append(
                "%s%s: %s"
                % (
                    consumer,
                    " by force" if force else "",
                    live.outcome(
                        live.client, "update_check_point", live.project, logstore, group, 0, cursor, consumer, force
                    ),
                )
            )
    return "; ".join(outcomes)


def heartbeat(live: Live, logstore: str, consumer: str, shards: Sequence[int] = ()) -> List[int]:
    return live.client.heart_beat(live.project, logstore, "live-group", consumer, list(shards)).get_shards()


def heartbeat_of_the_forgotten(live: Live) -> str:
    logstore = live.logstore()
    group = live.group(logstore, live.place.group_timeout)
    wait_for(lambda: heartbeat(live, logstore, "silent") == [0], "the shard")
    wait_for(lambda: heartbeat(live, logstore, "heir") == [0], "the shard of the silent one")
    return live.outcome(live.client, "heart_beat", live.project, logstore, group, "silent", [0])


def split_during_consumption(live: Live) -> str:
    logstore = live.logstore()
    live.group(logstore)
    live.put(logstore, logs())
    wait_for(lambda: heartbeat(live, logstore, "consumer") == [0], "the shard")
    live.client.split_shard(live.project, logstore, 0, "8" + "0" * 31)

    def shards() -> List[Mapping[str, Any]]:
        return live.client.list_shards(live.project, logstore).get_shards_info()

    wait_for(lambda: len(shards()) == 3, "the children")
    states = ["%d %s" % (shard["shardID"], shard["status"]) for shard in shards()]
    held: List[int] = [0]

    def holds_all() -> bool:
        held[:] = heartbeat(live, logstore, "consumer", held)
        return len(held) == 3

    wait_for(holds_all, "the children, held beside their parent")
    end = live.client.get_end_cursor(live.project, logstore, 0).get_cursor()
    live.client.update_check_point(live.project, logstore, "live-group", 0, end, "consumer", False)
    wait_for(lambda: heartbeat(live, logstore, "consumer", [1, 2]) == [1, 2], "the parent, over")
    body = logs().SerializeToString()
    path, size = "/logstores/%s/shards/0" % logstore, {"x-log-bodyrawsize": str(len(body))}
    put = live.outcome(live.client, "_send", "POST", live.project, body, path, {}, size)
    return "%s; parent and children held at once, the parent over at its end; put into it: %s" % (
        ", ".join(states),
        put,
    )


def two_copies_dispatch(live: Live) -> str:
    source, nginx, click = live.logstore(2), live.logstore(), live.logstore()
    sent = []
    for number in range(GROUPS_TO_DISPATCH):
        sent.append(make_log_group(("nginx", "click")[number % 2], Source="10.0.0.1"))
        live.put(source, LogGroup.FromString(sent[-1]))
    settings = {
        "SLS_PROJECT": live.project,
        "SLS_LOGSTORE": source,
        "SLS_STS_TOKEN": live.place.security_token,
        "SLS_LOGSTORE_TO1": nginx,
        "SLS_TOPIC_TO1": "nginx",
        "SLS_LOGSTORE_TO2": click,
        "SLS_TOPIC_TO2": "click",
        "SLS_LOGSTORE_TO3": None,
        "SLS_HEARTBEAT_INTERVAL": live.place.heartbeat_interval,
    }
    for target in (nginx, click):  # until these take puts, a copy would tell of what is only new
        live.put(target, LogGroup(Topic="live", Source="10.0.0.1"))
    directory = Path(tempfile.mkdtemp())

    def delivered() -> List[bytes]:
        return live.log_groups(nginx) + live.log_groups(click)

    try:
        with Copies(live.place, directory) as copies:  # type: ignore[arg-type]
            started = [copies.start(**settings) for _ in range(2)]
            wait_for(lambda: compare(sent, delivered()).lost == 0, "everything delivered")
            # One may have delivered it all before the other could be stopped in an orderly way.
            wait_for(lambda: all("INFO consumer " in copy.log() for copy in started), "copies that have joined")
            ended = [copy.stop(signal.SIGTERM, LIMIT) for copy in started]
    finally:
        shutil.rmtree(str(directory))
    verdict = compare(sent, delivered())
    print("two copies: %s" % str(verdict))
    return "%d lost, %d foreign, copies ended with %s" % (verdict.lost, verdict.foreign, ended)


PROBES: Sequence[Callable[[Live], str]] = (
    wrong_id,
    wrong_secret,
    dead_token,
    missing_logstore,
    put_of_one_log,
    put_of_11_mb,
    put_of_31_mb,
    logs_of_8_days_ago,
    logs_1_hour_ahead,
    empty_log_group,
    invalid_key,
    pulls,
    cursor_arithmetic,
    cursor_beyond_the_end,
    group_with_another_timeout,
    check_points_of_others,
    heartbeat_of_the_forgotten,
    split_during_consumption,
    two_copies_dispatch,
)

# ---- both sides, and the table


class Row(NamedTuple):
    """A probe's name, as the local service has it, and as it was."""

    probe: str
    expected: str
    found: str


def observe(place: Place, probes: Sequence[Callable[[Live], str]]) -> Dict[str, str]:
    """What each probe found at a place, by its name. A probe that fails has found that."""
    live = Live(place)
    found = {}
    try:
        for probe in probes:
            try:
                found[probe.__name__] = probe(live)
            except (LogException, OSError, ValueError, TypeError, AssertionError) as error:
                found[probe.__name__] = "failed: %s" % live.shape(repr(error))
    finally:
        live.clean_up()
    return found


@contextlib.contextmanager
def local_place(security_token: Optional[str]) -> Iterator[Place]:
    """The local service, as strict as it can be; it wants a token where the account's key has one."""
    tokens = {"local-id": security_token} if security_token else {}
    with LocalLogService(security_tokens=tokens, check_log_times=True) as service:
        service.create_logstore("live-project", "some-logstore")
        yield Place(
            service.endpoint,
            "local-id",
            service.access_keys["local-id"],
            security_token,
            "live-project",
            group_timeout=2,
            heartbeat_interval=HEARTBEAT_INTERVAL,
            local=service,
        )


def account(environment: Mapping[str, str]) -> Place:
    """The place that the settings name. Raises KeyError for one that is missing."""
    return Place(
        environment["SLS_LIVE_ENDPOINT"],
        environment["SLS_LIVE_AK_ID"],
        environment["SLS_LIVE_AK_KEY"],
        environment.get("SLS_LIVE_STS_TOKEN"),
        environment["SLS_LIVE_PROJECT"],
        group_timeout=int(environment.get("SLS_LIVE_GROUP_TIMEOUT", "20")),
        heartbeat_interval=environment.get("SLS_LIVE_HEARTBEAT_INTERVAL", "10"),
    )


def print_table(rows: Sequence[Row]) -> None:
    for row in rows:
        same = row.expected == row.found
        print("%s %s" % (" " if same else "!", row.probe.replace("_", " ")))
        print("      as the local service has it:  %s" % row.expected)
        print("      as it was:                    %s" % ("the same" if same else row.found))


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [probe.__name__ for probe in PROBES]
    parser.add_argument("probes", nargs="*", metavar="PROBE", help="of: " + ", ".join(names))
    wanted = parser.parse_args(arguments).probes or names
    if not set(wanted) <= set(names):
        parser.error("no such probe: " + ", ".join(sorted(set(wanted) - set(names))))
    probes = [probe for probe in PROBES if probe.__name__ in wanted]
    try:
        place = account(os.environ)
    except KeyError as error:
        print("%s is not set; see the head of this file" % error.args[0], file=sys.stderr)
        return 2
    with local_place(place.security_token) as local:
        expected = observe(local, probes)
    found = observe(place, probes)
    rows = [Row(name, expected[name], found[name]) for name in expected]
    print_table(rows)
    different = sum(row.expected != row.found for row in rows)
    print("%d probes, %d different" % (len(rows), different))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
