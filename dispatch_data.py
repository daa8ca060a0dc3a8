#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["aliyun-log-python-sdk==0.9.52"]
# ///
"""Sorts the logs of one Simple Log Service (SLS) logstore into many, by Topic, in real time.

Every copy of this program joins one consumer group on the source logstore. The service shares the shards out among the
copies and keeps the checkpoints; a copy writes each LogGroup to the logstore that its Topic is routed to:

    ConsumerWorker, the SDK's loop (here Consumer, one consumer of the group)
      -> Consumer.pull_logs -> ShardConsumer.pull       a batch of LogGroups from a shard
      -> ShardConsumer.process
           -> Delivery.deliver -> Routes.target_of             sorted by Topic, joined where they are alike
              -> PutScheduler -> Target.attempt               LogClient.put_log_raw, tried until the target has taken it
           -> ShardConsumer.save                          then the checkpoint, and only then the next batch

Whatever makes it doubtful that this consumer still holds its shards ends it: it saves nothing more, and another joins
(GroupMember). Read on in order: topics, settings, log groups (bytes), failures, keys, the service, check and status,
delivery, consumer, monitoring, command line. Each part knows only those before it.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import concurrent.futures
import contextlib
import difflib
import email.utils
import enum
import errno
import fnmatch
import functools
import hashlib
import http.client
import http.server
import io
import ipaddress
import json
import logging
import logging.handlers
import os
import platform
import random
import re
import resource
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import uuid
import weakref
from collections import Counter, deque
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence
from urllib.parse import unquote, urlencode, urlsplit

if __name__ == "__main__":  # importing the SDK takes a moment: Ctrl-C meanwhile is no reason for a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Whoever started this may have closed stdin, stdout or stderr: a socket would get the number, and all that is said.
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # For new objects PyPy takes half of the processor's cache, 240 MB of a large one, unless told so before it starts.
    nursery_is_set = platform.python_implementation() != "PyPy" or "PYPY_GC_NURSERY" in os.environ
    if not nursery_is_set and os.path.isfile(sys.argv[0]):
        os.environ["PYPY_GC_NURSERY"] = "16MB"
        with contextlib.suppress(OSError), open("/proc/self/cmdline", "rb") as command_line:
            os.execv(sys.executable, command_line.read().split(b"\0")[:-1])  # noqa: S606

try:
    import requests
    import urllib3
    from aliyun.log import LogClient, LogException
    from aliyun.log.auth import AUTH_VERSION_1, AUTH_VERSION_4
    from aliyun.log.consumer import ConsumerProcessorBase, ConsumerWorker, LogHubConfig, checkpoint_tracker, heart_beat
    from aliyun.log.consumer.checkpoint_tracker import ConsumerCheckpointTracker
    from aliyun.log.credentials import Credentials, CredentialsProvider
    from aliyun.log.pulllog_response import PullLogResponse

    # The SDK's locks are for several processes: they need /dev/shm and, from Python 3.14 on, one more process.
    checkpoint_tracker.RLock = heart_beat.RLock = threading.RLock  # type: ignore[attr-defined,assignment]
    # Private, or of newer releases only: what PooledLogClient and ConnectionFactory rest on.
    LogClient._getHttpResponse  # type: ignore[attr-defined]  # noqa: B018
    urllib3.HTTPSConnectionPool._new_conn, urllib3.HTTPSConnectionPool._prepare_proxy  # noqa: B018
    requests.adapters.HTTPAdapter.get_connection_with_tls_context  # noqa: B018
except (ImportError, AttributeError) as missing:
    sys.exit("dispatch_data.py: %s; install what it knows: pip install -r requirements.txt" % missing)

__version__ = "1.0.0"

log = logging.getLogger("dispatch_data")


# ---- topics: how they are spelt, and which target each belongs to ----------------------------------------------------

# What a Chinese keyboard gives in the place of ASCII: full-width forms, and punctuation of its own.
FULLWIDTH_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
FULLWIDTH_TO_ASCII.update(zip(map(ord, "\u3000\u3001\u3002\u3010\u3011\u2018\u2019\u201c\u201d"), b" ,.[]''\"\""))
FULLWIDTH_CHAR = re.compile("[%s]" % "".join(map(chr, FULLWIDTH_TO_ASCII)))


# One of these in brackets is the character itself; a full-width one without them is taken for a slip.
ESCAPED_CHAR = re.compile(r"\[([*?[]|%s)\]" % FULLWIDTH_CHAR.pattern)


@dataclass(frozen=True)
class TopicPattern:
    """One of the topics in SLS_TOPIC_TO<n>: a topic, or a pattern with the wildcards of fnmatch: * ? and [...]."""

    spelling: str

    @property
    def exact_topic(self) -> str | None:
        """The one topic that is meant, "" for [], which stands for what has no topic; None for a pattern."""
        if set("*?[") & set(ESCAPED_CHAR.sub("", self.spelling)):
            return "" if self.spelling == "[]" else None
        return ESCAPED_CHAR.sub(r"\1", self.spelling)

    @property
    def escaped_spelling(self) -> str:
        """Of a pattern that may be meant as a topic, such as app[1]: how that topic is spelt, app[[]1]; else ""."""
        is_doubtful = re.fullmatch(r"[^*?]*\[[^*?]+\][^*?]*", ESCAPED_CHAR.sub("", self.spelling))
        return ESCAPED_CHAR.sub(r"\1", self.spelling).replace("[", "[[]") if is_doubtful else ""

    def compile(self) -> re.Pattern[str]:
        """Raises re.error for a range such as [z-a], which newer versions of Python take to match nothing."""
        return re.compile(fnmatch.translate(self.spelling))


def decode_utf8(text: str) -> str:
    """A text of the environment as UTF-8, whatever the locale says; PyPy reads ASCII where none is set, as in cron."""
    with contextlib.suppress(UnicodeError):
        return os.fsencode(text).decode("utf-8")
    return text


def parse_topics(text: str) -> tuple[TopicPattern, ...]:
    """The topics in a text of the environment, one at least. Raises ValueError, which says what would be right."""
    text = decode_utf8(text)
    if not text.isprintable():
        raise ValueError("topics in UTF-8, of characters that can be seen")
    topics = tuple(TopicPattern(part.strip()) for part in text.split(",") if part.strip())
    if not topics or FULLWIDTH_CHAR.search(ESCAPED_CHAR.sub("", text)):
        raise ValueError("topics separated by commas, such as nginx,access_*; what is meant literally in brackets")
    if any(topic.spelling[0] in "'\"" or topic.spelling[-1] in "'\"" for topic in topics):
        raise ValueError("topics separated by commas, with quotes around all of them or none")
    try:
        for topic in topics:
            topic.compile()
    except re.error:
        raise ValueError("topics with ranges such as [a-z] in their brackets") from None
    return topics


class Routes:
    """Finds the target of a topic: a topic named exactly beats any pattern, patterns are tried in the order of n."""

    MAX_CACHED_LENGTH = 256  # characters

    def __init__(self, topics_by_number: Mapping[int, Iterable[TopicPattern]]) -> None:
        """The topics of each target by its number n, in the order of n."""
        self.exact: dict[str, int] = {}
        self.patterns: list[tuple[re.Pattern[str], int]] = []
        for number, topics in topics_by_number.items():
            for topic in topics:
                if topic.exact_topic is None:
                    self.patterns.append((topic.compile(), number))
                else:
                    self.exact[topic.exact_topic] = number
        # A topic may be a file's path or a container's id: remember many, but not without end.
        self.cached = functools.lru_cache(maxsize=10000)(self.match_uncached)

    def target_of(self, topic: str) -> int | None:
        """The number of the topic's target, None when no route matches."""
        return self.cached(topic) if len(topic) <= self.MAX_CACHED_LENGTH else self.match_uncached(topic)

    def match_uncached(self, topic: str) -> int | None:
        """As `target_of`, without remembering."""
        if topic in self.exact:
            return self.exact[topic]
        return next((number for pattern, number in self.patterns if pattern.match(topic)), None)


# ---- settings: the environment, checked as a whole ------------------------------------------------------------------

REQUIRED = None  # in the place of a default


@dataclass(frozen=True)
class Setting:
    """An environment variable, what it may be and what it means."""

    variable: str  # without the suffix that it has for targets: _TO for all of them, _TO<n> for one
    check: Callable[[str], Any]  # the value of a text; raises ValueError, which says what would be right
    default: str | None  # a text, too, or REQUIRED
    meaning: str
    is_secret: bool = False  # no error shows its text
    may_be_empty: bool = False  # set to nothing it is empty, not the default


def env(check: Callable[[str], Any], default: str | None, meaning: str, **more: Any) -> Any:
    """A dataclass's field that is read from the environment, as its Setting says; `more` are other fields of that."""
    return field(repr=not more.get("is_secret"), metadata=dict(check=check, default=default, meaning=meaning, **more))


def settings_of(kind: Any) -> dict[str, Setting]:
    """Those of a dataclass, by the field's name. The variable is SLS_ and that name in capitals, unless it is given."""
    metadata = {each.name: each.metadata for each in fields(kind) if each.metadata}
    return {name: Setting(**{"variable": "SLS_" + name.upper(), **given}) for name, given in metadata.items()}


def validator(value_of: Callable[[str], object], expected: str) -> Callable[[str], Any]:
    """A check by `value_of`, which gives None or raises ValueError for a wrong text; `expected` says what is right."""

    def check(text: str) -> object:
        with contextlib.suppress(ValueError):
            value = value_of(text)
            if value is not None:
                return value
        raise ValueError(expected)

    return check


def pattern(regex: str, expected: str) -> Callable[[str], str]:
    """A check that a text matches `regex` as a whole."""
    return validator(lambda text: text if re.fullmatch(regex, text) else None, expected)


def in_range(kind: type[float], low: float, high: float, expected: str) -> Callable[[str], float]:
    """A check for a number of the given kind (int or float) within low..high, in plain digits."""
    is_plain, expected = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?").fullmatch, "%s from %s to %s" % (expected, low, high)
    return validator(lambda text: kind(text) if is_plain(text) and low <= kind(text) <= high else None, expected)


CLOCK_TOLERANCE = 5.0  # seconds that two clocks may differ without a word


def format_local(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def format_with_utc(unix_seconds: float) -> str:
    """A time with its offset, and the same in UTC."""
    local = datetime.fromtimestamp(unix_seconds).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S %z") + time.strftime(" (%Y-%m-%d %H:%M:%S UTC)", time.gmtime(unix_seconds))


# A date, perhaps with a time, perhaps with its zone: Z, +08:00, +0800, UTC+8 or GMT+8.
TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d?)-(\d\d?)(?:[T ](\d\d?):(\d\d?)(?::(\d\d?)(?:\.\d+)?)?"
    r" ?(?:(Z|UTC|GMT)|(?:UTC|GMT)?([+-])(0?\d|1[0-4])(?::?([0-5]\d))?)?)?",
    re.ASCII | re.IGNORECASE,
)


def parse_cursor_start(text: str) -> str | int:
    """'begin', 'end', or a time as unix seconds; without a zone it is local time, as everywhere in the SDK. UTC+8 is
    eight hours east, as people mean it. No library reads this: dateutil's is west, and it drops zones it doesn't know.
    """
    if text in ("begin", "end"):
        return text
    try:
        *parts, utc, sign, hours, minutes = TIMESTAMP.fullmatch(text).groups()  # type: ignore[union-attr]
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        zone = timezone(-offset if sign == "-" else offset) if utc or sign else None
        year, month, day, hour, minute, second = (int(part or 0) for part in parts)
        start = int(datetime(year, month, day, hour, minute, second, tzinfo=zone).timestamp())
    except (AttributeError, ValueError, OverflowError):
        start = -1
    if start < 0:
        raise ValueError("begin, end, or a time such as 2018-12-26T00:00:00+08:00")
    if start > time.time() + CLOCK_TOLERANCE:
        raise ValueError("a time that has passed; this machine's clock says %s" % format_with_utc(time.time()))
    return start


# fmt: off
check_secret = pattern(r"[!-~]+", "printable characters without spaces")
check_ca_file = validator(lambda path: path if os.path.exists(path) else None, "a file of CA certificates")
check_directory = validator(lambda path: path if os.path.isdir(path) and os.access(path, os.W_OK) else None,
                            "a directory that exists and can be written to")
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST = r"%s(?:\.%s)*" % (LABEL, LABEL)
PORT = "(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
check_proxy = pattern(
    r"((?i:https?|socks4a?|socks5h?)://)?([^\s/?#\[\]\x7f-\U0010ffff]*@)?([A-Za-z0-9_.-]*[A-Za-z0-9]|\[[0-9a-fA-F:.]+\])"
    + PORT + "/?", "a URL such as http://proxy.example:3128")
AGENT_URL = r"http://([^/?#@\s]*@)?[A-Za-z0-9.-]+(:\d{1,5})?([/?][^#\s]*)?"
OIDC_VARIABLES = ("ALIBABA_CLOUD_ROLE_ARN", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "ALIBABA_CLOUD_OIDC_TOKEN_FILE")
URI_VARIABLE = "ALIBABA_CLOUD_CREDENTIALS_URI"
ACCESS_KEY_VARIABLES = ("SLS_AK_ID", "SLS_AK_KEY", "SLS_STS_TOKEN")
CREDENTIAL_VARIABLES = (*ACCESS_KEY_VARIABLES, "SLS_CREDENTIALS")
# An endpoint that names its region, which an address or a host of one's own doesn't.
REGION_PATTERN = re.compile(
    r"(^|/)([a-z]{2}-[a-z0-9-]+?)(-intranet|-internal|-share|-vpc)*\.(log|sls)\.aliyuncs\.com([:/]|$)")


@dataclass(frozen=True)
class Connection:
    """How to reach a project, and as whom: the source's, but with _TO another for all targets, with _TO<n> for one."""

    endpoint: str = env(pattern("(https?://)?%s%s/?" % (HOST, PORT), "a host such as cn-hangzhou.log.aliyuncs.com"),
        REQUIRED, "the service's host in the project's region; https:// in front turns TLS on")
    access_key_id: str = env(check_secret, REQUIRED, "id of the access key", variable="SLS_AK_ID", is_secret=True)
    access_key: str = env(check_secret, REQUIRED, "secret of the access key", variable="SLS_AK_KEY", is_secret=True)
    security_token: str = env(check_secret, "", "token of a temporary access key, which can't renew itself",
        variable="SLS_STS_TOKEN", is_secret=True)
    credentials: str = env(
        pattern(r"ecs(:[A-Za-z0-9._-]{1,64})?|oidc|uri|file:/.+|" + AGENT_URL,
                "ecs, ecs:<role>, oidc, uri, http://<agent>, or file:</path>"), "",
        "a key that renews itself, in the place of id, secret and token: ecs or ecs:<role> (the ECS instance's), "
        "oidc (RRSA), http://<agent> or uri (the agent that %s names), file:</path>" % URI_VARIABLE, is_secret=True)
    region: str = env(pattern("[a-z0-9-]+", "a region such as cn-hangzhou"), "",
        "the project's region: switches signatures from v1 to v4")
    project: str = env(
        pattern("[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", "3 to 63 lower-case letters, digits and - (not at the ends)"),
        REQUIRED, "the project")


@dataclass(frozen=True)
class LogstoreConfig(Connection):
    """One logstore and how to reach it, whatever it is for."""

    logstore: str = env(pattern("[A-Za-z0-9_-]{1,128}", "letters, digits, - and _"), REQUIRED, "the source logstore")
    # The source's variable, such as SLS_PROJECT -> the one that was read for this logstore, such as SLS_PROJECT_TO2.
    variables: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return "%s/%s" % (self.project, self.logstore)

    @property
    def connection(self) -> Connection:
        """Logstores for which it is equal can share a client."""
        return Connection(**{each.name: getattr(self, each.name) for each in fields(Connection)})

    def may_be_same_as(self, other: LogstoreConfig) -> bool:
        """Whether this may be the same logstore, however the endpoints are written: a project's name is unique within a
        region, so only two regions tell two of one name apart."""
        named = [REGION_PATTERN.search(config.endpoint.lower()) for config in (self, other)]
        are_two_regions = len({region.group(2) for region in named if region}) == 2
        same_name = (self.project, self.logstore.lower()) == (other.project, other.logstore.lower())
        return same_name and not are_two_regions


@dataclass(frozen=True)
class TargetSettings:
    number: int  # n of _TO<n>
    config: LogstoreConfig
    topics: tuple[TopicPattern, ...] = env(parse_topics, REQUIRED,
        "topics of target n, separated by commas; * ? and [...] are wildcards, * alone takes what is left, [] what "
        "has no topic; a wildcard in brackets is the character itself: app[[]1] is the topic app[1]",
        variable="SLS_TOPIC")

    @property
    def name(self) -> str:
        """As it is called in what is shown."""
        return "TO%d %s" % (self.number, self.config)


