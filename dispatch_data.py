#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["aliyun-log-python-sdk==0.9.52"]
# ///
"""Sorts the logs of one Simple Log Service (SLS) logstore into many, by Topic, in real time.

Every copy of this program joins one consumer group on the source logstore. The service shares the shards out among the
copies and keeps the checkpoints; a copy writes each LogGroup to the logstore that its Topic is routed to. Read on in
order: settings, routes, log groups (bytes), delivery, consumer, command line. Each part knows only those before it.
"""

import argparse
import base64
import concurrent.futures
import difflib
import fnmatch
import functools
import http.client
import logging
import logging.handlers
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import uuid
from collections import Counter, deque
from typing import (
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)
from urllib.parse import urlencode, urlsplit

try:
    import dateutil.parser
    import requests
    from aliyun.log import LogClient, LogException
    from aliyun.log.auth import AUTH_VERSION_1, AUTH_VERSION_4
    from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, LogHubConfig
    from aliyun.log.consumer.consumer_client import ConsumerClient
    from aliyun.log.consumer.exceptions import CheckPointException, ClientWorkerException
    from urllib3.util import wait_for_read
except ImportError as missing:
    sys.exit("dispatch_data.py: %s; install the SDK: pip install -r requirements.txt" % missing)

__version__ = "1.0.0"

log = logging.getLogger("dispatch_data")


# ---- settings: the environment, checked as a whole ------------------------------------------------------------------


class Setting(NamedTuple):
    """One row of the table of settings. `check` gives the text's value or raises ValueError(what would be right)."""

    name: str
    check: Callable[[str], object]
    default: Optional[str]
    meaning: str


