#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["aliyun-log-python-sdk==0.9.52"]
# ///
"""Sorts the logs of one Simple Log Service (SLS) logstore into many, by Topic, in real time.

Every copy of this program joins one consumer group on the source logstore. The service shares the shards out among the
copies and keeps the checkpoints; a copy writes each LogGroup to the logstore that its Topic is routed to. Read on in
order: settings, routes, log groups (bytes), the service, looking, delivery, consumer, command line. Each part knows
only those before it.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import difflib
import email.utils
import errno
import fnmatch
import functools
import hashlib
import http.client
import json
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
import urllib.request
import uuid
from collections import Counter, deque
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence
from urllib.parse import unquote, urlencode, urlsplit

if __name__ == "__main__":  # importing the SDK takes a moment: Ctrl-C meanwhile is no reason for a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    import requests
    from aliyun.log import LogClient, LogException
    from aliyun.log.auth import AUTH_VERSION_1, AUTH_VERSION_4
    from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, LogHubConfig
    from aliyun.log.consumer.checkpoint_tracker import ConsumerCheckpointTracker
    from aliyun.log.consumer.consumer_client import ConsumerClient
    from aliyun.log.consumer.exceptions import CheckPointException, ClientWorkerException
    from aliyun.log.logresponse import LogResponse
    from aliyun.log.pulllog_response import PullLogResponse
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
    default: str | None
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
    """A check for a number of the given kind (int or float) within low..high, in plain digits."""
    plain = re.compile("[0-9]{1,9}" if kind is int else r"[0-9]{1,9}(\.[0-9]{1,9})?")

    def check(text: str) -> float:
        if not plain.fullmatch(text) or not low <= kind(text) <= high:
            raise ValueError("%s from %s to %s" % (right, low, high))
        return kind(text)

    return check


CLOCKS_AGREE = 5.0  # seconds that two clocks may differ without a word


def local_time(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def both_times(unix_seconds: float) -> str:
    """A time with its offset, and the same in UTC."""
    local = datetime.fromtimestamp(unix_seconds).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S %z") + time.strftime(" (%Y-%m-%d %H:%M:%S UTC)", time.gmtime(unix_seconds))


# A date, perhaps with a time, perhaps with its zone: Z, +08:00, +0800, UTC+8 or GMT+8.
TIME = re.compile(
    r"(\d{4})-(\d\d?)-(\d\d?)(?:[T ](\d\d?):(\d\d?)(?::(\d\d?)(?:\.\d+)?)?"
    r" ?(?:(Z|UTC|GMT)|(?:UTC|GMT)?([+-])(0?\d|1[0-4])(?::?([0-5]\d))?)?)?",
    re.ASCII | re.IGNORECASE,
)


def cursor_start(text: str) -> str | int:
    """'begin', 'end', or a time as unix seconds; a time without a zone is local time, as everywhere in the SDK.

    UTC+8 is eight hours east, as people mean it. No library reads this: dateutil's UTC+8 is west, and zones that it
    doesn't know are dropped.
    """
    if text in ("begin", "end"):
        return text
    try:
        *parts, utc, sign, hours, minutes = TIME.fullmatch(text).groups()  # type: ignore[union-attr]
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        zone = timezone(-offset if sign == "-" else offset) if utc or sign else None
        year, month, day, hour, minute, second = (int(part or 0) for part in parts)
        start = int(datetime(year, month, day, hour, minute, second, tzinfo=zone).timestamp())
    except (AttributeError, ValueError, OverflowError):
        start = -1
    if start < 0:
        raise ValueError("begin, end, or a time such as 2018-12-26T00:00:00+08:00")
    if start > time.time() + CLOCKS_AGREE:
        raise ValueError("a time that has passed; this machine's clock says %s" % both_times(time.time()))
    return start


def writable_directory(text: str) -> str:
    if not (os.path.isdir(text) and os.access(text, os.W_OK)):
        raise ValueError("a directory that exists and can be written to")
    return text


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


# What a Chinese keyboard gives in the place of ASCII: full-width forms, and punctuation of its own.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
FULL_WIDTH.update(zip(map(ord, "\u3000\u3001\u3002\u3010\u3011\u2018\u2019\u201c\u201d"), b" ,.[]''\"\""))
# Brackets around one of these mean the character itself.
LITERAL = re.compile(r"\[([*?[%s])\]" % "".join(map(chr, FULL_WIDTH)))
NO_TOPIC = "[]"  # the Topic spelt so would be written [[]]


def type_instead(text: str) -> str:
    """What to do about the first full-width character in a text, "" without one."""
    wide = next((character for character in text if ord(character) in FULL_WIDTH), "")
    return wide and "; %r is a full-width character, type %r instead" % (wide, wide.translate(FULL_WIDTH))


def topics(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or type_instead(LITERAL.sub("", text)):
        raise ValueError("topics separated by commas, such as nginx,access_*; what is meant literally in brackets")
    if any(name[0] in "'\"" or name[-1] in "'\"" for name in names):
        raise ValueError("topics separated by commas, with quotes around all of them or none")
    try:
        for name in names:
            re.compile(fnmatch.translate(name))
    except re.error:
        raise ValueError("topics with ranges such as [a-z] in their brackets") from None
    return names


def only_topic(entry: str) -> str | None:
    """The one Topic that an entry of SLS_TOPIC_TO<n> stands for, "" for NO_TOPIC; None for a pattern."""
    if entry == NO_TOPIC:
        return ""
    return None if set("*?[") & set(LITERAL.sub("", entry)) else LITERAL.sub(r"\1", entry)


name_of_logstore = matching(r"[A-Za-z0-9_-]{1,128}", "letters, digits, - and _")
secret = matching(r"[!-~]+", "printable characters without spaces")
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST = r"%s(?:\.%s)*" % (LABEL, LABEL)
PORT = "(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
url_of_proxy = matching(
    r"((?i:https?|socks4a?|socks5h?)://)?([^\s/?#\[\]\x7f-\U0010ffff]*@)?([A-Za-z0-9_.-]*[A-Za-z0-9]|\[[0-9a-fA-F:.]+\])"
    + PORT + "/?",
    "a URL such as http://proxy.example:3128",
)  # fmt: skip
REQUIRED = None

# fmt: off
# What the source needs, and each target may have for itself: with _TO for all targets, with _TO<n> for one of them.
PLACE_SETTINGS = (
    Setting("SLS_ENDPOINT",
            matching("(https?://)?%s%s/?" % (HOST, PORT), "a host such as cn-hangzhou.log.aliyuncs.com"),
            REQUIRED, "the service's host in the project's region; https:// in front turns TLS on"),
    Setting("SLS_AK_ID", secret, REQUIRED, "id of the access key"),
    Setting("SLS_AK_KEY", secret, REQUIRED, "secret of the access key"),
    Setting("SLS_STS_TOKEN", secret, "", "token of a temporary access key"),
    Setting("SLS_REGION", matching(r"[a-z0-9-]+", "a region such as cn-hangzhou"),
            "", "the project's region: switches signatures from v1 to v4"),
    Setting("SLS_PROJECT",
            matching("[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", "3 to 63 lower-case letters, digits and - (not at the ends)"),
            REQUIRED, "the project"),
)
SOURCE_SETTINGS = (
    Setting("SLS_LOGSTORE", name_of_logstore, REQUIRED, "the source logstore"),
    Setting("SLS_CG", matching(r"[A-Za-z0-9_-]{1,64}", "up to 64 letters, digits, - and _"),
            REQUIRED, "the consumer group, the same for all copies"),
)
TARGET_SETTINGS = (
    Setting("SLS_LOGSTORE_TO", name_of_logstore, REQUIRED, "the logstore of target n; n is any number from 1"),
    Setting("SLS_TOPIC_TO", topics, REQUIRED,
            "topics of target n, separated by commas; * ? and [...] are wildcards, * alone takes what is left, [] what "
            "has no topic; a wildcard in brackets is the character itself: app[[]1] is the topic app[1]"),
)
TUNING_SETTINGS = (
    Setting("SLS_CURSOR_START", cursor_start, "begin",
            "where a group without checkpoints begins: begin, end, or a time such as 2018-12-26T00:00:00+08:00; "
            "without an offset or Z it is local time"),
    Setting("SLS_HEARTBEAT_INTERVAL", between(int, 1, 300, "whole seconds"), "20",
            "seconds; a copy that is silent for twice as long loses its shards"),
    Setting("SLS_FETCH_INTERVAL", between(float, 0.01, 60, "seconds"), "0.2", "seconds between looks at each shard"),
    Setting("SLS_WRITERS", between(int, 1, 64, "a whole number"), "8", "puts in the air at once, for each target"),
    Setting("SLS_MERGE_PACKS", yes_or_no, "false",
            "true puts the packs of one agent together: fewer requests, but the console's context view mixes them up"),
    Setting("SLS_REJECTED_DIR", writable_directory, "",
            "where LogGroups go that a target refuses for good, so that their shards can go on; none: the shards wait"),
    Setting("SLS_LOG_DIR", writable_directory, ".", "where the log file goes; empty: no file, stderr alone"),
    Setting("SLS_LOG_LEVEL", matching("DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR"), "INFO",
            "what is logged"),
)
# fmt: on
# They apply while no SLS_TOPIC_TO<n> is set. "ngnix" is how the field's original example spells it; logs with that
# topic are out there.
DEFAULT_TOPICS = {1: "ngnix,nginx", 2: "sql_audit", 3: "click"}


KEY_NAMES = ("SLS_AK_ID", "SLS_AK_KEY", "SLS_STS_TOKEN")
CA_NAMES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # what requests reads, and so does this program
PROXY_NAMES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
NUMBERED_NAMES = [setting.name + "_TO" for setting in PLACE_SETTINGS] + [setting.name for setting in TARGET_SETTINGS]


def split_number(name: str) -> tuple[str, str]:
    """'SLS_LOGSTORE_TO12' as ('SLS_LOGSTORE_TO', '12'); '' for the number where there is none, or no sensible one."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return (name, "") if digits.startswith("0") or len(digits) > 9 else (stem, digits)