@dataclass(frozen=True)
class Settings:
    source: LogstoreConfig
    targets: tuple[TargetSettings, ...]  # in the order of their numbers
    warnings: tuple[str, ...]
    notes: tuple[str, ...]  # what some settings have come to, to be told at the start
    consumer_group: str = env(pattern("[A-Za-z0-9_-]{1,64}", "up to 64 letters, digits, - and _"), REQUIRED,
        "the consumer group, the same for all copies", variable="SLS_CG")
    cursor_start: str | int = env(parse_cursor_start, "begin",  # "begin", "end" or unix seconds
        "where a group without checkpoints begins: begin, end, or a time such as 2018-12-26T00:00:00+08:00; without an "
        "offset or Z it is local time")
    heartbeat_interval: int = env(in_range(int, 1, 300, "whole seconds"), "20",
        "seconds; a new group's timeout is twice as long: then a silent copy loses its shards")
    fetch_interval: float = env(in_range(float, 0.01, 60, "seconds"), "0.4", "seconds between looks at an idle shard")
    writers: int = env(in_range(int, 1, 64, "a whole number"), "16", "puts in the air at once, for each target")
    merge_packs: bool = env(
        validator(lambda text: {"true": True, "false": False}.get(text.lower()), "true or false"), "false",
        "true puts the packs of one agent together: fewer requests, but the console's context view mixes them up")
    rejected_dir: str = env(check_directory, "",
        "where LogGroups go that a target refuses for good, so that their shards can go on; none: the shards wait")
    log_dir: str = env(check_directory, ".", "where the log file goes; empty: no file, stderr alone", may_be_empty=True)
    log_level: str = env(pattern("DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR"), "INFO", "what is logged")
    metrics_port: int | str = env(in_range(int, 1, 65535, "a port"), "",  # value "" without one
        "where /metrics (Prometheus) and /healthz are served, for each copy of a machine another; none: nowhere")
    metrics_host: str = env(
        validator(lambda text: str(ipaddress.ip_address(text)),
                  "an address of this machine such as 127.0.0.1, or 0.0.0.0 for all of them"), "127.0.0.1",
        "the address they are served on; 0.0.0.0 is all of them")

    @property
    def source_name(self) -> str:
        """As it is called in what is shown."""
        return "source %s" % (self.source,)

    def logstores(self) -> list[LogstoreConfig]:
        """The source and the targets, the source first."""
        return [self.source, *(target.config for target in self.targets)]
# fmt: on