def matching(pattern: str, right: str) -> Callable[[str], str]:
    """A check that a text matches `pattern` as a whole; `right` says in words what would."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(right)
        return text

    return check


def between(kind: Callable[[str], float], low: float, high: float, right: str) -> Callable[[str], float]:
    """A check for a number of the given kind (int or float) within low..high."""

    def check(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise ValueError("%s from %s to %s" % (right, low, high))
        return number

    return check


def cursor_start(text: str) -> Union[str, int]:
    """'begin', 'end', or a time as unix seconds; a time without a zone is local time, as everywhere in the SDK."""
    if text in ("begin", "end"):
        return text
    try:
        if not re.match(r"\d{4}-\d{1,2}-\d{1,2}", text):
            raise ValueError
        return max(0, int(dateutil.parser.parse(text).timestamp()))
    except (ValueError, OverflowError):
        raise ValueError("begin, end, or a time such as 2018-12-26T00:00:00+08:00") from None


def writable_directory(text: str) -> str:
    if not (os.path.isdir(text) and os.access(text, os.W_OK)):
        raise ValueError("a directory that exists and can be written to")
    return text


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


def topics(text: str) -> Tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("topics separated by commas, such as nginx,access_*")
    return names


name_of_logstore = matching(r"[A-Za-z0-9_-]{1,128}", "letters, digits, - and _")
secret = matching(r"[!-~]+", "printable characters without spaces")
REQUIRED = None

# fmt: off
# What the source needs, and each target may have for itself: with _TO for all targets, with _TO<n> for one of them.
PLACE_SETTINGS = (
    Setting("SLS_ENDPOINT",
            matching(r"(https?://)?[A-Za-z0-9.-]+(:\d{1,5})?/?", "a host such as cn-hangzhou.log.aliyuncs.com"),
            REQUIRED, "the service's host in the project's region; https:// in front turns TLS on"),
    Setting("SLS_AK_ID", secret, REQUIRED, "id of the access key"),
    Setting("SLS_AK_KEY", secret, REQUIRED, "secret of the access key"),
    Setting("SLS_STS_TOKEN", secret, "", "token of a temporary access key"),
    Setting("SLS_REGION", matching(r"[a-z0-9-]+", "a region such as cn-hangzhou"),
            "", "the project's region: switches signatures from v1 to v4"),
    Setting("SLS_PROJECT", name_of_logstore, REQUIRED, "the project"),
)
SOURCE_SETTINGS = (
    Setting("SLS_LOGSTORE", name_of_logstore, REQUIRED, "the source logstore"),
    Setting("SLS_CG", matching(r"[A-Za-z0-9_-]{1,64}", "up to 64 letters, digits, - and _"),
            REQUIRED, "the consumer group, the same for all copies"),
)
TARGET_SETTINGS = (
    Setting("SLS_LOGSTORE_TO", name_of_logstore, REQUIRED, "the logstore of target n; n is any number from 1"),
    Setting("SLS_TOPIC_TO", topics, REQUIRED,
            "topics of target n, separated by commas; * and ? are wildcards, * alone takes what is left"),
)
TUNING_SETTINGS = (
    Setting("SLS_CURSOR_START", cursor_start, "begin",
            "where a group without checkpoints begins: begin, end, or a time such as 2018-12-26T00:00:00+08:00"),
    Setting("SLS_HEARTBEAT_INTERVAL", between(int, 1, 300, "whole seconds"), "20",
            "seconds; a copy that is silent for twice as long loses its shards"),
    Setting("SLS_FETCH_INTERVAL", between(float, 0.01, 60, "seconds"), "0.2", "seconds between looks at each shard"),
    Setting("SLS_WRITERS", between(int, 1, 64, "a whole number"), "8", "puts in the air at once, for each target"),
    Setting("SLS_MERGE_PACKS", yes_or_no, "false",
            "true puts the packs of one agent together: fewer requests, but the console's context view mixes them up"),
    Setting("SLS_LOG_DIR", writable_directory, ".", "where the log file goes; empty: no file, stderr alone"),
    Setting("SLS_LOG_LEVEL", matching("DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR"), "INFO",
            "what is logged"),
)
# fmt: on
# "ngnix" is how the field's original example spells it; logs with that topic are out there.
DEFAULT_TOPICS = {1: "ngnix,nginx", 2: "sql_audit", 3: "click"}


KEY_NAMES = ("SLS_AK_ID", "SLS_AK_KEY", "SLS_STS_TOKEN")
NUMBERED_NAMES = [setting.name + "_TO" for setting in PLACE_SETTINGS] + [setting.name for setting in TARGET_SETTINGS]


def split_number(name: str) -> Tuple[str, Optional[str]]:
    """'SLS_LOGSTORE_TO12' as ('SLS_LOGSTORE_TO', '12'); None for the number where there is none."""
    return re.fullmatch(r"(.*?)([1-9]\d*)?", name).groups()


class Place(NamedTuple):
    """One logstore, and how to reach it."""

    endpoint: str
    access_key_id: str
    access_key: str
    security_token: str
    region: str
    project: str
    logstore: str

    def __str__(self) -> str:
        return "%s/%s" % (self.project, self.logstore)

    @property
    def auth_version(self) -> str:
        return AUTH_VERSION_4 if self.region else AUTH_VERSION_1

    def address(self) -> Tuple[str, str, str]:
        """What tells one logstore from another, however its endpoint is written."""
        host = self.endpoint.lower().rstrip("/").split("://")[-1]
        return host, self.project, self.logstore


class TargetSettings(NamedTuple):
    number: int
    place: Place
    topics: Tuple[str, ...]


class Settings(NamedTuple):
    source: Place
    consumer_group: str
    targets: Tuple[TargetSettings, ...]
    cursor_start: Union[str, int]  # "begin", "end" or unix seconds
    heartbeat_interval: int  # seconds
    fetch_interval: float  # seconds
    writers: int
    merge_packs: bool
    log_dir: str
    log_level: str
    warnings: Tuple[str, ...]

    def secrets(self) -> List[str]:
        """All that must never be shown."""
        places = [self.source] + [target.place for target in self.targets]
        return [text for place in places for text in (place.access_key, place.security_token) if text]


class SettingsError(Exception):
    """The environment won't do; `problems` has one line for each thing to mend."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class EnvironmentReader:
    """Reads settings and gathers what is wrong with them, so that all of it can be told at once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {name: text.strip() for name, text in environment.items() if name.startswith("SLS_")}
        self.problems: List[str] = []

    def problem(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)

    def read(self, setting: Setting, suffix: str = "", default: Optional[str] = None):
        """The checked value of a setting; "" where it is empty, or a problem has been noted."""
        name = setting.name + suffix
        text = self.environment.get(name, "")
        if not text and not (setting.name == "SLS_LOG_DIR" and name in self.environment):
            text = setting.default if default is None else default
        if text is REQUIRED:
            self.problem("%s is missing: %s" % (name, setting.meaning))
        elif text:
            try:
                return setting.check(text)
            except ValueError as right:
                shown = "its value (not shown)" if setting.check is secret else repr(text)
                self.problem("%s: %s is wrong; right would be %s" % (name, shown, right))
        return ""

    def nearest(self, names: Sequence[str], suffixes: Sequence[str]) -> str:
        """The first suffix with which one of the names is set; else the last."""
        set_here = (suffix for suffix in suffixes if any(self.environment.get(name + suffix) for name in names))
        return next(set_here, suffixes[-1])

    def read_place(self, suffixes: Sequence[str], logstore: Setting, logstore_suffix: str) -> Place:
        """The place of one logstore; what the first suffix doesn't set, the next does: _TO2, then _TO, then none."""
        values = []
        for setting in PLACE_SETTINGS:
            # Id, secret and token make one key: they are taken together, from where any of them is set.
            deciding = KEY_NAMES if setting.name in KEY_NAMES else (setting.name,)
            values.append(self.read(setting, self.nearest(deciding, suffixes)))
        place = Place(*values, logstore=self.read(logstore, logstore_suffix))
        if place.project and place.address()[0].startswith(place.project + "."):
            self.problem(
                "SLS_ENDPOINT%s: %r is wrong; right would be the host without the project"
                % (self.nearest(["SLS_ENDPOINT"], suffixes), place.endpoint)
            )
        return place

    def unknown_names(self) -> Iterator[str]:
        """A warning for each SLS_ variable that means nothing, with the nearest name that does."""
        plain = [setting.name for setting in PLACE_SETTINGS + SOURCE_SETTINGS + TUNING_SETTINGS]
        plain += [setting.name + "_TO" for setting in PLACE_SETTINGS]
        for name in sorted(self.environment):
            stem, digits = split_number(name)
            if name not in plain and not (digits and stem in NUMBERED_NAMES):
                possible = plain + [stem + (digits or "1") for stem in NUMBERED_NAMES]
                nearest = difflib.get_close_matches(name, possible, 1, 0)
                yield "%s is not a setting of this program; did you mean %s?" % (name, nearest[0])


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment` (names to texts, as os.environ).

    Raises SettingsError, with every problem there is.
    """
    reader = EnvironmentReader(environment)
    source = reader.read_place([""], SOURCE_SETTINGS[0], "")
    consumer_group = reader.read(SOURCE_SETTINGS[1])

    set_names = [split_number(name) for name, text in reader.environment.items() if text]
    numbers = {int(digits) for stem, digits in set_names if digits and stem in NUMBERED_NAMES}
    if not numbers:
        reader.problem("SLS_LOGSTORE_TO1 is missing: at least one target logstore is needed")

    targets = []
    logstore_setting, topics_setting = TARGET_SETTINGS
    for number in sorted(numbers):
        suffix = str(number)
        place = reader.read_place(["_TO" + suffix, "_TO", ""], logstore_setting, suffix)
        if place.logstore and place.address() == source.address():
            reader.problem("SLS_LOGSTORE_TO%d: %s is the source itself; name another logstore" % (number, place))
        targets.append(TargetSettings(number, place, reader.read(topics_setting, suffix, DEFAULT_TOPICS.get(number))))
    for first, second in ((a, b) for a in targets for b in targets if a.number < b.number):
        for topic in sorted(set(first.topics) & set(second.topics)):
            reader.problem(
                "SLS_TOPIC_TO%d: %r is routed by SLS_TOPIC_TO%d already; name each topic once"
                % (second.number, topic, first.number)
            )

    tuning = [reader.read(setting) for setting in TUNING_SETTINGS]
    warnings = tuple(reader.unknown_names())
    if reader.problems:
        raise SettingsError(reader.problems + list(warnings))
    return Settings(source, consumer_group, tuple(targets), *tuning, warnings=warnings)


# ---- routes: which target a topic belongs to ------------------------------------------------------------------------


class Routes:
    """Finds the target of a topic: a topic named exactly beats any pattern, patterns are tried in the order of n."""

    def __init__(self, targets: Iterable[TargetSettings]) -> None:
        self.exact: Dict[str, int] = {}
        self.patterns = []
        for target in sorted(targets):
            for topic in target.topics:
                if any(character in topic for character in "*?["):
                    self.patterns.append((re.compile(fnmatch.translate(topic)).match, target.number))
                else:
                    self.exact[topic] = target.number
        # A topic may be a file's path or a container's id: remember many, but not without end.
        self.find = functools.lru_cache(maxsize=10000)(self._find)

    def _find(self, topic: str) -> Optional[int]:
        """The number of the topic's target, None when no route matches."""
        if topic in self.exact:
            return self.exact[topic]
        return next((number for matches, number in self.patterns if matches(topic)), None)


# ---- log groups: passed on as bytes ---------------------------------------------------------------------------------

# Field numbers of the protobuf messages LogGroupList and LogGroup (proto2), as keys of length-delimited fields.
LOGS_KEY = LOG_GROUPS_KEY = 1 << 3 | 2
TOPIC_KEY = 3 << 3 | 2
LOG_TAGS_KEY = 6 << 3 | 2
PACK_ID_TAG = b"\x0a\x0b__pack_id__"  # how a LogTag begins whose Key is __pack_id__


class LogGroup:
    """A LogGroup as it came over the wire, in two pieces: its logs, and all that describes them.

    Offers what `LogClient.put_log_raw` and routing ask of a LogGroup, under the names of the SDK's message: `Topic` and
    `SerializeToString()`. `logs` are the serialised fields Logs, as views into the pull they came with, `log_counts`
    their numbers, one entry for each LogGroup joined; `rest` is every other field, untouched. With `joinable` false
    there are Logs in the rest as well.
    """

    __slots__ = ("Topic", "joinable", "log_count", "log_counts", "logs", "rest", "size")

    def __init__(self, topic: str, log_count: int, logs: Union[bytes, memoryview], rest: bytes, joinable=True) -> None:
        self.Topic = topic
        self.logs = [logs]
        self.log_counts = [log_count]
        self.rest = rest
        self.joinable = joinable
        self.size = len(logs) + len(rest)  # bytes, uncompressed
        self.log_count = log_count

    def SerializeToString(self) -> bytes:
        return b"".join(self.logs + [self.rest])

    def join(self, other: "LogGroup") -> None:
        """Takes over the logs of another, which is equal in everything else."""
        self.logs += other.logs
        self.log_counts += other.log_counts
        self.size += other.size - len(other.rest)
        self.log_count += other.log_count

    def split(self) -> List["LogGroup"]:
        """Those that were joined, each for itself again."""
        return [LogGroup(self.Topic, count, logs, self.rest) for count, logs in zip(self.log_counts, self.logs)]


def read_varint(data: bytes, position: int) -> Tuple[int, int]:
    """The varint at `position` and the position after it. Raises IndexError at the end, ValueError beyond 64 bits."""
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than 10 bytes")


def read_fields(data: bytes, position: int, end: int) -> Iterator[Tuple[int, int, int, int]]:
    """The fields of a message within data[position:end] as (key, start of field, start of value, end of field).

    Raises ValueError or IndexError where these bytes are no message, or use groups, which proto2 has given up.
    """
    while position < end:
        start = position
        key, position = read_varint(data, position)
        wire_type = key & 7
        value = position
        if wire_type == 2:
            length, value = read_varint(data, position)
            position = value + length
        elif wire_type == 0:
            position = read_varint(data, position)[1]
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:
            raise ValueError("wire type %d" % wire_type)
        if position > end or key < 8:
            raise ValueError("a field that is none, or goes beyond its message")
        yield key, start, value, position


def read_log_group(data: bytes, view: memoryview, start: int, end: int) -> LogGroup:
    """The LogGroup serialised in data[start:end], its logs skipped, not read. Raises as `read_fields`."""
    # Serialisers write fields in the order of their numbers, so the logs come first. One pass of this loop is one log:
    # it is the hot spot of the program, hence written out.
    position = start
    log_count = 0
    while position < end and data[position] == LOGS_KEY:
        length = data[position + 1]
        if length < 0x80:
            position += 2 + length
        elif data[position + 2] < 0x80:
            position += 3 + (length & 0x7F | data[position + 2] << 7)
        else:
            length, position = read_varint(data, position + 1)
            position += length
        log_count += 1
    if position > end:
        raise ValueError("a log that goes beyond its LogGroup")
    rest_start = position
    topic = b""
    joinable = True
    for key, _, value, field_end in read_fields(data, rest_start, end):
        if key == TOPIC_KEY:
            topic = data[value:field_end]
        elif key == LOGS_KEY:
            log_count += 1
            joinable = False
    # A topic should be UTF-8; one that isn't must still find the catch-all.
    return LogGroup(topic.decode("utf-8", "replace"), log_count, view[start:rest_start], data[rest_start:end], joinable)


def read_log_group_list(data: bytes) -> List[LogGroup]:
    """The LogGroups of a serialised LogGroupList, what a pull answers with. Raises as `read_fields`."""
    view = memoryview(data)
    return [
        read_log_group(data, view, value, end)
        for key, _, value, end in read_fields(data, 0, len(data))
        if key == LOG_GROUPS_KEY
    ]


def parse_log_group_list(response) -> List[LogGroup]:
    """The LogGroups of a PullLogResponse by way of the SDK's parser. Raises LogException where that refuses too."""
    log_groups = []
    for parsed in response.get_loggroup_list().LogGroups:
        topic = parsed.Topic
        if isinstance(topic, bytes):  # the SDK's LogGroupRaw, for what is not UTF-8
            topic = topic.decode("utf-8", "replace")
        log_groups.append(LogGroup(topic, len(parsed.Logs), b"", parsed.SerializeToString(), joinable=False))
    return log_groups


def log_groups_of(response) -> List[LogGroup]:
    """The LogGroups of a PullLogResponse. Raises LogException when its bytes are no LogGroupList."""
    # The SDK keeps the bytes of a pull in this private attribute until its own parser is asked for; when it is gone
    # from a new release, parsing is the slow way that still works.
    data = getattr(response, "_raw_uncompressed_body", None)
    if data is not None:
        try:
            return read_log_group_list(data)
        except (ValueError, IndexError) as error:
            log.warning("a pull of %d bytes has an unusual form (%s): handing it to the SDK's parser", len(data), error)
    return parse_log_group_list(response)


def without_pack_id(rest: bytes) -> bytes:
    """The rest of a LogGroup but for the tag with which an agent numbers its packs."""
    if PACK_ID_TAG not in rest:
        return rest
    return b"".join(
        rest[start:end]
        for key, start, value, end in read_fields(rest, 0, len(rest))
        if not (key == LOG_TAGS_KEY and rest.startswith(PACK_ID_TAG, value))
    )


# The service takes 10 MB a put; older limits, 3 MB and 4096 logs, are what every region and agent has kept to.
JOINED_BYTES = 3 * 1000 * 1000
JOINED_LOGS = 4096


def join_log_groups(log_groups: Iterable[LogGroup], join_packs: bool) -> List[LogGroup]:
    """Puts together LogGroups that are equal in everything but their logs, within JOINED_BYTES and JOINED_LOGS.

    The order of logs is kept, no LogGroup is split. With `join_packs`, an agent's packs count as equal, and the
    outcome bears the number of the first.
    """
    joined: List[LogGroup] = []
    growing: Dict[bytes, LogGroup] = {}
    for log_group in log_groups:
        likeness = without_pack_id(log_group.rest) if join_packs else log_group.rest
        first = growing.get(likeness) if log_group.joinable else None
        if (
            first
            and first.size + log_group.size <= JOINED_BYTES
            and first.log_count + log_group.log_count <= JOINED_LOGS
        ):
            first.join(log_group)
            continue
        joined.append(log_group)
        if log_group.joinable:
            growing[likeness] = log_group
    return joined


# ---- delivery: every put until the target has taken it --------------------------------------------------------------

FIRST_PAUSE = 0.1  # seconds
LONGEST_PAUSE = 5.0  # seconds
CONNECT_TIMEOUT = 10  # seconds
ANSWER_TIMEOUT = 60  # seconds
SURELY_OPEN = 1.0  # seconds for which a connection last used is not looked at before it is used again
USER_AGENT = {"User-Agent": "dispatch_data/" + __version__}
GRACE = 5.0  # seconds for a batch in flight when its copy is told to stop or its shard is to move
LOOK_INTERVAL = 0.05  # seconds of load that decide whether more writers would help
SAME_NEWS = 10.0  # seconds between two lines about one target's refusals


class Patience:
    """Lasts as long as its batch is wanted, and GRACE seconds more."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        self.is_wanted = is_wanted
        self.end: Optional[float] = None

    def lasts(self) -> bool:
        if self.is_wanted():
            self.end = None
        elif self.end is None:
            self.end = time.monotonic() + GRACE
        return self.end is None or time.monotonic() < self.end


class Crew:
    """How many writers each target gets: more while the process waits, fewer while it computes.

    A near service keeps the CPU busy with few writers, and more would only take turns; a far one makes it wait.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 1
        self.lock = threading.Lock()
        self.cpu, self.wall = time.process_time(), time.monotonic()

    def look(self) -> int:
        """The size for now."""
        with self.lock:
            passed = time.monotonic() - self.wall
            if passed >= LOOK_INTERVAL:
                busy = (time.process_time() - self.cpu) / passed
                self.size = min(self.most, self.size * 2) if busy < 0.5 else max(1, self.size - 1)
                self.cpu, self.wall = time.process_time(), time.monotonic()
            return self.size


def pauses() -> Iterator[float]:
    """Seconds to wait before each further try: exponential, capped, and spread so that copies don't try in step."""
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(pause * 2, LONGEST_PAUSE)


class CallFailed(Exception):
    """One call that the service refused or that never reached it. `status` is None without an answer."""

    def __init__(self, error: LogException) -> None:
        self.code = error.get_error_code()
        # LogException says 200 where there was no answer at all.
        self.status = error.get_resp_status() if error.get_resp_status() != 200 else None
        status = "%d " % self.status if self.status else ""
        super().__init__("%s%s: %s" % (status, self.code, error.get_error_message()))

    def may_pass(self) -> bool:
        """Whether time alone may mend it; else somebody has to change a key, a name or a clock."""
        return self.status is None or self.status >= 500 or self.code.endswith("QuotaExceed")


class Connector:
    """Opens connections to one origin (scheme://host:port) as requests would: same proxy, same trusted CAs.

    requests reads the environment and builds its objects anew for every call, which costs more than the rest of a
    put; this reads the environment once. What http.client can't do, a proxy spoken to in TLS or SOCKS, stays with
    requests: then `is_usable` is False.
    """

    def __init__(self, origin: str) -> None:
        settled = requests.Session().merge_environment_settings(origin, {}, None, None, None)
        bundle = requests.certs.where() if settled["verify"] is True else settled["verify"]
        self.origin = urlsplit(origin)
        self.proxy = urlsplit(requests.utils.select_proxy(origin, settled["proxies"]) or "")
        self.is_usable = self.proxy.scheme in ("", "http") and bool(bundle)
        self.proxy_headers = {}
        if self.proxy.username:
            user = "%s:%s" % requests.utils.get_auth_from_url(self.proxy.geturl())
            self.proxy_headers["Proxy-Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        self.tls = None
        if self.origin.scheme == "https" and self.is_usable:
            where = "capath" if os.path.isdir(bundle) else "cafile"
            self.tls = ssl.create_default_context(**{where: bundle})

    def connect(self) -> http.client.HTTPConnection:
        """A new connection, open. Raises OSError or HTTPException."""
        origin = self.origin.hostname, self.origin.port
        address = (self.proxy.hostname, self.proxy.port or 80) if self.proxy.hostname else origin
        if self.tls:
            connection = http.client.HTTPSConnection(*address, timeout=CONNECT_TIMEOUT, context=self.tls)
            if self.proxy.hostname:
                connection.set_tunnel(*origin, headers=self.proxy_headers)
        else:
            connection = http.client.HTTPConnection(*address, timeout=CONNECT_TIMEOUT)
        connection.connect()
        connection.sock.settimeout(ANSWER_TIMEOUT)
        return connection

    def request(self, connection, method: str, path: str, body: Optional[bytes], headers: Dict[str, str]):
        """Sends one request and returns (status, body, headers) of its answer. Raises OSError or HTTPException."""
        if self.proxy.hostname and not self.tls:  # an HTTP proxy is told the whole URL
            path = self.origin.geturl() + path
            headers = dict(headers, **self.proxy_headers)
        # http.client would check each header and send the body apart, which costs as much again.
        head = "%s %s HTTP/1.1\r\n%s\r\n" % (method, path, "".join("%s: %s\r\n" % pair for pair in headers.items()))
        connection.sock.sendall(head.encode("latin-1") + (body or b""))
        response = http.client.HTTPResponse(connection.sock, method=method)
        response.begin()
        answer = response.status, response.read(), response.headers
        if response.will_close:
            connection.close()
        return answer


class LeanClient(LogClient):
    """A LogClient that talks to one project, from many threads, without requests.

    It overrides a private method of the SDK's; should that be renamed, calls go through requests again.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(
            place.endpoint,
            place.access_key_id,
            place.access_key,
            place.security_token or None,
            source="dispatch_data",
            auth_version=place.auth_version,
            region=place.region,
        )
        self.timeout = (CONNECT_TIMEOUT, ANSWER_TIMEOUT)
        self.connector: Optional[Connector] = None
        self.of_thread = threading.local()  # each thread keeps one connection: there is no pool to run out of

    def _getHttpResponse(self, method, url, params, body, headers):
        origin, path = re.match("([a-z]+://[^/]+)(.*)", url, re.IGNORECASE).groups()
        self.connector = self.connector or Connector(origin)
        if not self.connector.is_usable:
            return super()._getHttpResponse(method, url, params, body, headers)
        if params:
            path += "?" + urlencode(params)
        connection, last_use = getattr(self.of_thread, "kept", (None, 0.0))
        self.of_thread.kept = None, 0.0
        is_open = connection is not None and connection.sock is not None
        try:
            # An idle connection with something to read has been closed by the other side.
            if not is_open or (time.monotonic() - last_use > SURELY_OPEN and wait_for_read(connection.sock, 0)):
                connection = self.connector.connect()
            answer = self.connector.request(connection, method, path, body, dict(headers, **USER_AGENT))
        except (OSError, http.client.HTTPException) as error:
            if connection is not None:
                connection.close()
            raise LogException("LogRequestError", "%s: %s" % (type(error).__name__, error)) from error
        self.of_thread.kept = connection, time.monotonic()
        return answer


class WriterClient(LeanClient):
    """A LeanClient that leaves it to its caller to try again: each failure is raised as CallFailed."""

    def _sendRequest(self, *args, **kwargs):
        # LogClient._send repeats some LogExceptions ten times, a second apart, deaf to a stop, and others never.
        try:
            return super()._sendRequest(*args, **kwargs)
        except LogException as error:
            raise CallFailed(error) from error


class Target:
    """One target logstore: its writer, its threads and its counts."""

    def __init__(self, settings: TargetSettings, writers: int) -> None:
        place = settings.place
        self.name = "TO%d %s" % (settings.number, place)
        self.write = functools.partial(WriterClient(place).put_log_raw, place.project, place.logstore)
        # Threads of its own, so that a slow or refused target holds back no other.
        self.threads = concurrent.futures.ThreadPoolExecutor(writers, "TO%d" % settings.number)
        self.lock = threading.Lock()
        self.log_groups = self.logs = self.bytes = self.retries = 0
        self.next_news = 0.0

    def put_all(self, log_groups: Deque[LogGroup], given_up: threading.Event) -> bool:
        """Puts what waits in `log_groups`, beside other writers; False if `given_up` was set before one was taken."""
        while True:
            try:
                log_group = log_groups.popleft()
            except IndexError:
                return True
            if not self.put(log_group, given_up):
                return False

    def put(self, log_group: LogGroup, given_up: threading.Event) -> bool:
        """Tries until the target has taken it, on every error; False if `given_up` was set before that."""
        for pause in pauses():
            if given_up.is_set():
                return False
            try:
                self.write(log_group)
                break
            except Exception as error:
                self.report_refusal(error)
                if getattr(error, "status", None) == 400 and len(log_group.logs) > 1:
                    # One of those joined may be what the service won't have: it must hold up no more than itself.
                    return self.put_all(deque(log_group.split()), given_up)
            given_up.wait(pause)
        with self.lock:
            self.log_groups += len(log_group.logs)
            self.logs += log_group.log_count
            self.bytes += log_group.size
        return True

    def report_refusal(self, error: Exception) -> None:
        with self.lock:
            self.retries += 1
            if time.monotonic() < self.next_news:
                return
            self.next_news = time.monotonic() + SAME_NEWS
        level = logging.WARNING if isinstance(error, CallFailed) and error.may_pass() else logging.ERROR
        reason = error if isinstance(error, CallFailed) else repr(error)
        log.log(level, "%s: a put failed and is tried again until it is taken: %s", self.name, reason)

    def __str__(self) -> str:
        return "%s %d groups %d logs %.1f MB %d retries" % (
            self.name,
            self.log_groups,
            self.logs,
            self.bytes / 1e6,
            self.retries,
        )


class Unmatched:
    """Counts the LogGroups left out because no route matches their topic."""

    MOST_TOPICS = 1000

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log_groups = self.logs = 0
        self.topics: Counter = Counter()

    def add(self, log_group: LogGroup) -> None:
        with self.lock:
            self.log_groups += 1
            self.logs += log_group.log_count
            if log_group.Topic in self.topics or len(self.topics) < self.MOST_TOPICS:
                self.topics[log_group.Topic] += 1

    def __str__(self) -> str:
        with self.lock:
            named = ", ".join("%r %d" % pair for pair in self.topics.most_common(10))
            return "unmatched %d groups %d logs%s" % (self.log_groups, self.logs, " (%s)" % named if named else "")


class Delivery:
    """Takes batches of LogGroups to their targets."""

    def __init__(self, settings: Settings) -> None:
        self.routes = Routes(settings.targets)
        self.targets = {target.number: Target(target, settings.writers) for target in settings.targets}
        self.crew = Crew(settings.writers)
        self.join_packs = settings.merge_packs
        self.unmatched = Unmatched()

    def sort(self, log_groups: Iterable[LogGroup]) -> Dict[int, List[LogGroup]]:
        """The LogGroups by the number of their target, in their order; the unmatched are counted and left out."""
        sorted_groups: Dict[int, List[LogGroup]] = {}
        for log_group in log_groups:
            number = self.routes.find(log_group.Topic)
            if number is None:
                self.unmatched.add(log_group)
            else:
                sorted_groups.setdefault(number, []).append(log_group)
        return sorted_groups

    def deliver(self, log_groups: Iterable[LogGroup], patience: Patience) -> bool:
        """True once every routed LogGroup has been taken by its target, False if `patience` ended before that."""
        given_up = threading.Event()
        waiting = {
            self.targets[number]: deque(join_log_groups(routed, self.join_packs))
            for number, routed in self.sort(log_groups).items()
        }
        tasks: List[concurrent.futures.Future] = []
        started = 0  # writers of each target
        while patience.lasts():
            crew = self.crew.look()
            for target, puts in waiting.items():
                for _ in range(min(crew - started, len(puts))):
                    tasks.append(target.threads.submit(target.put_all, puts, given_up))
            started = max(started, crew)
            if not concurrent.futures.wait(tasks, LOOK_INTERVAL if any(waiting.values()) else 0.2).not_done:
                return all(task.result() for task in tasks)
        given_up.set()
        return False


# ---- consumer: what was delivered, and only that, is checkpointed ---------------------------------------------------


class SourceClient(ConsumerClient):
    """The consumer group's calls, where the SDK's would lose logs or write over another copy's checkpoint."""

    # The SDK keeps up to three pulls of a shard in memory, so the count asked for follows from the size of what came
    # last. Five pulls of 2 MB a second are what the service gives of a shard.
    PULL_BYTES = 2 * 1000 * 1000
    FIRST_COUNT = 100
    MOST_COUNT = 1000  # the service's limit

    def __init__(self, config: LogHubConfig, settings: Settings) -> None:
        super().__init__(
            config.endpoint,
            config.accessKeyId,
            config.accessKey,
            config.project,
            config.logstore,
            config.consumer_group_name,
            config.consumer_name,
        )
        self.mclient = LeanClient(settings.source)
        self.start = settings.cursor_start
        self.fetch_interval = settings.fetch_interval
        self.next_pulls: Dict[int, float] = {}
        self.counts: Dict[int, int] = {}
        checkpoints = self.mclient.get_check_point(self.mproject, self.mlogstore, self.mconsumer_group)
        group_is_new = not any(entry["checkpoint"] for entry in checkpoints.get_consumer_group_check_points())
        shards = self.mclient.list_shards(self.mproject, self.mlogstore).get_shards_info()
        self.first_shards = {shard["shardID"] for shard in shards} if group_is_new else set()

    def settle_start(self, shard: int) -> None:
        """Saves where a shard without a checkpoint begins, before anything is read.

        Else a copy killed before its first checkpoint would let the next begin at a later "end". A shard that was born
        after the group began, by a split or a merge, is read from its first log. Raises LogException.
        """
        if self.get_check_point(shard)["checkpoint"]:
            return
        cursor = self.get_cursor(shard, self.start if shard in self.first_shards else "begin")
        self.update_check_point(shard, self.mconsumer, cursor)

    def update_check_point(self, shard, consumer, check_point):
        # The SDK forces its update: a copy that was frozen and lost the shard would write over the new holder's.
        self.mclient.update_check_point(
            self.mproject, self.mlogstore, self.mconsumer_group, shard, check_point, consumer, force_success=False
        )

    def lag(self, shards: Iterable[int]) -> float:
        """Seconds since the oldest log arrived that these shards have yet to deliver, 0 without one.

        Asked of the service, by checkpoint: a batch that a target won't take is pulled, but not delivered. Raises
        LogException.
        """
        oldest = time.time()
        checkpoints = self.mclient.get_check_point(self.mproject, self.mlogstore, self.mconsumer_group)
        for entry in checkpoints.get_consumer_group_check_points():
            shard, checkpoint = entry["shard"], entry["checkpoint"]
            if shard in shards and checkpoint and checkpoint != self.get_end_cursor(shard):
                arrival = self.mclient.get_cursor_time(self.mproject, self.mlogstore, shard, checkpoint)
                oldest = min(oldest, arrival.get_cursor_time())
        return max(0.0, time.time() - oldest)

    def pull_logs(self, shard_id, cursor, *args, **options):
        time.sleep(max(0.0, self.next_pulls.get(shard_id, 0.0) - time.monotonic()))
        self.next_pulls[shard_id] = time.monotonic() + self.fetch_interval
        options["count"] = self.counts.get(shard_id, self.FIRST_COUNT)
        try:
            response = super().pull_logs(shard_id, cursor, *args, **options)
        except LogException as error:
            # The SDK would go on at the newest log and skip what lies between.
            if error.get_error_code() != "InvalidCursor":
                raise
            log.error(
                "shard %s: the service no longer knows cursor %s, older logs may have reached the end of their "
                "retention time; reading on from the oldest log there is",
                shard_id,
                cursor,
            )
            response = super().pull_logs(shard_id, self.get_begin_cursor(shard_id), *args, **options)
        if response.get_loggroup_count():
            size = response.get_raw_size() / response.get_loggroup_count()
            self.counts[shard_id] = max(1, min(self.MOST_COUNT, int(self.PULL_BYTES / size)))
        return response


class ShardConsumer(ConsumerProcessorBase):
    """Delivers one shard's batches, one after the other; the SDK makes one for each shard held."""

    UNREADABLE_PAUSE = 5.0  # seconds before bytes that nobody can read are pulled again

    def __init__(self, dispatcher: "Dispatcher") -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self._preprocessor = self.read_pull  # called by the SDK in the fetching thread

    def initialize(self, shard: int) -> None:
        super().initialize(shard)
        self.dispatcher.consumer_client.settle_start(shard)

    def read_pull(self, response) -> List[LogGroup]:
        try:
            return log_groups_of(response)
        except LogException:  # its text would hold the whole pull
            log.error(
                "shard %s: a pull of %s bytes is no LogGroupList; nothing of it is delivered, it is pulled again",
                self.shard_id,
                response.get_raw_size(),
            )
            time.sleep(self.UNREADABLE_PAUSE)
            raise LogException("BadResponse", "not a LogGroupList") from None

    def process(self, log_groups: List[LogGroup], check_point_tracker) -> Optional[str]:
        """Delivers a batch, then saves its checkpoint; the next batch comes after both.

        Returns None, or, for a batch that was not delivered whole, the checkpoint from which the SDK is to fetch again:
        had this raised or returned False, the SDK would go on with the next batch and checkpoint beyond this one.
        """
        delivered = False
        if self.dispatcher.begin_batch(self.shard_id):
            patience = Patience(self.is_wanted)
            try:
                delivered = self.dispatcher.delivery.deliver(log_groups, patience)
                if delivered:
                    check_point_tracker.save_check_point(persistent=False)
                    self.persist(check_point_tracker, patience)
            except Exception:
                log.exception("shard %s: a batch failed and is fetched again", self.shard_id)
                time.sleep(LONGEST_PAUSE)
            finally:
                self.dispatcher.end_batch()
        return None if delivered else check_point_tracker.get_check_point()

    def shutdown(self, check_point_tracker) -> None:
        """Called when the shard moves on. The SDK's own would save the cursor of a batch that may not be delivered."""
        self.persist(check_point_tracker, Patience(self.is_wanted))

    def persist(self, check_point_tracker, patience: Patience) -> None:
        """Saves the checkpoint of what was delivered, trying until it is taken, refused for good, or patience ends."""
        for pause in pauses():
            try:
                return check_point_tracker.flush_check_point()
            except CheckPointException as error:
                cause = CallFailed(error.args[-1])
            if cause.code.startswith("ConsumerNot"):
                return log.warning("shard %s: another copy holds it now, its checkpoint stays as it is", self.shard_id)
            log.warning("shard %s: the checkpoint is not saved yet: %s", self.shard_id, cause)
            if not patience.lasts():
                return None
            time.sleep(pause)

    def is_wanted(self) -> bool:
        return self.dispatcher.wants(self.shard_id)


class Dispatcher(ConsumerWorker):
    """One copy's membership in the consumer group."""

    # Seconds for a turn of the SDK's one loop, which begins every pull and every batch. A batch waits two turns; pulls
    # are held apart by SourceClient, and by the SDK, which leaves half a second after one that brings little.
    TURN = 0.05
    THREADS = 512  # made as needed; the SDK needs up to three for each shard, and a waiting put must not block another

    def __init__(self, settings: Settings, delivery: Delivery) -> None:
        """Joins the group, and makes it where there is none. Raises LogException or ClientWorkerException.

        Where shards begin is not in the SDK's config: SourceClient.settle_start saves it before the SDK would ask.
        """
        source = settings.source
        config = LogHubConfig(
            source.endpoint,
            source.access_key_id,
            source.access_key,
            source.project,
            source.logstore,
            settings.consumer_group,
            consumer_name(settings.consumer_group),
            heartbeat_interval=settings.heartbeat_interval,
            data_fetch_interval=self.TURN,
            security_token=source.security_token or None,
            worker_pool_size=self.THREADS,
            auth_version=source.auth_version,
            region=source.region,
        )
        super().__init__(ShardConsumer, config, args=(self,))
        self.consumer_client = SourceClient(config, settings)
        self.delivery = delivery
        self.stopping = False
        self.batches_in_flight = 0
        self.change = threading.Condition()

    def wants(self, shard: int) -> bool:
        """Whether this copy is to go on with a shard."""
        return not self.stopping and shard in self.heart_beat.get_held_shards()

    def begin_batch(self, shard: int) -> bool:
        """Waits until this copy surely holds the shard; False when it is not, or no longer, to deliver from it."""
        group_timeout = self.option.consumer_group_time_out
        # A copy that was frozen or cut off may have lost its shards to another: only a heartbeat can tell.
        while self.wants(shard) and time.time() - self.heart_beat.last_hearbeat_successed_unixtime > group_timeout:
            time.sleep(0.1)
        with self.change:
            if self.wants(shard):
                self.batches_in_flight += 1
                return True
        return False

    def end_batch(self) -> None:
        with self.change:
            self.batches_in_flight -= 1
            self.change.notify_all()

    def stop(self, seconds: float) -> bool:
        """Begins no new batch and waits, `seconds` at the most, for those in flight; True if all came to an end."""
        with self.change:
            self.stopping = True
            return self.change.wait_for(lambda: self.batches_in_flight == 0, seconds)

    def lag(self) -> str:
        """The lag of the shards held, for people."""
        try:
            return "lag %.0f s" % self.consumer_client.lag(self.heart_beat.get_held_shards())
        except LogException as error:
            return "lag unknown (%s)" % CallFailed(error)

    def summary(self) -> str:
        """What became of the logs so far, in one line."""
        shards = sorted(self.heart_beat.get_held_shards())
        parts = [str(target) for target in self.delivery.targets.values()]
        parts += [str(self.delivery.unmatched), "shards held: %s" % (" ".join(map(str, shards)) or "none")]
        return "summary: " + "; ".join(parts)


def consumer_name(consumer_group: str) -> str:
    """A name of at most 63 characters that no other copy has: host and process id repeat themselves in containers."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    return "%s-%s-%d-%s" % (consumer_group[:24], host[:12], os.getpid(), uuid.uuid4().hex[:12])


# ---- command line ---------------------------------------------------------------------------------------------------

SUMMARY_INTERVAL = 30.0  # seconds
STOP_TIME = 8.0  # seconds for an orderly stop, which as a whole must not take 10


class CannotStart(Exception):
    """Joining the group failed in a way that time won't mend."""


# What to look at when the service refuses to let a copy join, by the code of its answer.
REMEDIES = {
    "ProjectNotExist": "SLS_PROJECT or SLS_ENDPOINT: the project must exist in the endpoint's region",
    "LogStoreNotExist": "SLS_LOGSTORE: the logstore must exist in the project",
    "InvalidAccessKeyId": "SLS_AK_ID: the access key must exist and be enabled",
    "SignatureNotMatch": "SLS_AK_KEY: the secret must belong to SLS_AK_ID",
    "Unauthorized": "SLS_AK_ID: the access key must be allowed to consume from the logstore",
    "ConsumerGroupQuotaExceed": "SLS_CG: name a group that exists, or delete one that nobody needs",
    "RequestTimeExpired": "the clock of this machine: it must be right to 15 minutes",
}


def join_group(settings: Settings, delivery: Delivery) -> Dispatcher:
    """Joins the consumer group, trying again while that may help. Raises CannotStart."""
    for pause in pauses():
        try:
            return Dispatcher(settings, delivery)
        except (LogException, ClientWorkerException) as error:
            # ClientWorkerException hides the LogException that caused it.
            cause = error if isinstance(error, LogException) else error.__context__
            failure = CallFailed(cause or LogException("ClientWorkerException", str(error)))
        if failure.code in REMEDIES:
            raise CannotStart(
                "cannot join the consumer group, check %s (the service says: %s)" % (REMEDIES[failure.code], failure)
            )
        if not failure.may_pass():
            raise CannotStart("cannot join the consumer group: %s" % failure)
        log.warning("cannot join the consumer group yet, trying again: %s", failure)
        time.sleep(pause)
    raise AssertionError("pauses() has no end")


class LineFormatter(logging.Formatter):
    """Hides secrets, and keeps what the SDK logs down to a line of bearable length."""

    LONGEST_SDK_LINE = 1000

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(process)d %(levelname)s %(message)s")
        self.secrets = list(secrets)

    def format(self, record: logging.LogRecord) -> str:
        if record.name.startswith("aliyun"):
            record.exc_info = None
            line = " ".join(super().format(record).split())[: self.LONGEST_SDK_LINE]
        else:
            line = super().format(record)
        for text in self.secrets:
            line = line.replace(text, "***")
        return line


def set_up_logging(settings: Settings) -> None:
    """To stderr, and to a file of this process's own; stderr gets only warnings when it is no terminal but a file."""
    to_stderr = logging.StreamHandler()
    handlers: List[logging.Handler] = [to_stderr]
    if settings.log_dir:
        path = os.path.join(settings.log_dir, "dispatch_data_%d.log" % os.getpid())
        handlers.append(
            logging.handlers.RotatingFileHandler(path, maxBytes=100 * 1000 * 1000, backupCount=5, encoding="utf-8")
        )
        if not sys.stderr.isatty():
            to_stderr.setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(LineFormatter(settings.secrets()))
    logging.basicConfig(level=settings.log_level, handlers=handlers)
    if settings.log_level != "DEBUG":
        logging.getLogger("aliyun").setLevel(logging.WARNING)
        logging.raiseExceptions = False  # the SDK's heartbeat formats one of its messages wrongly


def help_text() -> str:
    """The table of settings, for --help."""
    lines = ["settings, from the environment:"]
    for setting in PLACE_SETTINGS + SOURCE_SETTINGS + TARGET_SETTINGS + TUNING_SETTINGS:
        numbered = "<n>" if setting in TARGET_SETTINGS else ""
        default = "required" if setting.default is REQUIRED else "default: %s" % (setting.default or "none")
        if setting.name == "SLS_TOPIC_TO":
            default = "default: %s" % "; ".join("%d: %s" % pair for pair in DEFAULT_TOPICS.items())
        lines.append("  %s%s (%s)\n      %s" % (setting.name, numbered, default, setting.meaning))
    lines.append(
        "  %s with _TO: the same for all targets, with _TO<n>: for target n; else as the source's"
        % ", ".join(setting.name for setting in PLACE_SETTINGS)
    )
    return "\n".join(lines)


def run(settings: Settings) -> int:
    """Joins the group and dispatches until SIGTERM or SIGINT; the process's exit status."""
    dispatcher = None
    stopped = False
    try:
        # As KeyboardInterrupt both end the main thread's waiting wherever it is, even where a shell had SIGINT ignored.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        dispatcher = join_group(settings, Delivery(settings))
        log.info(
            "consumer %s of %s, targets: %s",
            dispatcher.option.consumer_name,
            settings.source,
            ", ".join("%s <- %s" % (target.place, ",".join(target.topics)) for target in settings.targets),
        )
        dispatcher.start()
        next_summary = time.monotonic() + SUMMARY_INTERVAL
        while dispatcher.is_alive():
            time.sleep(0.2)
            if time.monotonic() > next_summary:
                log.info("%s; %s", dispatcher.summary(), dispatcher.lag())
                next_summary += SUMMARY_INTERVAL
    except CannotStart as error:
        log.error("%s", error)
    except KeyboardInterrupt:
        stopped = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if dispatcher:
        if not stopped:
            log.error("the consumer ended by itself; this copy ends so that another can take its shards")
        if not dispatcher.stop(STOP_TIME):
            log.warning("stopped in the middle of a batch; it is delivered again by whoever takes the shard next")
        log.info("%s", dispatcher.summary())
    return 0 if stopped else 1


def main(arguments: Optional[Sequence[str]] = None, environment: Mapping[str, str] = os.environ) -> int:
    """The program; returns the exit status: 0 stopped as asked, 1 failed, 2 the settings are wrong."""
    parser = argparse.ArgumentParser(
        prog="dispatch_data.py",
        description=__doc__.splitlines()[0],
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version="dispatch_data.py " + __version__)
    parser.parse_args(arguments)
    try:
        settings = read_settings(environment)
    except SettingsError as error:
        for problem in error.problems:
            print("dispatch_data.py: %s" % problem, file=sys.stderr)
        return 2
    set_up_logging(settings)
    for warning in settings.warnings:
        log.warning("%s", warning)
    return run(settings)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that waits for an answer from a dead target, up to ANSWER_TIMEOUT, must not hold up the end.
    os._exit(status)