class Place(NamedTuple):
    """One logstore, and how to reach it; `names` has the variable that each setting was read from."""

    endpoint: str
    access_key_id: str
    access_key: str
    security_token: str
    region: str
    project: str
    logstore: str
    names: Mapping[str, str]

    def __str__(self) -> str:
        return "%s/%s" % (self.project, self.logstore)

    @property
    def auth_version(self) -> str:
        return AUTH_VERSION_4 if self.region else AUTH_VERSION_1

    @property
    def host(self) -> str:
        """Of the endpoint, in lower case."""
        return re.sub("^https?://|[:/].*$", "", self.endpoint.lower())

    @property
    def host_region(self) -> str:
        """The region that the endpoint's host names, "" where it names none, as an address or a host of one's own."""
        domain = r"([a-z]{2}-[a-z0-9-]+?)(-intranet|-internal|-share|-vpc)*\.(log|sls)\.aliyuncs\.com"
        found = re.fullmatch(domain, self.host)
        return found.group(1) if found else ""

    def may_be(self, other: Place) -> bool:
        """Whether this may be the same logstore, however the endpoints are written: a project's name is unique within a
        region, so only two regions tell two of one name apart."""
        regions = {self.host_region, other.host_region}
        same_name = (self.project, self.logstore.lower()) == (other.project, other.logstore.lower())
        return same_name and (len(regions) == 1 or "" in regions)