CONNECTION_SETTINGS = settings_of(Connection)
SOURCE_LOGSTORE = settings_of(LogstoreConfig)["logstore"]
TARGET_LOGSTORE = replace(SOURCE_LOGSTORE, meaning="the logstore of target n; n is any number from 1")
TARGET_TOPICS = settings_of(TargetSettings)["topics"]
TUNING_SETTINGS = settings_of(Settings)
CONSUMER_GROUP = TUNING_SETTINGS.pop("consumer_group")
SOURCE_SETTINGS = (*CONNECTION_SETTINGS.values(), SOURCE_LOGSTORE, CONSUMER_GROUP)
# While no SLS_TOPIC_TO<n> is set. "ngnix" is how the field's original example spells it; such logs are out there.
DEFAULT_TOPICS = {1: "ngnix,nginx", 2: "sql_audit", 3: "click"}
# What requests reads, and so does this program: a typo here must not look like a service that can't be reached.
PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
NETWORK_SETTINGS = [Setting(name, check_ca_file, "", "CAs") for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")]
NETWORK_SETTINGS += [Setting(name, check_proxy, "", "a proxy", is_secret=True) for name in PROXY_VARIABLES]
TARGET_STEMS = [each.variable + "_TO" for each in (*CONNECTION_SETTINGS.values(), TARGET_LOGSTORE, TARGET_TOPICS)]
TARGET_NUMBER = "[1-9][0-9]{0,8}"
TARGET_VARIABLE = re.compile("(?:%s)(%s)" % ("|".join(TARGET_STEMS), TARGET_NUMBER))


class SettingsError(Exception):
    """The environment won't do; `args` has one line for each thing to mend."""


def strip_quotes(text: str) -> str:
    """Without what is around a value: space, and quotes, which a shell takes away, but `docker --env-file` doesn't."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] in "'\"" and text.count(text[0]) == 2 else text


class SettingsParser:
    """Reads settings and gathers what is wrong with them, so that all of it can be told at once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {
            name: strip_quotes(text) if name.startswith("SLS_") else text for name, text in environment.items()
        }
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.any_topic_set = any(re.fullmatch("SLS_TOPIC_TO(%s)?" % TARGET_NUMBER, name) for name in environment)

    def read(self, setting: Setting, suffix: str = "") -> Any:
        """The checked value of a setting; "" where it is empty, or an error has been noted."""
        name = setting.variable + suffix
        text = self.environment.get(name)
        if not text and (text is None or not setting.may_be_empty):
            text = setting.default
        if text is REQUIRED:
            self.errors.append("%s is missing: %s" % (name, setting.meaning))
        elif text:
            try:
                return setting.check(text)
            except ValueError as expected:
                text = decode_utf8(text)
                shown = "its value (not shown)" if setting.is_secret else repr(text)
                line = "%s: %s is wrong; right would be %s" % (name, shown, expected)
                wide = FULLWIDTH_CHAR.search(text)
                if wide and not setting.is_secret:
                    words = "; %r is a full-width character, type %r instead"
                    line += words % (wide.group(), wide.group().translate(FULLWIDTH_TO_ASCII))
                self.errors.append(line)
        return ""

    def suffix_of(self, variable: str, suffixes: Sequence[str]) -> str:
        """The first of these with which the variable is set, or any that makes up the same key; "" for none."""
        together = CREDENTIAL_VARIABLES if variable in CREDENTIAL_VARIABLES else [variable]
        return next((each for each in suffixes if any(self.environment.get(name + each) for name in together)), "")

    def read_logstore(self, logstore: Setting, suffixes: Sequence[str]) -> LogstoreConfig:
        """The logstore that `logstore` with the first suffix names; all else may also be set with the next ones."""
        values, variables = {}, {}
        replacement = "SLS_CREDENTIALS" + self.suffix_of("SLS_CREDENTIALS", suffixes)
        replaced = ACCESS_KEY_VARIABLES if self.environment.get(replacement) else ()
        for name, setting in CONNECTION_SETTINGS.items():
            suffix = self.suffix_of(setting.variable, suffixes)
            variable = setting.variable + suffix
            if setting.variable in replaced:
                if self.environment.get(variable):
                    self.errors.append("%s: %s stands in its place; leave out one of them" % (variable, replacement))
                values[name], variables[setting.variable] = "", replacement  # what advice is to name
            else:
                values[name], variables[setting.variable] = self.read(setting, suffix), variable
        values["logstore"] = self.read(logstore, suffixes[0])
        variables[logstore.variable] = logstore.variable + suffixes[0]
        if values["project"] and re.match(r"(https?://)?%s\." % values["project"], values["endpoint"], re.IGNORECASE):
            words = "%s: %r is wrong; right would be the host without the project"
            self.errors.append(words % (variables["SLS_ENDPOINT"], values["endpoint"]))
        values["credentials"] = self.complete_credentials(values["credentials"], variables["SLS_CREDENTIALS"])
        return LogstoreConfig(**values, variables=variables)

    def complete_credentials(self, source: str, variable: str) -> str:
        """The source of a key, as `variable` names it, with what the platform's variables must say of it."""
        meaning = "%s=%s takes it" % (variable, source)
        for name in OIDC_VARIABLES if source == "oidc" else ():
            self.read(Setting(name, str, REQUIRED, meaning))
        agent = Setting(URI_VARIABLE, pattern(AGENT_URL, "http://<agent>"), REQUIRED, meaning, is_secret=True)
        return self.read(agent) if source == "uri" else source

    def read_targets(self, source: LogstoreConfig) -> Iterator[TargetSettings]:
        """The targets in the order of their numbers."""
        numbered = [TARGET_VARIABLE.fullmatch(name) for name, text in self.environment.items() if text]
        numbers = {int(name.group(1)) for name in numbered if name}
        if not numbers:
            self.errors.append("SLS_LOGSTORE_TO1 is missing: at least one target logstore is needed")
        routed: dict[TopicPattern, int] = {}
        for number in sorted(numbers):
            suffix = "_TO%d" % number
            config = self.read_logstore(TARGET_LOGSTORE, [suffix, "_TO", ""])
            if config.logstore and config.may_be_same_as(source):
                self.errors.append(
                    "SLS_LOGSTORE_TO%d: %s is the source itself, for its endpoint and the source's don't name two "
                    "regions; name another logstore" % (number, config)
                )
            default = REQUIRED if self.any_topic_set else DEFAULT_TOPICS.get(number, REQUIRED)
            topics = self.read(replace(TARGET_TOPICS, default=default), suffix)
            for topic in topics:
                if topic.escaped_spelling:
                    self.warnings.append(
                        "SLS_TOPIC_TO%d: %r is a pattern, its brackets stand for one of the characters in them; the "
                        "topic spelt like that is written %r" % (number, topic.spelling, topic.escaped_spelling)
                    )
                if routed.setdefault(topic, number) != number:
                    words = "SLS_TOPIC_TO%d: %r is routed by SLS_TOPIC_TO%d already; name each topic once"
                    self.errors.append(words % (number, topic.spelling, routed[topic]))
            yield TargetSettings(number, config, topics)

    def warn_unknown_variables(self) -> Iterator[str]:
        """A warning for each SLS_ variable that means nothing, with the nearest name that does."""
        plain = [each.variable for each in (*SOURCE_SETTINGS, *TUNING_SETTINGS.values())]
        plain += [each.variable + "_TO" for each in CONNECTION_SETTINGS.values()]
        for name in sorted(self.environment):
            if name.startswith("SLS_") and name not in plain and not TARGET_VARIABLE.fullmatch(name):
                number = re.search("[^0-9](%s)$" % TARGET_NUMBER, name)
                possible = plain + [stem + (number.group(1) if number else "1") for stem in TARGET_STEMS]
                nearest = difflib.get_close_matches(name, possible, 1, 0)
                yield "%s is not a setting of this program; did you mean %s?" % (name, nearest[0])


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`, names to texts. Raises SettingsError, with every problem there is."""
    parser = SettingsParser(environment)
    source = parser.read_logstore(SOURCE_LOGSTORE, [""])
    consumer_group = parser.read(CONSUMER_GROUP)
    targets = tuple(parser.read_targets(source))
    tuning = {name: parser.read(setting) for name, setting in TUNING_SETTINGS.items()}
    for setting in NETWORK_SETTINGS:
        parser.read(setting)
    warnings = [*parser.warn_unknown_variables(), *parser.warnings]
    if parser.errors:
        raise SettingsError(*dict.fromkeys(parser.errors), *warnings)
    configs = [source, *(target.config for target in targets)]
    for name in dict.fromkeys(config.variables["SLS_STS_TOKEN"] for config in configs if config.security_token):
        warnings.append("%s can't renew itself, and this copy ends when it has run out; SLS_CREDENTIALS can" % name)
    start = tuning["cursor_start"]
    shown = start if isinstance(start, str) else format_with_utc(start)
    notes = ["SLS_CURSOR_START, where a group without checkpoints begins: %s" % shown]
    if not parser.any_topic_set:
        notes.append("no SLS_TOPIC_TO<n> is set: the default topics apply")
    return Settings(source=source, consumer_group=consumer_group, targets=targets, warnings=tuple(warnings),
                    notes=tuple(notes), **tuning)  # fmt: skip


# ---- log groups: passed on as bytes ---------------------------------------------------------------------------------

# Field numbers of the protobuf messages LogGroupList and LogGroup (proto2), as keys of length-delimited fields.
LOGS_KEY = LOG_GROUPS_KEY = 1 << 3 | 2
TOPIC_KEY = 3 << 3 | 2
LOG_TAGS_KEY = 6 << 3 | 2
PACK_ID_TAG = b"\x0a\x0b__pack_id__"  # how a LogTag begins whose Key is __pack_id__


class LogGroup(NamedTuple):
    """A LogGroup as it came over the wire, in two pieces; its names are those of the SDK's message."""

    Topic: str
    log_count: int
    logs: bytes | memoryview  # the serialised fields Logs, a view into the pull they came with
    envelope: bytes  # every other field
    mergeable: bool = True  # else there are Logs in the rest as well

    def SerializeToString(self) -> bytes:
        return b"".join([self.logs, self.envelope])


class PutRequest:
    """LogGroups equal in everything but their logs, which travel as one: `LogClient.put_log_raw` takes it for such."""

    __slots__ = ("accepted_at_last_rejection", "envelope", "log_count", "log_groups", "rejections", "size")

    def __init__(self, rest: bytes) -> None:
        self.log_groups: list[LogGroup] = []
        self.envelope = rest
        self.log_count = 0
        self.size = len(rest)  # bytes, uncompressed
        self.rejections = 0  # times that it was refused for what it brings, by a target that takes others
        self.accepted_at_last_rejection = -1  # that its target had taken when it was refused last

    def SerializeToString(self) -> bytes:
        return b"".join([log_group.logs for log_group in self.log_groups] + [self.envelope])

    def add(self, log_group: LogGroup) -> PutRequest:
        self.log_groups.append(log_group)
        self.log_count += log_group.log_count
        self.size += len(log_group.logs)
        return self


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The varint at `position` and the position after it. Raises IndexError at the end, ValueError beyond 64 bits."""
    number, shift = data[position] & 0x7F, 7
    while data[position] >= 0x80:
        if shift > 63:
            raise ValueError("a varint of more than 10 bytes")
        position += 1
        number |= (data[position] & 0x7F) << shift
        shift += 7
    return number, position + 1


def read_fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message within data[position:end] as (key, start of field, start of value, end of field).

    Raises ValueError or IndexError where these bytes are no message, or use groups, which proto2 has given up.
    """
    while position < end:
        start = position
        key, value = read_varint(data, start)
        wire_type = key & 7
        if wire_type == 2:
            length, value = read_varint(data, value)
            position = value + length
        elif wire_type == 0:
            position = read_varint(data, value)[1]
        elif wire_type in (1, 5):
            position = value + (8 if wire_type == 1 else 4)
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
    mergeable = True
    for key, _, value, field_end in read_fields(data, rest_start, end):
        if key == TOPIC_KEY:
            topic = data[value:field_end]
        elif key == LOGS_KEY:
            log_count += 1
            mergeable = False
    # A topic should be UTF-8; one that isn't must still find the catch-all.
    return LogGroup(
        topic.decode("utf-8", "replace"), log_count, view[start:rest_start], data[rest_start:end], mergeable
    )


def read_log_group_list(data: bytes) -> list[LogGroup]:
    """The LogGroups of a serialised LogGroupList, what a pull answers with. Raises as `read_fields`."""
    view = memoryview(data)
    return [
        read_log_group(data, view, value, end)
        for key, _, value, end in read_fields(data, 0, len(data))
        if key == LOG_GROUPS_KEY
    ]


def log_groups_of(response: PullLogResponse) -> list[LogGroup]:
    """The LogGroups of a PullLogResponse. Raises ValueError when its bytes are not those that were announced."""
    # The SDK keeps the bytes of a pull in this private attribute until its own parser is asked for; when it is gone
    # from a new release, parsing is the slow way that still works.
    data: Any = getattr(response, "_raw_uncompressed_body", None)
    size = response.get_raw_size()
    if data is None and size <= 0:
        return []
    if data is not None and len(data) != size:
        raise ValueError("a pull of %d bytes, announced as %d" % (len(data), size))
    with contextlib.suppress(ValueError, IndexError, TypeError):
        return read_log_group_list(data)
    log_groups = []
    try:
        for parsed in response.get_loggroup_list().LogGroups:
            # The SDK's LogGroupRaw, for what is not UTF-8, has bytes here.
            topic = parsed.Topic.decode("utf-8", "replace") if isinstance(parsed.Topic, bytes) else parsed.Topic
            log_groups.append(LogGroup(topic, len(parsed.Logs), b"", parsed.SerializeToString(), mergeable=False))
    except Exception:  # its text would hold the whole pull
        raise ValueError("a pull of %d bytes is no LogGroupList" % size) from None
    log.warning("a pull of %d bytes has an unusual form: the SDK's parser has read it", size)
    return log_groups


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
MAX_MERGED_BYTES = 3 * 1000 * 1000
MAX_MERGED_LOGS = 4096


def merge_log_groups(log_groups: Iterable[LogGroup], merge_packs: bool) -> list[PutRequest]:
    """Puts together LogGroups that are equal in everything but their logs, within MAX_MERGED_BYTES and MAX_MERGED_LOGS.

    The order of logs is kept, no LogGroup is split. With `merge_packs`, an agent's packs count as equal, and the
    outcome bears the number of the first.
    """
    puts: list[PutRequest] = []
    growing: dict[bytes, PutRequest] = {}
    for log_group in log_groups:
        merge_key = without_pack_id(log_group.envelope) if merge_packs else log_group.envelope
        put = growing.get(merge_key) if log_group.mergeable else None
        if put and (
            put.size + len(log_group.logs) > MAX_MERGED_BYTES or put.log_count + log_group.log_count > MAX_MERGED_LOGS
        ):
            put = None
        if not put:
            put = PutRequest(log_group.envelope)
            puts.append(put)
            if log_group.mergeable:
                growing[merge_key] = put
        put.add(log_group)
    return puts


# ---- failures: what the answers of the service mean, and the one way to try again ------------------------------------

INITIAL_BACKOFF, MAX_BACKOFF = 0.1, 5.0  # seconds
CONNECT_TIMEOUT = 10  # seconds
RESPONSE_TIMEOUT = 30  # seconds for a call, and more as long as bytes move, see DeadlineStream
MIN_THROUGHPUT = 10 * 1000  # bytes a second; what moves no faster is given up
MAX_IDLE = 50  # seconds after which a connection isn't used again: a NAT or firewall may have forgotten it
REQUEST_ID = "x-log-requestid"  # every answer of the service bears it; what doesn't came from something on the way
USER_AGENT = {"User-Agent": "dispatch_data/" + __version__}


class ErrorKind(enum.Enum):
    """Whose fault it is that a call failed."""

    TRANSIENT = "will pass"
    CONFIG = "has to be mended by somebody"
    CREDENTIALS = "as well, but a key that renews itself may do so"
    REJECTED = "blames what the put brings"
    FENCED = "this consumer is not, or no longer, the holder of the shard"


EXPIRED_TOKEN_HINT = "{SLS_STS_TOKEN} has run out: set a new key and token and start again"  # noqa: S105
PERMISSION_HINT = "the account of {SLS_AK_ID} needs the permission, see the README's RAM policy"
OUTAGE_HINT = "the service has trouble of its own, which should pass"
# What the service's error codes mean, and what to do about them; {SLS_...} stands for the variable that decides. By the
# service's page of error codes, the pages of its calls, and the consumer libraries; a few are this program's own.
# fmt: off
ERROR_CATALOGUE = {
    ErrorKind.CREDENTIALS: {
        "InvalidAccessKeyId": "{SLS_AK_ID} must be a key that exists and is enabled",
        "SignatureNotMatch": "{SLS_AK_KEY} must be the secret of {SLS_AK_ID}",
        "SecurityTokenExpired": EXPIRED_TOKEN_HINT,
    },
    ErrorKind.CONFIG: {
        "ProjectNotExist": "{SLS_PROJECT} must exist in the region of {SLS_ENDPOINT}",
        "LogStoreNotExist": "{SLS_LOGSTORE} must exist in the project",
        "ProjectForbidden": "the account of {SLS_PROJECT} is in arrears, or the project is locked",
        "Unauthorized": PERMISSION_HINT,
        "KeyRefused": "what {SLS_CREDENTIALS} names gives no key: is the RAM role attached to this instance, does it "
                      "trust the pod's service account?",
        "RequestTimeExpired RequestTimeTooSkewed": "this machine's clock must be right to 15 minutes",
        "ConsumerGroupQuotaExceed": "the logstore has all the consumer groups it may have: delete one that nobody "
                                    "uses, in the console or by `aliyunlog log delete_consumer_group`, or ask for more",
        "ConsumerGroupNotExist": "the consumer group was deleted, and its checkpoints with it: start the copies again "
                                 "to make it anew, from SLS_CURSOR_START on",
        "ShardNotExist": "the shard, or the logstore it was in, is gone",
        "InvalidCursor InvalidShardCheckPoint":
            "{SLS_LOGSTORE} may have been deleted and made again: then start the copies again",
    },
    ErrorKind.TRANSIENT: {
        "WriteQuotaExceed": "the project's write quota is used up: ask for more in the console",
        "ShardWriteQuotaExceed": "the logstore's shards are full (5 MB/s each): split some, or let the service do it",
        "ReadQuotaExceed": "the project's read quota is used up: ask for more in the console",
        "ShardReadQuotaExceed": "the shard is read at its limit, by this group or by others",
        "ExceedQuota": "a quota of the project is used up: ask for more in the console",
        "MetaOperationQpsLimitExceeded": "too many calls a second, of all programs in the account",
        "InternalServerError ServerBusy": OUTAGE_HINT,
        "NoAnswer": "{SLS_ENDPOINT} must be reachable from here: look at its name, the network, the proxy variables",
        "NoKey": "what {SLS_CREDENTIALS} names must be reachable, and have a key that is good by this machine's clock",
        "CertificateNotTrusted": "the certificate is not trusted; REQUESTS_CA_BUNDLE can name a file of CAs",
        "TooManyOpenFiles": "this process may open no more files: raise `ulimit -n` (LimitNOFILE in systemd)",
        "UnreadablePull": "nothing of it is delivered or skipped; it is pulled again",
        "NotTheService": "something else answers for {SLS_ENDPOINT}: look at its name, at gateways and portals on the "
                         "way, at the proxy variables (http_proxy, https_proxy, no_proxy)",
    },
    ErrorKind.REJECTED: {
        "PostBodyTooLarge PostBodyInvalid PostBodyUncompressError InvalidKey InvalidEncoding InvalidTimestamp":
            "the service won't take this LogGroup, see SLS_REJECTED_DIR",
        "ParameterInvalid": "the service won't take this call; if it is a put, see SLS_REJECTED_DIR",
        "RequestEntityTooLarge": "a gateway on the way to {SLS_ENDPOINT} won't let a put of this size pass",
    },
    ErrorKind.FENCED: {
        "ConsumerNotExist ConsumerNotExsit NotExistConsumerWithBody":
            "the service has forgotten this consumer, another joins",
        "ConsumerNotMatch": "another consumer holds the shard",
    },
}
# fmt: on
ERROR_BY_CODE = {
    code: (fault, advice)
    for fault, advices in ERROR_CATALOGUE.items()
    for codes, advice in advices.items()
    for code in codes.split()
}
# Unauthorized is also what an unknown key is answered with, and more; only the message tells, the first of these in it.
UNAUTHORIZED = {
    "accesskeyid not found": (ErrorKind.CREDENTIALS, "{SLS_AK_ID} must be a key that exists"),
    "accesskeyid is disabled": (ErrorKind.CREDENTIALS, "{SLS_AK_ID} is disabled: enable it, or set another"),
    "expired": (ErrorKind.CREDENTIALS, EXPIRED_TOKEN_HINT),
    "token": (ErrorKind.CREDENTIALS, "{SLS_STS_TOKEN} must be the token that came with {SLS_AK_ID}"),
    "forbidden": (ErrorKind.CONFIG, "the account of {SLS_AK_ID} is in arrears, or its Log Service is locked"),
}


def escape_for_log(text: str, longest: int = 300) -> str:
    """The text, safe to show on one line: what isn't printable is escaped, what is too long is cut."""
    shown = text if len(text) <= longest else text[:longest] + "..."
    return shown if shown.isprintable() else repr(shown)[1:-1]


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets."""
    for secret in sorted(secrets, key=len, reverse=True):  # one may begin with another
        text = text.replace(secret, "***")
    return text


class CallError(Exception):
    """One call that the service refused, or that got no answer of the service.

    It is no LogException, for those LogClient repeats, some ten times, a second apart. `status` is None without an
    answer; `code` is the service's, or one of the program's own.
    """

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        self.code, self.message, self.status = code.replace("SecurityToken.", "SecurityToken"), message, status
        super().__init__("%s%s: %s" % ("%d " % status if status else "", self.code, escape_for_log(message)))
        self.kind, self.hint = ERROR_BY_CODE.get(
            self.code, (ErrorKind.TRANSIENT if status in (None, 429) else ErrorKind.CONFIG, "")
        )
        if status is not None and status >= 500 and code != "NotTheService":  # whatever it says
            self.kind, self.hint = ErrorKind.TRANSIENT, OUTAGE_HINT
        elif code == "Unauthorized":
            told = (meaning for words, meaning in UNAUTHORIZED.items() if words in message.lower())
            self.kind, self.hint = next(told, (self.kind, self.hint))
        self.is_missing_permission = self.hint == PERMISSION_HINT

    @classmethod
    def from_exception(cls, error: Exception) -> CallError:
        """For a call that ended in an exception; urllib3's stand for those of the operating system."""
        cause = error.__cause__ or error
        text = "%s: %s" % (type(cause).__name__, cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cls("CertificateNotTrusted", text)
        no_file = isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)
        return cls("TooManyOpenFiles" if no_file else "NoAnswer", text)

    @classmethod
    def from_response(cls, status: int, headers: Mapping[str, str], body: bytes) -> CallError:
        """For an answer that is no success: an error of the service, or not of the service at all."""
        if REQUEST_ID in headers:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                error = json.loads(body)
                return cls(str(error["errorCode"]), str(error["errorMessage"]), status)
        text = "%s %s" % (headers.get("Content-Type", ""), body[:100].decode("utf-8", "replace"))
        return cls("RequestEntityTooLarge" if status == 413 else "NotTheService", text.strip(), status)

    def is_transient(self) -> bool:
        """Whether time alone may mend it; else somebody has to change a key, a name or a clock."""
        return self.kind == ErrorKind.TRANSIENT


def describe_error(error: Exception, config: LogstoreConfig) -> str:
    """An error in one line, with what to do about it."""
    if not isinstance(error, CallError):
        return escape_for_log(repr(error))
    return "; ".join(filter(None, [str(error), error.hint.format(**config.variables)]))


class LogThrottle:
    """Says when it is time for another line about what happens again and again: at once, then ever less often."""

    FIRST, LONGEST = 10.0, 600.0  # seconds

    def __init__(self) -> None:
        self.next, self.interval = 0.0, self.FIRST

    def admit(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next, self.interval = now + self.interval, min(self.interval * 2, self.LONGEST)
        return True


class Cancelled(Exception):
    """What was tried is not wanted any more."""


class StartupError(Exception):
    """The program can't do what it is for; the text has a line for each reason. Nothing tries again after it."""


# When the loop of each thread last turned, by the monotonic clock; see MetricsServer.
turned: weakref.WeakKeyDictionary[threading.Thread, float] = weakref.WeakKeyDictionary()


def note_turn(asks: bool = False) -> None:
    """Notes that this thread's loop turns, or `asks` the service: to wait for an answer is not to stand still."""
    turned[threading.current_thread()] = float("inf") if asks else time.monotonic()


def wait(seconds: float, goes_on: Callable[[], bool]) -> None:
    """Sleeps, but no longer than `goes_on()` is true."""
    end = time.monotonic() + seconds
    while goes_on() and time.monotonic() < end:
        note_turn()
        time.sleep(max(0.0, min(0.05, end - time.monotonic())))


def retry(
    call: Callable[[], Any], goes_on: Callable[[], bool], failed: Callable[[Exception], object], longest: float
) -> Any:
    """Calls until that succeeds, and returns its value: the one way of this program to try again.

    Before each further try it waits, exponentially longer up to `longest` seconds, and spread so that copies don't try
    in step. Raises Cancelled once `goes_on()` is false, and StartupError as `call` does.
    """
    pause = INITIAL_BACKOFF
    while goes_on():
        try:
            return call()
        except (Cancelled, StartupError):
            raise
        except Exception as error:
            failed(error)
        wait(min(pause, longest) * random.uniform(0.5, 1.0), goes_on)
        pause = min(pause * 2, MAX_BACKOFF)
    raise Cancelled


class RetryLog:
    """Calls of one kind to one place, tried until they are done, and what is told of those that fail.

    The first failure is told, then sums at growing intervals, then the end: when whatever failed has been done after
    all, and nothing failed for RECOVERY_QUIET seconds.
    """

    RECOVERY_QUIET = 5.0

    def __init__(self, subject: str, calls: str, failing: str, config: LogstoreConfig) -> None:
        """`calls` names them, such as "puts"; `failing` says what happens to one that failed."""
        self.subject, self.calls, self.failing, self.config = subject, calls, failing, config
        self.lock = threading.Lock()
        self.failing_now: set[object] = set()  # what has failed and is yet to be done
        self.failures = 0  # since all was well

    def retry(
        self, what: object, call: Callable[[], Any], goes_on: Callable[[], bool], longest: float = MAX_BACKOFF
    ) -> Any:
        """As the function of that name, and tells of what fails. `what` tells one thing to be done from another."""
        try:
            return retry(call, goes_on, functools.partial(self.on_failure, what), longest)
        finally:
            self.on_done(what)

    def on_failure(self, what: object, error: Exception) -> None:
        """Takes note of a failure; `what` failed, and will be tried again."""
        code = error.code if isinstance(error, CallError) else type(error).__name__
        with self.lock:
            self.last = time.monotonic()
            if not self.failures:  # this one begins the trouble
                self.since, self.intervals = self.last, LogThrottle()
                self.codes: set[str] = set()
            self.failures += 1
            self.failing_now.add(what)
            if not self.intervals.admit() and code in self.codes:
                return
            self.codes.add(code)
            failures, seconds = self.failures, self.last - self.since
        line = "%s: %s: %s" % (self.subject, self.failing, describe_error(error, self.config))
        if failures > 1:
            line += " (%d failed tries in %.0f s)" % (failures, seconds)
        log.log(logging.WARNING if isinstance(error, CallError) and error.is_transient() else logging.ERROR, "%s", line)

    def on_done(self, what: object) -> None:
        """Takes note that `what` has been done, or is nobody's business any more."""
        self.failing_now.discard(what)

    def report_recovery(self) -> None:
        """Says when it is over; to be called now and then."""
        with self.lock:
            if not self.failures or self.failing_now or time.monotonic() - self.last < self.RECOVERY_QUIET:
                return
            told = self.subject, self.calls, self.failures, self.last - self.since
            self.failures = 0
        log.warning("%s: %s recovered after %d failed tries in %.0f s", *told)


# ---- keys: where they come from, and how they renew themselves -------------------------------------------------------

ECS_METADATA_URL = "http://100.100.100.200/latest/"  # answers on an ECS instance, and nowhere else
LOCAL_TIMEOUT = 2.0  # seconds, for the metadata service and local agents
STS_TIMEOUT = 10.0  # seconds
FIRST_CREDENTIALS_TIMEOUT = 15.0  # seconds that calls wait for the outcome of the first try to get a key
STS_DURATION = 3600  # seconds, of a key that STS is asked for
REFRESH_MARGIN = 15 * 60  # seconds before a key ends, or half of what is left of it if that is less
REFRESH_POLL = 1.0  # seconds between looks at whether it is time for another key
CREDENTIAL_FIELDS = ("AccessKeyId", "AccessKeySecret", "SecurityToken", "Expiration")


class AccessKey(Credentials):
    """An access key that ends at `end` (unix seconds); `role` says whose it is, "" where that is not known."""

    def __init__(self, key_id: str, secret: str, token: str, end: float = float("inf"), role: str = "") -> None:
        super().__init__(key_id, secret, token)
        self.end, self.role = end, role

    def __str__(self) -> str:
        tense = "ended" if time.time() >= self.end else "ends"
        return "%s%s %s" % ("role %s, " % self.role if self.role else "", tense, format_with_utc(self.end))


def http_request(method: str, url: str, headers: Mapping[str, str] = USER_AGENT, form: object = None) -> str:
    """What is answered to one short request with 200. Raises CallError.

    http:// is for what is near, and asked without a proxy; https:// is for STS. requests' timeout begins again with
    each byte: so the body is read byte by byte, as long as there is time.
    """
    is_far, body = url.startswith("https:"), b""
    seconds = STS_TIMEOUT if is_far else LOCAL_TIMEOUT
    end = time.monotonic() + seconds
    options: Any = {"headers": headers, "data": form, "timeout": seconds, "allow_redirects": False, "stream": True}
    if is_far:
        options["auth"] = lambda request: request  # else requests would send what ~/.netrc has by default
    try:
        with requests.Session() as session:
            session.trust_env = is_far  # its proxies, its CAs
            with session.request(method, url, **options) as answer:
                for byte in answer.iter_content(1):
                    body += byte
                    if time.monotonic() > end:
                        raise requests.Timeout("the answer has no end")
    except requests.RequestException as error:
        reason = getattr(error.args[0], "reason", error) if error.args else error  # without the URL, a secret maybe
        raise CallError("NoKey", "%s: %s" % (type(reason).__name__, reason)) from None
    text = body.decode("utf-8", "replace").strip()
    if answer.status_code == 200:
        return text
    # Only an error's code and message are shown, in JSON or XML: the rest may be half a key.
    words = re.findall(r'["<](?:Code|Message)(?:"\s*:\s*"|>)([^"<]+)', text)
    code = "NoKey" if answer.status_code == 429 or "Throttling" in "".join(words) else "KeyRefused"
    where = "%s%s" % (urlsplit(url).hostname, urlsplit(url).path)
    raise CallError(code, ": ".join([where, *words]), answer.status_code)


def parse_credentials(text: str, role: str = "") -> AccessKey:
    """The key in the JSON that all sources give, STS inside of another object. Raises CallError."""
    try:
        fields = json.loads(text)
        fields = fields.get("Credentials", fields)
        if fields.get("Code", "Success") != "Success":
            raise CallError("KeyRefused", "%s: %s" % (fields["Code"], fields.get("Message")))
        key_id, key_secret, token, expiration = [check_secret(fields[name]) for name in CREDENTIAL_FIELDS]
        end = calendar.timegm(time.strptime(expiration, "%Y-%m-%dT%H:%M:%SZ"))
        return AccessKey(key_id, key_secret, token, end, role)
    except (ValueError, TypeError, KeyError, AttributeError):  # their text may show what was to be read
        raise CallError("NoKey", "what came isn't JSON with %s" % ", ".join(CREDENTIAL_FIELDS)) from None


def from_ecs_metadata(role: str) -> AccessKey:
    """From the metadata service of the ECS instance: in its hardened form or, where it has none, in the older one."""
    headers = {"X-aliyun-ecs-metadata-token-ttl-seconds": "21600"}
    try:
        headers = {"X-aliyun-ecs-metadata-token": http_request("PUT", ECS_METADATA_URL + "api/token", headers)}
        CredentialSource.hide(time.time(), *headers.values())
    except CallError as failure:
        is_forbidden = os.environ.get("ALIBABA_CLOUD_IMDSV1_DISABLED", "").lower() in ("1", "true")
        if is_forbidden or failure.status not in (404, 405):
            raise
        headers = {}
    roles = ECS_METADATA_URL + "meta-data/ram/security-credentials/"
    role = role or http_request("GET", roles, headers)
    return parse_credentials(http_request("GET", roles + role, headers), role)


def from_oidc(_: str) -> AccessKey:
    """From STS, in exchange for the OIDC token of the pod's service account (RRSA), which the cluster renews."""
    role, provider, token_file = [os.environ[name] for name in OIDC_VARIABLES]
    with open(token_file, encoding="ascii") as file:
        token = file.read().strip()
    CredentialSource.hide(time.time() + STS_DURATION, token)
    query = {"Action": "AssumeRoleWithOIDC", "Version": "2015-04-01", "Format": "JSON",
             "Timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
    form = {"RoleArn": role, "OIDCProviderArn": provider, "OIDCToken": token, "DurationSeconds": STS_DURATION,
            "RoleSessionName": os.environ.get("ALIBABA_CLOUD_ROLE_SESSION_NAME") or "dispatch_data"}  # fmt: skip
    host = os.environ.get("ALIBABA_CLOUD_STS_ENDPOINT") or "sts.aliyuncs.com"  # the cluster sets that of its region
    return parse_credentials(http_request("POST", "https://%s/?%s" % (host, urlencode(query)), form=form), role)


def from_file(path: str) -> AccessKey:
    with open(path, encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_mode & 0o007:
            raise CallError("KeyRefused", "others can get at %s: chmod 600 it, or 640" % path)
        return parse_credentials(file.read())


CREDENTIAL_SOURCES = {
    "ecs": from_ecs_metadata,
    "oidc": from_oidc,
    "http": lambda rest: parse_credentials(http_request("GET", "http:" + rest)),
    "file": from_file,
}


class CredentialSource(CredentialsProvider):
    """The key of one source for all who sign with it: the SDK asks at each signature, from many threads.

    One thread renews it ahead of its end, and everybody else goes on with the key there is until that has really ended.
    A key of the settings stays what it is; its `source` is "".
    """

    known: dict[tuple[str, ...], CredentialSource] = {}
    secrets: Mapping[str, float] = {}  # what must never be shown, of all sources -> when it ends, unix seconds
    lock = threading.RLock()

    def __init__(self, config: LogstoreConfig) -> None:
        self.source, _, self.detail = config.credentials.partition(":")
        self.name = config.variables.get("SLS_CREDENTIALS" if self.source else "SLS_STS_TOKEN", "")
        self.refresh_retries = RetryLog(self.name, "renewals", "no new key yet, trying again", config)
        self.key = None if self.source else AccessKey(config.access_key_id, config.access_key, config.security_token)
        self.failure: CallError | None = None  # of the last try
        self.first_try_done = threading.Event()
        self.refresh_at = self.refreshed_at = (
            0.0  # when to renew the key, in unix seconds; when it came, by the monotonic clock
        )
        self.is_expired = False
        if self.source == "http":
            url = urlsplit(config.credentials)
            self.hide(float("inf"), url.password, unquote(url.password or ""), url.query)

    def __str__(self) -> str:
        """Where the key comes from, whose it is, and when it ends."""
        shown = "//" + urlsplit(self.detail).netloc.rpartition("@")[2] if self.source == "http" else self.detail
        return "%s, %s" % (":".join(filter(None, [self.source, shown])), self.key or "no key yet")

    @classmethod
    def hide(cls, end: float, *texts: str | None) -> None:
        """No log shows these texts from now on, until some time after their `end` (unix seconds): clocks may differ."""
        with cls.lock:
            kept = {text: its_end for text, its_end in cls.secrets.items() if its_end > time.time() - STS_DURATION}
            cls.secrets = {**kept, **{text: end for text in texts if text}}

    def get_credentials(self) -> AccessKey:
        """Called by the SDK. Waits for nothing but the outcome of the very first try. Raises CallError."""
        if not self.key:
            self.first_try_done.wait(FIRST_CREDENTIALS_TIMEOUT)
        key = self.key
        if key and time.time() < key.end:
            return key
        raise self.unavailable()

    def unavailable(self) -> CallError:
        """Why there is no other key, and how it stands with the one before."""
        failure = self.failure or CallError("NoKey", "another is on its way")
        before = "the key at hand: %s; " % self.key if self.key else ""
        return CallError(failure.code, before + failure.message, failure.status)

    def refresh_loop(self) -> None:
        """For ever, in the one thread that asks the source."""
        while True:
            if time.time() >= self.refresh_at:
                self.refresh_retries.retry("key", self.refresh, lambda: True)
            time.sleep(REFRESH_POLL)

    def refresh(self) -> None:
        """Gets a key from its source; the one before stays where that fails. Raises CallError."""
        try:
            key = CREDENTIAL_SOURCES[self.source](self.detail)
            self.hide(key.end, key.access_key_secret, key.security_token)
            now = time.time()
            if key.end <= now:
                raise CallError("NoKey", "what came is dead: %s, now is %s" % (key, format_with_utc(now)))
            # A file may be written anew at any time, and costs nothing to look at.
            self.refresh_at = 0.0 if self.source == "file" else key.end - min(REFRESH_MARGIN, (key.end - now) / 2)
            self.key, self.refreshed_at, self.failure = key, time.monotonic(), None
        except Exception as error:  # any: the only thread that can get a key must not end
            if not isinstance(error, CallError):
                error = CallError("NoKey", "%s: %s" % (type(error).__name__, error))
            self.failure = CallError(error.code, redact(error.message, self.secrets), error.status)
            raise self.unavailable() from None
        finally:
            self.first_try_done.set()

    def on_auth_failure(self, failure: CallError, token: str) -> None:
        """Looks at why the service refused a call that was signed with a key of this token."""
        if not token or failure.kind != ErrorKind.CREDENTIALS:
            return
        if not self.source:
            self.is_expired |= failure.hint == EXPIRED_TOKEN_HINT
            return
        failure.kind, failure.hint = ErrorKind.TRANSIENT, "{SLS_CREDENTIALS} is asked for another key"
        if self.key and self.key.security_token == token and time.monotonic() - self.refreshed_at > MAX_BACKOFF:
            self.refresh_at = 0.0


def credentials_for(config: LogstoreConfig) -> CredentialSource:
    """The same for all places whose key comes from the same source."""
    identity = config.credentials, config.access_key_id, config.access_key, config.security_token
    with CredentialSource.lock:
        if identity not in CredentialSource.known:
            credential_source = CredentialSource(config)
            if credential_source.source:
                threading.Thread(target=credential_source.refresh_loop, daemon=True).start()
            CredentialSource.known[identity] = credential_source
        return CredentialSource.known[identity]


def expiring_credentials(settings: Settings) -> list[CredentialSource]:
    """Each once, that of the source first."""
    ending = [config for config in settings.logstores() if config.credentials or config.security_token]
    return list(dict.fromkeys(credentials_for(config) for config in ending))


# ---- the service: connections and calls ------------------------------------------------------------------------------


class ConnectionFactory:
    """Opens connections to one origin (scheme://host:port) as requests would: same proxy of any kind, same trusted CAs.

    requests reads the environment and builds its objects anew for every call, which costs more than the rest of a put;
    here its pool is made once, and asked for nothing but connections.
    """

    def __init__(self, origin: str) -> None:
        session = requests.Session()
        request = session.prepare_request(requests.Request("GET", origin))
        settled = session.merge_environment_settings(origin, {}, None, None, None)
        adapter: Any = session.get_adapter(origin)
        pool = self.pool = adapter.get_connection_with_tls_context(request, settled["verify"], settled["proxies"])
        pool.conn_kw["socket_options"] = urllib3.connection.HTTPConnection.default_socket_options  # TCP_NODELAY
        self.uses_tunnel = pool.proxy and origin.startswith("https:")
        if pool.scheme == "https" and not (self.uses_tunnel and pool.proxy.scheme == "https"):
            # One for all connections: to read the CAs takes some 20 ms, to keep them half a MB.
            context = ssl.create_default_context(cafile=pool.ca_certs, capath=pool.ca_cert_dir)
            pool.conn_kw["ssl_context"], pool.ca_certs, pool.ca_cert_dir = context, None, None
        # An HTTP proxy without a tunnel is told the whole URL, and who asks, with each request.
        sends_absolute_url = pool.proxy and not self.uses_tunnel
        self.url_prefix = origin if sends_absolute_url else ""
        self.headers = dict(USER_AGENT, **(pool.proxy_headers if sends_absolute_url else {}))

    def connect(self, seconds: float) -> Any:
        """A new HTTPConnection, open, with so much time for each address that the host has. Raises OSError, ValueError,
        HTTPException or HTTPError."""
        # Two private methods of urllib3's, for which it has no public ones.
        connection: Any = self.pool._new_conn()
        connection.timeout = seconds
        try:
            self.pool._prepare_proxy(connection) if self.uses_tunnel else connection.connect()
            connection.sock.settimeout(None)  # see DeadlineStream
        except BaseException:
            connection.close()
            raise
        return connection


class DeadlineStream(io.RawIOBase):
    """What one call receives over a socket, as long as its time lasts: from its making until it is closed.

    That is `seconds`, and more for all that moves: MIN_THROUGHPUT decides. A timeout of the socket would begin again
    with each byte, so that an answer may trickle for ever, would cut off a large put on a slow line, and makes each
    call of the operating system two. So the socket has none; who waits for it is woken by the end of the connection.
    """

    CHECK_INTERVAL = 0.1  # seconds between looks at whose time is over
    in_use: set[DeadlineStream] = set()

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self.sock = sock
        self.end = time.monotonic() + seconds
        self.received = 0
        self.reader: Any = io.BufferedReader(self)
        DeadlineStream.in_use.add(self)

    def close(self) -> None:
        """At the end of a with statement. The socket stays as it is."""
        DeadlineStream.in_use.discard(self)
        super().close()
        self.reader = None  # which holds this: a circle would wait for the garbage collector, with 8 KB

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def makefile(self, *_: object) -> object:
        """Called by http.client, to which this stands for the socket."""
        return self.reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.sock.recv_into(buffer)
        if not count and self.is_over():
            raise TimeoutError("timed out")  # for an answer without a length this would be its end
        self.received += count
        self.end += count / MIN_THROUGHPUT
        return count

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def watcher() -> threading.Thread:
        """The thread that ends the connections of those whose time is over; started by who first asks for it."""
        thread = threading.Thread(target=DeadlineStream.watch, daemon=True)
        thread.start()
        return thread

    @staticmethod
    def watch() -> None:
        while True:
            note_turn()
            time.sleep(DeadlineStream.CHECK_INTERVAL)
            for line in filter(DeadlineStream.is_over, list(DeadlineStream.in_use)):
                # The socket itself, for its TLS layer is another thread's. Once that closes it, the kernel forgets what
                # it has not sent: else a put or a checkpoint that was given up might arrive much later.
                sock = getattr(line.sock, "socket", line.sock)
                with contextlib.suppress(OSError):
                    socket.socket.setsockopt(sock, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)


SIMPLE_OK = re.compile(rb"HTTP/1\.1 200 [^\r\n]*\r\n((?:[A-Za-z0-9-]+:[^\r\n]*\r\n)+)\r\n")


def read_response(line: DeadlineStream) -> tuple[int, bytes, Mapping[str, str], bool]:
    """(status, body, headers) of an answer, and whether the connection can be used again, as after a whole 200. Raises
    OSError or HTTPException."""
    head = SIMPLE_OK.match(line.reader.peek())
    if head:  # as the service's usually are, which http.client would take longer for than the rest of a put takes
        fields = [field.split(":", 1) for field in head.group(1).decode("latin-1").split("\r\n")[:-1]]
        headers = requests.structures.CaseInsensitiveDict((name, value.strip()) for name, value in fields)
        length = headers.get("Content-Length", "")
        leaves_open = headers.get("Connection", "keep-alive").lower() == "keep-alive"
        is_plain = leaves_open and "Transfer-Encoding" not in headers and len(headers) == len(fields)
        if is_plain and re.fullmatch("[0-9]{1,9}", length):
            line.reader.read(head.end())
            body = line.reader.read(int(length))
            if len(body) < int(length):
                raise http.client.IncompleteRead(body, int(length) - len(body))
            return 200, body, headers, True
    response: Any = http.client.HTTPResponse(line)  # type: ignore[arg-type]
    response.begin()
    while 100 <= response.status < 200:  # such as 103 Early Hints; http.client knows 100 alone
        response.headers = response.msg = None
        response.begin()
    body = response.read()
    return response.status, body, response.headers, response.status == 200 and not response.will_close


def is_reusable(connection: http.client.HTTPConnection, since: float) -> bool:
    """Whether nobody has closed a connection that has been idle since then, and nothing lies unread on it."""
    return time.monotonic() - since < MAX_IDLE and not urllib3.util.wait_for_read(connection.sock, 0)


class PooledLogClient(LogClient):
    """A LogClient that talks to one project, from many threads, without requests, and tries each call once.

    It is the one place where answers come in: an answer counts only if the service gave it. `_getHttpResponse`, behind
    which the SDK has requests, is overridden; what it raises, no LogException, passes LogClient._send, which would
    repeat the call.
    """

    signing_lock = threading.RLock()  # of all clients

    def __init__(self, config: LogstoreConfig, response_timeout: float | None = None, keep_alive: bool = True) -> None:
        """`response_timeout` is in seconds; None stands for RESPONSE_TIMEOUT."""
        self.credential_source = credentials_for(config)
        version = AUTH_VERSION_4 if config.region else AUTH_VERSION_1
        super().__init__(
            config.endpoint,
            None,
            None,
            None,
            "dispatch_data",
            version,
            config.region,
            credentials_provider=self.credential_source,
        )
        # The SDK's sets the process's locale for the Date of each request, at the cost of compressing it.
        self._auth._getGMT = functools.partial(email.utils.formatdate, usegmt=True)  # type: ignore[attr-defined]
        self.response_timeout = response_timeout or RESPONSE_TIMEOUT
        self.keep_alive = keep_alive
        DeadlineStream.watcher()
        self.connector: ConnectionFactory | None = None
        self.idle_connections: deque[tuple[http.client.HTTPConnection, float]] = (
            deque()
        )  # and since when, the last used last
        self.last_date = "", 0.0  # its Date, and when it came

    def put_log_raw(self, *args: Any, **named: Any) -> Any:
        """PutLogs. One thread at a time compresses, hashes and signs: several would wait for each other at each step of
        that, for the interpreter's lock."""
        self.credential_source.get_credentials()  # the first may have to be waited for, and not by all
        self.signing_lock.acquire()
        try:
            return super().put_log_raw(*args, **named)
        finally:
            self.release_signing_lock()

    def release_signing_lock(self) -> None:
        with contextlib.suppress(RuntimeError):  # raised in a thread that doesn't hold it, or has ended it
            self.signing_lock.release()

    def _getHttpResponse(
        self, method: str, url: str, params: Mapping[str, Any], body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Called by LogClient with what it has signed; (status, body, headers) of the answer. Raises CallError."""
        self.release_signing_lock()
        note_turn(asks=True)
        try:
            scheme, host, path = urlsplit(url)[:3]
            connector = self.connector = self.connector or ConnectionFactory("%s://%s" % (scheme, host))
            path = connector.url_prefix + path + ("?" + urlencode(params) if params else "")
            lines = ["%s: %s\r\n" % pair for sent in (headers, connector.headers) for pair in sent.items()]
            request = ("%s %s HTTP/1.1\r\n%s\r\n" % (method, path, "".join(lines))).encode("latin-1") + (body or b"")
            status, answer, answer_headers = self.round_trip(connector, request)
        except (OSError, ValueError, http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
            raise CallError.from_exception(error) from error
        finally:
            note_turn()
        is_put = url.endswith("/shards/lb")
        if status != 200 or REQUEST_ID not in answer_headers or (is_put and answer):
            failure = CallError.from_response(status, answer_headers, answer)
            self.credential_source.on_auth_failure(failure, headers.get("x-acs-security-token", ""))
            raise failure
        self.last_date = answer_headers.get("Date") or "", time.monotonic()
        return status, answer, answer_headers

    def round_trip(
        self, connector: ConnectionFactory, request: bytes, is_repeat: bool = False
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Sends a request; (status, body, headers) of its answer. Raises what `connect` and `read_response` do.

        It goes over an idle connection, if there is one. Where that was closed meanwhile, the request is repeated over
        a fresh one, and never again: each may have been taken.
        """
        idle = None if is_repeat else self.take_idle()
        connection = idle or connector.connect(min(CONNECT_TIMEOUT, self.response_timeout))
        line = DeadlineStream(connection.sock, self.response_timeout)
        is_kept = False
        try:
            with line:
                try:
                    line.end += (
                        len(request) / MIN_THROUGHPUT
                    )  # the kernel takes it at once, whenever the line carries it
                    line.sock.sendall(request)
                except ConnectionError:  # whoever won't read it all may have said why, as gateways do with 413
                    if not urllib3.util.wait_for_read(line.sock, 0):
                        raise
                status, body, headers, leaves_open = read_response(line)
            is_kept = leaves_open and self.keep_alive
            return status, body, headers
        except OSError as error:
            if line.is_over():
                raise TimeoutError("timed out") from None
            # http.client's RemoteDisconnected is a ConnectionError, too.
            was_closed_before = idle and isinstance(error, ConnectionError) and not line.received
            if not was_closed_before:
                raise
        finally:
            if is_kept:
                self.idle_connections.append((connection, time.monotonic()))
            else:
                connection.close()
        return self.round_trip(connector, request, is_repeat=True)

    def take_idle(self) -> http.client.HTTPConnection | None:
        """A connection to use again, if there is one."""
        with contextlib.suppress(IndexError):
            while True:
                connection, since = self.idle_connections.pop()
                if is_reusable(connection, since):
                    return connection
                connection.close()
        return None

    def close_stale(self, all_idle: bool) -> None:
        """Closes idle connections that can't be used again, or all of them; to be called often."""
        for _ in range(len(self.idle_connections)):
            with contextlib.suppress(IndexError):
                connection, since = self.idle_connections.popleft()
                if not all_idle and is_reusable(connection, since):
                    self.idle_connections.append((connection, since))
                else:
                    connection.close()

    def server_time(self) -> float:
        """The service's clock in unix seconds, by the Date of its last answer; this machine's where there is none."""
        with contextlib.suppress(TypeError, ValueError):
            date, received = self.last_date
            return email.utils.parsedate_to_datetime(date).timestamp() + time.monotonic() - received
        return time.time()


def cursor_position(cursor: str) -> int:
    """A cursor as a number that grows along the shard; -1 for what is no cursor as the service's pages have it."""
    with contextlib.suppress(ValueError):
        return int(base64.b64decode(cursor, validate=True))
    return -1


class PullResult(NamedTuple):
    """What a pull brought, under the names that the SDK asks for."""

    log_groups: list[LogGroup]
    size: int  # bytes, uncompressed
    next_cursor: str

    def get_loggroup_count(self) -> int:
        return len(self.log_groups)

    def get_raw_size(self) -> int:
        return self.size

    def get_next_cursor(self) -> str:
        return self.next_cursor


class LogstoreApi:
    """The calls for one logstore, each tried once, its answer held to the form it must have; else CallError."""

    def __init__(self, config: LogstoreConfig, response_timeout: float | None = None, keep_alive: bool = True) -> None:
        self.config = config
        self.client = PooledLogClient(config, response_timeout, keep_alive)

    def call(self, method: Callable[..., Any], *arguments: object) -> Any:
        """What the SDK makes of the answer; whatever it can't make sense of is no answer of the service."""
        try:
            return method(self.config.project, self.config.logstore, *arguments)
        except CallError:
            raise
        except Exception as error:  # any: the SDK reads all answers as if they were right
            raise CallError("NotTheService", "200, but %s" % escape_for_log(repr(error), 100)) from error

    @staticmethod
    def validate(is_right: object, answer: Any) -> Any:
        """The answer, if it is right."""
        if not is_right:
            raise CallError("NotTheService", "200, but %s" % escape_for_log(repr(answer), 100))
        return answer

    def list_shards(self) -> list[dict[str, Any]]:
        """ListShards: shardID and status ("readwrite" or "readonly") of each, at least one."""
        shards = self.call(self.client.list_shards).get_shards_info()
        return self.validate(shards and is_list(shards, "shardID", "status"), shards)

    def get_cursor(self, shard: int, start: str | int) -> str:
        """GetCursor: of "begin", "end", or of the first LogGroup that arrived at a time (unix seconds) or later."""
        cursor = self.call(self.client.get_cursor, shard, start).get_cursor()
        return self.validate(cursor and isinstance(cursor, str), cursor)

    def arrival_time(self, shard: int, cursor: str) -> int:
        """GetCursorTime: when the LogGroup at the cursor arrived, in unix seconds."""
        seconds = self.call(self.client.get_cursor_time, shard, cursor).get_cursor_time()
        return self.validate(isinstance(seconds, int), seconds)

    def pull_logs(self, shard: int, cursor: str, count: int) -> PullResult:
        """PullLogs: at most `count` (1 to 1000) LogGroups from the cursor on."""
        response = self.call(self.client.pull_logs, shard, cursor, count)
        size, next_cursor = response.get_raw_size(), response.get_next_cursor()
        self.validate(next_cursor, response.get_all_headers())
        try:
            log_groups = log_groups_of(response)
        except ValueError as error:
            raise CallError("UnreadablePull", "shard %d: %s" % (shard, error)) from error
        # A cache or a proxy in confusion may give the answer of an earlier pull; it would lead back.
        leads_on = (
            cursor_position(next_cursor) >= cursor_position(cursor) + bool(log_groups)
            or cursor_position(next_cursor) < 0
        )
        self.validate(leads_on and len(log_groups) <= count, "an answer to another pull")
        return PullResult(log_groups, size, next_cursor)

    def consumer_groups(self) -> dict[str, Any] | None:
        """ListConsumerGroup: the SDK's ConsumerGroupEntity by name; None where the key may not list them."""
        try:
            groups = self.call(self.client.list_consumer_group).get_consumer_groups()
        except CallError as error:
            if error.is_missing_permission:
                return None
            raise
        return {group.get_consumer_group_name(): group for group in groups}

    def make_consumer_group(self, name: str, timeout: int) -> None:
        """CreateConsumerGroup; `timeout` in seconds. Shards that a split makes are handed out at once."""
        self.call(self.client.create_consumer_group, name, timeout, False)

    def checkpoints(self, group: str) -> dict[int, dict[str, Any]]:
        """GetCheckPoint of every shard: checkpoint (a cursor), updateTime (unix microseconds), consumer."""
        entries = self.call(self.client.get_check_point, group).get_consumer_group_check_points()
        self.validate(is_list(entries, "shard", "checkpoint"), entries)
        return {entry["shard"]: entry for entry in entries}

    def save_checkpoint(self, group: str, consumer: str, shard: int, cursor: str) -> None:
        """UpdateCheckPoint, refused where another consumer holds the shard."""
        # The SDK forces its update: a copy that was frozen and lost the shard would write over the new holder's.
        self.call(self.client.update_check_point, group, shard, cursor, consumer, False)

    def heartbeat(self, group: str, consumer: str, shards: Sequence[int]) -> list[int]:
        """HeartBeat: tells the shards that are held, returns those that may be."""
        held = self.call(self.client.heart_beat, group, consumer, list(shards)).get_shards()
        return self.validate(isinstance(held, list) and all(isinstance(shard, int) for shard in held), held)


def is_list(answer: object, *fields: str) -> bool:
    """Whether it is a list of objects with these fields."""
    return isinstance(answer, list) and all(isinstance(one, dict) and {*fields} <= {*one} for one in answer)


class ThreadPool(concurrent.futures.ThreadPoolExecutor):
    """ThreadPool made as needed. Where the machine gives no more, work waits for those that there are, one at least."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.on_task_done: Callable[[], object] = lambda: None  # called whenever a piece of work is done
        self.throttle = LogThrottle()
        self.submit(int).result()

    def submit(self, *args: Any, **named: Any) -> Any:
        future = super().submit(*args, **named)
        future.add_done_callback(lambda _: self.on_task_done())
        return future

    def _adjust_thread_count(self) -> None:
        """The standard library's, called with the work in the queue already."""
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not self._threads:
                raise
            if self.throttle.admit():
                count = len(self._threads)
                log.warning("%s: %d threads go on; the limit is `ulimit -u`, or the container's", error, count)


# ---- check and status: what --check and --status tell, changing nothing ----------------------------------------------

CHECK_TIMEOUT = 10.0  # seconds for an answer
PROBE_CONCURRENCY = 32  # shards or logstores that are asked of at a time, each over a connection of its own
GROUP_LIMITS = (10, 30)  # consumer groups a logstore may have, by the service's older and newer pages
# How consumers of this program are called, see Consumer: group, host, process id, when the group began, chance.
CONSUMER_NAME = re.compile(r".+-\d+-([0-9a-f]{8})?[0-9a-f]{12}")


@dataclass(frozen=True)
class ShardStatus:
    """How far a consumer group is with one shard; the fields are named as in --status --json."""

    shard: int
    status: str  # "readwrite" or "readonly"
    holder: str  # consumer that holds it, or did when the checkpoint was saved; "" before that
    checkpoint: str  # cursor, "" before the first
    checkpoint_time: int | None  # unix seconds: when the next log to deliver arrived
    behind_seconds: float | None  # since then, 0 with nothing left to deliver; None: nobody knows
    updated_time: float | None  # unix seconds: when the checkpoint was saved
    is_at_end: bool  # nothing is left to deliver, by the cursors: 0 seconds may be less than a whole one; not shown


def read_shard_status(
    logstore: LogstoreApi,
    group: str,
    only: Sequence[int] | None = None,
    mapper: Callable[..., Iterable[ShardStatus]] = map,
) -> list[ShardStatus]:
    """Asks the service of every shard, or of some. It goes by checkpoints: what was pulled is not yet delivered.

    `mapper` is `map`, or an executor's to ask of many at a time. Raises CallError.
    """
    entries = logstore.checkpoints(group)
    shards = [shard for shard in logstore.list_shards() if only is None or shard["shardID"] in only]
    statuses = mapper(lambda shard: probe_shard(logstore, shard, entries.get(shard["shardID"], {})), shards)
    return sorted(statuses, key=lambda status: status.shard)


def probe_shard(logstore: LogstoreApi, shard: Mapping[str, Any], entry: Mapping[str, Any]) -> ShardStatus:
    """Asks of one shard, as LogstoreApi.list_shards has it; `entry` is of LogstoreApi.checkpoints. Raises CallError.

    A shard that holds no log has nothing left to deliver, with a checkpoint, an expired one or none. With logs and no
    checkpoint nobody knows how far behind it is: where it begins is decided when a copy first gets it.
    """
    number, checkpoint = shard["shardID"], entry.get("checkpoint") or ""
    end = logstore.get_cursor(number, "end")
    try:
        arrival = logstore.arrival_time(number, checkpoint) if checkpoint else None
    except CallError as error:
        if error.code != "InvalidCursor":
            raise
        arrival = None  # it has expired
    is_at_end = checkpoint == end or (arrival is None and logstore.get_cursor(number, "begin") == end)
    behind = 0.0 if is_at_end else None
    if not is_at_end and arrival is not None:
        seconds = logstore.client.server_time() - arrival
        behind = max(0.0, seconds) if seconds > -CLOCK_TOLERANCE else None
    updated = entry["updateTime"] / 1e6 if entry.get("updateTime") else None
    return ShardStatus(
        shard=number, status=shard["status"], holder=entry.get("consumer") or "", checkpoint=checkpoint,
        checkpoint_time=arrival, behind_seconds=behind, updated_time=updated, is_at_end=is_at_end,
    )  # fmt: skip


def largest_lag(statuses: Sequence[ShardStatus]) -> float | None:
    """Seconds that the last of these shards is behind; None when that is unknown of one of them."""
    known = [status.behind_seconds for status in statuses if status.behind_seconds is not None]
    return max(known, default=0.0) if len(known) == len(statuses) else None


class Verdict(enum.Enum):
    OK = "fine"
    WRONG = "wrong"
    UNREACHABLE = "not reachable now"
    UNVERIFIED = "could not verify"


@dataclass(frozen=True)
class CheckResult:
    """What the check of one logstore has shown."""

    subject: str
    verdict: Verdict
    text: str
    cause: str = ""  # the same for logstores that the same thing is wrong with
    group_has_begun: bool = True  # unless a check of the source has shown that no shard has a checkpoint

    def __str__(self) -> str:
        return "%s: %s" % (self.verdict.value, self.text)


def probe(
    subject: str, config: LogstoreConfig, probe_reading: Callable[[LogstoreApi], tuple[str, bool]] | None = None
) -> CheckResult:
    """Tries a logstore with calls that only read; `subject` is what it is called in what is shown.

    `probe_reading` is for one that is read from: see `probe_group`. A key for one that is written to may not look.
    """
    logstore = LogstoreApi(config, CHECK_TIMEOUT, keep_alive=False)
    try:
        count = len(logstore.list_shards())
        of_group, group_has_begun = probe_reading(logstore) if probe_reading else ("", True)
        text = "%d shard%s%s" % (count, "" if count == 1 else "s", of_group)
        return CheckResult(subject, Verdict.OK, text, group_has_begun=group_has_begun)
    except CallError as failure:
        text = describe_error(failure, config)
        if failure.is_transient():
            return CheckResult(subject, Verdict.UNREACHABLE, text)
        if failure.is_missing_permission and not probe_reading:
            words = "the key may not look, whether it may write the first put will show: %s"
            return CheckResult(subject, Verdict.UNVERIFIED, words % failure)
        return CheckResult(subject, Verdict.WRONG, text, cause=failure.code + failure.hint.format(**config.variables))


def probe_group(settings: Settings, logstore: LogstoreApi) -> tuple[str, bool]:
    """What a start would find of its consumer group, in words, and whether the group has begun. Raises CallError."""
    name, groups = settings.consumer_group, logstore.consumer_groups()
    if groups is None:
        text = ", could not verify the consumer group, for the key may not list them"
        try:
            return text, has_checkpoints(logstore.checkpoints(name))
        except CallError as error:
            if error.code != "ConsumerGroupNotExist":
                raise
            return text, False
    if name in groups:
        checkpoints = logstore.checkpoints(name)
        remarks = group_warnings(groups[name], checkpoints, settings.heartbeat_interval)
        return "; ".join([", consumer group %s exists" % name, *remarks]), has_checkpoints(checkpoints)
    full = ", which may be as many as the logstore takes" if len(groups) in GROUP_LIMITS else ""
    return ", consumer group %s will be made, beside %d others%s" % (name, len(groups), full), False


def has_checkpoints(checkpoints: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether a group with these checkpoints, by shard, has any."""
    return any(entry["checkpoint"] for entry in checkpoints.values())


def group_warnings(group: Any, checkpoints: Mapping[int, Mapping[str, Any]], interval: int) -> Iterator[str]:
    """What there is to say of a consumer group that exists: an SDK's ConsumerGroupEntity, its checkpoints by shard.

    `interval` is SLS_HEARTBEAT_INTERVAL. The group's timeout and order are the service's, and stay as they are found.
    """
    name, timeout = "consumer group " + group.get_consumer_group_name(), group.get_timeout()
    if timeout != 2 * interval:
        line = "%s keeps its timeout of %g s, where SLS_HEARTBEAT_INTERVAL=%d would make it %d; heartbeats every %g s"
        yield line % (name, timeout, interval, 2 * interval, min(interval, timeout / 2))
    if group.is_in_order():
        yield "%s consumes in order, and keeps that: children of a split wait for their parent" % name
    holders = {entry.get("consumer") or "" for entry in checkpoints.values()} - {""}
    strange = sorted(escape_for_log(holder, 60) for holder in holders if not CONSUMER_NAME.fullmatch(holder))
    if strange:
        line = "%s has checkpoints of another program (%s); if that still runs, each of the two gets a part of the logs"
        yield line % (name, ", ".join(strange[:3]))


def probe_all(settings: Settings) -> list[CheckResult]:
    """Probes the source and every target at the same time; the source comes first."""
    with ThreadPool(PROBE_CONCURRENCY) as threads:
        probe_reading = functools.partial(probe_group, settings)
        probes = [threads.submit(probe, settings.source_name, settings.source, probe_reading)]
        probes += [threads.submit(probe, target.name, target.config) for target in settings.targets]
        return [each.result() for each in probes]


def check_before_start(settings: Settings) -> None:
    """Probes every logstore and says what is wrong, or could not be found out. Raises StartupError.

    A target that is wrong stops only a group that has not begun: there it may be a typo. Later it holds up its own
    logs, as one that goes missing while the copies run.
    """
    note_turn(asks=True)
    results = probe_all(settings)
    note_turn()
    wrong: dict[str, list[CheckResult]] = {}
    for result in results:
        if result.verdict is Verdict.WRONG:
            wrong.setdefault(result.cause, []).append(result)
        elif result.verdict is Verdict.UNREACHABLE:
            log.warning("%s: %s", result.subject, result)
    lines = ["%s: %s" % (", ".join(one.subject for one in alike), alike[0].text) for alike in wrong.values()]
    source = results[0]
    if lines and (source.verdict is Verdict.WRONG or not source.group_has_begun):
        raise StartupError("\n".join(lines))
    for line in lines:
        log.error("%s; its logs, and no others, wait until that is mended", line)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def show_check(settings: Settings) -> int:
    """Prints what was found, a line for each logstore; the exit status: 1 when any is wrong or not reachable."""
    results = probe_all(settings)
    keys = [key for key in expiring_credentials(settings) if key.source]
    print(table([(result.subject, str(result)) for result in results] + [(key.name, str(key)) for key in keys]))
    print("\n".join([*settings.notes, *("warning: " + warning for warning in settings.warnings)]))
    return int(any(result.verdict in (Verdict.WRONG, Verdict.UNREACHABLE) for result in results))


def status_table(statuses: Sequence[ShardStatus], behind: float | None, now: float) -> str:
    """As --status shows it; `behind` is that of all of them, `now` in unix seconds."""
    rows = [("shard", "status", "holder", "checkpoint", "behind", "updated")]
    for shard in statuses:
        arrival = format_local(shard.checkpoint_time) if shard.checkpoint_time else ""
        rows.append((
            str(shard.shard),
            shard.status,
            shard.holder or "-",
            arrival or ("expired" if shard.checkpoint else "none"),
            "-" if shard.behind_seconds is None else "%.0f s" % shard.behind_seconds,
            "%.0f s ago" % (now - shard.updated_time) if shard.updated_time else "never",
        ))  # fmt: skip
    holders = {status.holder for status in statuses} - {""}
    total = "unknown" if behind is None else "%.0f s" % behind
    return table([*rows, ("all", "%d in all" % len(statuses), "%d in all" % len(holders), "", total, "")])


def show_status(settings: Settings, as_json: bool, max_lag: float | None) -> int:
    """Prints how far the group is; the exit status: 1 when it can't be told, or is more than `max_lag` seconds behind.

    A shard without a valid checkpoint counts as behind: nobody knows how far.
    """
    source, group = settings.source, settings.consumer_group
    logstore = LogstoreApi(source, CHECK_TIMEOUT)
    try:
        statuses = read_shard_status(logstore, group, mapper=ThreadPool(PROBE_CONCURRENCY).map)
    except CallError as error:
        subject = "%s, consumer group %s" % (settings.source_name, group)
        print("%s: %s" % (subject, describe_error(error, source)), file=sys.stderr)
        return 1
    now = logstore.client.server_time()
    ahead = time.time() - now
    if abs(ahead) > CLOCK_TOLERANCE:
        words = abs(ahead), "ahead of" if ahead > 0 else "behind"
        print("this machine's clock is %.0f s %s the service's, by which this is told" % words, file=sys.stderr)
    behind = largest_lag(statuses)
    if as_json:
        shards = [{name: value for name, value in vars(each).items() if name != "is_at_end"} for each in statuses]
        print(json.dumps({"project": source.project, "logstore": source.logstore, "consumer_group": group,
                          "time": now, "behind_seconds": behind, "shards": shards}, indent=2))  # fmt: skip
    else:
        print(status_table(statuses, behind, now))
    return int(max_lag is not None and (behind is None or behind > max_lag))


# ---- delivery: every put until the target has taken it --------------------------------------------------------------

SAMPLE_SECONDS = 0.05  # of load that decide whether more puts at once would help
CPU_BOUND = 0.7  # CPU seconds a second, from which on they would not: Python code runs in one thread at a time
SLOW_PUT_SECONDS, SLOW_PUT_RATE = 5.0, 250 * 1000  # and bytes a second: puts that take longer want no company
RETRY_LINGER = 1.0  # seconds for which puts that failed wait for the others of their batch
MAX_REJECTIONS = 3  # times that a LogGroup must be refused, alone, before it counts as refused for good
BREAKER_THRESHOLD = 8  # puts in a row that a target must fail before those that wait for it are not even tried
EMPTY_LOG_GROUP = b"\x1a\x00"  # a LogGroup with the topic "" and no logs


class DeadLetterDirectory:
    """Keeps LogGroups that a target refuses for good as files: one each, for the owner alone, on disk for certain.

    A file has the bytes of one LogGroup, and a name made of those of its target and of a hash: a LogGroup that is
    refused again after a crash is the same file again.
    """

    MAX_BYTES = 1000 * 1000 * 1000  # of all such files; what goes beyond is not set aside
    MAX_NAME = 64  # characters of a project's or logstore's, for a file's name must not have more than 255
    RESCAN_INTERVAL = 30.0  # seconds between looks at what other copies keep, and what has been taken away

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.lock = threading.Lock()
        self.used, self.looked = 0, float("-inf")

    def save(self, target: int, config: LogstoreConfig, log_group: LogGroup) -> str:
        """Returns the path of the file, which is there whole or not at all, whenever the machine stops.

        Raises OSError, also when the directory has MAX_BYTES.
        """
        data = log_group.SerializeToString()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        names = config.project[: self.MAX_NAME], config.logstore[: self.MAX_NAME]
        path = os.path.join(self.directory, "TO%d-%s-%s-%s.loggroup" % (target, *names, digest))
        with self.lock:
            if time.monotonic() - self.looked > self.RESCAN_INTERVAL:
                with os.scandir(self.directory) as entries:
                    self.used = sum(entry.stat().st_size for entry in entries if ".loggroup" in entry.name)
                self.looked = time.monotonic()
            is_new = not os.path.exists(path)
            if is_new and self.used + len(data) > self.MAX_BYTES:
                used = "it holds %d bytes, as many as are kept; make room" % self.used
                raise OSError(errno.EDQUOT, used, self.directory)
            self.used += is_new * len(data)
        unfinished = "%s.%d.unfinished" % (path, threading.get_native_id())
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
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems, as of networks, have no such thing
                raise
        finally:
            os.close(directory)
        return path


class Target:
    """One target logstore: its writer, what waits for it, and its counts."""

    def __init__(
        self, settings: TargetSettings, client: PooledLogClient, writers: int, rejected: DeadLetterDirectory | None
    ) -> None:
        self.number, self.config, self.name = settings.number, settings.config, settings.name
        self.write = functools.partial(client.put_log_raw, self.config.project, self.config.logstore)
        self.max_in_flight = writers
        self.limit = 1  # one more after each quick put, half as many after one that ran out of time
        self.in_flight = 0
        self.queue: deque[tuple[PutRequest, Batch]] = deque()
        self.consecutive_failures = 0
        self.next_probe = 0.0
        self.lock = threading.Lock()
        self.puts = self.log_groups = self.logs = self.bytes = self.retries = self.dead_lettered = 0
        self.rejected = rejected
        self.put_retries = RetryLog(self.name, "puts", "a put failed and is tried again until it is taken", self.config)
        self.dead_letter_retries = RetryLog(
            self.name, "setting aside", "a refused LogGroup can't be set aside yet", self.config
        )
        self.dead_letter_throttle = LogThrottle()

    def attempt(self, put: PutRequest) -> Exception | None:
        """Puts; returns why not, None when the target has taken it. Never raises."""
        slow = time.monotonic() + SLOW_PUT_SECONDS + put.size / SLOW_PUT_RATE
        try:
            self.write(put)
        except Exception as error:  # any: whatever kept this put from being taken, it is tried again
            with contextlib.suppress(Exception):  # reporter may fail as well, on a full disk or without memory
                with self.lock:
                    self.retries += 1
                    self.consecutive_failures += not is_rejection(error)
                    if time.monotonic() > slow:
                        self.limit = max(1, self.limit // 2)
                self.put_retries.on_failure(put, error)
            return error
        self.put_retries.on_done(put)
        with self.lock:
            self.consecutive_failures = 0
            self.puts += 1
            self.log_groups += len(put.log_groups)
            self.logs += put.log_count
            self.bytes += put.size
            if time.monotonic() < slow:
                self.limit = min(self.limit + 1, self.max_in_flight)
        return None

    def forget(self, put: PutRequest) -> None:
        """Called when a put need not be tried again, for it is set aside, or its batch is given up."""
        self.put_retries.on_done(put)
        self.dead_letter_retries.on_done(put)

    def split_or_reject(self, put: PutRequest, error: Exception) -> list[PutRequest]:
        """What is to be tried in the place of a put that failed.

        One that is refused for what it brings is split into the LogGroups that were joined. A single one that was
        refused so MAX_REJECTIONS times, by a target that took others in between, is set aside in SLS_REJECTED_DIR.
        """
        if not is_rejection(error):
            return [put]
        if len(put.log_groups) > 1:
            self.put_retries.on_done(put)
            return [PutRequest(single.envelope).add(single) for single in put.log_groups]
        # Unless the target takes others, no LogGroup is at fault: a header, the key or something on the way may be.
        # Where it has taken none since, one without logs is tried.
        if self.puts <= put.accepted_at_last_rejection and time.monotonic() >= self.next_probe:
            try:
                self.write(PutRequest(EMPTY_LOG_GROUP))
                with self.lock:
                    self.puts += 1
            except Exception:  # any: then nothing is known
                self.next_probe = time.monotonic() + RETRY_LINGER
        put.rejections += self.puts > put.accepted_at_last_rejection
        put.accepted_at_last_rejection = self.puts
        if put.rejections < MAX_REJECTIONS or not self.rejected:
            return [put]
        try:
            path = self.rejected.save(self.number, self.config, put.log_groups[0])
        except OSError as failure:
            self.dead_letter_retries.on_failure(put, failure)
            return [put]
        self.forget(put)
        with self.lock:
            self.dead_lettered += 1
        if self.dead_letter_throttle.admit():
            log.error(
                "%s: a LogGroup of topic '%s', %d logs, is refused for good and set aside as %s (%d so far): %s",
                self.name, escape_for_log(put.log_groups[0].Topic, 60), put.log_count, path, self.dead_lettered, error,
            )  # fmt: skip
        return []

    def summary(self) -> str:
        return (
            f"target={self.number} logstore={self.config} groups={self.log_groups} logs={self.logs} bytes={self.bytes} "
            f"retries={self.retries} failing={len(self.put_retries.failing_now)} set_aside={self.dead_lettered}"
        )


def is_rejection(error: Exception) -> bool:
    return isinstance(error, CallError) and error.kind == ErrorKind.REJECTED


class Batch:
    """What is to be put of one pull, and what has become of it."""

    def __init__(self, pending: list[tuple[Target, PutRequest]]) -> None:
        self.change = threading.Condition()
        self.pending = pending
        self.in_flight = 0  # puts that wait for a writer, or are in the air
        self.accepted = 0
        self.failed: list[tuple[Target, PutRequest, Exception]] = []
        self.is_cancelled = False

    def on_result(self, target: Target, put: PutRequest, error: Exception | None) -> None:
        """Called when a put has been tried."""
        with self.change:
            self.in_flight -= 1
            if error is None:
                self.accepted += 1
            elif self.is_cancelled:
                target.forget(put)
            else:
                self.failed.append((target, put, error))
            if not self.in_flight or len(self.failed) == 1:
                self.change.notify_all()

    def wait_for_failures(self, goes_on: Callable[[], bool]) -> list[tuple[Target, PutRequest, Exception]]:
        """The puts that failed, once all were tried, or those that failed need not wait for the others any longer.

        Raises Cancelled when `goes_on()` is false before that.
        """
        end = float("inf")
        while True:
            with self.change:
                if self.failed:
                    end = min(end, time.monotonic() + RETRY_LINGER)
                if not self.in_flight or time.monotonic() >= end:
                    failed, self.failed = self.failed, []
                    self.pending = [(target, put) for target, put, _ in failed]  # unless others take their place
                    return failed
                self.change.wait(0.2)
            note_turn()
            if not goes_on():
                raise Cancelled


class NoProgress(Exception):
    """Of what was tried of a batch, its targets took nothing."""


class PutScheduler:
    """Puts, for all batches and targets of the process. No thread waits for another try of its put.

    How many put at once follows the load. A near service keeps the CPU busy with one, and more would only take turns; a
    far one makes it wait. And each target has as many as it can use, so that a slow one takes none from the others.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.workers = most, 1, 0
        self.threads = ThreadPool(most)
        self.change = threading.Condition()
        self.ready: deque[Target] = deque()  # those that have something to put, and writers left
        self.follower = threading.Thread(target=self.adapt_concurrency, daemon=True)
        self.follower.start()

    def submit(self, puts: Sequence[tuple[Target, PutRequest]], batch: Batch) -> None:
        with self.change:
            batch.in_flight += len(puts)
            for target, put in puts:
                target.queue.append((put, batch))
                self.schedule(target)
            self.change.notify_all()

    def schedule(self, target: Target) -> None:
        """Sees to it that as many threads as may put what waits for a target."""
        if target.queue and target.in_flight < target.limit and target not in self.ready:
            self.ready.append(target)
        for _ in range(min(self.limit - self.workers, len(self.ready))):
            self.threads.submit(self.work)
            self.workers += 1

    def work(self) -> None:
        """In a thread of its own: puts what waits, of one ready target after the other."""
        with self.change:
            try:
                while self.ready and self.workers <= self.limit:
                    target = self.ready.popleft()
                    try:
                        self.attempt_next(target)
                    finally:
                        self.schedule(target)
            finally:
                self.workers -= 1

    def attempt_next(self, target: Target) -> None:
        put, batch = target.queue.popleft()
        target.in_flight += 1
        error: Exception | None = Cancelled()
        try:
            self.schedule(target)
            self.change.release()
            try:
                if not batch.is_cancelled:
                    error = target.attempt(put)
            finally:
                self.change.acquire()
        except Exception as failure:  # any, such as MemoryError: the batch goes on
            error = failure
        target.in_flight -= 1
        batch.on_result(target, put, error)
        while error and target.queue and target.consecutive_failures >= BREAKER_THRESHOLD:
            put, batch = target.queue.popleft()
            batch.on_result(target, put, Cancelled())  # not tried, so no refusal counts against it

    def adapt_concurrency(self) -> None:
        while True:
            note_turn()
            with self.change:
                if not self.change.wait_for(lambda: self.ready, 1.0):
                    continue
            cpu, wall = time.process_time(), time.monotonic()
            time.sleep(SAMPLE_SECONDS)
            busy = (time.process_time() - cpu) / (time.monotonic() - wall)
            with self.change:
                self.limit = min(self.most, self.limit * 2) if busy < CPU_BOUND else max(1, self.limit - 1)
                with contextlib.suppress(Exception):  # any: this thread goes on, and looks again soon
                    for target in list(self.ready):
                        self.schedule(target)


class UnmatchedCounter:
    """Counts the LogGroups that are put nowhere: no route matches their topic, or they have no logs."""

    MAX_TOPICS, MAX_TOPIC_LENGTH = 1000, 60  # counted each for itself; shown, in characters

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log_groups = self.logs = self.empty = 0
        self.topics: Counter[str] = Counter()

    def add(self, log_group: LogGroup) -> None:
        topic = escape_for_log(log_group.Topic, self.MAX_TOPIC_LENGTH)
        with self.lock:
            if not log_group.log_count:
                self.empty += 1
                return
            self.log_groups += 1
            self.logs += log_group.log_count
            if topic in self.topics or len(self.topics) < self.MAX_TOPICS:
                self.topics[topic] += 1

    def summary(self) -> str:
        with self.lock:
            named = json.dumps(", ".join("%s %d" % pair for pair in self.topics.most_common(10)), ensure_ascii=False)
            counts = f"empty_groups={self.empty} unmatched_groups={self.log_groups} unmatched_logs={self.logs}"
            return f"{counts} unmatched_topics={named}"


def connection_budget() -> int:
    """How many puts may be in the air, and how many connections idle: each is an open file."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft // 3)


class Delivery:
    """Takes batches of LogGroups to their targets."""

    def __init__(self, settings: Settings) -> None:
        self.routes = Routes({target.number: target.topics for target in settings.targets})
        rejected = DeadLetterDirectory(settings.rejected_dir) if settings.rejected_dir else None
        clients: dict[Connection, PooledLogClient] = {}
        self.targets: dict[int, Target] = {}
        for target in settings.targets:
            connection = target.config.connection
            if connection not in clients:
                clients[connection] = PooledLogClient(target.config)
            self.targets[target.number] = Target(target, clients[connection], settings.writers, rejected)
        self.clients = list(clients.values())
        self.writers = PutScheduler(min(settings.writers * len(self.targets), connection_budget()))
        self.merge_packs = settings.merge_packs
        self.unmatched = UnmatchedCounter()

    def route(self, log_groups: Iterable[LogGroup]) -> list[tuple[Target, PutRequest]]:
        """What is to be put where, in the order of each target's LogGroups; those that go nowhere are counted."""
        shares: dict[Target, list[LogGroup]] = {}
        for log_group in log_groups:
            number = self.routes.target_of(log_group.Topic) if log_group.log_count else None
            if number is None:
                self.unmatched.add(log_group)
            else:
                shares.setdefault(self.targets[number], []).append(log_group)
        return [(target, put) for target, share in shares.items() for put in merge_log_groups(share, self.merge_packs)]

    def deliver(self, log_groups: Iterable[LogGroup], goes_on: Callable[[], bool]) -> None:
        """Returns once every routed LogGroup has been taken by its target.

        Raises Cancelled when `goes_on()` was false before that; then, as on any other exception, no put of these begins
        any more.
        """
        batch = Batch(self.route(log_groups))

        def failed(error: Exception) -> None:
            if not isinstance(error, NoProgress):
                raise error  # nobody knows what is left of the batch, so it is given up whole

        try:
            retry(lambda: self.attempt_round(batch, goes_on), goes_on, failed, MAX_BACKOFF)
        except BaseException:
            with batch.change:
                batch.is_cancelled = True  # what has not begun never will
                for target, put in [*batch.pending, *((target, put) for target, put, _ in batch.failed)]:
                    target.forget(put)
            raise

    def attempt_round(self, batch: Batch, goes_on: Callable[[], bool]) -> None:
        """Tries what is left of a batch until nothing is. Puts that failed are tried again soon while others are taken.

        Raises NoProgress when none is, and Cancelled.
        """
        while batch.pending or batch.in_flight:
            taken_before = batch.accepted
            self.writers.submit(batch.pending, batch)
            failed = batch.wait_for_failures(goes_on)
            batch.pending = [
                (target, put) for target, tried, why in failed for put in target.split_or_reject(tried, why)
            ]
            if batch.pending and batch.accepted == taken_before:
                raise NoProgress from failed[0][2]
            wait(INITIAL_BACKOFF if batch.pending else 0.0, goes_on)


# ---- consumer: what was delivered, and only that, is checkpointed ---------------------------------------------------
#
# A consumer is one name in the consumer group, from joining it to losing it. What holds for it:
#   1. a batch's checkpoint is saved before the next batch of its shard begins;
#   2. whoever is lost saves nothing;
#   3. the group is made at the first join only, never at a later one;
#   4. the SDK's checkpoint tracker is never told of anything, so it has nothing to flush;
#   5. what is tried again is so by `retry`, which ends when the shard is revoked, the consumer lost, the copy
#      stopped, and a batch in flight has had its GRACE.
# Three things happen to a shard. *Assigned* (Heartbeat.send): the SDK makes a ShardConsumer for it. *Revoked*
# (Consumer.revoke): its batch in flight is ended, its checkpoint saved, then it moves. *Lost* (Consumer.lose), with
# the consumer and so with all its shards: nothing begins, nothing is saved, batches in flight have their GRACE, then
# another consumer joins and begins at the service's checkpoints.

GRACE = 5.0  # seconds for a batch in flight when its copy is told to stop, or its shard is revoked or lost


class ShardConsumer(ConsumerProcessorBase):
    """One shard from when it is assigned until it is revoked or lost: its beginning, pulls, batches and checkpoint.

    The SDK calls `initialize` once, then `pull` (by way of Consumer) and `process`, each one after the other but
    both at the same time: up to two pulls wait while a batch is delivered.
    """

    MAX_PULL_BYTES = 4 * 1000 * 1000  # bytes; what is asked of one pull, and less where many shards share the memory
    PREFETCH_BYTES = 48 * 1000 * 1000  # bytes of pulls that the shards of the process may hold together, three for each
    INITIAL_SIZE = 200 * 1000  # bytes that a LogGroup is taken to have, until a pull has shown otherwise
    INITIAL_COUNT, MAX_COUNT = 20, 1000  # LogGroups asked of a pull; 1000 is the service's limit
    TARGET_BATCH_SECONDS = (
        1.0  # seconds that a batch should take, for so long it holds up a stop, and is repeated after a crash
    )

    def __init__(self, consumer: Consumer) -> None:
        super().__init__()
        self.consumer = consumer
        self.member = consumer.member
        self.source = consumer.member.source
        self.is_revoked = False
        self.checkpoint = ""  # the service's
        self.delivered = ""  # how far all is delivered; beyond the checkpoint while that is not saved
        self.buffered_bytes = 0  # bytes that were pulled and not yet delivered
        self.rewinds = 0  # times that the SDK was told to fetch again: it drops what was pulled before
        self.mean_log_group_size = float(self.INITIAL_SIZE)  # bytes of a LogGroup, by the last pull
        self.count_for_target_time = float(
            self.INITIAL_COUNT
        )  # LogGroups that take TARGET_BATCH_SECONDS, by the last batch
        self.next_pull = 0.0
        self.overtime_ends = float("inf")
        self.lock = threading.Lock()
        self._preprocessor = lambda pull: pull  # what the SDK calls in between, for which its own would parse

    def may_begin(self) -> bool:
        """Whether anything may begin. Once it is false it stays so."""
        return not (self.is_revoked or self.member.is_stopping or self.consumer.is_lost())

    def may_go_on(self) -> bool:
        """Whether a batch that has begun may go on: as long as others may begin, and GRACE seconds more."""
        if self.overtime_ends == float("inf") and not self.may_begin():
            self.overtime_ends = time.monotonic() + GRACE
        return time.monotonic() < self.overtime_ends

    def initialize(self, shard: int) -> None:
        """Called by the SDK before the first pull. Raises Cancelled."""
        super().initialize(shard)
        self.consumer.shards[shard] = self
        self.member.begin_retries.retry(shard, self.load_checkpoint, self.may_begin)

    def load_checkpoint(self) -> None:
        """Finds where the shard begins, and sees to it that the service knows before anything is read.

        Else a copy killed before its first checkpoint would let the next begin at a later "end". What the consumer
        before this one has delivered, but could not save, is saved if nobody has been further since.
        """
        shard, member, start = self.shard_id, self.member, self.member.settings.cursor_start
        saved = self.source.checkpoints(member.group).get(shard, {}).get("checkpoint", "")
        before, delivered = member.delivered_unsaved.get(shard, ("", ""))
        if not saved:
            # The end is that of when the group began: who was born since has logs from then on alone, and is read from
            # the first.
            if start == "end":
                start = member.group_start or "begin"
            self.send_checkpoint(member.end_cursors_at_start.get(shard) or self.source.get_cursor(shard, start))
        elif saved == before:
            self.send_checkpoint(delivered)
        else:
            self.checkpoint = self.delivered = saved
        member.delivered_unsaved.pop(shard, None)

    def pull(self, cursor: str) -> PullResult:
        """Called by the SDK's fetching thread. Returns when there is an answer, however long that takes.

        Raises LogException, which the SDK passes over in silence, when this is not wanted any more or fetched again.
        """
        rewinds = self.rewinds
        try:
            wait(self.next_pull - time.monotonic(), self.may_begin)
            wait(float("inf"), lambda: self.buffered_bytes > 0 and self.consumer.buffers_full() and self.may_begin())
            self.next_pull = time.monotonic() + self.member.settings.fetch_interval
            pull_size = min(
                self.MAX_PULL_BYTES, self.PREFETCH_BYTES / 3 / max(1, len(self.consumer.heartbeat_loop.owned))
            )  # bytes
            count = int(max(1, min(self.MAX_COUNT, pull_size / self.mean_log_group_size, self.count_for_target_time)))
            pull = self.member.pull_retries.retry(self.shard_id, lambda: self.pull_once(cursor, count), self.may_begin)
            with self.lock:
                if rewinds != self.rewinds:  # the SDK was told so while this was on its way
                    raise Cancelled
                is_all_delivered = not self.buffered_bytes
                self.buffered_bytes += pull.size if pull.log_groups else 0
        except Cancelled:
            time.sleep(0.1)  # the SDK asks again at once
            raise LogException("Cancelled", "the shard is not wanted any more or fetched again") from None
        if pull.log_groups:
            if len(pull.log_groups) >= count or pull.size >= pull_size / 2:
                self.next_pull = 0.0  # there is more
            self.mean_log_group_size = max(1, pull.size) / len(pull.log_groups)
        elif pull.next_cursor != self.checkpoint and is_all_delivered:
            # The cursor has moved over nothing, a gap or what a filter left out, of which the SDK makes no batch.
            with contextlib.suppress(Cancelled):
                self.save(pull.next_cursor, self.may_begin)
        return pull

    def pull_once(self, cursor: str, count: int) -> PullResult:
        """One pull. Where the service no longer knows the cursor, it is one from the oldest log there is."""
        try:
            return self.source.pull_logs(self.shard_id, cursor, count)
        except CallError as error:
            # By this code the SDK would go on at the newest log and skip what lies between.
            if error.code != "InvalidCursor":
                raise
            oldest = self.source.get_cursor(self.shard_id, "begin")
            newest = self.source.get_cursor(self.shard_id, "end")
            if cursor_position(oldest) <= cursor_position(cursor) <= cursor_position(newest):
                raise  # the cursor is fine, and so will be the next answer
        pull = self.source.pull_logs(self.shard_id, oldest, count)
        saved, arrived = "an unknown time", "now"
        with contextlib.suppress(CallError, KeyError):
            saved = format_local(self.source.checkpoints(self.member.group)[self.shard_id]["updateTime"] / 1e6)
            arrived = format_local(self.source.arrival_time(self.shard_id, oldest))
        log.error(
            "%s: shard %s: the service no longer knows cursor %s, the checkpoint of %s; logs that arrived from then on "
            "and before %s have reached the end of their retention time and are SKIPPED, not delivered",
            self.member.name, self.shard_id, cursor, saved, arrived,
        )  # fmt: skip
        return pull

    def process(self, batch: PullResult, check_point_tracker: ConsumerCheckpointTracker) -> str | None:  # noqa: ARG002
        """Called by the SDK with each pull that brought something: delivers it, then saves the checkpoint.

        Returns None when that is done, else the checkpoint, from which the SDK is to fetch again: had this raised, or
        returned False, the SDK would go on with the next batch, and a checkpoint would come to lie beyond this one.
        """
        in_flight = self.consumer.in_flight
        try:
            note_turn()
            in_flight[self.shard_id] = len(batch.log_groups), threading.current_thread()
            try:
                if not self.may_begin():  # asked for now: a stop is seen here, or else sees this batch in flight
                    raise Cancelled
                began = time.monotonic()
                self.member.delivery.deliver(batch.log_groups, self.may_go_on)
                self.count_for_target_time = (
                    len(batch.log_groups) * self.TARGET_BATCH_SECONDS / max(0.001, time.monotonic() - began)
                )
                self.delivered = batch.next_cursor
                self.save(batch.next_cursor, self.may_go_on)
            finally:
                del in_flight[self.shard_id]
            with self.lock:
                self.buffered_bytes -= batch.size
            return None
        except Cancelled:
            time.sleep(0.1)  # the SDK asks again at once
        except Exception:
            with contextlib.suppress(Exception):  # reporter must not fail where the batch did
                log.exception("shard %s: a batch failed and is fetched again", self.shard_id)
            wait(MAX_BACKOFF, self.may_begin)
        with self.lock:
            self.rewinds += 1
            self.buffered_bytes = 0
        return self.checkpoint

    def save(self, cursor: str, goes_on: Callable[[], bool]) -> None:
        """Saves the checkpoint. Raises Cancelled, also when this consumer is lost: then it saves nothing."""
        self.member.checkpoint_retries.retry(
            self.shard_id, lambda: self.send_checkpoint(cursor), lambda: goes_on() and not self.consumer.is_lost()
        )

    def send_checkpoint(self, cursor: str) -> None:
        try:
            self.source.save_checkpoint(self.member.group, self.consumer.name, self.shard_id, cursor)
        except CallError as error:
            if error.kind == ErrorKind.FENCED:
                self.consumer.lose("the checkpoint of shard %d was refused: %s" % (self.shard_id, error))
            raise
        self.checkpoint = self.delivered = cursor

    def shutdown(self, check_point_tracker: ConsumerCheckpointTracker) -> None:  # noqa: ARG002
        """Called by the SDK when the shard is gone; its own would save the cursor of a batch that is not delivered."""
        if self.is_revoked:
            self.consumer.shards.pop(self.shard_id, None)


class Heartbeat(threading.Thread):
    """Tells the service that this consumer lives, and learns what it holds.

    Stands in the place of the SDK's, which counts in wall time, waits a whole interval after a failure, and believes an
    answer that came too late. Here the SDK's one loop waits for its next turn, too.
    """

    LOOP_INTERVAL = 0.05  # seconds between turns of the SDK's loop, which begins pulls and batches; less after a task
    MIN_LOOP_INTERVAL = 0.005

    def __init__(self, consumer: Consumer) -> None:
        super().__init__(daemon=True)
        self.consumer = consumer
        settings = consumer.member.settings
        self.interval = min(settings.heartbeat_interval, consumer.group_timeout / 2)  # seconds
        self.source = LogstoreApi(settings.source, keep_alive=False)
        self.owned: list[int] = []
        self.reported: set[int] = set()  # to the service: those held, and those that were revoked and still end a batch
        self.lock = threading.Lock()
        self.turn = threading.Event()

    def get_held_shards(self) -> list[int]:
        """Called by the SDK once in each turn."""
        note_turn()
        if self.turn.wait(self.LOOP_INTERVAL):
            self.turn.clear()
            time.sleep(self.MIN_LOOP_INTERVAL)
        with self.lock:
            self.reported &= {*self.owned, *self.consumer.shard_consumers}  # one may be revoked before the SDK sees it
            return self.owned[:]

    def remove_heart_shard(self, shard: int) -> None:
        """Called by the SDK when nothing of a revoked shard is left: now it may move."""
        with self.lock:
            self.reported.discard(shard)

    def shutdown(self) -> None:
        """Called by the SDK at its end; `run` looks for itself."""

    def run(self) -> None:
        consumer, beating = self.consumer, self.consumer.member.heartbeat_retries
        with contextlib.suppress(Cancelled):
            while consumer.goes_on():
                began = time.monotonic()
                beating.retry("heartbeat", self.send, consumer.goes_on, longest=self.interval / 2)
                wait(began + self.interval - time.monotonic(), consumer.goes_on)

    def send(self) -> None:
        consumer = self.consumer
        sent = consumer.boottime()
        # Time for several tries before the service forgets this consumer, each over a connection of its own.
        self.source.client.response_timeout = max(0.5, (consumer.lease_expires - sent) / 3)
        with self.lock:
            listed = sorted(self.reported)
        try:
            answer = self.source.heartbeat(consumer.member.group, consumer.name, listed)
        except CallError as error:
            if error.kind == ErrorKind.FENCED:
                consumer.lose(str(error))
            raise
        consumer.lease_expires = sent + consumer.group_timeout
        consumer.member.last_heartbeat = time.time()
        with self.lock:
            releasing = self.reported - set(self.owned)
            held = [shard for shard in answer if shard not in releasing]
            revoked = set(self.owned) - set(held)
            self.reported |= set(held)
            self.owned = held
        for shard in revoked:
            consumer.revoke(shard)
        self.turn.set()


class Consumer(ConsumerWorker):
    """One consumer, from joining the group to losing it: the SDK's worker, with what it asks of others replaced."""

    # It goes on while the process or the machine sleeps.
    CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def __init__(self, member: GroupMember, group_timeout: float) -> None:
        """`group_timeout` in seconds, the service's."""
        config = member.settings.source
        self.member = member
        self.group_timeout = group_timeout
        self.lease_expires = self.boottime() + group_timeout  # then the service forgets this consumer
        self.shards: dict[int, ShardConsumer] = {}
        self.reason = ""  # why it was lost
        # shard -> LogGroups of the batch that is being delivered, and who does that
        self.in_flight: dict[int, tuple[int, threading.Thread]] = {}
        self.lock = threading.Lock()
        # No other consumer has this name of at most 63 characters, also not one of this copy before, for host and
        # process id repeat themselves in containers. It says when the group began, so that who begins its last shard
        # knows it as well as who began its first.
        host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
        words = member.group[:20], host[:12], os.getpid(), member.group_start, uuid.uuid4().hex[:12]
        name = "%s-%s-%d-%08x%s" % words
        hub_config = LogHubConfig(
            config.endpoint, config.access_key_id, config.access_key, config.project, config.logstore,
            member.group, name, shared_executor=member.tasks,
            # Its loops count in wall time, which may step: so it never sleeps, see Heartbeat.get_held_shards,
            data_fetch_interval=float("-inf"),  # type: ignore[arg-type]
            # and never leaves a pause between two pulls of a shard, see ShardConsumer.pull.
            max_fetch_log_group_size=-1,
        )  # fmt: skip
        self.mproject, self.mlogstore = config.project, config.logstore  # these four are asked for by the SDK's loggers
        self.mconsumer_group, self.mconsumer = member.group, name
        super().__init__(ShardConsumer, hub_config, args=(self,))
        self.daemon = True
        self.name = name
        self.heart_beat = self.heartbeat_loop = Heartbeat(self)
        member.tasks.on_task_done = self.heartbeat_loop.turn.set

    @property
    def consumer_client(self) -> Any:
        """Where the SDK asks for the next four: its own client loses logs where calls fail."""
        return self

    @consumer_client.setter
    def consumer_client(self, made_by_the_sdk: object) -> None:
        """ConsumerWorker makes one for itself, and makes the group through it; ours stands in its place."""

    def ensure_consumer_group_created(self, timeout: int, in_order: bool) -> None:
        """The SDK's own would write over a group that exists, at each join; see GroupMember.join_group."""

    def get_check_point(self, shard: int) -> dict[str, str]:
        return {"checkpoint": self.shards[shard].checkpoint}

    def update_check_point(self, shard: int, consumer: str, check_point: str) -> None:
        """Called by the SDK's tracker when it has something to flush, which is never."""

    def pull_logs(self, shard: int, cursor: str, *_: object, **__: object) -> PullResult:
        return self.shards[shard].pull(cursor)

    def boottime(self) -> float:
        return time.clock_gettime(self.CLOCK)

    def goes_on(self) -> bool:
        return not (self.is_lost() or self.member.is_stopped)

    def is_lost(self) -> bool:
        """Whether the service may have given the shards to others. Nothing but its answers can tell that it has not."""
        if not self.reason and self.boottime() > self.lease_expires:
            self.lose("not heard of for longer than the group's timeout, %g s" % self.group_timeout)
        return bool(self.reason)

    def buffers_full(self) -> bool:
        """Whether what was pulled takes all the memory it may; a shard that holds nothing may pull all the same, lest
        those whose targets take nothing hold up the others."""
        return sum([shard.buffered_bytes for shard in list(self.shards.values())]) > ShardConsumer.PREFETCH_BYTES

    def lose(self, reason: str) -> None:
        with self.lock:
            is_first, self.reason = not self.reason, self.reason or reason
        if is_first:
            with contextlib.suppress(Exception):
                log.warning("%s: consumer %s is lost, another joins: %s", self.member.name, self.name, reason)

    def revoke(self, shard: int) -> None:
        if shard in self.shards:
            self.shards[shard].is_revoked = True

    def drain(self, seconds: float) -> dict[int, int]:
        """Waits for the batches in flight, `seconds` at the most, when no other begins; what is left of them then."""
        self.shut_down_flag = True  # the SDK's loop ends
        self.heartbeat_loop.turn.set()
        wait(seconds, lambda: bool(self.in_flight))
        return {shard: log_groups for shard, (log_groups, _) in list(self.in_flight.items())}


class GroupMember(threading.Thread):
    """This copy in the consumer group: joins it, and whenever its consumer is lost, joins again."""

    def __init__(self, settings: Settings, delivery: Delivery) -> None:
        super().__init__(daemon=True)
        config = settings.source
        self.settings, self.delivery = settings, delivery
        self.group = settings.consumer_group
        self.last_heartbeat: float | None = None  # unix seconds
        self.last_lag: float | None = None  # see `lag`
        self.group_start = 0  # unix seconds, the service's; 0 when nobody can tell any more
        self.source = LogstoreApi(config)
        self.credential_source = expiring_credentials(settings)
        self.tasks = ThreadPool(2048)  # for the SDK's tasks, up to three for each shard
        name = self.name = settings.source_name
        self.join_retries = RetryLog(name, "joining", "can't join the consumer group yet, trying again", config)
        self.begin_retries = RetryLog(name, "beginning", "a shard can't begin yet", config)
        self.heartbeat_retries = RetryLog(name, "heartbeats", "a heartbeat failed and is tried again", config)
        self.pull_retries = RetryLog(name, "pulls", "a pull failed and is tried again", config)
        self.checkpoint_retries = RetryLog(name, "checkpoints", "a checkpoint is not saved yet", config)
        self.consumer: Consumer | None = None
        self.delivered_unsaved: dict[
            int, tuple[str, str]
        ] = {}  # shard -> checkpoint, what the lost consumer delivered since
        self.end_cursors_at_start: dict[
            int, str
        ] = {}  # of the shards that were there when the group began at the "end"
        self.failure: StartupError | None = None
        self.is_stopping = False  # asked to: no batch begins
        self.is_stopped = False  # no batch is in flight either, or they have had their time

    def run(self) -> None:
        try:
            check_before_start(self.settings)
            while True:
                consumer = self.join_retries.retry("join", self.join_group, lambda: not self.is_stopping)
                while consumer.is_alive() and consumer.goes_on():
                    note_turn()
                    time.sleep(MAIN_LOOP_INTERVAL)
                if self.is_stopped:
                    return
                consumer.lose("the SDK's loop has ended by itself")
                consumer.drain(GRACE + 1)
                # What it has delivered, but may not save, is kept for the next.
                for shard, its in list(consumer.shards.items()):  # tasks of the SDK may still change it
                    if its.delivered != its.checkpoint:
                        self.delivered_unsaved[shard] = its.checkpoint, its.delivered
        except StartupError as error:
            self.failure = error
        except Cancelled:
            pass
        except Exception:
            log.exception("a defect of this program")

    def join_group(self) -> Consumer:
        """Joins as a new consumer; at the first time it makes the group where there is none. Raises StartupError."""
        timeout = 2 * self.settings.heartbeat_interval
        try:
            group = (self.source.consumer_groups() or {}).get(self.group)
            if not (group or self.consumer):
                self.source.make_consumer_group(self.group, timeout)
        except CallError as error:
            if error.code == "ConsumerGroupAlreadyExist":  # another copy was faster, or the key may not list groups
                group = (self.source.consumer_groups() or {}).get(self.group)
            elif error.is_transient() or self.consumer:
                raise
            else:  # what will not pass by itself ends a start; later there may be somebody to mend it
                text = "%s: can't join the consumer group: %s"
                raise StartupError(text % (self.name, describe_error(error, self.settings.source))) from error
        if not self.consumer:
            self.find_group_start(group)
        self.consumer = Consumer(self, group.get_timeout() if group else timeout)
        self.consumer.start()
        targets = self.settings.targets
        routes = ["%s <- %s" % (each.config, ",".join(topic.spelling for topic in each.topics)) for each in targets]
        log.info("consumer %s of %s, targets: %s", self.consumer.name, self.settings.source, ", ".join(routes))
        for note in self.settings.notes:
            log.info("%s", note)
        return self.consumer

    def find_group_start(self, group: Any) -> None:
        """Finds when the group began, and says what there is to say of it: an SDK's ConsumerGroupEntity, or None."""
        checkpoints = self.source.checkpoints(self.group)
        for line in group_warnings(group, checkpoints, self.settings.heartbeat_interval) if group else ():
            log.warning("%s: %s", self.name, line)
        if has_checkpoints(checkpoints):  # the names of its consumers tell when, unless none was of this program
            names = [CONSUMER_NAME.fullmatch(entry.get("consumer") or "") for entry in checkpoints.values()]
            self.group_start = min([int(name.group(1), 16) for name in names if name and name.group(1)], default=0)
        else:
            self.group_start = int(self.source.client.server_time())  # no later than the ends: nothing lies between
            if self.settings.cursor_start == "end":
                shards = [shard["shardID"] for shard in self.source.list_shards()]
                self.end_cursors_at_start = {shard: self.source.get_cursor(shard, "end") for shard in shards}

    def stop(self, seconds: float) -> dict[int, int]:
        """Begins no new batch and waits, `seconds` at the most, for those in flight; the shards of those that did not
        end, and how many LogGroups they have."""
        self.is_stopping = True
        left = self.consumer.drain(seconds) if self.consumer else {}
        self.is_stopped = True
        return left

    def held_shards(self) -> list[int]:
        return sorted(self.consumer.heartbeat_loop.owned) if self.consumer else []

    def housekeeping(self) -> None:
        """What is to be done now and then."""
        all_tries = [
            self.join_retries,
            self.begin_retries,
            self.heartbeat_retries,
            self.pull_retries,
            self.checkpoint_retries,
        ]
        all_tries += [credential_source.refresh_retries for credential_source in self.credential_source]
        for target in self.delivery.targets.values():
            all_tries += [target.put_retries, target.dead_letter_retries]
        for retries in all_tries:
            retries.report_recovery()
        clients = [self.source.client, *self.delivery.clients]
        are_many = sum(len(client.idle_connections) for client in clients) > connection_budget()
        for client in clients:
            client.close_stale(all_idle=are_many)

    def measure_lag(self) -> float | None:
        """Asks for the lag of the shards held, in seconds; None where it is unknown."""
        try:
            self.last_lag = largest_lag(read_shard_status(self.source, self.group, self.held_shards()))
        except Exception:  # any: the thread that tells must go on telling
            self.last_lag = None
        return self.last_lag

    def summary(self, lag_seconds: float | None = None) -> list[str]:
        """What became of the logs so far: a line for each target and one for the source, to be read by programs too."""
        lag = "unknown" if lag_seconds is None else "%d" % lag_seconds
        lines = ["summary " + target.summary() for target in self.delivery.targets.values()]
        shards = ",".join(map(str, self.held_shards())) or "none"
        state = f"source={self.settings.source} group={self.group} shards={shards} lag_seconds={lag}"
        return [*lines, f"summary {state} {self.delivery.unmatched.summary()}"]


# ---- monitoring: what the process counts, and whether its loops turn, over HTTP --------------------------------------

WATCHDOG_TIMEOUT = 60.0  # seconds; a loop of the process that has not turned for longer is stuck
REQUEST_TIMEOUT = 2.0  # seconds that a client has for its request, and again for taking the answer
SERVER_THREADS = 8  # requests, a thread for each; others wait in the kernel

# Of what, name, meaning, and how to read the value from a Target, the GroupMember or CredentialSource; None is unknown.
METRICS: tuple[tuple[str, str, str, Callable[[Any], float | None]], ...] = (
    ("target", "log_groups_total", "LogGroups that the target has taken.", lambda it: it.log_groups),
    ("target", "logs_total", "Logs that the target has taken.", lambda it: it.logs),
    ("target", "bytes_total", "Bytes that the target has taken, uncompressed.", lambda it: it.bytes),
    ("target", "put_retries_total", "Puts that failed and were tried again.", lambda it: it.retries),
    ("target", "set_aside_total", "LogGroups that the target refused for good.", lambda it: it.dead_lettered),
    ("target", "puts_failing", "Puts that have failed and are being tried again.",
     lambda it: len(it.put_retries.failing_now)),
    ("copy", "unmatched_log_groups_total", "LogGroups that no route matches.",
     lambda it: it.delivery.unmatched.log_groups),
    ("copy", "unmatched_logs_total", "Logs that no route matches.", lambda it: it.delivery.unmatched.logs),
    ("copy", "shards_held", "Shards that this copy holds.", lambda it: len(it.held_shards())),
    ("copy", "lag_seconds", "Age of the oldest log of these shards that is not yet delivered.",
     lambda it: it.last_lag if it.held_shards() else None),
    ("copy", "last_heartbeat_timestamp_seconds", "When the service took the last heartbeat.",
     lambda it: it.last_heartbeat),
    ("key", "credentials_expire_timestamp_seconds", "When the key ends.", lambda it: it.key and it.key.end),
    ("program", "build_info", "Always 1.", lambda _: 1),
)  # fmt: skip


def prometheus_labels(**labels: object) -> str:
    """Labels as Prometheus has them, whose strings are quoted as JSON's."""
    return "{%s}" % ",".join("%s=%s" % (name, json.dumps(str(value))) for name, value in labels.items())


class MetricsServer(socketserver.TCPServer):
    """Serves what there is to tell of this copy, in threads of its own.

    It asks nobody: the lag is what `telling`, the thread that tells, has learned last.
    """

    allow_reuse_address = True
    request_queue_size = 32

    def __init__(self, settings: Settings, member: GroupMember, reporter: threading.Thread) -> None:
        """A port that is taken, perhaps by another copy, is no reason to stop: then this copy goes on without."""
        config = settings.metrics_host, int(settings.metrics_port)
        self.address_family = socket.AF_INET6 if ":" in settings.metrics_host else socket.AF_INET
        self.member, self.reporter = member, reporter
        try:
            super().__init__(config, MetricsHandler)
            for _ in range(SERVER_THREADS):
                threading.Thread(target=self.serve, daemon=True).start()
        except (OSError, RuntimeError) as error:
            log.warning("SLS_METRICS_PORT: this copy goes on without: can't listen on %s port %d: %s", *config, error)

    def serve(self) -> None:
        while True:
            self.handle_request()
            time.sleep(0.01)  # it returns at once while there is no file for another connection

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is no news."""

    def metrics(self) -> tuple[int, str]:
        """HTTP's status, and the text, in Prometheus' format."""
        targets, credential_source = self.member.delivery.targets.values(), self.member.credential_source
        python = "%s %s" % (platform.python_implementation(), platform.python_version())
        labels_and_subjects: dict[str, list[tuple[str, Any]]] = {
            "target": [(prometheus_labels(target=one.number, logstore=one.config), one) for one in targets],
            "copy": [("", self.member)],
            "key": [(prometheus_labels(source=one.name), one) for one in credential_source if one.source],
            "program": [(prometheus_labels(version=__version__, python=python), None)],
        }
        text = ""
        for of_what, short_name, meaning, read in METRICS:
            name = "dispatch_data_" + short_name
            values = [(name, labels, read(subject)) for labels, subject in labels_and_subjects[of_what]]
            known = ["%s%s %s\n" % value for value in values if value[2] is not None]
            if known:
                kind = "counter" if name.endswith("_total") else "gauge"
                text += "# HELP %s %s\n# TYPE %s %s\n%s" % (name, meaning, name, kind, "".join(known))
        return 200, text

    def health(self) -> tuple[int, str]:
        """HTTP's status, and a line for each loop that stands still, of those without which a copy is of no use."""
        member, consumer = self.member, self.member.consumer
        loops: dict[str, threading.Thread] = {
            "tells": self.reporter,
            "joins": member,
            "follows the load": member.delivery.writers.follower,
            "ends silent connections": DeadlineStream.watcher(),
        }
        if consumer and not consumer.reason:  # else they come to their end
            loops.update({"gives out work": consumer, "sends heartbeats": consumer.heartbeat_loop})
            in_flight = list(consumer.in_flight.items())
            loops.update(("delivers shard %d" % shard, thread) for shard, (_, thread) in in_flight)
        now = time.monotonic()  # one that never turned has its time from the first look
        still = {name: now - turned.setdefault(thread, now) for name, thread in loops.items()}
        line = "the loop that %s has stood still for %.0f s\n"
        problems = "".join(line % (name, seconds) for name, seconds in still.items() if seconds > WATCHDOG_TIMEOUT)
        return (503, problems) if problems else (200, "ok\n")


class MetricsHandler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: MetricsServer
    server_version, sys_version = USER_AGENT["User-Agent"], ""

    def handle(self) -> None:
        # A timeout of the socket would begin again with each byte.
        with DeadlineStream(self.connection, REQUEST_TIMEOUT) as self.line:
            super().handle()

    def do_GET(self) -> None:
        pages = {"/metrics": self.server.metrics, "/healthz": self.server.health}
        page = pages.get(self.path.partition("?")[0])
        status, text = page() if page else (404, "")
        self.line.end = time.monotonic() + REQUEST_TIMEOUT
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nobody wants a line for each request."""


# ---- command line ---------------------------------------------------------------------------------------------------

MAIN_LOOP_INTERVAL = 0.1  # seconds between looks at whether something is to be done
SUMMARY_INTERVAL = 30.0  # seconds
SHUTDOWN_TIMEOUT = 8.0  # seconds for an orderly stop, which as a whole must not take 10
FIRST_RUN_HINT = (
    "dispatch_data.py: every setting is explained in .env.example; to see the program work without a cloud account: "
    "python3 -m tests.local_log_service demo"
)


def secret_values(settings: Settings) -> list[str]:
    """All that must never be shown: secrets, tokens, and the passwords of proxies, as written and decoded."""
    secrets = [text for config in settings.logstores() for text in (config.access_key, config.security_token)]
    for name in PROXY_VARIABLES:
        password = urlsplit("//" + os.environ.get(name, "").rpartition("//")[2]).password  # with scheme or without
        secrets += [password or "", unquote(password or "")]
    return [text for text in secrets if text]


class RedactingFormatter(logging.Formatter):
    """Hides secrets, and makes sure that nothing which is logged looks like a line of its own or is without end."""

    LONGEST_LINE = 2000  # characters

    def format(self, record: logging.LogRecord) -> str:
        lines = redact(super().format(record), CredentialSource.secrets).splitlines()
        return "\n    ".join(escape_for_log(line, self.LONGEST_LINE) for line in lines)


class QuietLogFile(logging.handlers.RotatingFileHandler):
    """A log file whose trouble, such as a full disk, is told on stderr and stops nothing."""

    intervals = LogThrottle()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's signature
        told = "dispatch_data.py: can't write the log file %s: %s" % (self.baseFilename, sys.exc_info()[1])
        with contextlib.suppress(OSError):  # stderr may be on the same full disk
            if self.intervals.admit():
                print(told, file=sys.stderr)


def set_up_logging(settings: Settings) -> None:
    """To stderr, and to a file of this process's own; stderr gets only warnings when it is no terminal but a file.

    Raises OSError when the file can't be made.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if settings.log_dir:
        handlers[0].setLevel(logging.NOTSET if sys.stderr.isatty() else logging.WARNING)
        path = os.path.join(settings.log_dir, "dispatch_data_%d.log" % os.getpid())
        handlers.append(QuietLogFile(path, maxBytes=100 * 1000 * 1000, backupCount=5, encoding="utf-8"))
    CredentialSource.hide(float("inf"), *secret_values(settings))
    for handler in handlers:
        handler.setFormatter(RedactingFormatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=handlers)
    if settings.log_level != "DEBUG":
        # What the SDK would say of failing calls, once each, RetryLog says in sums.
        logging.getLogger("aliyun").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # what can't be told, on a full disk, is no reason for a traceback


def help_text() -> str:
    """The table of settings and the exit statuses, for --help."""

    def rows(settings: Iterable[Setting], suffix: str = "") -> Iterator[str]:
        for setting in settings:
            default = "required" if setting.default is REQUIRED else "default: %s" % (setting.default or "none")
            if setting is TARGET_TOPICS:
                default = "default, while none is set: " + "; ".join("%d: %s" % pair for pair in DEFAULT_TOPICS.items())
            yield "  %s%s (%s)\n      %s" % (setting.variable, suffix, default, setting.meaning)

    return "\n".join([
        "settings are environment variables:",
        "\n the source, and the targets unless they say otherwise:", *rows(SOURCE_SETTINGS),
        "\n the targets, n = 1, 2, 3 ...:", *rows([TARGET_LOGSTORE, TARGET_TOPICS], "_TO<n>"),
        "  %s with _TO:" % ", ".join(setting.variable for setting in CONNECTION_SETTINGS.values()),
        "      the same for all targets; with _TO<n>: for target n",
        "\n tuning:", *rows(TUNING_SETTINGS.values()),
        "\nexit status:",
        "  0  stopped as asked; --check: nothing is wrong; --status: within --max-lag",
        "  1  could not start, or ended by itself; --check: something is wrong; --status: beyond --max-lag, or unknown",
        "  2  the settings or the arguments are wrong",
    ])  # fmt: skip


def install_signal_handlers() -> list[int]:
    """A list that gets the numbers of SIGTERM, SIGINT and SIGHUP as they come.

    It is for the main thread to look at: an exception raised out of the blue, as Ctrl-C does by default, could strike
    where a lock is held. SIGINT is caught also where a shell had it ignored; nohup has SIGHUP ignored, so it stays.
    """
    caught: list[int] = []
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # some supervisors leave theirs blocked
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with contextlib.suppress(OSError, IndexError), open("/proc/self/status", encoding="latin-1") as file:
        mask = file.read().partition("SigIgn:")[2].split()[0]  # for PyPy, whose getsignal doesn't know
        is_ignored = bool(int(mask, 16) >> (signal.SIGHUP - 1) & 1)
    for number in numbers:
        if number != signal.SIGHUP or not is_ignored:
            signal.signal(number, lambda number, _: caught.append(number))
    return caught


def report_loop(member: GroupMember) -> None:
    """Tells how it goes, for ever; in a thread of its own, for the service may take its time to say the lag."""
    next_summary = time.monotonic() + SUMMARY_INTERVAL
    while True:
        note_turn()
        time.sleep(MAIN_LOOP_INTERVAL)
        member.housekeeping()
        if time.monotonic() > next_summary:
            for line in member.summary(member.measure_lag()):
                log.info("%s", line)
            next_summary = time.monotonic() + SUMMARY_INTERVAL


def tune_process() -> None:
    """Lets the process open more files, and keep less memory, than the system would have it by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # the soft limit is often 1024, each put in the air takes a file
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(ImportError, OSError, AttributeError):  # glibc alone would keep as much for each thread
        import ctypes  # not sooner: libffi keeps a file open

        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def run(settings: Settings) -> int:
    """Joins the group and dispatches until it is told to stop; the process's exit status."""
    stop_asked = install_signal_handlers()
    tune_process()
    try:
        member = GroupMember(settings, Delivery(settings))
        reporter = threading.Thread(target=report_loop, args=(member,), daemon=True)
        if settings.metrics_port:
            MetricsServer(settings, member, reporter)
        member.start()
        reporter.start()
    except RuntimeError as error:
        log.error("%s; the limit is `ulimit -u`, or the container's", error)
        return 1
    expired: list[CredentialSource] = []
    while member.is_alive() and not stop_asked and not expired:
        time.sleep(MAIN_LOOP_INTERVAL)
        expired = [credential_source for credential_source in member.credential_source if credential_source.is_expired]
    for credential_source in expired:
        log.error(
            "%s has run out, says the service: this copy ends, to be started again with another", credential_source.name
        )
    left = member.stop(SHUTDOWN_TIMEOUT)
    if left:
        log.warning(
            "stopped in the middle of a batch of shard %s, %d LogGroups; what was delivered of it is so again by "
            "whoever takes the shard next", ",".join(map(str, sorted(left))), sum(left.values()),
        )  # fmt: skip
    for line in str(member.failure or "").splitlines():
        log.error("%s", line)
    for line in member.summary() if member.consumer else ():
        log.info("%s", line)
    return 0 if stop_asked else 1


def non_negative_float(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dispatch_data.py",
        usage="dispatch_data.py [--check | --status [--json] [--max-lag SECONDS] | --version | --help]",
        description=(__doc__ or "").partition("\n")[0],
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version="dispatch_data.py " + __version__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="try the settings, the source and the targets, and end")
    action.add_argument("--status", action="store_true", help="show how far the consumer group is, and end")
    parser.add_argument("--json", action="store_true", help="with --status: for programs")
    parser.add_argument(
        "--max-lag", type=non_negative_float, metavar="SECONDS", help="with --status: exit status 1 beyond it"
    )
    parsed = parser.parse_args(arguments)
    if not parsed.status and (parsed.json or parsed.max_lag is not None):
        parser.error("--json and --max-lag go with --status")
    return parsed


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """The program; returns the exit status: see `help_text`."""
    parsed = read_arguments(arguments)
    try:
        settings = read_settings(environment)
    except SettingsError as error:
        for problem in error.args:
            print("dispatch_data.py: %s" % problem, file=sys.stderr)
        if any(" is missing: " in problem for problem in error.args):
            print(FIRST_RUN_HINT, file=sys.stderr)
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
        try:
            status = main()
        except SystemExit as end:  # argparse's way
            status = int(end.code or 0)
        sys.stdout.flush()
    except OSError as error:  # such as stdout on a full disk
        status = 1
        print("dispatch_data.py: %s" % error, file=sys.stderr)
    except Exception:
        logging.disable(logging.NOTSET)
        logging.getLogger().exception("a defect of this program")
    finally:
        logging.shutdown()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        # A thread that waits for an answer from a dead target, up to RESPONSE_TIMEOUT, must not hold up the end.
        os._exit(status)