class TargetSettings(NamedTuple):
    number: int
    place: Place
    topics: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is called in what is shown."""
        return "TO%d %s" % (self.number, self.place)


class Settings(NamedTuple):
    source: Place
    consumer_group: str
    targets: tuple[TargetSettings, ...]
    cursor_start: str | int  # "begin", "end" or unix seconds
    heartbeat_interval: int  # seconds
    fetch_interval: float  # seconds
    writers: int
    merge_packs: bool
    rejected_dir: str
    log_dir: str
    log_level: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]  # what some settings have come to, to be told at the start

    @property
    def source_name(self) -> str:
        """As it is called in what is shown."""
        return "source %s" % (self.source,)

    def secrets(self) -> list[str]:
        """All that must never be shown."""
        places = [self.source] + [target.place for target in self.targets]
        return [text for place in places for text in (place.access_key, place.security_token) if text]


class SettingsError(Exception):
    """The environment won't do; `problems` has one line for each thing to mend."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def unquoted(text: str) -> str:
    """Without what is around a value: space, and quotes, which a shell takes away, but `docker --env-file` doesn't."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] in "'\"" and text.count(text[0]) == 2 else text


class EnvironmentReader:
    """Reads settings and gathers what is wrong with them, so that all of it can be told at once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {name: unquoted(text) for name, text in environment.items() if name.startswith("SLS_")}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.has_topics = any(split_number(name)[0] == "SLS_TOPIC_TO" for name in self.environment)

    def problem(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)

    def read(self, setting: Setting, suffix: str = "", default: str | None = None) -> Any:
        """The checked value of a setting; "" where it is empty, or a problem has been noted."""
        name = setting.name + suffix
        text: str | None = self.environment.get(name, "")
        if not text and not (setting.name == "SLS_LOG_DIR" and name in self.environment):
            text = setting.default if default is None else default
        if text is REQUIRED:
            self.problem("%s is missing: %s" % (name, setting.meaning))
        elif text:
            try:
                return setting.check(text)
            except ValueError as right:
                shown = "its value (not shown)" if setting.check is secret else repr(text)
                hint = "" if setting.check is secret else type_instead(text)
                self.problem("%s: %s is wrong; right would be %s%s" % (name, shown, right, hint))
        return ""

    def nearest(self, names: Sequence[str], suffixes: Sequence[str]) -> str:
        """The first suffix with which one of the names is set; else the last."""
        set_here = (suffix for suffix in suffixes if any(self.environment.get(name + suffix) for name in names))
        return next(set_here, suffixes[-1])

    def read_place(self, suffixes: Sequence[str], logstore: Setting, logstore_suffix: str) -> Place:
        """The place of one logstore; what the first suffix doesn't set, the next does: _TO2, then _TO, then none."""
        values: list[Any] = []
        names = {"SLS_LOGSTORE": logstore.name + logstore_suffix}
        for setting in PLACE_SETTINGS:
            # Id, secret and token make one key: they are taken together, from where any of them is set.
            deciding = KEY_NAMES if setting.name in KEY_NAMES else (setting.name,)
            suffix = self.nearest(deciding, suffixes)
            values.append(self.read(setting, suffix))
            names[setting.name] = setting.name + suffix
        values += [self.read(logstore, logstore_suffix), names]
        place = Place(*values)
        if place.project and place.host.startswith(place.project + "."):
            self.problem(
                "%s: %r is wrong; right would be the host without the project" % (names["SLS_ENDPOINT"], place.endpoint)
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


def read_targets(reader: EnvironmentReader, source: Place) -> Iterator[TargetSettings]:
    """The targets in the order of their numbers; what is wrong with them is noted with the reader."""
    set_names = [split_number(name) for name, text in reader.environment.items() if text]
    numbers = {int(digits) for stem, digits in set_names if digits and stem in NUMBERED_NAMES}
    if not numbers:
        reader.problem("SLS_LOGSTORE_TO1 is missing: at least one target logstore is needed")
    logstore_setting, topics_setting = TARGET_SETTINGS
    routed: dict[str, int] = {}
    for number in sorted(numbers):
        suffix = str(number)
        place = reader.read_place(["_TO" + suffix, "_TO", ""], logstore_setting, suffix)
        if place.logstore and place.may_be(source):
            reader.problem(
                "SLS_LOGSTORE_TO%d: %s is the source itself, for its endpoint and the source's don't name two regions; "
                "name another logstore" % (number, place)
            )
        default = None if reader.has_topics else DEFAULT_TOPICS.get(number)
        target = TargetSettings(number, place, reader.read(topics_setting, suffix, default))
        for topic in target.topics:
            if re.fullmatch(r"[^*?]*\[[^*?]+\][^*?]*", LITERAL.sub("", topic)):
                reader.warnings.append(
                    "SLS_TOPIC_TO%d: %r is a pattern, its brackets stand for one of the characters in them; the topic "
                    "spelt like that is written %r" % (number, topic, LITERAL.sub(r"\1", topic).replace("[", "[[]"))
                )
            if routed.setdefault(topic, number) != number:
                reader.problem(
                    "SLS_TOPIC_TO%d: %r is routed by SLS_TOPIC_TO%d already; name each topic once"
                    % (number, topic, routed[topic])
                )
        yield target


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment` (names to texts, as os.environ).

    Raises SettingsError, with every problem there is.
    """
    reader = EnvironmentReader(environment)
    source = reader.read_place([""], SOURCE_SETTINGS[0], "")
    consumer_group = reader.read(SOURCE_SETTINGS[1])
    targets = tuple(read_targets(reader, source))
    tuning = [reader.read(setting) for setting in TUNING_SETTINGS]
    for name in CA_NAMES:  # a typo here must not look like a service that can't be reached
        if environment.get(name) and not os.path.exists(environment[name]):
            reader.problem("%s: %r is wrong; right would be a file of CA certificates" % (name, environment[name]))
    for name in PROXY_NAMES:
        try:
            url_of_proxy(environment.get(name) or "proxy")
        except ValueError as right:
            reader.problem("%s: its value (not shown) is wrong; right would be %s" % (name, right))
    warnings = [*reader.unknown_names(), *reader.warnings]
    if reader.problems:
        raise SettingsError(reader.problems + warnings)
    start = tuning[0] if isinstance(tuning[0], str) else both_times(tuning[0])
    notes = ["SLS_CURSOR_START, where a group without checkpoints begins: %s" % start]
    if not reader.has_topics:
        notes.append("no SLS_TOPIC_TO<n> is set: the default topics apply")
    return Settings(source, consumer_group, targets, *[*tuning, tuple(warnings), tuple(notes)])


# ---- routes: which target a topic belongs to ------------------------------------------------------------------------


class Routes:
    """Finds the target of a topic: a topic named exactly beats any pattern, patterns are tried in the order of n."""

    LONGEST_REMEMBERED = 256  # characters

    def __init__(self, targets: Iterable[TargetSettings]) -> None:
        self.exact: dict[str, int] = {}
        self.patterns = []
        for target in sorted(targets, key=lambda target: target.number):
            for topic in target.topics:
                exact = only_topic(topic)
                if exact is None:
                    self.patterns.append((re.compile(fnmatch.translate(topic)).match, target.number))
                else:
                    self.exact[exact] = target.number
        # A topic may be a file's path or a container's id: remember many, but not without end.
        self.remembered = functools.lru_cache(maxsize=10000)(self.match)

    def find(self, topic: str) -> int | None:
        """The number of the topic's target, None when no route matches."""
        return self.remembered(topic) if len(topic) <= self.LONGEST_REMEMBERED else self.match(topic)

    def match(self, topic: str) -> int | None:
        """As `find`, without remembering."""
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

    def __init__(
        self, topic: str, log_count: int, logs: bytes | memoryview, rest: bytes, joinable: bool = True
    ) -> None:
        self.Topic = topic
        self.logs = [logs]
        self.log_counts = [log_count]
        self.rest = rest
        self.joinable = joinable
        self.size = len(logs) + len(rest)  # bytes, uncompressed
        self.log_count = log_count

    def SerializeToString(self) -> bytes:
        return b"".join(self.logs + [self.rest])

    def join(self, other: LogGroup) -> None:
        """Takes over the logs of another, which is equal in everything else."""
        self.logs += other.logs
        self.log_counts += other.log_counts
        self.size += other.size - len(other.rest)
        self.log_count += other.log_count

    def split(self) -> list[LogGroup]:
        """Those that were joined, each for itself again."""
        return [LogGroup(self.Topic, count, logs, self.rest) for count, logs in zip(self.log_counts, self.logs)]


def read_varint(data: bytes, position: int) -> tuple[int, int]:
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


def read_fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
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


def read_log_group_list(data: bytes) -> list[LogGroup]:
    """The LogGroups of a serialised LogGroupList, what a pull answers with. Raises as `read_fields`."""
    view = memoryview(data)
    return [
        read_log_group(data, view, value, end)
        for key, _, value, end in read_fields(data, 0, len(data))
        if key == LOG_GROUPS_KEY
    ]


def parse_log_group_list(response: PullLogResponse) -> list[LogGroup]:
    """The LogGroups of a PullLogResponse by way of the SDK's parser. Raises LogException where that refuses too."""
    log_groups = []
    for parsed in response.get_loggroup_list().LogGroups:
        topic = parsed.Topic
        if isinstance(topic, bytes):  # the SDK's LogGroupRaw, for what is not UTF-8
            topic = topic.decode("utf-8", "replace")
        log_groups.append(LogGroup(topic, len(parsed.Logs), b"", parsed.SerializeToString(), joinable=False))
    return log_groups


def log_groups_of(response: PullLogResponse) -> list[LogGroup]:
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


def join_log_groups(log_groups: Iterable[LogGroup], join_packs: bool) -> list[LogGroup]:
    """Puts together LogGroups that are equal in everything but their logs, within JOINED_BYTES and JOINED_LOGS.

    The order of logs is kept, no LogGroup is split. With `join_packs`, an agent's packs count as equal, and the
    outcome bears the number of the first.
    """
    joined: list[LogGroup] = []
    growing: dict[bytes, LogGroup] = {}
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


# ---- the service: calls, and what to do about those that fail --------------------------------------------------------

FIRST_PAUSE = 0.1  # seconds
LONGEST_PAUSE = 5.0  # seconds
CONNECT_TIMEOUT = 10  # seconds
ANSWER_TIMEOUT = 30  # seconds without a byte of it
SURELY_OPEN = 1.0  # seconds for which a connection last used is not looked at before it is used again
USER_AGENT = {"User-Agent": "dispatch_data/" + __version__}

# What an error code means to an operator; {SLS_...} stands for the variable that decides.
ADVICE = {
    "ProjectNotExist": "{SLS_PROJECT} must exist in the region of {SLS_ENDPOINT}",
    "LogStoreNotExist": "{SLS_LOGSTORE} must exist in the project",
    "InvalidAccessKeyId": "{SLS_AK_ID} must be a key that exists and is enabled",
    "SignatureNotMatch": "{SLS_AK_KEY} must be the secret of {SLS_AK_ID}",
    "Unauthorized": "the account of {SLS_AK_ID} needs the permission, see the README's RAM policy",
    "SecurityTokenExpired": "{SLS_STS_TOKEN} has run out: set a new key and token and start again",
    "RequestTimeExpired": "this machine's clock must be right to 15 minutes",
    "ConsumerGroupQuotaExceed": "the logstore has all the consumer groups it may have: delete one that nobody needs, "
    "in the console or by `aliyunlog log list_consumer_group`, `delete_consumer_group`; SLS_CG must not name a group "
    "that another program uses, for each would get the logs of some shards only",
    "ConsumerGroupNotExist": "the consumer group was deleted, and its checkpoints with it: start the copies again to "
    "make it anew, from SLS_CURSOR_START on",
    "ShardNotExist": "the shard, or the logstore it was in, is gone",
    "InvalidShardCheckPoint": "{SLS_LOGSTORE} may have been deleted and made again: then start the copies again",
    "WriteQuotaExceed": "the project's write quota is used up: ask for more in the console",
    "ShardWriteQuotaExceed": "the logstore's shards are full (5 MB/s each): split some, or let the service split them",
    "ReadQuotaExceed": "the project's read quota is used up: ask for more in the console",
    "ShardReadQuotaExceed": "the shard is read at its limit (10 MB/s), by this group or by others",
    "PostBodyTooLarge": "the service won't take this LogGroup, see SLS_REJECTED_DIR",
    "PostBodyInvalid": "the service won't take this LogGroup, see SLS_REJECTED_DIR",
    "ParameterInvalid": "the service won't take this call; if it is a put, see SLS_REJECTED_DIR",
    "CERTIFICATE_VERIFY_FAILED": "the certificate is not trusted; REQUESTS_CA_BUNDLE can name a file of CAs",
    "no answer": "{SLS_ENDPOINT} must be reachable from here: look at its name, the network, the proxy variables",
    "trouble inside": "the service has trouble of its own, which should pass",
}
# Answers that blame what was put, not who puts it, where, or when.
REFUSALS_OF_LOG_GROUPS = ("PostBodyInvalid", "PostBodyTooLarge", "ParameterInvalid")


def printable(text: str, longest: int = 300) -> str:
    """The text, safe to show on one line: what isn't printable is escaped, what is too long is cut."""
    shown = text if len(text) <= longest else text[:longest] + "..."
    return shown if shown.isprintable() else repr(shown)[1:-1]


def pauses() -> Iterator[float]:
    """Seconds to wait before each further try: exponential, capped, and spread so that copies don't try in step."""
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(pause * 2, LONGEST_PAUSE)


class CallFailed(LogException):
    """One call that the service refused, or that never reached it. `status` is None without an answer."""

    def __init__(self, error: LogException) -> None:
        self.code = str(error.get_error_code())
        super().__init__(self.code, str(error.get_error_message()), error.get_request_id(), error.get_resp_status())
        # LogException says 200 where there was no answer at all.
        self.status: int | None = error.get_resp_status() if error.get_resp_status() != 200 else None

    def __str__(self) -> str:
        status = "%d " % self.status if self.status else ""
        return "%s%s: %s" % (status, self.code, printable(self.get_error_message()))

    def may_pass(self) -> bool:
        """Whether time alone may mend it; else somebody has to change a key, a name or a clock."""
        is_throttled = self.code.endswith("QuotaExceed") and self.code != "ConsumerGroupQuotaExceed"
        return self.status is None or self.status >= 500 or is_throttled

    def refuses_log_group(self) -> bool:
        """Whether it was a put that was refused for what it brings."""
        return self.status == 400 and self.code in REFUSALS_OF_LOG_GROUPS

    def advice(self, place: Place) -> str:
        """What to do about it, "" when that is not known."""
        reason = self.code.replace("SecurityToken.", "SecurityToken")
        if self.status is None:
            text = self.get_error_message().lower()
            reason = "CERTIFICATE_VERIFY_FAILED" if "certificate" in text and "verify" in text else "no answer"
        elif self.status >= 500:
            reason = "trouble inside"
        return ADVICE.get(reason, "").format(**place.names)


def explain(error: Exception, place: Place) -> str:
    """An error in one line, with what to do about it."""
    if not isinstance(error, CallFailed):
        return printable(repr(error))
    return "; ".join(filter(None, [str(error), error.advice(place)]))


class GrowingIntervals:
    """Says when it is time for another line about what happens again and again: at once, then ever less often."""

    FIRST, LONGEST = 10.0, 600.0  # seconds

    def __init__(self) -> None:
        self.next, self.interval = 0.0, self.FIRST

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next, self.interval = now + self.interval, min(self.interval * 2, self.LONGEST)
        return True


class Trouble:
    """Calls of one kind that fail at one place: the first is told, then sums at growing intervals, then the end.

    The end is when whatever failed has been done after all, and nothing failed for QUIET seconds.
    """

    QUIET = 5.0

    def __init__(self, subject: str, calls: str, failing: str, place: Place) -> None:
        """`calls` names them, such as "puts"; `failing` says what happens to one that failed."""
        self.subject, self.calls, self.failing, self.place = subject, calls, failing, place
        self.lock = threading.Lock()
        self.open: set[object] = set()  # what has failed and is yet to be done
        self.begin_again()

    def begin_again(self) -> None:
        self.failures = 0
        self.since = self.last = 0.0
        self.codes: set[str] = set()
        self.intervals = GrowingIntervals()

    def failed(self, what: object, error: Exception) -> None:
        """Takes note of a failure; `what` failed, and will be tried again."""
        code = error.code if isinstance(error, CallFailed) else type(error).__name__
        with self.lock:
            self.last = time.monotonic()
            self.since = self.since or self.last
            self.failures += 1
            self.open.add(what)
            is_due = self.intervals.is_due()
            if code in self.codes and not is_due:
                return
            self.codes.add(code)
            failures, seconds = self.failures, self.last - self.since
        line = "%s: %s: %s" % (self.subject, self.failing, explain(error, self.place))
        if failures > 1:
            line += " (%d failed tries in %.0f s)" % (failures, seconds)
        log.log(logging.WARNING if isinstance(error, CallFailed) and error.may_pass() else logging.ERROR, "%s", line)

    def passed(self, what: object) -> None:
        """Takes note that `what` has been done, or is nobody's business any more."""
        if what in self.open:
            with self.lock:
                self.open.discard(what)

    @contextlib.contextmanager
    def watch(self, what: object, pause: float) -> Iterator[None]:
        """Notes how the block ends; if it fails, waits `pause` seconds and raises again."""
        try:
            yield
        except Exception as error:
            self.failed(what, error)
            time.sleep(pause)
            raise
        self.passed(what)

    def settle(self) -> None:
        """Says when it is over; to be called now and then."""
        with self.lock:
            if not self.failures or self.open or time.monotonic() - self.last < self.QUIET:
                return
            line = "%s: %s recovered after %d failed tries in %.0f s"
            values = self.subject, self.calls, self.failures, self.last - self.since
            self.begin_again()
        log.warning(line, *values)


class Connector:
    """Opens connections to one origin (scheme://host:port) as requests would: same proxy, same trusted CAs.

    requests reads the environment and builds its objects anew for every call, which costs more than the rest of a
    put; this reads the environment once. What http.client can't do, a proxy spoken to in TLS or SOCKS, stays with
    requests: then `is_usable` is False.
    """

    def __init__(self, origin: str) -> None:
        settled = requests.Session().merge_environment_settings(origin, {}, None, None, None)
        bundle = requests.utils.DEFAULT_CA_BUNDLE_PATH if settled["verify"] is True else str(settled["verify"] or "")
        self.origin = urlsplit(origin)
        proxy = requests.utils.select_proxy(origin, settled["proxies"])
        self.proxy = urlsplit(requests.utils.prepend_scheme_if_needed(proxy, "http") if proxy else "")
        self.is_usable = self.proxy.scheme in ("", "http") and bool(bundle)
        self.proxy_headers = {}
        if self.proxy.username:
            user = "%s:%s" % requests.utils.get_auth_from_url(self.proxy.geturl())
            self.proxy_headers["Proxy-Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        self.tls = None
        if self.origin.scheme == "https" and self.is_usable:
            is_directory = os.path.isdir(bundle)
            self.tls = ssl.create_default_context(
                cafile=None if is_directory else bundle, capath=bundle if is_directory else None
            )

    def connect(self, answer_timeout: float) -> http.client.HTTPConnection:
        """A new connection, open. Raises OSError, ValueError or HTTPException."""
        host, port = self.origin.hostname or "", self.origin.port
        address = (self.proxy.hostname, self.proxy.port or 80) if self.proxy.hostname else (host, port)
        connection: http.client.HTTPConnection
        if self.tls:
            connection = http.client.HTTPSConnection(*address, timeout=CONNECT_TIMEOUT, context=self.tls)
            if self.proxy.hostname:
                connection.set_tunnel(host, port, headers=self.proxy_headers)
        else:
            connection = http.client.HTTPConnection(*address, timeout=CONNECT_TIMEOUT)
        connection.connect()
        connection.sock.settimeout(answer_timeout)
        return connection

    def request(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Sends one request and returns (status, body, headers) of its answer. Raises OSError or HTTPException."""
        if self.proxy.hostname and not self.tls:  # an HTTP proxy is told the whole URL
            path = self.origin.geturl() + path
            headers = dict(headers, **self.proxy_headers)
        # http.client would check each header and send the body apart, which costs as much again.
        head = "%s %s HTTP/1.1\r\n%s\r\n" % (method, path, "".join("%s: %s\r\n" % pair for pair in headers.items()))
        connection.sock.sendall(head.encode("latin-1") + (body or b""))
        # Closed at once: where there is no answer, an open file would keep the socket open, on PyPy for long.
        with http.client.HTTPResponse(connection.sock, method=method) as response:
            response.begin()
            answer = response.status, response.read(), response.headers
            if response.will_close:
                connection.close()
        return answer


class NotRepeated(Exception):
    """Carries a CallFailed past LogClient._send, which repeats some LogExceptions ten times, a second apart."""


class LeanClient(LogClient):
    """A LogClient that talks to one project, from many threads, without requests, and tries each call once.

    A call that fails raises CallFailed. Three private methods of the SDK's are overridden; should they be renamed,
    calls go through requests again.
    """

    def __init__(self, place: Place, answer_timeout: float | None = None) -> None:
        """`answer_timeout` is in seconds; None stands for ANSWER_TIMEOUT."""
        super().__init__(
            place.endpoint,
            place.access_key_id,
            place.access_key,
            place.security_token or None,
            source="dispatch_data",
            auth_version=place.auth_version,
            region=place.region,
        )
        self.answer_timeout = answer_timeout or ANSWER_TIMEOUT
        self.timeout = (CONNECT_TIMEOUT, self.answer_timeout)  # type: ignore[assignment]  # what requests takes
        self.connector: Connector | None = None
        self.of_thread = threading.local()  # each thread keeps one connection: there is no pool to run out of

    def _send(self, *args: Any, **options: Any) -> Any:
        try:
            return super()._send(*args, **options)  # type: ignore[misc]
        except NotRepeated as carrier:
            raise carrier.args[0] from None

    def _sendRequest(self, *args: Any, **options: Any) -> Any:
        try:
            return super()._sendRequest(*args, **options)  # type: ignore[misc]
        except LogException as error:
            raise NotRepeated(CallFailed(error)) from error

    def _getHttpResponse(
        self, method: str, url: str, params: Mapping[str, Any], body: bytes | None, headers: dict[str, str]
    ) -> Any:
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        path = slash + path + ("?" + urlencode(params) if params else "")
        kept, last_use = getattr(self.of_thread, "kept", (None, 0.0))
        self.of_thread.kept = None, 0.0
        connection: http.client.HTTPConnection | None = kept
        try:
            self.connector = self.connector or Connector(scheme.lower() + "://" + host)
            if not self.connector.is_usable:
                return super()._getHttpResponse(method, url, params, body, headers)  # type: ignore[misc]
            if connection and connection.sock and time.monotonic() - last_use > SURELY_OPEN:
                # An idle connection with something to read has been closed by the other side.
                connection = None if wait_for_read(connection.sock, 0) else connection
            if not connection or not connection.sock:
                connection = self.connector.connect(self.answer_timeout)
            answer = self.connector.request(connection, method, path, body, dict(headers, **USER_AGENT))
        except (OSError, ValueError, http.client.HTTPException) as error:
            if connection:
                connection.close()
            raise LogException("LogRequestError", "%s: %s" % (type(error).__name__, error)) from error
        self.of_thread.kept = connection, time.monotonic()
        return answer


# ---- looking: what --check and --status tell, changing nothing -----------------------------------------------------

CHECK_TIMEOUT = 10.0  # seconds for an answer
GROUP_LIMITS = (10, 30)  # consumer groups a logstore may have, by the service's older and newer pages
ASKED_AT_ONCE = 32  # shards that --status asks of at a time, each over a connection of its own


class ShardStatus(NamedTuple):
    """How far a consumer group is with one shard."""

    shard: int
    status: str  # "readwrite" or "readonly"
    consumer: str  # that holds it, or did when the checkpoint was saved; "" before that
    checkpoint: str  # cursor, "" before the first
    checkpoint_time: int | None  # unix seconds: when the next log to deliver arrived
    behind: float | None  # seconds since then, 0 with nothing left to deliver; None: nobody knows
    updated: float | None  # unix seconds: when the checkpoint was saved


class GroupStatus(NamedTuple):
    """How far a consumer group is; what is compared with now goes by the service's clock."""

    shards: list[ShardStatus]
    clock_ahead: float  # seconds that this machine's clock is ahead of the service's; 0 where they agree

    @property
    def behind(self) -> float | None:
        """Seconds that the last of the shards is behind; None when that is unknown of one of them."""
        seconds = [shard.behind for shard in self.shards]
        known = [behind for behind in seconds if behind is not None]
        return max(known, default=0.0) if len(known) == len(seconds) else None


def clock_ahead(answer: LogResponse, asked: float) -> float:
    """Seconds that this machine's clock is ahead of the service's, by the Date of an answer; 0 within CLOCKS_AGREE.

    `asked` is when the call began, in unix seconds: the service wrote its Date, in whole seconds, since then.
    """
    date = next((text for name, text in answer.get_all_headers().items() if name.lower() == "date"), "")
    parsed = email.utils.parsedate_tz(date)
    if not parsed:
        return 0.0
    there = email.utils.mktime_tz(parsed)
    ahead = max(0.0, asked - there - 1) + min(0.0, time.time() - there)
    return ahead if abs(ahead) > CLOCKS_AGREE else 0.0


def read_shard_status(
    client: LogClient, place: Place, shard: Mapping[str, Any], entry: Mapping[str, Any], clock_ahead: float
) -> ShardStatus:
    """Asks of one shard, as list_shards has it; `entry` is what get_check_point has of it. Raises LogException.

    A shard that holds no log has nothing left to deliver, with a checkpoint, an expired one or none. With logs and no
    checkpoint nobody knows how far behind it is: where it begins is decided when a copy first gets it.
    """
    arguments = place.project, place.logstore, shard["shardID"]
    checkpoint = entry.get("checkpoint") or ""
    arrival = behind = None
    end = client.get_end_cursor(*arguments).get_cursor()
    if checkpoint:
        try:
            arrival = client.get_cursor_time(*arguments, checkpoint).get_cursor_time()
        except LogException as error:
            if error.get_error_code() != "InvalidCursor":
                raise
    if checkpoint == end:
        behind = 0.0
    elif arrival is not None:
        seconds = time.time() - clock_ahead - arrival
        behind = max(0.0, seconds) if seconds > -CLOCKS_AGREE else None
    elif end == client.get_begin_cursor(*arguments).get_cursor():
        behind = 0.0
    updated = entry["updateTime"] / 1e6 if entry.get("updateTime") else None
    consumer = entry.get("consumer") or ""
    return ShardStatus(shard["shardID"], shard["status"], consumer, checkpoint, arrival, behind, updated)


def read_group_status(
    client: LogClient,
    place: Place,
    consumer_group: str,
    only: Sequence[int] | None = None,
    ask: Callable[..., Iterable[ShardStatus]] = map,
) -> GroupStatus:
    """Asks the service of every shard, or of some. It goes by checkpoints: what was pulled is not yet delivered.

    `ask` is `map`, or an executor's to ask of many at a time. Raises LogException.
    """
    shards = client.list_shards(place.project, place.logstore).get_shards_info()
    asked = time.time()
    answer = client.get_check_point(place.project, place.logstore, consumer_group)
    ahead = clock_ahead(answer, asked)
    entries = {entry["shard"]: entry for entry in answer.get_consumer_group_check_points()}

    def read(shard: Mapping[str, Any]) -> ShardStatus:
        return read_shard_status(client, place, shard, entries.get(shard["shardID"], {}), ahead)

    wanted = [shard for shard in shards if only is None or shard["shardID"] in only]
    return GroupStatus(sorted(ask(read, wanted)), ahead)


class Finding(NamedTuple):
    """What a look at the source or at one target has shown."""

    subject: str
    verdict: str  # FINE, WRONG, UNREACHABLE or UNVERIFIED
    text: str
    cause: str = ""  # the same for places that the same thing is wrong with
    warnings: Sequence[str] = ()


FINE, WRONG, UNREACHABLE, UNVERIFIED = "fine", "wrong", "not reachable now", "could not verify"


def look_at(place: Place, subject: str, settings: Settings | None = None) -> Finding:
    """Tries a place with calls that only read; the source with its settings, a target without."""
    client = LeanClient(place, CHECK_TIMEOUT)
    try:
        count = len(client.list_shards(place.project, place.logstore).get_shards_info())
        text = "%d shard%s" % (count, "" if count == 1 else "s")
        if not settings:
            return Finding(subject, FINE, text)
        group = look_at_group(client, place, settings.consumer_group)
        warnings = group.warnings(settings.heartbeat_interval)
        return Finding(subject, FINE, "%s, %s" % (text, group.words()), warnings=warnings)
    except LogException as error:
        failure = CallFailed(error)
    text = explain(failure, place)
    if failure.may_pass():
        return Finding(subject, UNREACHABLE, text)
    if failure.code == "Unauthorized" and not settings:
        return Finding(subject, UNVERIFIED, "the key may not look, whether it may write the first put will show")
    return Finding(subject, WRONG, text, failure.code + failure.advice(place))


class GroupFinding(NamedTuple):
    """What a look at a consumer group has shown."""

    name: str
    others: int | None  # how many other groups the logstore has; None: the key may not list them
    timeout: int | None = None  # seconds; None: there is no such group, or that is unknown
    in_order: bool = False
    strangers: Sequence[str] | None = ()  # consumers that are no copies of this program; None: the key may not ask

    def words(self) -> str:
        """What a start would find."""
        if self.others is None:
            return "could not verify the consumer group, for the key may not list them"
        if self.timeout is None:
            full = ", which may be as many as the logstore takes" if self.others in GROUP_LIMITS else ""
            return "consumer group %s will be made, beside %d others%s" % (self.name, self.others, full)
        unverified = ", could not verify who consumes it" if self.strangers is None else ""
        order = "true" if self.in_order else "false"
        return "consumer group %s exists: timeout %d s, order %s%s" % (self.name, self.timeout, order, unverified)

    def warnings(self, heartbeat_interval: float) -> list[str]:
        """What of it may not be meant so; `heartbeat_interval` in seconds."""
        lines = []
        if self.timeout is not None and self.timeout != 2 * heartbeat_interval:
            lines.append(
                "the timeout of consumer group %s is %d s, which SLS_HEARTBEAT_INTERVAL=%g doesn't fit (twice as long "
                "would): heartbeats follow the shorter of the two, and a copy that is silent for %d s loses its shards"
                % (self.name, self.timeout, heartbeat_interval, self.timeout)
            )
        if self.strangers:
            lines.append(
                "consumer group %s has checkpoints of consumers that are no copies of this program (%s): if they still "
                "run, each program gets the logs of some shards only; give SLS_CG a name that nothing else uses"
                % (self.name, printable(", ".join(self.strangers)))
            )
        return lines


def is_copy(consumer: str, consumer_group: str) -> bool:
    """Whether a consumer's name is of the form that consumer_name() gives to copies of this program."""
    form = re.escape(consumer_group[:24]) + "-[A-Za-z0-9]{0,12}-[0-9]+-[0-9a-f]{12}"
    return bool(re.fullmatch(form, consumer))


def look_at_group(client: LogClient, place: Place, consumer_group: str) -> GroupFinding:
    """Looks at the consumer group as it is now. Raises LogException."""
    try:
        groups = client.list_consumer_group(place.project, place.logstore).get_consumer_groups()
        found = next((group for group in groups if group.get_consumer_group_name() == consumer_group), None)
    except LogException as error:
        if error.get_error_code() != "Unauthorized":
            raise
        return GroupFinding(consumer_group, None)
    if not found:
        return GroupFinding(consumer_group, len(groups))
    strangers = None
    try:
        answer = client.get_check_point(place.project, place.logstore, consumer_group)
        names = {entry.get("consumer") or "" for entry in answer.get_consumer_group_check_points()}
        strangers = sorted(name for name in names if name and not is_copy(name, consumer_group))
    except LogException as error:
        if error.get_error_code() != "Unauthorized":
            raise
    return GroupFinding(consumer_group, len(groups) - 1, found.get_timeout(), found.is_in_order(), strangers)


def look_at_all(settings: Settings) -> list[Finding]:
    """Looks at the source and at every target at the same time; the source comes first."""
    threads = concurrent.futures.ThreadPoolExecutor(1 + len(settings.targets))
    looks = [threads.submit(look_at, settings.source, settings.source_name, settings)]
    looks += [threads.submit(look_at, target.place, target.name) for target in settings.targets]
    return [look.result() for look in looks]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def show_check(settings: Settings) -> int:
    """Prints what was found, a line for each place; the exit status: 1 when anything is wrong or not reachable."""
    findings = look_at_all(settings)
    print(table([(finding.subject, "%s: %s" % (finding.verdict, finding.text)) for finding in findings]))
    found = ["%s: %s" % (finding.subject, warning) for finding in findings for warning in finding.warnings]
    for line in [*settings.notes, *("warning: " + warning for warning in (*settings.warnings, *found))]:
        print(line)
    return int(any(finding.verdict in (WRONG, UNREACHABLE) for finding in findings))


def status_table(status: GroupStatus, now: float) -> str:
    """What --status prints; `now` in unix seconds by the service's clock."""
    rows = [("shard", "status", "holder", "checkpoint", "behind", "updated")]
    for shard in status.shards:
        no_time = "expired" if shard.checkpoint else "none"
        rows.append((
            str(shard.shard),
            shard.status,
            shard.consumer or "-",
            local_time(shard.checkpoint_time) if shard.checkpoint_time else no_time,
            "-" if shard.behind is None else "%.0f s" % shard.behind,
            "%.0f s ago" % (now - shard.updated) if shard.updated else "never",
        ))  # fmt: skip
    holders = {shard.consumer for shard in status.shards if shard.consumer}
    total = "unknown" if status.behind is None else "%.0f s" % status.behind
    rows.append(("all", "%d in all" % len(status.shards), "%d in all" % len(holders), "", total, ""))
    return table(rows)


def show_status(settings: Settings, as_json: bool, max_lag: float | None) -> int:
    """Prints how far the group is; the exit status: 1 when it can't be told, or is more than `max_lag` seconds behind.

    A shard of which nobody knows how far behind it is counts as behind.
    """
    source, group = settings.source, settings.consumer_group
    ask = concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE).map
    try:
        status = read_group_status(LeanClient(source, CHECK_TIMEOUT), source, group, ask=ask)
    except LogException as error:
        failure = explain(CallFailed(error), source)
        print("%s, consumer group %s: %s" % (settings.source_name, group, failure), file=sys.stderr)
        return 1
    now, behind = time.time() - status.clock_ahead, status.behind
    if status.clock_ahead:
        words = abs(status.clock_ahead), "ahead of" if status.clock_ahead > 0 else "behind"
        print("this machine's clock is %.0f s %s the service's, by which this is told" % words, file=sys.stderr)
    if as_json:
        shards = [
            {
                "shard": shard.shard, "status": shard.status, "holder": shard.consumer,
                "checkpoint": shard.checkpoint, "checkpoint_time": shard.checkpoint_time,
                "behind_seconds": shard.behind, "updated_time": shard.updated,
            }
            for shard in status.shards
        ]  # fmt: skip
        print(json.dumps({"project": source.project, "logstore": source.logstore, "consumer_group": group,
                          "time": now, "clock_ahead_seconds": status.clock_ahead, "behind_seconds": behind,
                          "shards": shards}, indent=2))  # fmt: skip
    else:
        print(status_table(status, now))
    return int(max_lag is not None and (behind is None or behind > max_lag))


# ---- delivery: every put until the target has taken it --------------------------------------------------------------

GRACE = 5.0  # seconds for a batch in flight when its copy is told to stop or its shard is to move
LOOK_INTERVAL = 0.05  # seconds of load that decide whether more writers would help
REFUSALS = 3  # times that a LogGroup must be refused, alone, before it counts as refused for good


class Patience:
    """Lasts as long as its batch is wanted, and GRACE seconds more."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        self.is_wanted = is_wanted
        self.end: float | None = None

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


class RejectedLogGroups:
    """Keeps LogGroups that a target refuses for good as files: one each, for the owner alone, on disk for certain.

    A file has the bytes of one LogGroup, and a name made of those of its target and of a hash: a LogGroup that is
    refused again after a crash is the same file again.
    """

    MOST_BYTES = 1000 * 1000 * 1000  # of all such files; what goes beyond is not set aside

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.lock = threading.Lock()

    def keep(self, target: int, place: Place, log_group: LogGroup) -> str:
        """Returns the path of the file. Raises OSError, also when the directory has MOST_BYTES."""
        data = log_group.SerializeToString()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        name = "TO%d-%s-%s-%s.loggroup" % (target, place.project, place.logstore, digest)
        path = os.path.join(self.directory, name)
        with self.lock:
            with os.scandir(self.directory) as entries:
                used = sum(
                    entry.stat().st_size for entry in entries if ".loggroup" in entry.name and entry.name != name
                )
            if used + len(data) > self.MOST_BYTES:
                raise OSError(errno.EDQUOT, "it holds %d bytes, as many as are kept; make room" % used, self.directory)
            self.write(path, data)
        return path

    def write(self, path: str, data: bytes) -> None:
        """Writes a file that is there whole or not at all, whenever the machine stops."""
        unfinished = "%s.%d.unfinished" % (path, os.getpid())
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class Target:
    """One target logstore: its writer, its threads and its counts."""

    def __init__(self, settings: TargetSettings, writers: int, rejected: RejectedLogGroups | None) -> None:
        self.number, self.place = settings.number, settings.place
        self.name = settings.name
        self.write = functools.partial(LeanClient(self.place).put_log_raw, self.place.project, self.place.logstore)
        # Threads of its own, so that a slow or refused target holds back no other.
        self.threads = concurrent.futures.ThreadPoolExecutor(writers, "TO%d" % self.number)
        self.lock = threading.Lock()
        self.log_groups = self.logs = self.bytes = self.retries = self.set_aside = 0
        self.rejected = rejected
        self.putting = Trouble(self.name, "puts", "a put failed and is tried again until it is taken", self.place)
        self.keeping = Trouble(self.name, "setting aside", "a refused LogGroup can't be set aside yet", self.place)
        self.set_aside_lines = GrowingIntervals()

    def put_all(self, log_groups: deque[LogGroup], given_up: threading.Event) -> bool:
        """Puts what waits in `log_groups`, beside other writers; False if `given_up` was set before one was taken."""
        while True:
            try:
                log_group = log_groups.popleft()
            except IndexError:
                return True
            if not self.put(log_group, given_up):
                return False

    def put(self, log_group: LogGroup, given_up: threading.Event) -> bool:
        """Tries until the target has taken it, on every error; False if `given_up` was set before that.

        What is refused for what it brings is put in the pieces it was joined of. A single LogGroup refused so
        REFUSALS times is set aside where SLS_REJECTED_DIR is set.
        """
        is_done = False
        refusals = 0
        for pause in pauses():
            if is_done or given_up.is_set():
                break
            try:
                self.write(log_group)
                self.count(len(log_group.logs), log_group.log_count, log_group.size)
                is_done = True
            except Exception as error:
                self.putting.failed(log_group, error)
                self.count(retries=1)
                refusals += isinstance(error, CallFailed) and error.refuses_log_group()
                if refusals and len(log_group.logs) > 1:
                    self.putting.passed(log_group)
                    return self.put_all(deque(log_group.split()), given_up)
                is_done = refusals >= REFUSALS and self.keep(log_group, error)
                if not is_done:
                    given_up.wait(pause)
        self.putting.passed(log_group)
        self.keeping.passed(log_group)
        return is_done

    def keep(self, log_group: LogGroup, error: Exception) -> bool:
        """Sets a LogGroup aside; False if that can't be done, or not now."""
        if not self.rejected:
            return False
        try:
            path = self.rejected.keep(self.number, self.place, log_group)
        except OSError as failure:
            self.keeping.failed(log_group, failure)
            return False
        self.count(set_aside=1)
        if self.set_aside_lines.is_due():
            log.error(
                "%s: a LogGroup of topic '%s', %d logs, is refused for good and set aside as %s (%d so far): %s",
                self.name, printable(log_group.Topic, 60), log_group.log_count, path, self.set_aside, error,
            )  # fmt: skip
        return True

    def count(self, log_groups: int = 0, logs: int = 0, size: int = 0, retries: int = 0, set_aside: int = 0) -> None:
        with self.lock:
            self.log_groups += log_groups
            self.logs += logs
            self.bytes += size
            self.retries += retries
            self.set_aside += set_aside

    def summary(self) -> str:
        return (
            f"target={self.number} logstore={self.place} groups={self.log_groups} logs={self.logs} bytes={self.bytes} "
            f"retries={self.retries} failing={len(self.putting.open)} set_aside={self.set_aside}"
        )


class Unmatched:
    """Counts the LogGroups left out because no route matches their topic."""

    MOST_TOPICS, LONGEST_TOPIC = 1000, 60  # counted each for itself; shown, in characters

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log_groups = self.logs = 0
        self.topics: Counter[str] = Counter()

    def add(self, log_group: LogGroup) -> None:
        topic = printable(log_group.Topic, self.LONGEST_TOPIC)
        with self.lock:
            self.log_groups += 1
            self.logs += log_group.log_count
            if topic in self.topics or len(self.topics) < self.MOST_TOPICS:
                self.topics[topic] += 1

    def summary(self) -> str:
        with self.lock:
            named = json.dumps(", ".join("%s %d" % pair for pair in self.topics.most_common(10)), ensure_ascii=False)
            return f"unmatched_groups={self.log_groups} unmatched_logs={self.logs} unmatched_topics={named}"


class Delivery:
    """Takes batches of LogGroups to their targets."""

    def __init__(self, settings: Settings) -> None:
        self.routes = Routes(settings.targets)
        rejected = RejectedLogGroups(settings.rejected_dir) if settings.rejected_dir else None
        self.targets = {target.number: Target(target, settings.writers, rejected) for target in settings.targets}
        self.crew = Crew(settings.writers)
        self.join_packs = settings.merge_packs
        self.unmatched = Unmatched()

    def troubles(self) -> Iterator[Trouble]:
        for target in self.targets.values():
            yield target.putting
            yield target.keeping

    def sort(self, log_groups: Iterable[LogGroup]) -> dict[int, list[LogGroup]]:
        """The LogGroups by the number of their target, in their order; the unmatched are counted and left out."""
        sorted_groups: dict[int, list[LogGroup]] = {}
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
        tasks: list[concurrent.futures.Future[bool]] = []
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


class Membership:
    """Whether what this copy knows of its shards still holds.

    The service forgets a consumer that is silent for longer than the group's timeout, and gives its shards to others.
    Should it get them back, they are ahead of what it knew: then everything begins anew, at their checkpoints. Each
    such beginning has a number.
    """

    CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # it goes on while the process or machine sleeps

    def __init__(self, group_timeout: float) -> None:
        self.group_timeout = group_timeout  # seconds
        self.number = 0
        self.saving = 0  # checkpoints on their way to the service
        self.change = threading.Condition()
        self.last_beat = self.now()

    def now(self) -> float:
        return time.clock_gettime(self.CLOCK)

    def may_have_ended(self) -> bool:
        return self.now() - self.last_beat > self.group_timeout

    def begin_anew(self) -> None:
        """Ends what was. Returns when no checkpoint of it is under way: the service refuses those, until it is told
        of this copy again, and would take them after that."""
        with self.change:
            self.number += 1
            self.change.wait_for(lambda: self.saving == 0)

    @contextlib.contextmanager
    def save(self, number: int) -> Iterator[bool]:
        """Around the saving of a checkpoint, which makes sense only if it gives True."""
        with self.change:
            makes_sense = number == self.number
            self.saving += makes_sense
        try:
            yield makes_sense
        finally:
            with self.change:
                self.saving -= makes_sense
                self.change.notify_all()


class SourceClient(ConsumerClient):
    """The consumer group's calls, where the SDK's would lose logs or write over another copy's checkpoint."""

    # The SDK keeps up to three pulls of a shard in memory, so the count asked for follows from the size of what came
    # last. Five pulls of 2 MB a second are what the service gives of a shard.
    PULL_BYTES = 2 * 1000 * 1000
    FIRST_COUNT = 100
    MOST_COUNT = 1000  # the service's limit

    def __init__(self, config: LogHubConfig, settings: Settings) -> None:
        place = self.place = settings.source
        key = place.access_key_id, place.access_key
        names = place.project, place.logstore, settings.consumer_group, config.consumer_name
        super().__init__(place.endpoint, *key, *names)
        self.mclient = LeanClient(place)
        # A heartbeat whose answer takes longer than its interval comes too late.
        self.heartbeat_client = LeanClient(place, settings.heartbeat_interval)
        self.heartbeat_interval = settings.heartbeat_interval
        self.membership = Membership(config.consumer_group_time_out)
        self.start = settings.cursor_start
        self.fetch_interval = settings.fetch_interval
        self.next_pulls: dict[int, float] = {}
        self.counts: dict[int, int] = {}
        self.pauses: dict[int, Iterator[float]] = {}
        self.refused_checkpoints: dict[int, tuple[str, str]] = {}  # shard -> the one saved last, the one refused
        name = self.name = settings.source_name
        self.beginning = Trouble(name, "beginning", "a shard can't begin yet", place)
        self.beating = Trouble(name, "heartbeats", "a heartbeat failed and is tried again", place)
        self.pulling = Trouble(name, "pulls", "a pull failed and is tried again", place)
        self.saving = Trouble(name, "checkpoints", "a checkpoint is not saved yet", place)
        checkpoints = self.mclient.get_check_point(self.mproject, self.mlogstore, self.mconsumer_group)
        group_is_new = not any(entry["checkpoint"] for entry in checkpoints.get_consumer_group_check_points())
        shards = self.mclient.list_shards(self.mproject, self.mlogstore).get_shards_info()
        self.first_shards = {shard["shardID"] for shard in shards} if group_is_new else set()

    def heartbeat(self, shards: list[int], responce: list[int] | None = None) -> bool:
        """Adds the shards that this copy may hold to `responce`; False when that has failed for half an interval.

        The SDK would wait a whole interval after the first failure, and would go on listing shards to a service that
        has forgotten this consumer, and therefore refuses the heartbeat.
        """
        deadline = time.monotonic() + self.heartbeat_interval / 2
        is_unknown = False
        for pause in pauses():
            sent = self.membership.now()
            begins_anew = is_unknown or self.membership.may_have_ended()
            if begins_anew:
                self.membership.begin_anew()
            try:
                listed = [] if begins_anew else shards
                answer = self.heartbeat_client.heart_beat(
                    self.mproject, self.mlogstore, self.mconsumer_group, self.mconsumer, listed
                )
            except Exception as error:  # any: ConsumerHeatBeat.run would begin again without a pause
                is_unknown = isinstance(error, CallFailed) and error.code == "NotExistConsumerWithBody"
                if is_unknown and not begins_anew:
                    continue
                self.beating.failed("heartbeat", error)
                if time.monotonic() + pause > deadline:
                    return False
                time.sleep(pause)
                continue
            if begins_anew:
                self.membership.begin_anew()  # once more: what was asked before its answer may be old
                log.warning("%s: the service has not heard of this copy for longer than the group's timeout; each "
                            "shard begins again at its checkpoint", self.name)  # fmt: skip
            self.membership.last_beat = sent
            self.beating.passed("heartbeat")
            if responce is not None:
                responce.extend(answer.get_shards())
            return True
        return False

    def settle_start(self, shard: int) -> None:
        """Sees to it that the service knows where a shard begins, before anything is read.

        Else a copy killed before its first checkpoint would let the next begin at a later "end". A shard that was born
        after the group began, by a split or a merge, is read from its first log. Raises LogException.
        """
        saved = self.get_check_point(shard)["checkpoint"]
        before, delivered = self.refused_checkpoints.get(shard, ("", ""))
        if saved:
            if saved == before:  # nobody has been further since: what this copy has delivered need not be repeated
                self.update_check_point(shard, self.mconsumer, delivered)
            self.refused_checkpoints.pop(shard, None)
            return
        cursor = self.get_cursor(shard, self.start if shard in self.first_shards else "begin")
        self.update_check_point(shard, self.mconsumer, cursor)

    def update_check_point(self, shard: int, consumer: str, check_point: str) -> None:
        # The SDK forces its update: a copy that was frozen and lost the shard would write over the new holder's.
        self.mclient.update_check_point(
            self.mproject, self.mlogstore, self.mconsumer_group, shard, check_point, consumer, force_success=False
        )

    def lag(self, shards: Sequence[int]) -> float | None:
        """Seconds since the oldest log arrived that these shards have yet to deliver, 0 without one.

        None when a checkpoint has expired. Raises LogException.
        """
        return read_group_status(self.mclient, self.place, self.mconsumer_group, shards).behind

    def pull_logs(self, shard_id: int, cursor: str, *args: Any, **options: Any) -> PullLogResponse:
        time.sleep(max(0.0, self.next_pulls.get(shard_id, 0.0) - time.monotonic()))
        self.next_pulls[shard_id] = time.monotonic() + self.fetch_interval
        options["count"] = self.counts.get(shard_id, self.FIRST_COUNT)
        with self.pulling.watch(shard_id, 0.0):
            try:
                response = super().pull_logs(shard_id, cursor, *args, **options)
            except LogException as error:
                self.next_pulls[shard_id] += next(self.pauses.setdefault(shard_id, pauses()))
                # The SDK would go on at the newest log and skip what lies between.
                if error.get_error_code() != "InvalidCursor":
                    raise
                response = self.pull_oldest(shard_id, cursor, *args, **options)
        self.pauses.pop(shard_id, None)
        if response.get_loggroup_count():
            size = response.get_raw_size() / response.get_loggroup_count()
            self.counts[shard_id] = max(1, min(self.MOST_COUNT, int(self.PULL_BYTES / size)))
        return response

    def pull_oldest(self, shard: int, lost_cursor: str, *args: Any, **options: Any) -> PullLogResponse:
        """Pulls from the oldest log there is, in the place of a cursor that the service no longer knows."""
        oldest = self.get_begin_cursor(shard)
        try:
            response = super().pull_logs(shard, oldest, *args, **options)
        except LogException as error:
            # By any other name: this one would send the SDK to the newest log after all.
            raise LogException("OldestLogUnknown", error.get_error_message(), resp_status=503) from error
        log.error(
            "%s: shard %s: the service no longer knows cursor %s, the checkpoint of %s; logs that arrived from then on "
            "and before %s have reached the end of their retention time and are SKIPPED, not delivered",
            self.name, shard, lost_cursor, self.time_saved(shard), self.arrival_time(shard, oldest),
        )  # fmt: skip
        return response

    def time_saved(self, shard: int) -> str:
        try:
            return local_time(self.get_check_point(shard)["updateTime"] / 1e6)
        except (LogException, CheckPointException, KeyError):
            return "an unknown time"

    def arrival_time(self, shard: int, cursor: str) -> str:
        try:
            answer = self.mclient.get_cursor_time(self.mproject, self.mlogstore, shard, cursor)
            return local_time(answer.get_cursor_time())
        except LogException:
            return "now"


class ShardConsumer(ConsumerProcessorBase):
    """Delivers one shard's batches, one after the other; the SDK makes one for each shard held."""

    UNREADABLE_PAUSE = 5.0  # seconds before bytes that nobody can read are pulled again
    NO_MEMBERSHIP = -1
    BEGIN_PAUSE = 1.0  # seconds before another try to begin; the SDK alone would try in every turn

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.source = dispatcher.consumer_client
        self.membership = self.source.membership.number
        self._preprocessor = self.read_pull  # called by the SDK in the fetching thread

    def initialize(self, shard: int) -> None:
        super().initialize(shard)
        with self.source.beginning.watch(shard, self.BEGIN_PAUSE):
            self.source.settle_start(shard)

    def read_pull(self, response: PullLogResponse) -> list[LogGroup]:
        try:
            return log_groups_of(response)
        except LogException:  # its text would hold the whole pull
            words = "shard %s: a pull of %s bytes is no LogGroupList; nothing of it is delivered, it is pulled again"
            log.error(words, self.shard_id, response.get_raw_size())
            time.sleep(self.UNREADABLE_PAUSE)
            raise LogException("BadResponse", "not a LogGroupList") from None

    def process(self, log_groups: list[LogGroup], check_point_tracker: ConsumerCheckpointTracker) -> str | None:
        """Delivers a batch, then saves its checkpoint; the next batch comes after both.

        Returns None, or, for a batch that was not delivered whole, the checkpoint from which the SDK is to fetch again:
        had this raised or returned False, the SDK would go on with the next batch and checkpoint beyond this one.
        """
        delivered = False
        if self.dispatcher.begin_batch(self.is_wanted):
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
        if self.membership != self.source.membership.number:
            return self.begin_anew(check_point_tracker)
        return None if delivered else check_point_tracker.get_check_point()

    def begin_anew(self, check_point_tracker: ConsumerCheckpointTracker) -> str:
        """Goes on at the service's checkpoint, for others may have been further. Returns where the SDK is to fetch.

        If that can't be found out, it is where something is to be fetched, so that the next batch tries again.
        """
        number = self.source.membership.number
        try:
            self.initialize(self.shard_id)
            checkpoint = self.source.get_check_point(self.shard_id)["checkpoint"]
        except LogException:
            before, _ = self.source.refused_checkpoints.get(self.shard_id, ("", ""))
            return before or check_point_tracker.get_check_point()
        check_point_tracker.set_memory_check_point(checkpoint)
        check_point_tracker.set_persistent_check_point(checkpoint)
        self.membership = number
        return checkpoint

    def shutdown(self, check_point_tracker: ConsumerCheckpointTracker) -> None:
        """Called when the shard moves on. The SDK's own would save the cursor of a batch that may not be delivered."""
        self.persist(check_point_tracker, Patience(self.is_wanted))
        self.source.pulling.passed(self.shard_id)
        self.source.beginning.passed(self.shard_id)

    def persist(self, check_point_tracker: ConsumerCheckpointTracker, patience: Patience) -> None:
        """Saves the checkpoint of what was delivered, trying until it is taken, refused for good, or patience ends."""
        for pause in pauses():
            try:
                with self.source.membership.save(self.membership) as makes_sense:
                    if makes_sense:
                        check_point_tracker.flush_check_point()
                        break
            except CheckPointException as error:
                cause = CallFailed(error.args[-1])
                makes_sense = not cause.code.startswith("ConsumerNot")
            if not makes_sense:
                self.membership = self.NO_MEMBERSHIP
                last, refused = check_point_tracker.last_persistent_checkpoint, check_point_tracker.get_check_point()
                if refused != last:
                    log.warning("shard %s: it is another copy's, or was; its checkpoint stays as it is", self.shard_id)
                    self.source.refused_checkpoints[self.shard_id] = last, refused
                    # Else the SDK's one loop would try again when the shard has been idle for a while, and die of it.
                    check_point_tracker.set_persistent_check_point(refused)
                break
            self.source.saving.failed(self.shard_id, cause)
            if not patience.lasts():
                break
            time.sleep(pause)
        self.source.saving.passed(self.shard_id)

    def is_wanted(self) -> bool:
        return self.membership == self.source.membership.number and self.dispatcher.wants(self.shard_id)


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
            data_fetch_interval=self.TURN,  # type: ignore[arg-type]  # any number will do
            security_token=source.security_token or None,
            worker_pool_size=self.THREADS,
            auth_version=source.auth_version,
            region=source.region,
        )
        super().__init__(ShardConsumer, config, args=(self,))
        self.consumer_client = self.heart_beat.log_client = SourceClient(config, settings)
        self.delivery = delivery
        self.stopping = False
        self.batches_in_flight = 0
        self.change = threading.Condition()

    def wants(self, shard: int) -> bool:
        """Whether this copy is to go on with a shard."""
        return not self.stopping and shard in self.heart_beat.get_held_shards()

    def begin_batch(self, is_wanted: Callable[[], bool]) -> bool:
        """Waits until this copy surely holds the batch's shard; False when the batch is not wanted, or no longer."""
        # A copy that was frozen or cut off may have lost its shards to another: only a heartbeat can tell.
        while is_wanted() and self.consumer_client.membership.may_have_ended():
            time.sleep(0.1)
        with self.change:
            if is_wanted():
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

    def troubles(self) -> list[Trouble]:
        source = self.consumer_client
        return [source.beginning, source.beating, source.pulling, source.saving, *self.delivery.troubles()]

    def lag(self) -> str:
        """The lag of the shards held, in whole seconds, or "unknown"."""
        try:
            lag = self.consumer_client.lag(self.heart_beat.get_held_shards())
        except Exception:  # any: the thread that tells must go on telling
            lag = None
        return "unknown" if lag is None else "%d" % lag

    def summary(self, lag: str = "unknown") -> list[str]:
        """What became of the logs so far: a line for each target and one for the source, to be read by programs too."""
        lines = ["summary " + target.summary() for target in self.delivery.targets.values()]
        shards = ",".join(map(str, sorted(self.heart_beat.get_held_shards()))) or "none"
        source = self.consumer_client
        state = f"source={source.place} group={source.mconsumer_group} shards={shards} lag_seconds={lag}"
        return [*lines, f"summary {state} {self.delivery.unmatched.summary()}"]


def consumer_name(consumer_group: str) -> str:
    """A name of at most 63 characters that no other copy has: host and process id repeat themselves in containers."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
    return "%s-%s-%d-%s" % (consumer_group[:24], host[:12], os.getpid(), uuid.uuid4().hex[:12])


# ---- command line ---------------------------------------------------------------------------------------------------

TICK = 0.1  # seconds between looks at whether something is to be done
SUMMARY_INTERVAL = 30.0  # seconds
STOP_TIME = 8.0  # seconds for an orderly stop, which as a whole must not take 10
FIRST_CONTACT = (
    "dispatch_data.py: every setting is explained in .env.example; to see the program work without a cloud account: "
    "python3 -m tests.local_log_service demo"
)
EXIT_STATUSES = """exit status:
  0  stopped as asked; --check: nothing is wrong; --status: within --max-lag
  1  could not start, or ended by itself; --check: something is wrong; --status: beyond --max-lag, or unknown
  2  the settings or the arguments are wrong"""


class CannotStart(Exception):
    """The group can't be joined, or not in a way that makes sense; the text has a line for each reason."""


def check_before_start(settings: Settings) -> None:
    """Looks at every place. Raises CannotStart for what is certainly wrong; says what could not be found out."""
    wrong: dict[str, list[Finding]] = {}
    for finding in look_at_all(settings):
        if finding.verdict == WRONG:
            wrong.setdefault(finding.cause, []).append(finding)
        elif finding.verdict == UNREACHABLE:
            log.warning("%s: %s: %s", finding.subject, finding.verdict, finding.text)
        for warning in finding.warnings:
            log.warning("%s: %s", finding.subject, warning)
    if wrong:
        lines = ["%s: %s" % (", ".join(one.subject for one in alike), alike[0].text) for alike in wrong.values()]
        raise CannotStart("\n".join(lines))


def join_group(settings: Settings, delivery: Delivery) -> Dispatcher:
    """Joins the consumer group, trying again while that may help. Raises CannotStart."""
    place = settings.source
    joining = Trouble(settings.source_name, "joining", "can't join the consumer group yet, trying again", place)
    client = LeanClient(place)
    for pause in pauses():
        try:
            # The SDK would try its own first calls for 20 s, in silence, where the service can't be reached.
            client.list_shards(place.project, place.logstore)
            return Dispatcher(settings, delivery)
        except (LogException, ClientWorkerException) as error:
            # ClientWorkerException hides the LogException that caused it.
            cause = error if isinstance(error, LogException) else error.__context__
            failure = CallFailed(cause if isinstance(cause, LogException) else LogException("JoinFailed", str(error)))
        if not failure.may_pass():
            raise CannotStart("%s: can't join the consumer group: %s" % (settings.source_name, explain(failure, place)))
        joining.failed("join", failure)
        time.sleep(pause)
    raise AssertionError("pauses() has no end")


def hidden(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def secrets_of(settings: Settings) -> list[str]:
    """All that must never be shown: the settings' secrets and the passwords of proxies, as written and decoded."""
    proxies = urllib.request.getproxies()  # the others are nobody's business here, and may be no URLs
    passwords = [urlsplit(proxies[name]).password for name in ("http", "https", "all") if name in proxies]
    return settings.secrets() + [form for text in passwords if text for form in (text, unquote(text))]


class LineFormatter(logging.Formatter):
    """Hides secrets, and makes sure that nothing which is logged looks like a line of its own or is without end."""

    LONGEST_LINE = 2000  # characters

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(process)d %(levelname)s %(message)s")
        self.secrets = list(secrets)

    def format(self, record: logging.LogRecord) -> str:
        lines = hidden(super().format(record), self.secrets).splitlines()
        return "\n    ".join(printable(line, self.LONGEST_LINE) for line in lines)


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file whose trouble, such as a full disk, is told on stderr and stops nothing."""

    def __init__(self, directory: str) -> None:
        self.intervals = GrowingIntervals()
        path = os.path.join(directory, "dispatch_data_%d.log" % os.getpid())
        super().__init__(path, maxBytes=100 * 1000 * 1000, backupCount=5, encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's signature
        error = sys.exc_info()[1]
        if self.intervals.is_due():
            print("dispatch_data.py: can't write the log file %s: %s" % (self.baseFilename, error), file=sys.stderr)


def set_up_logging(settings: Settings) -> None:
    """To stderr, and to a file of this process's own; stderr gets only warnings when it is no terminal but a file.

    Raises OSError when the file can't be made.
    """
    to_stderr = logging.StreamHandler()
    handlers: list[logging.Handler] = [to_stderr]
    if settings.log_dir:
        handlers.append(LogFile(settings.log_dir))
        if not sys.stderr.isatty():
            to_stderr.setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(LineFormatter(secrets_of(settings)))
    logging.basicConfig(level=settings.log_level, handlers=handlers)
    if settings.log_level != "DEBUG":
        # What the SDK would say of failing calls, once each, Trouble says in sums.
        logging.getLogger("aliyun").setLevel(logging.CRITICAL)
        logging.raiseExceptions = False  # the SDK's heartbeat formats one of its messages wrongly


def help_text() -> str:
    """The table of settings and the exit statuses, for --help."""
    groups = (
        ("the source, and the targets unless they say otherwise", PLACE_SETTINGS + SOURCE_SETTINGS),
        ("the targets, n = 1, 2, 3 ...", TARGET_SETTINGS),
        ("tuning", TUNING_SETTINGS),
    )
    lines = ["settings are environment variables:"]
    for title, settings in groups:
        lines.append("\n %s:" % title)
        for setting in settings:
            numbered = "<n>" if setting in TARGET_SETTINGS else ""
            default = "required" if setting.default is REQUIRED else "default: %s" % (setting.default or "none")
            if setting.name == "SLS_TOPIC_TO":
                default = "default, while none is set: " + "; ".join("%d: %s" % pair for pair in DEFAULT_TOPICS.items())
            lines.append("  %s%s (%s)\n      %s" % (setting.name, numbered, default, setting.meaning))
        if settings is TARGET_SETTINGS:
            names = ", ".join(setting.name for setting in PLACE_SETTINGS)
            lines.append("  %s with _TO:\n      the same for all targets; with _TO<n>: for target n" % names)
    return "\n".join([*lines, "", EXIT_STATUSES])


def is_ignored(number: int) -> bool:
    """Whether this process began with a signal ignored, as nohup has SIGHUP. PyPy's getsignal doesn't know that."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            mask = next(line.split()[1] for line in file if line.startswith("SigIgn:"))
        return bool(int(mask, 16) >> (number - 1) & 1)
    except (OSError, StopIteration):
        return signal.getsignal(number) == signal.SIG_IGN


def catch_stop_signals() -> list[int]:
    """A list that gets the numbers of SIGTERM, SIGINT and SIGHUP as they come.

    It is for the main thread to look at: an exception raised out of the blue, as Ctrl-C does by default, could strike
    where a lock is held. SIGINT is caught also where a shell had it ignored; nohup has SIGHUP ignored, so it stays.
    """
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or not is_ignored(number):
            signal.signal(number, lambda number, _: caught.append(number))
    return caught


def tell(dispatcher: Dispatcher) -> None:
    """Tells how it goes, for ever; in a thread of its own, for the service may take its time to say the lag."""
    next_summary = time.monotonic() + SUMMARY_INTERVAL
    while True:
        time.sleep(TICK)
        for trouble in dispatcher.troubles():
            trouble.settle()
        if time.monotonic() > next_summary:
            for line in dispatcher.summary(dispatcher.lag()):
                log.info("%s", line)
            next_summary = time.monotonic() + SUMMARY_INTERVAL


def prepare(settings: Settings) -> Dispatcher:
    """Checks the settings against the service and joins the group. Raises CannotStart."""
    check_before_start(settings)
    dispatcher = join_group(settings, Delivery(settings))
    for note in settings.notes:
        log.info("%s", note)
    routes = ["%s <- %s" % (target.place, ",".join(target.topics)) for target in settings.targets]
    log.info("consumer %s of %s, targets: %s", dispatcher.option.consumer_name, settings.source, ", ".join(routes))
    return dispatcher


def run(settings: Settings) -> int:
    """Joins the group and dispatches until it is told to stop; the process's exit status."""
    stop_asked = catch_stop_signals()
    preparing = concurrent.futures.ThreadPoolExecutor(1).submit(prepare, settings)
    while not preparing.done() and not stop_asked:
        time.sleep(TICK)
    if not preparing.done():
        return 0
    try:
        dispatcher = preparing.result()
    except CannotStart as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return 0 if stop_asked else 1
    dispatcher.start()
    threading.Thread(target=tell, args=(dispatcher,), daemon=True).start()
    while dispatcher.is_alive() and not stop_asked:
        time.sleep(TICK)
    if not stop_asked:
        log.error("the consumer ended by itself; this copy ends so that another can take its shards")
    if not dispatcher.stop(STOP_TIME):
        log.warning("stopped in the middle of a batch; it is delivered again by whoever takes the shard next")
    for line in dispatcher.summary():
        log.info("%s", line)
    return 0 if stop_asked else 1


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dispatch_data.py",
        usage="dispatch_data.py [--check | --status [--json] [--max-lag SECONDS] | --version | --help]",
        description=(__doc__ or "").splitlines()[0],
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version="dispatch_data.py " + __version__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="try the settings, the source and the targets, and end")
    action.add_argument("--status", action="store_true", help="show how far the consumer group is, and end")
    parser.add_argument("--json", action="store_true", help="with --status: for programs")
    parser.add_argument("--max-lag", type=seconds, metavar="SECONDS", help="with --status: exit status 1 beyond it")
    parsed = parser.parse_args(arguments)
    if not parsed.status and (parsed.json or parsed.max_lag is not None):
        parser.error("--json and --max-lag go with --status")
    return parsed


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """The program; returns the exit status: see EXIT_STATUSES."""
    parsed = read_arguments(arguments)
    try:
        settings = read_settings(environment)
    except SettingsError as error:
        for problem in error.problems:
            print("dispatch_data.py: %s" % problem, file=sys.stderr)
        if any(" is missing: " in problem for problem in error.problems):
            print(FIRST_CONTACT, file=sys.stderr)
        return 2
    if parsed.check or parsed.status:
        logging.disable(logging.CRITICAL)  # what there is to say goes to stdout
        return show_check(settings) if parsed.check else show_status(settings, parsed.json, parsed.max_lag)
    try:
        set_up_logging(settings)
    except OSError as error:
        print("dispatch_data.py: SLS_LOG_DIR: can't write a log file there: %s" % error, file=sys.stderr)
        return 2
    for warning in settings.warnings:
        log.warning("%s", warning)
    return run(settings)


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except SystemExit as end:  # argparse's way
        status = int(end.code or 0)
    except Exception:
        logging.getLogger().exception("a defect of this program")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread that waits for an answer from a dead target, up to ANSWER_TIMEOUT, must not hold up the end.
        os._exit(status)
