#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["aliyun-log-python-sdk==0.9.52"]
# ///
"""Sorts the logs of one Simple Log Service (SLS) logstore into many, by Topic, in real time.

Every copy of this program joins one consumer group on the source logstore. The service shares the shards out among the
copies and keeps the checkpoints; a copy writes each LogGroup to the logstore that its Topic is routed to. A LogGroup is
some logs with one Topic. A shard is a queue of LogGroups, a cursor a position in it: a pull reads many LogGroups from a
cursor on, a put writes one. A consumer's lease is its right to the shards it was assigned; each heartbeat that the
service answers renews it. Who calls whom:

    main                              reads the settings, then does what the arguments ask for, such as --check; without
                                      arguments, or with --drain, calls `run`, which ends at a signal, or all is drained
      GroupMember                     joins the group as a new Consumer, and as another when that has lost its lease
        Consumer                      the SDK's ConsumerWorker, made of a LogHubConfig; its loop calls, for each shard,
          ShardConsumer.consume       which begins tasks in threads, a pull and one other at a time:
            load_checkpoint           where the shard begins
            pull                      up to three batches of LogGroups wait in memory
            deliver                   the oldest batch:
              Delivery.deliver        called for each batch: finds each LogGroup's target by its Topic
                PutLoop, Target       each put, a functools.partial of PutClient.put_log_raw, is tried until accepted
              cut_batch               if the batch was ended early: makes what is delivered a batch of its own
              ShardCheckpoint.save    then the checkpoint, and only then the next batch
        Heartbeat                     renews the lease, and learns which shards are assigned and which are revoked

A consumer that has lost its lease saves nothing more. The copy then joins as a new consumer, which begins each shard
where the one before it had delivered to, unless somebody else has saved or set a checkpoint since.
Read on in order: topics, settings, log groups, failures, credentials, the service, check and status, delivery,
consumer, monitoring, command line. Each section needs only those before it, with one exception: the Watchdog, in
failures, calls Deadline.abort, in the service. The CancelTokens that delivery is given stand in a table at the head of
the section on the consumer.

Threads, by the names that a stack dump shows. None is waited for: the process ends by os._exit, whatever they do.

    MainThread                waits for a signal, or for the end of the group member
    joins                     GroupMember.run, until the copy stops
    gives out work            the SDK's loop, one for each Consumer, until its lease is cancelled
    begins heartbeats         Heartbeat.run, started by the SDK's loop, until the same
    sends heartbeats_<n>      GroupMember.beats: one heartbeat each, until it is answered
    shard task_<n>            GroupMember.tasks, at most two for each shard: one pulls, one does the rest
    puts                      PutLoop.run: sends all puts, takes all their answers, tries again what failed
    opens connections_<n>     PutLoop.opener: opens the puts' connections; through an HTTPS proxy, does a put as a whole
    probe_<n>                 `probe` of all logstores at the start; of all shards for --status
    tells                     report_loop: summaries, recoveries, what is left to drain, stale connections
    ends silent connections   Watchdog.run
    refreshes credentials     CredentialSource.refresh_loop, one for each source that is not a fixed key
    serves metrics            MetricsServer.serve
    writes stderr             LogWriter.run: no other thread waits for whoever reads that
    writes the log file       the same, and for the file's disk
    writes progress           the same, for the line on a terminal that says how far it is
    puts again TO<n>_<n>      `put_rejected`, with --put-rejected alone: beside them run then `MainThread`, `ends silent
                              connections`, `refreshes credentials` and `writes ...`, no others

A lock stands above the fields that it guards. Whoever writes them holds it, and so does who reads two that must fit
together; reading one, or one operation on a set, dict or deque, needs no lock, and what only the PutLoop's thread
touches has none. Two locks are held at once in these orders only:

    ShardConsumer.lock                       then Consumer.lock, or the ThreadPool's own
    CredentialSources.lock                   then the redactor's
    GroupMember.begin_lock or .look_lock     held while the service is called: then those that the call takes
    any of these                             then logging's

Global state of our own: `watchdog` and `redactor`, since whoever opens a connection or writes a line needs them. Set
once, at the start: what the table below replaces, logging's handlers and switches, stdout and stderr, the handlers and
mask of signals, threading.excepthook, and what tune_process sets.

What is used or replaced here of other packages' internals, each with a test that fails when a release changes it:

    aliyun.log.consumer.ConsumerWorker
      ._get_shard_consumer    ShardConsumer instead of the SDK's, which goes on with the next batch where one fails
                              test_each_shard_that_is_held_is_consumed_in_each_turn_by_what_we_make
      .consumer_client        the worker itself, which makes no group: the SDK's client would overwrite the timeout and
                              order of one that exists, at each join
                              test_the_worker_makes_its_client_and_its_group_through_what_we_override
      .heart_beat             Heartbeat: the SDK's counts in wall time, and sleeps in its loop
                              test_each_turn_of_the_loop_asks_once_what_is_held_and_never_sleeps
      .shut_down_flag, .shutdown_and_wait, .shard_consumers
                              Consumer.finish_batches waits for batches in flight
                              test_the_flag_ends_the_loop_and_leaves_shards_and_threads_to_others
    aliyun.log.consumer.heart_beat.RLock
                              threading's: multiprocessing's needs /dev/shm, and one more process from Python 3.14 on
                              test_without_shared_memory_it_works_too
    aliyun.log.LogClient._getHttpResponse
                              PooledLogClient's: requests costs four times as much, and the SDK repeats what fails
                              test_the_sdk_s_client_still_sends_through_the_method_we_override
    aliyun.log.LogClient._logHost, aliyun.log.auth.AuthV1, .AuthV4
                              PutClient signs as they do, and what many puts share once
                              test_puts_are_signed_byte_for_byte_as_the_sdk_signs_them
    aliyun.log.LogClient._isRowIp, ._endpoint, .http_type
                              PooledLogClient opens connections to where the SDK's would go
                              test_connections_go_where_the_sdk_s_would_go
    aliyun.log.LogClient._auth._getGMT
                              one that doesn't set the process's locale for each signature
                              test_the_sdk_s_client_still_takes_the_date_from_where_we_put_it
    aliyun.log.pulllog_response.PullLogResponse._raw_uncompressed_body
                              read by `log_groups_of`; the SDK's parser is slow, on PyPy by a factor of a thousand,
                              and reads there no pull with a text that isn't UTF-8
                              test_the_sdk_still_keeps_the_bytes_of_a_pull
    urllib3.HTTPSConnectionPool._new_conn, ._prepare_proxy, requests' HTTPAdapter.get_connection_with_tls_context
                              ConnectionFactory opens connections as requests does: test_proxies.py
    _signal                   importing signal takes so long that Ctrl-C may come meanwhile: test_starting.py
    logging.FileHandler._open
                              QuietLogFile's opens one that nobody else writes to
                              test_a_log_file_that_is_full_goes_on_beside_another_of_its_name
    http.client.HTTPResponse  reads from a ResponseReader: test_answers.py
    concurrent.futures.ThreadPoolExecutor._adjust_thread_count, ._threads
                              ThreadPool's goes on with the threads that there are
                              test_tasks_wait_for_the_threads_that_there_are
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os

if __name__ == "__main__":  # the other imports take a moment: Ctrl-C meanwhile is no reason for a traceback
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if os.getpid() == 1:  # in a container; of such a process the kernel drops the signals that nothing handles
        for number in (_signal.SIGINT, _signal.SIGTERM):
            _signal.signal(number, lambda number, _: os._exit(128 + number))

import argparse
import asyncio
import base64
import bisect
import concurrent.futures
import contextlib
import difflib
import email.utils
import enum
import errno
import fnmatch
import functools
import gc
import hashlib
import heapq
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import platform
import queue
import random
import re
import selectors
import shlex
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
import unicodedata
import uuid
import weakref
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence, TextIO
from urllib.parse import unquote, urlencode, urlsplit

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("dispatch_data.py: this system is no Unix; on Windows it runs in WSL or a container")

if __name__ == "__main__":  # before the SDK is imported
    # Whoever started this may have closed stdin, stdout or stderr: else a socket would become file 0, 1 or 2, and be
    # sent what is printed.
    while os.open(os.devnull, os.O_RDWR) < 2:  # a file gets the lowest number that is free
        pass
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # For new objects PyPy takes half of the processor's cache, 240 MB of a large one, unless told so before it starts.
    is_pypy = platform.python_implementation() == "PyPy"
    if is_pypy and "PYPY_GC_NURSERY" not in os.environ and os.path.isfile(sys.argv[0]):
        os.environ["PYPY_GC_NURSERY"] = "16MB"
        os.environ.setdefault("PYPY_GC_MAX_DELTA", "48MB")  # of garbage before it is collected, where much is in use
        # Until the new process gets below, or execv fails.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        with contextlib.suppress(OSError), open("/proc/self/cmdline", "rb") as command_line:
            os.execv(sys.executable, command_line.read().split(b"\0")[:-1])  # noqa: S606
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])

try:
    import requests
    import urllib3
    from aliyun.log import LogClient
    from aliyun.log.auth import AUTH_VERSION_1, AUTH_VERSION_4
    from aliyun.log.compress import Compressor, CompressType
    from aliyun.log.consumer import ConsumerWorker, LogHubConfig, heart_beat
    from aliyun.log.credentials import Credentials, CredentialsProvider
    from aliyun.log.pulllog_response import PullLogResponse
    from aliyun.log.version import API_VERSION

    heart_beat.RLock = threading.RLock  # type: ignore[attr-defined,assignment]
    for owner, name in (
        (LogClient, "_getHttpResponse"), (ConsumerWorker, "_get_shard_consumer"),
        (urllib3.HTTPSConnectionPool, "_new_conn"), (urllib3.HTTPSConnectionPool, "_prepare_proxy"),
        (requests.adapters.HTTPAdapter, "get_connection_with_tls_context"),
        (PullLogResponse("", dict.fromkeys(["x-log-count", "x-log-bodyrawsize", "x-log-cursor"], "0")),
         "_raw_uncompressed_body"),
    ):  # fmt: skip
        getattr(owner, name)  # a release without these fails here, at once
except (ImportError, AttributeError) as missing:
    sys.exit("dispatch_data.py: %s; install what it knows: pip install -r requirements.txt" % missing)

__version__ = "1.0.0"

log = logging.getLogger("dispatch_data")


# ---- topics: how they are spelt, and which target each belongs to ----------------------------------------------------

# What a Chinese keyboard gives in the place of ASCII: full-width forms, and punctuation of its own.
FULLWIDTH_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
FULLWIDTH_TO_ASCII.update(str.maketrans("\u3000\u3001\u3002\u3010\u3011\u2018\u2019\u201c\u201d", " ,.[]''\"\""))
FULLWIDTH_CHAR = re.compile("[%s]" % "".join(map(chr, FULLWIDTH_TO_ASCII)))
# What brackets make literal: one character that is no letter, digit, _, ! or ], and any full-width one.
ESCAPED_CHAR = re.compile(r"\[([^\w!\]]|%s)\]" % FULLWIDTH_CHAR.pattern)
TOPIC_SEPARATOR = re.compile(r"(?<!\[),|,(?!\])")  # a comma, but for [,]
COMMENT = r"\s#|^#(?:\s|$)"  # behind a value: shells drop it, docker --env-file, kubectl and systemd don't


def spell_out(topic: str) -> str:
    """A topic as it is shown: [] where there is none; with \\u escapes for what the eye can't tell from another topic:
    accents apart from their letters, spaces at the ends, Greek or Cyrillic among ASCII letters."""
    if unicodedata.normalize("NFC", topic) != topic:
        topic = "".join(ascii(char)[1:-1] if unicodedata.combining(char) else char for char in topic)
    for pattern in ("^ +| +$", "(?<=[A-Za-z])[\u0370-\u052f]+|[\u0370-\u052f]+(?=[A-Za-z])"):
        topic = re.sub(pattern, lambda found: "".join("\\u%04x" % ord(char) for char in found.group()), topic)
    return topic or "[]"


BRACKETS_OR_STARS = re.compile(r"(\[!?\]?[^]]*\])|\*+")


@dataclass(frozen=True)
class TopicPattern:
    """One of the topics in SLS_TOPIC_TO<n>: a topic, or a pattern with the wildcards of fnmatch: * ? and [...]."""

    spelling: str

    @property
    def exact_topic(self) -> str | None:
        """The one topic that is meant, "" for [], which stands for what has no topic; None for a pattern."""
        if self.spelling == "[]":
            return ""
        is_pattern = set("*?[") & set(ESCAPED_CHAR.sub("", self.spelling))
        return None if is_pattern else ESCAPED_CHAR.sub(r"\1", self.spelling)

    @property
    def literal_spelling(self) -> str:
        """If this pattern was probably meant literally, how that is written: app[[]1] for app[1]; else ""."""
        is_doubtful = re.fullmatch(r"[^*?]*\[[^*?]+\][^*?]*", ESCAPED_CHAR.sub("", self.spelling))
        return ESCAPED_CHAR.sub(r"\1", self.spelling).replace("[", "[[]") if is_doubtful else ""

    def compile(self) -> re.Pattern[str]:
        """Matches in linear time, for whoever writes logs chooses their topics: a*b*c becomes
        a(?=(?P<s0>.*?b))(?P=s0).*c, an atomic group, never tried anew, spelt so that Python before 3.11 has it, too.

        Raises re.error for a range such as [z-a], which newer versions of Python take to match nothing.
        """
        # fnmatch.translate does that only from Python 3.9 on; of a part without a star it gives (?s:...)\Z.
        # \0 stands for each star outside of brackets, for it can't be in a topic that is set.
        parts = BRACKETS_OR_STARS.sub(lambda found: found.group(1) or "\0", self.spelling).split("\0")
        first, *others = [fnmatch.translate(part)[: -len(r"\Z")] for part in parts]
        last = [".*" + part for part in others[-1:]]
        between = [r"(?=(?P<s%d>.*?%s))(?P=s%d)" % (n, part, n) for n, part in enumerate(others[:-1])]
        return re.compile(r"(?s:%s)\Z" % "".join([first, *between, *last]))

    @property
    def meaning(self) -> str | re.Pattern[str]:
        """Equal for those that take the same topics by other brackets, as a-b and a[-]b do, a-* and a[-]*."""
        plain = ESCAPED_CHAR.sub(lambda found: found[0] if found[1] in "*?[" else found[1], self.spelling)
        return TopicPattern(plain).compile() if self.exact_topic is None else self.exact_topic


ALL_TOPICS = TopicPattern("*")


def decode_utf8(text: str) -> str:
    """A text of the environment as UTF-8, whatever the locale says; PyPy reads ASCII where none is set, as in cron."""
    with contextlib.suppress(UnicodeError):
        return os.fsencode(text).decode("utf-8")
    return text


def parse_topics(text: str) -> tuple[TopicPattern, ...]:
    """The topics in a text of the environment, one at least. Raises ValueError, which says what would be right."""
    text = decode_utf8(text)
    if not text.isprintable():
        raise ValueError("topics in UTF-8, of characters that can be seen, separated by commas")
    # a** is a*, also where patterns are compared.
    parts = [BRACKETS_OR_STARS.sub(lambda found: found.group(1) or "*", part) for part in TOPIC_SEPARATOR.split(text)]
    topics = tuple(TopicPattern(part.strip()) for part in parts)
    if not all(topic.spelling for topic in topics):
        raise ValueError("topics separated by commas, one on either side of each; was the value cut off at a space?")
    if re.search("%s|%s" % (FULLWIDTH_CHAR.pattern, COMMENT), ESCAPED_CHAR.sub("", text)):
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
        routes = [(topic, number) for number, topics in topics_by_number.items() for topic in topics]
        self.exact = {topic.exact_topic: number for topic, number in routes if topic.exact_topic is not None}
        self.patterns = [(topic.compile(), number) for topic, number in routes if topic.exact_topic is None]
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


@dataclass(frozen=True)
class Setting:
    """An environment variable, what it may be and what it means."""

    variable: str  # without the suffix that it has for targets: _TO for all of them, _TO<n> for one
    check: Callable[[str], Any]  # the value of a text; raises ValueError, which says what would be right
    meaning: str
    default: str | None = None  # a text, too; None: it must be set
    is_secret: bool = False  # no error shows its text
    may_be_empty: bool = False  # set to nothing it is empty, not the default


def env(variable: str, check: Callable[[str], Any], **more: Any) -> Any:
    """A dataclass's field that is read from the environment; `more` are the other fields of its Setting."""
    setting = Setting(variable, check, **more)
    return field(repr=not setting.is_secret, metadata={"setting": setting})


def settings_of(kind: Any) -> dict[str, Setting]:
    """The Settings declared in a dataclass, by the name of their field."""
    return {each.name: each.metadata["setting"] for each in fields(kind) if each.metadata}


def validator(value_of: Callable[[str], object], expected: str) -> Callable[[str], Any]:
    """A check by `value_of`, which gives None or raises ValueError for a wrong text; `expected` says what is right."""

    def check(text: str) -> object:
        try:
            value = value_of(text)
        except ValueError:
            value = None
        if value is None:
            raise ValueError(expected)
        return value

    return check


def pattern(regex: str, expected: str) -> Callable[[str], str]:
    """A check that a text matches `regex` as a whole."""
    return validator(lambda text: text if re.fullmatch(regex, text) else None, expected)


def in_range(kind: type[float], low: float, high: float, expected: str) -> Callable[[str], float]:
    """A check for a number of the given kind (int or float) within low..high, in plain digits."""

    def value_of(text: str) -> float | None:
        is_plain = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text)
        return kind(text) if is_plain and low <= kind(text) <= high else None

    return validator(value_of, "%s from %s to %s" % (expected, low, high))


CLOCK_TOLERANCE = 5.0  # seconds; two clocks that differ by less are taken for equal


def format_local(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def format_with_utc(unix_seconds: float) -> str:
    """A time with its offset, and the same in UTC."""
    local = datetime.fromtimestamp(unix_seconds).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S %z") + time.strftime(" (%Y-%m-%d %H:%M:%S UTC)", time.gmtime(unix_seconds))


# A date, perhaps with a time, perhaps with its zone: Z, +08:00, +0800, UTC+8 or GMT+8.
TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d?)-(\d\d?)(?:[T ](\d\d?):(\d\d?)(?::(\d\d?)(?:\.\d+)?)?"
    r" ?(?:(?P<utc>Z|UTC|GMT)|(?:UTC|GMT)?(?P<sign>[+-])(0?\d|1[0-4])(?::?([0-5]\d))?)?)?",
    re.ASCII | re.IGNORECASE,
)


def parse_cursor_start(text: str) -> str | int:
    """'begin', 'end', or a time as unix seconds; without a zone it is local time, as everywhere in the SDK. UTC+8 is
    eight hours east, as people mean it. No library reads this: dateutil's is west, and it drops zones it doesn't know.
    """
    place = {"earliest": "begin", "latest": "end"}.get(text.lower(), text.lower())
    if place in ("begin", "end"):
        return place
    start = int(text) if re.fullmatch("[0-9]{10}", text) else -1
    written = TIMESTAMP.fullmatch(text)
    if written:
        *parts, utc, sign, hours, minutes = written.groups()
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        zone = timezone(-offset if sign == "-" else offset) if utc or sign else None
        with contextlib.suppress(ValueError, OverflowError):  # there may be no such day
            year, month, day, hour, minute, second = (int(part or 0) for part in parts)
            start = int(datetime(year, month, day, hour, minute, second, tzinfo=zone).timestamp())
    if start < 0:
        raise ValueError("begin, end, or a time such as 2018-12-26T00:00:00+08:00, or in seconds, 1545753600")
    if start > time.time() + CLOCK_TOLERANCE:
        raise ValueError("a time that has passed; this machine's clock says %s" % format_with_utc(time.time()))
    return start


def local_time_warnings(name: str, text: str, unix_seconds: int) -> Iterator[str]:
    """For a time that was read from `text`, if that has no offset; `name` is where it stood."""
    written = TIMESTAMP.fullmatch(text)
    if written and not (written["utc"] or written["sign"]):
        by = "TZ=%r" % os.environ["TZ"] if os.environ.get("TZ") else "this machine's clock"
        offset = datetime.fromtimestamp(unix_seconds).astimezone().strftime("%z")
        words = "%s: %r has no offset, and is taken for local time, %s by %s; write its offset, as in "
        yield (words + "2018-12-26T00:00:00+08:00") % (name, text, offset, by)


def hashed_cas(directory: str) -> list[str]:
    """The paths of CAs in a directory that OpenSSL finds there, by their hashes. Raises OSError."""
    names = [name for name in os.listdir(directory) if re.fullmatch(r"[0-9a-f]{8}\.\d+", name)]
    return [os.path.join(directory, name) for name in names]


def load_cas(path: str) -> ssl.SSLContext:
    """A TLS context that trusts the CAs of this file or directory alone, or with "" those of the system.

    Raises ValueError, with the reason, where no CA can be read from the path.
    """
    context: ssl.SSLContext | None = None
    try:
        if os.path.isdir(path):
            # Read here, as far as `openssl rehash` has named it: OpenSSL (`capath`) would do so when it verifies a
            # certificate, too late to say that there are none.
            for file in hashed_cas(path):
                with contextlib.suppress(OSError):  # one that can't be read is passed over, as OpenSSL does
                    if context:
                        context.load_verify_locations(file)
                    else:
                        context = ssl.create_default_context(cafile=file)
        else:
            context = ssl.create_default_context(cafile=path or None)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError("%s: %s" % (path, error.strerror or error)) from None
    if not context or (path and not context.cert_store_stats()["x509"]):
        raise ValueError("%s: no certificates" % path)
    # urllib3 sets the protocols of the context for each connection, in several threads at once. In PyPy, where a call
    # into OpenSSL lets other threads run, two threads then free what was set before: copies died of it.
    context.set_alpn_protocols(["http/1.1"])
    context.set_alpn_protocols = lambda _: None  # type: ignore[method-assign,assignment]
    return context


def is_md5_allowed() -> bool:
    """Whether this machine's OpenSSL lets the SDK hash a body for a signature v1; not so in FIPS mode."""
    try:
        hashlib.md5(b"")  # noqa: S324
    except (AttributeError, ValueError):
        return False
    return True


# fmt: off
check_secret = pattern("[!-~]+", "printable characters without spaces")
check_cas = validator(load_cas, "a file of CA certificates in PEM that can be read, or a directory of such files, "
                                "named by `openssl rehash`")
check_directory = validator(lambda path: path if os.path.isdir(path) and os.access(path, os.W_OK) else None,
                            "a directory that exists and can be written to")
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
check_switch = validator(lambda text: SWITCH.get(text.lower()), "true or false")
LOG_LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "warn": "WARNING", "error": "ERROR"}
check_log_level = validator(lambda text: LOG_LEVELS.get(text.lower()), "DEBUG, INFO, WARNING or ERROR")
check_address = validator(lambda text: str(ipaddress.ip_address(text)),
                          "an address of this machine such as 127.0.0.1, 0.0.0.0 for all, or :: for all, IPv6 too")
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
PORT = "(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"  # up to 65535
ENDPOINT = r"((?i:https?)://)?%s(\.%s)*%s/?" % (LABEL, LABEL, PORT)
check_endpoint = validator(lambda text: re.sub("^.*:/", lambda scheme: scheme.group().lower(), text)
                           if re.fullmatch(ENDPOINT, text) else None, "a host such as cn-hangzhou.log.aliyuncs.com")
check_proxy = pattern(
    r"((?i:https?|socks4a?|socks5h?)://)?([^\s/?#\[\]\x7f-\U0010ffff]*@)?([A-Za-z0-9_.-]*[A-Za-z0-9]|\[[0-9a-fA-F:.]+\])"
    + PORT + "/?", "a URL such as http://proxy.example:3128")
AGENT_URL = r"http://([^/?#@\s]*@)?[A-Za-z0-9.-]+(:\d{1,5})?([/?][^#\s]*)?"
check_agent = pattern(AGENT_URL, "http://<agent>")
check_credentials = pattern(r"ecs(:[A-Za-z0-9._-]{1,64})?|oidc|uri|file:/.+|" + AGENT_URL,
                            "ecs, ecs:<role>, oidc, uri, http://<agent>, or file:</path>")
URI_VARIABLE = "ALIBABA_CLOUD_CREDENTIALS_URI"
# An endpoint that names its region, which an address or a host of one's own doesn't.
REGION_PATTERN = re.compile(
    r"(^|/)([a-z]{2}-[a-z0-9-]+?)(-intranet|-internal|-share|-vpc)*\.(log|sls)\.aliyuncs\.com([:/]|$)")


def region_in(endpoint: str) -> str:
    """The region that an endpoint names, "" where it names none."""
    named = REGION_PATTERN.search(endpoint.lower())
    return named.group(2) if named else ""


@dataclass(frozen=True)
class LogstoreConfig:
    """One logstore. A target's endpoint, key, region and project are the source's, unless set with _TO for all targets,
    or with _TO<n> for one."""

    endpoint: str = env("SLS_ENDPOINT", check_endpoint,
        meaning="the service's host in the project's region; https:// in front turns TLS on")
    access_key_id: str = env("SLS_AK_ID", check_secret, is_secret=True, meaning="id of the access key")
    access_key: str = env("SLS_AK_KEY", check_secret, is_secret=True, meaning="secret of the access key")
    security_token: str = env("SLS_STS_TOKEN", check_secret, is_secret=True, default="",
        meaning="token of a temporary access key, which can't renew itself")
    credentials: str = env("SLS_CREDENTIALS", check_credentials, is_secret=True, default="",
        meaning="a key that renews itself, in the place of id, secret and token: ecs or ecs:<role> (the ECS "
        "instance's), oidc (RRSA), http://<agent> or uri (the agent that %s names), file:</path>" % URI_VARIABLE)
    region: str = env("SLS_REGION", pattern("[a-z0-9-]+", "a region such as cn-hangzhou"), default="",
        meaning="the project's region: switches signatures from v1 to v4")
    project: str = env("SLS_PROJECT",
        pattern("[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", "3 to 63 lower-case letters, digits and - (not at the ends)"),
        meaning="the project")
    logstore: str = env("SLS_LOGSTORE", pattern("[A-Za-z0-9_-]{1,128}", "letters, digits, - and _"),
        meaning="the source logstore")
    # A name above, such as SLS_PROJECT -> the variable that was read, such as SLS_PROJECT_TO2: for hints.
    variables: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return "%s/%s" % (self.project, self.logstore)

    @property
    def connection(self) -> LogstoreConfig:
        """This without the logstore: logstores for which it is equal can share a client."""
        return replace(self, logstore="")

    @property
    def known_region(self) -> str:
        """The region in the endpoint's name, else SLS_REGION, else ""."""
        return region_in(self.endpoint) or self.region

    def may_be_same_as(self, other: LogstoreConfig) -> bool:
        """Whether this may be the same logstore, however the endpoints are written: a project's name is unique within a
        region, so only two regions tell two of one name apart."""
        same_name = (self.project, self.logstore.lower()) == (other.project, other.logstore.lower())
        return same_name and len({self.known_region, other.known_region} - {""}) < 2


@dataclass(frozen=True)
class TargetSettings:
    number: int  # n of _TO<n>
    config: LogstoreConfig
    topics: tuple[TopicPattern, ...] = env("SLS_TOPIC", parse_topics,
        meaning="topics of target n, separated by commas; * ? and [...] are wildcards, * alone takes what is left, [] "
        "what has no topic; a character in brackets is itself: app[[]1] is the topic app[1], a[,]b is a,b")

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
    consumer_group: str = env("SLS_CG", pattern("[A-Za-z0-9_-]{1,64}", "up to 64 letters, digits, - and _"),
        meaning="the consumer group, the same for all copies")
    cursor_start: str | int = env("SLS_CURSOR_START", parse_cursor_start, default="begin",  # or "end", or unix seconds
        meaning="where a group without checkpoints begins: begin (earliest), end (latest), or a time such as "
        "2018-12-26T00:00:00+08:00; without an offset or Z it is local time")
    heartbeat_interval: int = env("SLS_HEARTBEAT_INTERVAL", in_range(int, 1, 300, "whole seconds"), default="20",
        meaning="seconds; a new group's timeout is twice as long: then a silent copy loses its shards")
    fetch_interval: float = env("SLS_FETCH_INTERVAL", in_range(float, 0.01, 60, "seconds"), default="0.4",
        meaning="seconds between looks at an idle shard; longer where a copy has many, for it looks 100 times "
        "a second at most")
    writers: int = env("SLS_WRITERS", in_range(int, 1, 64, "a whole number"), default="16",
        meaning="puts in the air at once, for each target")
    merge_packs: bool = env("SLS_MERGE_PACKS", check_switch, default="false",
        meaning="true merges LogGroups of one agent that differ in nothing but their pack id: fewer requests, but "
        "the console's context view mixes them up")
    rejected_dir: str = env("SLS_REJECTED_DIR", check_directory, default="",
        meaning="where LogGroups go that a target refuses for good, so that their shards can go on; none: "
        "the shards wait")
    log_dir: str = env("SLS_LOG_DIR", check_directory, default=".", may_be_empty=True,
        meaning="where the log file goes, the newest of those before it stay; empty: no file, stderr alone")
    log_level: str = env("SLS_LOG_LEVEL", check_log_level, default="INFO", meaning="what is logged")
    metrics_port: int | str = env("SLS_METRICS_PORT", in_range(int, 1, 65535, "a port"), default="",  # "": none
        meaning="the port of /metrics (Prometheus) and /healthz, for each copy on a machine a port of its own; "
        "none: they are not served")
    metrics_host: str = env("SLS_METRICS_HOST", check_address, default="127.0.0.1",
        meaning="the address they are served on; 0.0.0.0 is all of them, :: those of IPv6, too")

    @property
    def source_name(self) -> str:
        """As it is called in what is shown."""
        return "source %s" % (self.source,)

    def logstores(self) -> list[LogstoreConfig]:
        """The source and the targets, the source first."""
        return [self.source, *(target.config for target in self.targets)]
# fmt: on


CONNECTION_SETTINGS = settings_of(LogstoreConfig)
SOURCE_LOGSTORE = CONNECTION_SETTINGS.pop("logstore")
TARGET_LOGSTORE = replace(SOURCE_LOGSTORE, meaning="the logstore of target n; n is any number from 1")
TARGET_TOPICS = settings_of(TargetSettings)["topics"]
TUNING_SETTINGS = settings_of(Settings)
CONSUMER_GROUP = TUNING_SETTINGS.pop("consumer_group")
SOURCE_SETTINGS = (*CONNECTION_SETTINGS.values(), SOURCE_LOGSTORE, CONSUMER_GROUP)
ACCESS_KEY_VARIABLES = ("SLS_AK_ID", "SLS_AK_KEY", "SLS_STS_TOKEN")
CREDENTIAL_VARIABLES = (*ACCESS_KEY_VARIABLES, "SLS_CREDENTIALS")
OIDC_VARIABLES = ("ALIBABA_CLOUD_ROLE_ARN", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "ALIBABA_CLOUD_OIDC_TOKEN_FILE")
# While no SLS_TOPIC_TO<n> is set. "ngnix" is a slip of the first example program; such logs are out there.
DEFAULT_TOPICS = {1: "ngnix,nginx", 2: "sql_audit", 3: "click"}
# What requests reads, and so does this program: a typo here must not look like a service that can't be reached.
PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
TARGET_STEMS = [each.variable + "_TO" for each in (*CONNECTION_SETTINGS.values(), TARGET_LOGSTORE, TARGET_TOPICS)]
TARGET_NUMBER = "[1-9][0-9]{0,8}"
TARGET_VARIABLE = re.compile("(?:%s)(%s)" % ("|".join(TARGET_STEMS), TARGET_NUMBER))
# What Kubernetes sets for a Service that is called sls or sls-...
SERVICE_LINK_NAME = r"SLS_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT|PORT_[0-9]+_[A-Z]+\w*)"
# What no value has by intent, and where it comes from.
LEFTOVERS = (
    (COMMENT, "what follows # is no comment to docker, kubectl and systemd; give it a line of its own"),
    (r"\$[{(]|\{\{|^\$\w+$|^%\w+%$", "it holds a variable that nothing has replaced"),
    (r"<[^<>]+>", "it holds a placeholder that nothing has replaced"),
    ("^(tcp|udp|sctp)://", "Kubernetes sets it so for a Service of that name; not with enableServiceLinks: false"),
)
# How other programs write choices of topics (a regular expression), and how that is written here: the first is told.
FOREIGN_NOTATIONS = (
    # lists and alternatives of shells, YAML, JSON and others
    (r"\{[^{}]*,[^{}]*\}", "braces stand for themselves; name all the topics, as in nginx*,apache*"),
    (r"^\[.*,.*\]$", "brackets make no list; leave them out"),
    (r"[;|]", "only commas separate topics"),
    # regular expressions
    (r"(^|,)\s*/?\^|\$/?\s*(,|$)", "^ and $ stand for themselves; a topic is compared as a whole anyway"),
    (r"(^|,)\s*\.\*|\.\+|\\[dDsSwWb]|\(\?", "this is no regular expression; * stands for any characters, ? for one"),
    (r"\[\^[^\]]", "[^...] is one of these characters; one that is none of them is [!...]"),
    (r"\\[^\w\s]", "a backslash stands for itself; brackets make a character literal, as in [,] or [*]"),
    # .gitignore, queries, SQL's LIKE, and lists of shells again
    (r"(^|,)\s*!", "! stands for itself; nothing can be excluded"),
    (r"(^|,)\s*(__topic__|topic|re|regexp?|glob)\s*[:=]", "a topic is written without a name in front"),
    (r"%\s*(,|$)|(^|,)\s*%", "% stands for itself; * stands for any characters"),
    (r"[^,\s]\s+[^,\s]", "a space belongs to the topic; only commas separate topics"),
)
# What settings are called elsewhere; ends of names.
FOREIGN_NAMES = (
    ("SECRET|SECRET_?KEY", "SLS_AK_KEY"),
    ("(ACCESS_?KEY|ACCESS|KEY|AK)_?ID", "SLS_AK_ID"),
    ("TOKEN", "SLS_STS_TOKEN"),
    ("GROUP(_NAME)?", "SLS_CG"),
    ("START|POSITION", "SLS_CURSOR_START"),
)
OTHER_PREFIXES = "(ALIBABA_?CLOUD|ALICLOUD|ALIYUN)_"


class SettingsError(Exception):
    """The environment won't do; `args` has one line for each thing to mend."""


def strip_quotes(text: str) -> str:
    """Without what is around a value: space, and quotes, which a shell takes away, but `docker --env-file` doesn't."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] in "'\"" and text.count(text[0]) == 2 else text


def foreign_name(name: str) -> str:
    """The setting here for a name that other programs have for it, such as SECRET_KEY; "" if nobody can tell."""
    stem, target = re.fullmatch("(.*?)(_TO[0-9]*)?", name).groups("")  # type: ignore[union-attr]
    return next((here + target for regex, here in FOREIGN_NAMES if re.search("_(%s)$" % regex, stem)), "")


class SettingsParser:
    """Reads settings and gathers what is wrong with them, so that all of it can be told at once."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {
            name: strip_quotes(text) if name.startswith("SLS_") else text for name, text in environment.items()
        }
        self.errors: list[str] = []
        self.warnings: list[str] = []
        # While none is, the default topics apply.
        self.any_topic_set = any(re.fullmatch("SLS_TOPIC_TO(%s)?" % TARGET_NUMBER, name) for name in environment)

    def read(self, setting: Setting, suffix: str = "") -> Any:
        """The checked value of a setting; "" where it is empty, or an error has been noted."""
        name = setting.variable + suffix
        text = self.environment.get(name)
        if text is None or (text == "" and not setting.may_be_empty):
            text = setting.default
        if text is None:
            others = [other for other in sorted(self.environment) if re.match(OTHER_PREFIXES, other)]
            unread = [other for other in others if self.environment[other] and foreign_name(other) == name]
            but = "; %s is set, but not read" % " and ".join(unread) if unread else ""
            self.errors.append("%s is missing: %s%s" % (name, setting.meaning, but))
        if not text:
            return ""
        readable = decode_utf8(text)
        shown = "its value (not shown)" if setting.is_secret else repr(readable)
        foreign = self.foreign_notation(setting, readable)
        try:
            value = setting.check(text)
        except ValueError as expected:
            line = "%s: %s is wrong; right would be %s" % (name, shown, expected)
            self.errors.append("; ".join(filter(None, [line, foreign])))
            return ""
        if foreign:
            self.warnings.append("%s: %s looks wrong: %s" % (name, shown, foreign))
        return value

    def foreign_notation(self, setting: Setting, text: str) -> str:
        """What there is to say of a value that means something else elsewhere, "" for nothing."""
        unescaped = ESCAPED_CHAR.sub("", text)
        wide = None if setting.is_secret else FULLWIDTH_CHAR.search(unescaped)
        if wide:
            words = "%r is a full-width character" % wide.group()
            with contextlib.suppress(ValueError):
                setting.check(strip_quotes(text.translate(FULLWIDTH_TO_ASCII)))
                words += ", type %r instead" % wide.group().translate(FULLWIDTH_TO_ASCII)
            return words
        if not setting.variable.startswith("SLS_"):
            return ""
        notations = (*LEFTOVERS, *FOREIGN_NOTATIONS) if setting.variable == TARGET_TOPICS.variable else LEFTOVERS
        return next((words for regex, words in notations if re.search(regex, unescaped)), "")

    def read_network(self, configs: Iterable[LogstoreConfig]) -> None:
        """Checks what requests takes from the environment to reach these: of variables that stand in for each other,
        such as http_proxy, HTTP_PROXY and all_proxy, only the one that requests would use."""
        schemes = {"https" if config.endpoint.startswith("https:") else "http" for config in configs}
        schemes |= {"https" for config in configs if config.credentials == "oidc"}  # STS
        groups = [(check_cas, CA_VARIABLES)] + [(check_proxy, (scheme + "_proxy", "all_proxy")) for scheme in schemes]
        for check, names in groups:
            # An empty one in lower case hides that in capitals.
            heard = [name if name in self.environment else name.upper() for name in names]
            for name in [name for name in heard if self.environment.get(name)][:1]:
                self.read(Setting(name, check, meaning="", is_secret=check is check_proxy))

    def suffix_of(self, variables: Iterable[str], suffixes: Sequence[str]) -> str:
        """The first of the suffixes with which any of the variables is set, "" for none."""
        return next((each for each in suffixes if any(self.environment.get(name + each) for name in variables)), "")

    def read_logstore(self, logstore: Setting, suffixes: Sequence[str]) -> LogstoreConfig:
        """Reads the settings of one logstore: its name, `logstore`, with the first suffix; each other setting with the
        first suffix with which it is set."""
        values, variables = {}, {}
        # What makes up an access key goes together: all of it is taken from where any of it is set.
        key_suffix = self.suffix_of(CREDENTIAL_VARIABLES, suffixes)
        credentials_variable = "SLS_CREDENTIALS" + key_suffix
        for name, setting in CONNECTION_SETTINGS.items():
            is_key = setting.variable in CREDENTIAL_VARIABLES
            suffix = key_suffix if is_key else self.suffix_of([setting.variable], suffixes)
            variable = variables[setting.variable] = setting.variable + suffix
            if setting.variable in ACCESS_KEY_VARIABLES and self.environment.get(credentials_variable):
                values[name], variables[setting.variable] = "", credentials_variable  # hints then name SLS_CREDENTIALS
                if self.environment.get(variable):
                    self.errors.append(
                        "%s: %s stands in its place; leave out one of them" % (variable, credentials_variable)
                    )
            else:
                values[name] = self.read(setting, suffix)
        values["logstore"] = self.read(logstore, suffixes[0])
        variables[logstore.variable] = logstore.variable + suffixes[0]
        if values["project"] and re.match(r"(https?://)?%s\." % values["project"], values["endpoint"], re.IGNORECASE):
            words = "%s: %r is wrong; right would be the host without the project"
            self.errors.append(words % (variables["SLS_ENDPOINT"], values["endpoint"]))
        if not values["region"] and not is_md5_allowed():
            words = "%s must be set: OpenSSL forbids MD5 here, as in FIPS mode; signatures v1 need it, v4 do not"
            self.errors.append(words % variables["SLS_REGION"])
        named = region_in(values["endpoint"])
        # Some endpoints leave out the end of a region's name: cn-shenzhen-finance is that of cn-shenzhen-finance-1.
        if named and values["region"] and not (values["region"] + "-").startswith(named + "-"):
            words = "%s: %r is not the region that %s names: signatures for it may be refused; set %s=%s"
            region, endpoint = variables["SLS_REGION"], variables["SLS_ENDPOINT"]
            mended = max(region, endpoint.replace("ENDPOINT", "REGION"), key=len)
            self.warnings.append(words % (region, values["region"], endpoint, mended, named))
        meaning = "%s=%s takes it" % (credentials_variable, values["credentials"])
        if values["credentials"] == "oidc":
            for name in OIDC_VARIABLES:
                self.read(Setting(name, str, meaning))
        elif values["credentials"] == "uri":
            values["credentials"] = self.read(Setting(URI_VARIABLE, check_agent, meaning, is_secret=True))
        return LogstoreConfig(**values, variables=variables)

    def read_targets(self, source: LogstoreConfig) -> Iterator[TargetSettings]:
        """The targets in the order of their numbers."""
        numbered = [TARGET_VARIABLE.fullmatch(name) for name, text in self.environment.items() if text]
        numbers = {int(name.group(1)) for name in numbered if name}
        if not numbers:
            self.errors.append("SLS_LOGSTORE_TO1 is missing: at least one target logstore is needed")
        routed: dict[str | re.Pattern[str], int] = {}  # what the topics mean -> the number of their target
        for number in sorted(numbers):
            suffix = "_TO%d" % number
            config = self.read_logstore(TARGET_LOGSTORE, [suffix, "_TO", ""])
            if config.logstore and config.may_be_same_as(source):
                words = "SLS_LOGSTORE_TO%d: %s is the source itself, for its endpoint and the source's don't name two "
                self.errors.append((words + "regions; name another logstore") % (number, config))
            default = None if self.any_topic_set else DEFAULT_TOPICS.get(number)
            topics = self.read(replace(TARGET_TOPICS, default=default), suffix)
            for topic in topics:
                if topic.literal_spelling:
                    words = "SLS_TOPIC_TO%d: %r is a pattern, its brackets stand for one of the characters in them; "
                    words += "the topic spelt like that is written %r"
                    self.warnings.append(words % (number, topic.spelling, topic.literal_spelling))
                if routed.setdefault(topic.meaning, number) != number:
                    words = "SLS_TOPIC_TO%d: %r is routed by SLS_TOPIC_TO%d already; name each topic once"
                    self.errors.append(words % (number, topic.spelling, routed[topic.meaning]))
                elif routed.get(ALL_TOPICS.meaning, number) != number and topic.exact_topic is None:
                    words = "SLS_TOPIC_TO%d: %r takes nothing: the * of SLS_TOPIC_TO%d comes first, and takes all"
                    self.warnings.append(words % (number, topic.spelling, routed[ALL_TOPICS.meaning]))
            yield TargetSettings(number, config, topics)

    def warn_of_unknown_variables(self) -> None:
        """Of each SLS_ variable, in capitals or not, that means nothing, with the nearest name that does."""
        plain = [each.variable for each in (*SOURCE_SETTINGS, *TUNING_SETTINGS.values())]
        plain += [each.variable + "_TO" for each in CONNECTION_SETTINGS.values()]
        names = [name for name in sorted(self.environment) if name.upper().startswith("SLS_")]
        unknown = [name for name in names if name not in plain and not TARGET_VARIABLE.fullmatch(name)]
        links = [name for name in unknown if re.fullmatch(SERVICE_LINK_NAME, name)]
        if links:
            words = "%s: Kubernetes sets it for a Service that is called like that; not with enableServiceLinks: false"
            self.warnings.append(words % ", ".join(links))
        for name in sorted(set(unknown) - set(links)):
            number = re.search("[^0-9](%s)$" % TARGET_NUMBER, name)
            possible = plain + [stem + (number.group(1) if number else "1") for stem in TARGET_STEMS]
            nearest = difflib.get_close_matches(name.upper(), possible, 1, 0)[0]
            meant = foreign_name(name) if foreign_name(name) in possible else nearest
            self.warnings.append("%s is not a setting of this program; did you mean %s?" % (name, meant))


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`, names to texts. Raises SettingsError, with every problem there is."""
    parser = SettingsParser(environment)
    parser.warn_of_unknown_variables()
    source = parser.read_logstore(SOURCE_LOGSTORE, [""])
    consumer_group = parser.read(CONSUMER_GROUP)
    targets = tuple(parser.read_targets(source))
    tuning = {name: parser.read(setting) for name, setting in TUNING_SETTINGS.items()}
    configs = [source, *(target.config for target in targets)]
    parser.read_network(configs)
    warnings = list(dict.fromkeys(parser.warnings))
    if parser.errors:
        raise SettingsError(*dict.fromkeys(parser.errors), *warnings)
    for name in dict.fromkeys(config.variables["SLS_STS_TOKEN"] for config in configs if config.security_token):
        warnings.append("%s can't renew itself, and this copy ends when it has run out; SLS_CREDENTIALS can" % name)
    # No error: a volume of a pod's own may have mode 0777, and in its pod nobody else is there.
    if tuning["rejected_dir"] and os.stat(tuning["rejected_dir"]).st_mode & 0o002:
        words = "SLS_REJECTED_DIR: any user can write to %s, and so remove or replace what is set aside; chmod 700 it"
        warnings.append((words + ", unless there are no others, as in a pod") % tuning["rejected_dir"])
    start = tuning["cursor_start"]
    shown = start if isinstance(start, str) else format_with_utc(start)
    notes = ["SLS_CURSOR_START, where a group without checkpoints begins: %s" % shown]
    if isinstance(start, int):
        warnings += local_time_warnings("SLS_CURSOR_START", parser.environment["SLS_CURSOR_START"], start)
    if not parser.any_topic_set:
        notes.append("no SLS_TOPIC_TO<n> is set: the default topics apply")
        for number in sorted(DEFAULT_TOPICS.keys() - {target.number for target in targets}):
            words = "no SLS_LOGSTORE_TO%d is set: its default topics, %s, go nowhere"
            warnings.append(words % (number, DEFAULT_TOPICS[number]))
    return Settings(source=source, consumer_group=consumer_group, targets=targets, warnings=tuple(warnings),
                    notes=tuple(notes), **tuning)  # fmt: skip


# ---- log groups: passed on as bytes ---------------------------------------------------------------------------------

# Fields of the protobuf messages LogGroupList and LogGroup (proto2): their numbers, as keys of length-delimited fields.
LOG_GROUPS_KEY = 1 << 3 | 2
LOGS_KEY, TOPIC_KEY, LOG_TAGS_KEY = 1 << 3 | 2, 3 << 3 | 2, 6 << 3 | 2
PACK_ID_TAG = b"\x0a\x0b__pack_id__"  # how a LogTag begins whose Key is __pack_id__


class LogGroup(NamedTuple):
    """A LogGroup as it came over the wire, in two pieces; its names are those of the SDK's message."""

    Topic: str
    log_count: int
    logs: bytes | memoryview  # the serialised fields Logs, a view into the pull they came with
    envelope: bytes  # every other field
    mergeable: bool = True  # else there are Logs in the envelope as well

    def SerializeToString(self) -> bytes:
        return b"".join([self.logs, self.envelope])


class PutRequest:
    """LogGroups equal in everything but their logs, which travel as one. `put_log_raw` accepts it in the place of the
    SDK's LogGroup message."""

    __slots__ = (
        "began", "envelope", "failures", "first_rejection", "log_count", "log_groups", "rejections", "size", "target",
        "timeout",
    )  # fmt: skip
    target: Target  # set by whoever makes it
    began: float  # when it was tried last, by the monotonic clock

    def __init__(self, envelope: bytes) -> None:
        self.log_groups: list[LogGroup] = []
        self.envelope = envelope
        self.log_count = 0
        self.size = len(envelope)  # bytes, uncompressed
        self.timeout = 0.0  # seconds for its next answer, where there is reason for more than RESPONSE_TIMEOUT
        self.failures = 0  # tries that failed
        self.rejections = 0  # of these, how often the service has refused it for what it brings
        self.first_rejection = -1.0  # when it, or the put it was split from, was rejected first, by the monotonic clock

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

    Raises ValueError or IndexError where these bytes are no message.
    """
    open_groups: list[int] = []  # the field numbers of protobuf's groups, each within the one before it
    start = position
    while position < end:
        key, value = read_varint(data, position)
        wire_type = key & 7
        if wire_type == 2:
            length, value = read_varint(data, value)
            position = value + length
        elif wire_type == 0:
            position = read_varint(data, value)[1]
        elif wire_type in (1, 5):
            position = value + (8 if wire_type == 1 else 4)
        elif wire_type == 3:
            open_groups.append(key >> 3)
            position = value
        elif wire_type == 4 and open_groups and open_groups.pop() == key >> 3:
            position = value
        else:
            raise ValueError("wire type %d" % wire_type)
        if position > end or key < 8:
            raise ValueError("a field that is none, or goes beyond its message")
        if not open_groups:
            yield key, start, value, position
            start = position
    if open_groups:
        raise ValueError("a group without an end")


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
    text = topic.decode("utf-8", "replace")
    return LogGroup(text, log_count, view[start:rest_start], data[rest_start:end], mergeable)


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
    data: bytes = response._raw_uncompressed_body or b""  # type: ignore[attr-defined]
    size = response.get_raw_size()
    if len(data) != size:
        raise ValueError("a pull of %d bytes, announced as %d" % (len(data), size))
    try:
        return read_log_group_list(data)
    except (ValueError, IndexError):
        raise ValueError("a pull of %d bytes is no LogGroupList" % size) from None


def without_pack_id(envelope: bytes) -> bytes:
    """The envelope of a LogGroup but for the tag with which an agent numbers its packs."""
    if PACK_ID_TAG not in envelope:
        return envelope
    kept = [envelope[start:end] for key, start, value, end in read_fields(envelope, 0, len(envelope))
            if not (key == LOG_TAGS_KEY and envelope.startswith(PACK_ID_TAG, value))]  # fmt: skip
    return b"".join(kept)


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
        if not log_group.mergeable:
            puts.append(PutRequest(log_group.envelope).add(log_group))
            continue
        merge_key = without_pack_id(log_group.envelope) if merge_packs else log_group.envelope
        put = growing.get(merge_key)
        if (not put or put.size + len(log_group.logs) > MAX_MERGED_BYTES
                or put.log_count + log_group.log_count > MAX_MERGED_LOGS):  # fmt: skip
            put = growing[merge_key] = PutRequest(log_group.envelope)
            puts.append(put)
        put.add(log_group)
    return puts


# ---- failures: how they are shown, what they mean, and how long it is tried again ------------------------------------


class Redactor:
    """Keeps secrets out of all that is shown.

    A secret that may be a word or a number is hidden only where it stands alone, any other within words as well; each
    as it is, and as URLs, JSON, HTML or a repr write it.
    """

    MAX_LENGTH = 10000  # characters of a secret, as others may write it
    # Alone: no letter, digit or _ is next to it, unless it is the end of an escape such as \n, \x0a, \u000a or %0A.
    BEGINS = r"(?:(?<![A-Za-z0-9_])|(?<=\\[abfnrtv])|(?<=\\x..)|(?<=\\u....)|(?<=%[0-9A-F].)|(?<=%[0-9a-f].))"
    ENDS = "(?![A-Za-z0-9_])"

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards:
        self.secrets: Mapping[str, float] = {}  # text -> when it ends, unix seconds
        self.pattern = re.compile("(?!)")  # finds any of them

    def add(self, end: float, *texts: str | None) -> None:
        """Has these texts hidden until some time after their `end` (unix seconds), for clocks may differ."""
        with self.lock:
            kept = {text: its_end for text, its_end in self.secrets.items() if its_end > time.time() - 3600}
            self.secrets = {**kept, **{text: end for text in texts if text}}
            longest_first = sorted(self.secrets, key=len, reverse=True)  # one may begin with another
            self.pattern = re.compile("|".join(map(self.pattern_of, longest_first)) or "(?!)")

    def pattern_of(self, secret: str) -> str:
        """Of all its spellings."""
        spelt, most = "", "15"  # backslashes before a character; without a limit at the first, rows take quadratic time
        for char in secret:
            if re.fullmatch("[A-Za-z0-9_.~-]", char):
                spelt += re.escape(char)
            else:
                encoded = char.encode("utf-8", "surrogateescape")
                codes = "".join(r"(?:%%(?:25)*|\\{1,%s}x)%02x" % (most, byte) for byte in encoded)
                words = most, ord(char), most, re.escape(char)
                spelt += r"(?:(?i:%s|\\{1,%s}u%04x)|&#?\w+;|\\{0,%s}%s)" % (codes, *words)
            most = ""
        # Such as Password, max_size, TOKEN or 10.0.0.1; and what is short.
        may_be_word = re.fullmatch("[A-Za-z]?[a-z_-]*|[A-Z_-]*|[0-9.:-]*", secret) and len(secret) < 20
        stands_alone = may_be_word or len(secret) < 8
        begins, ends = (stands_alone and re.match("[A-Za-z0-9_]", char) for char in (secret[0], secret[-1]))
        return (self.BEGINS if begins else "") + spelt + (self.ENDS if ends else "")

    def redact(self, text: str) -> str:
        return self.pattern.sub("***", text)

    def cut(self, text: str, longest: int) -> str:
        """Redacts a text and cuts it to its first `longest` characters, in this order: half a secret is not known."""
        if len(text) <= longest:
            return self.redact(text)
        found = self.pattern.finditer(text, 0, longest + self.MAX_LENGTH)
        end = max([longest, *(one.end() for one in found if one.start() < longest)])
        return self.redact(text[:end])[:longest] + "..."


redactor = Redactor()


def escape(text: str) -> str:
    """The text on one line, without what a terminal might obey."""
    return text if text.isprintable() else repr(text)[1:-1]


def escape_for_log(text: str, longest: int = 300) -> str:
    """What others have written, safe to show on one line: without secrets, cut where it is too long, escaped."""
    return escape(redactor.cut(text, longest))


def show(text: str, file: TextIO | None = None) -> None:
    """Prints lines on stdout, or another stream, without secrets, and escaped. Raises OSError."""
    print("\n".join(map(escape, redactor.redact(text).split("\n"))), file=file, flush=True)


class LogThrottle:
    """Lets pass the first line about what happens again and again, and further ones ever less often."""

    FIRST, LONGEST = 10.0, 600.0  # seconds between them

    def __init__(self) -> None:
        self.next, self.interval = 0.0, self.FIRST

    def allow(self) -> bool:
        """To be called for each line. Returns whether it may be written; if so, the next one has to wait longer."""
        now = time.monotonic()
        if now < self.next:
            return False
        self.next, self.interval = now + self.interval, min(self.interval * 2, self.LONGEST)
        return True


REQUEST_ID = "x-log-requestid"  # every answer of the service bears it; what doesn't came from something on the way


class ErrorKind(enum.Enum):
    """Whose fault it is that a call failed. A put of the kinds REJECTED or BLOCKED is called blamed."""

    TRANSIENT = "will pass"
    CONFIG = "has to be mended by somebody"
    CREDENTIALS = "has to be mended by somebody, unless the key is one that is refreshed"
    REJECTED = "blames what the put brings"
    BLOCKED = "nobody knows: something on the way blames the size of the put"
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
        "KeyFileExposed": "chmod 600 what {SLS_CREDENTIALS} names, or 640; in a Secret's volume set defaultMode: 0400",
        "RequestTimeExpired RequestTimeTooSkewed": "this machine's clock must be right to 15 minutes",
        "ConsumerGroupQuotaExceed": "the logstore has all the consumer groups it may have: delete one that nobody "
                                    "uses, in the console or by `aliyunlog log delete_consumer_group`, or ask for more",
        "ConsumerGroupNotExist": "the consumer group was deleted, and its checkpoints with it: start the copies again "
                                 "to make it anew, from SLS_CURSOR_START on",
        "ShardNotExist": "the shard, or the logstore it was in, is gone",
        "UnreadableCheckPoint": "somebody saved what is none: set it to a cursor of the shard, in the console or by "
                                "`aliyunlog log update_check_point`, and the shard goes on by itself",
        "InvalidCursor InvalidShardCheckPoint":
            "{SLS_LOGSTORE} may have been deleted and made again: then start the copies again",
        "LocalFailure": "neither the service nor the network is to blame: the call failed within this process",
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
        "CertificateNotTrusted": "the certificate is not trusted; REQUESTS_CA_BUNDLE can name a file of CAs, which is "
                                 "read again when it changes",
        "CAsUnreadable": "REQUESTS_CA_BUNDLE must name a file of CA certificates in PEM that this process can read",
        "NoShards": "{SLS_LOGSTORE} has no shards yet, as for a moment after it was made",
        "OutOfMemory": "this process gets no more memory: raise its limit",
        "TooManyOpenFiles": "this process may open no more files: raise `ulimit -n` (LimitNOFILE in systemd)",
        "UnreadablePull": "nothing of it is delivered or skipped; it is pulled again",
        "MissingCheckPoint": "it is looked for again; if it stays away, the shard begins as in a new group",
        "NotTheService": "something else answers for {SLS_ENDPOINT}: look at its name, at gateways and portals on the "
                         "way, at the proxy variables (http_proxy, https_proxy, no_proxy)",
    },
    ErrorKind.REJECTED: {
        "PostBodyTooLarge PostBodyInvalid PostBodyUncompressError InvalidKey InvalidEncoding InvalidTimestamp":
            "the service won't take this LogGroup, see SLS_REJECTED_DIR",
        "ParameterInvalid": "the service won't take this call; if it is a put, see SLS_REJECTED_DIR",
    },
    ErrorKind.BLOCKED: {
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
    code: (kind, hint)
    for kind, hints in ERROR_CATALOGUE.items()
    for codes, hint in hints.items()
    for code in codes.split()
}  # fmt: skip
REJECTION_CODES = [code for code, (kind, _) in ERROR_BY_CODE.items() if kind is ErrorKind.REJECTED]
# The service answers Unauthorized for an unknown key, too, and for more. What stands first in this table counts.
UNAUTHORIZED = {
    "denied": (ErrorKind.CONFIG, PERMISSION_HINT),  # such messages name the logstore, which may be expired-tokens
    "accesskeyid not found": (ErrorKind.CREDENTIALS, "{SLS_AK_ID} must be a key that exists"),
    "accesskeyid is disabled": (ErrorKind.CREDENTIALS, "{SLS_AK_ID} is disabled: enable it, or set another"),
    "expired": (ErrorKind.CREDENTIALS, EXPIRED_TOKEN_HINT),
    "token": (ErrorKind.CREDENTIALS, "{SLS_STS_TOKEN} must be the token that came with {SLS_AK_ID}"),
    "forbidden": (ErrorKind.CONFIG, "the account of {SLS_AK_ID} is in arrears, or its Log Service is locked"),
}


class CallError(Exception):
    """One call that the service refused, or that got no answer of the service.

    It is no LogException: LogClient repeats a call that raises one, some ten times, a second apart.
    """

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        """`code` is the service's, or one of the program's own; `status` is HTTP's, None without an answer."""
        self.code = escape_for_log(code.replace("SecurityToken.", "SecurityToken"), 60)  # also SecurityToken.Expired
        self.message, self.status = message, status
        self.kind, self.hint = self.meaning()
        super().__init__("%s%s: %s" % ("%d " % status if status else "", self.code, escape_for_log(message)))

    def meaning(self) -> tuple[ErrorKind, str]:
        """Its kind, and what to do about it."""
        if self.status is not None and self.status >= 500 and self.code != "NotTheService":  # whatever it says
            return ErrorKind.TRANSIENT, OUTAGE_HINT
        for words, meaning in UNAUTHORIZED.items() if self.code == "Unauthorized" else ():
            if words in self.message.lower():
                return meaning
        kind_of_unknown = ErrorKind.TRANSIENT if self.status in (None, 429) else ErrorKind.CONFIG
        return ERROR_BY_CODE.get(self.code, (kind_of_unknown, ""))

    @classmethod
    def from_exception(cls, error: Exception) -> CallError:
        """For a call that ended in an exception; the cause of urllib3's is often one of the operating system's."""
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
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                error = json.loads(body)
                return cls(str(error["errorCode"]), str(error["errorMessage"]), status)
        beginning = escape_for_log(body[: Redactor.MAX_LENGTH].decode("utf-8", "replace"), 100)
        text = "%s %s" % (headers.get("content-type", ""), beginning)
        return cls("RequestEntityTooLarge" if status == 413 else "NotTheService", text.strip(), status)

    def is_transient(self) -> bool:
        """Whether time alone may mend it."""
        return self.kind == ErrorKind.TRANSIENT


def describe_error(error: Exception, config: LogstoreConfig) -> str:
    """An error in one line, with what to do about it."""
    if not isinstance(error, CallError):
        return escape_for_log(repr(error))
    return "; ".join(filter(None, [str(error), error.hint.format(**config.variables)]))


class StartupError(Exception):
    """The program can't do what it is for; the text has a line for each reason. It is not retried."""


class Watchdog:
    """Knows by name the loops that must not stand still, and ends the connections whose deadline has passed."""

    CHECK_INTERVAL = 0.1  # seconds between looks at the deadlines

    def __init__(self) -> None:
        self.loops: dict[str, threading.Thread] = {}
        # When each thread said last that it goes on, by the monotonic clock; infinity while it is excused.
        self.beats: weakref.WeakKeyDictionary[threading.Thread, float] = weakref.WeakKeyDictionary()
        self.deadlines: set[Deadline] = set()
        self.lock = threading.Lock()  # guards its start
        self.thread = threading.Thread(target=self.run, name="ends silent connections", daemon=True)

    @contextlib.contextmanager
    def watching(self, loop: str, is_permanent: bool = False) -> Iterator[None]:
        """Watches a loop, in a `with` around it; its thread has to `beat`. One that is permanent stays watched after it
        has ended, and then counts as standing still. Where several threads have loops of one name, that of the last to
        begin is watched."""
        thread = threading.current_thread()
        self.beat()
        self.loops[loop] = thread
        try:
            yield
        finally:
            if self.loops.get(loop) is thread and not is_permanent:
                del self.loops[loop]

    def beat(self) -> None:
        self.beats[threading.current_thread()] = time.monotonic()

    def excuse(self) -> None:
        """The calling thread waits for an answer of the service; until its next beat it doesn't count as stuck."""
        self.beats[threading.current_thread()] = float("inf")

    def stuck(self, seconds: float) -> dict[str, float]:
        """The loops that have stood still for longer, and for how many seconds."""
        now = time.monotonic()
        still = {loop: now - self.beats.get(thread, now) for loop, thread in list(self.loops.items())}
        return {loop: seconds_still for loop, seconds_still in still.items() if seconds_still > seconds}

    def start(self) -> None:
        """Begins to look at deadlines, unless that has begun; to be called before the first connection is opened."""
        with self.lock:
            if not self.thread.ident:
                self.thread.start()

    def run(self) -> None:
        with self.watching(self.thread.name, is_permanent=True):
            while True:
                time.sleep(self.CHECK_INTERVAL)
                with contextlib.suppress(Exception):  # any, such as MemoryError: they are looked at again in a moment
                    self.beat()
                    for one in list(self.deadlines):
                        with contextlib.suppress(Exception):  # what others wait for is ended all the same
                            if one.is_over():
                                one.abort()


watchdog = Watchdog()


class Cancelled(Exception):
    """What was asked for is not wanted any more."""


class CancelToken:
    """Says whether work is still wanted. Once cancelled it stays so, and so do the tokens made of it: at once or, with
    `grace`, so many seconds later, which leaves time for what has begun.

    Which tokens there are, and what each ends, is said at the head of the section on the consumer.
    """

    def __init__(self, *parents: CancelToken, grace: float = 0.0) -> None:
        self.parents, self.grace = parents, grace
        self.own_time = float("inf")

    def cancel(self) -> None:
        self.own_time = min(self.own_time, time.monotonic())

    def cancelled_at(self) -> float:
        """When it was, or will be, cancelled, by the monotonic clock; infinity as long as nobody knows."""
        return min([self.own_time, *[parent.cancelled_at() + self.grace for parent in self.parents]])

    def is_cancelled(self) -> bool:
        return self.cancelled_at() <= time.monotonic()

    def check(self) -> None:
        """Raises Cancelled if it is."""
        if self.is_cancelled():
            raise Cancelled

    def sleep(self, seconds: float) -> None:
        """Sleeps; raises Cancelled as soon as it is."""
        end = time.monotonic() + seconds
        while True:
            self.check()
            watchdog.beat()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(0.05, left))


class Lease(CancelToken):
    """A consumer's right to its shards: cancelled when heartbeats don't renew it within the group's timeout; then the
    service may have given the shards to others. Only an answered heartbeat tells that it has not."""

    CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the process or the machine sleeps

    def __init__(self, seconds: float) -> None:
        """`seconds` is the group's timeout."""
        super().__init__()
        self.seconds = seconds
        self.expires = float("inf")  # before the first heartbeat is answered there are no shards to lose
        self.reason = ""  # for which it was cancelled, the first

    @classmethod
    def now(cls) -> float:
        return time.clock_gettime(cls.CLOCK)

    def renew(self, sent: float) -> bool:
        """Extends it, for a heartbeat that was `sent` then, by the lease's clock, and is answered now. Returns whether
        that answer renews it: none renews a lease that has expired, nor does one that took longer than the group's
        timeout."""
        expires = sent + self.seconds
        if self.now() > min(self.expires, expires):
            return False
        self.expires = expires if self.expires == float("inf") else max(self.expires, expires)
        return True

    def cancel(self, reason: str = "") -> None:
        self.reason = self.reason or reason
        super().cancel()

    def cancelled_at(self) -> float:
        """An expired lease counts as cancelled when that is first noticed, not when it expired: where the machine has
        slept meanwhile, what had begun still has its grace."""
        if self.now() > self.expires:
            self.cancel("not heard of for longer than the group's timeout, %g s" % self.seconds)
        return super().cancelled_at()


INITIAL_BACKOFF, MAX_BACKOFF = 0.1, 5.0  # seconds


def backoff(failures: int, longest: float = float("inf")) -> float:
    """Seconds to wait after so many failures in a row: exponential, with jitter so that copies don't retry in step."""
    return min(INITIAL_BACKOFF * 2 ** min(failures - 1, 30), longest, MAX_BACKOFF) * random.uniform(0.5, 1.0)


class RetryLog:
    """Retries calls of one kind to one place until they succeed, by `retry`, and tells of their failures. The PutLoop
    and Drain retry by themselves, and have theirs told here.

    The first failure is told, then sums at growing intervals, then the end: when nothing that failed waits for another
    try, something has succeeded since the last failure, and RECOVERY_QUIET seconds have passed.
    """

    RECOVERY_QUIET = 5.0  # seconds

    def __init__(self, subject: str, calls: str, failure_text: str, config: LogstoreConfig) -> None:
        """`calls` names them, such as "puts"; `failure_text` says what happens to one that failed."""
        self.subject, self.calls, self.failure_text, self.config = subject, calls, failure_text, config
        self.lock = threading.Lock()  # guards:
        self.failing: set[object] = set()  # what has failed and is to be retried
        self.failures = 0  # since all was well
        self.codes: set[str] = set()  # of those failures; a new one is told at once
        self.since = self.last = 0.0  # when the first and the last of them came, by the monotonic clock
        self.throttle = LogThrottle()
        self.last_success = 0.0  # by the same clock; written by whoever has one

    def retry(self, what: object, call: Callable[[], Any], token: CancelToken, longest: float = float("inf")) -> Any:
        """Calls until that succeeds, with backoff of at most `longest` seconds, and returns its value. `what` tells one
        thing to be done from another.

        Raises Cancelled once `token` is cancelled, and StartupError as `call` does.
        """
        try:
            for failures in itertools.count(1):
                token.check()
                try:
                    value = call()
                    self.on_success(what)
                    return value
                except (Cancelled, StartupError):
                    raise
                except Exception as error:
                    self.on_failure(what, error)
                token.sleep(backoff(failures, longest))
        finally:
            self.on_done(what)

    def on_failure(self, what: object, error: Exception) -> None:
        """Takes note that `what` has failed and will be retried."""
        # Codes that nobody knows count as one: else each could be new, and get a line of its own.
        code = error.code if isinstance(error, CallError) and error.code in ERROR_BY_CODE else type(error).__name__
        with self.lock:
            self.last = time.monotonic()
            if not self.failures:
                self.since, self.throttle, self.codes = self.last, LogThrottle(), set()
            self.failures += 1
            self.failing.add(what)
            is_new = code not in self.codes
            self.codes.add(code)
            if not self.throttle.allow() and not is_new:
                return
            failures, seconds = self.failures, self.last - self.since
        with contextlib.suppress(Exception):  # telling may fail as well, on a full disk or without memory
            line = "%s: %s: %s" % (self.subject, self.failure_text, describe_error(error, self.config))
            if failures > 1:
                line += " (%d failed tries in %.0f s)" % (failures, seconds)
            is_transient = isinstance(error, CallError) and error.is_transient()
            log.log(logging.WARNING if is_transient else logging.ERROR, "%s", line)

    def on_success(self, what: object) -> None:
        """Takes note that `what` has succeeded."""
        self.last_success = time.monotonic()
        self.failing.discard(what)

    def on_done(self, what: object) -> None:
        """Takes note that `what` is not tried again, whether it has succeeded or nobody wants it any more."""
        self.failing.discard(what)

    def report_recovery(self) -> None:
        """Tells when the failures are over; to be called now and then."""
        with self.lock:
            is_over = not self.failing and self.last_success >= self.last
            if not self.failures or not is_over or time.monotonic() - self.last < self.RECOVERY_QUIET:
                return
            told = self.subject, self.calls, self.failures, self.last - self.since
            self.failures = 0
        log.warning("%s: %s recovered after %d failed tries in %.0f s", *told)


# ---- credentials: where access keys come from, and how they are refreshed --------------------------------------------

ECS_METADATA_URL = "http://100.100.100.200/latest/"  # answers on an ECS instance, and nowhere else
LOCAL_TIMEOUT = 2.0  # seconds, for the metadata service and local agents
STS_TIMEOUT = 10.0  # seconds
FIRST_CREDENTIALS_TIMEOUT = 15.0  # seconds that calls wait for the outcome of the first try to get a key
STS_DURATION = 3600  # seconds that a key lives which STS is asked for
REFRESH_MARGIN = 15 * 60  # seconds that a key is refreshed before it ends; half of its rest, if that is less
REFRESH_POLL = 1.0  # seconds between looks at whether it is time for another key
MAX_ANSWER_BYTES = 1000 * 1000  # of any answer but a pull's or a put's, head included: a list of 4000 shards fits in
USER_AGENT = {"User-Agent": "dispatch_data/" + __version__}


def unix_seconds(value: Any) -> float:
    """Of a time with its zone, or of unix seconds or milliseconds, which their size tells apart. Raises ValueError."""
    try:
        number = float(value)
    except ValueError:
        text = re.sub(r"(?<=:\d\d)\.\d+", "", value).replace(" ", "T").upper()
        end = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
        return min(end, 1e10)  # the year 9999 is another in some zones, and can't be shown there
    number /= 1000 if number >= 1e12 else 1
    if not 1e9 <= number < 1e10:
        raise ValueError(number)
    return number


# The fields of the JSON that all sources give, and how each is read.
CREDENTIAL_FIELDS: dict[str, Callable[[Any], Any]] = {
    "AccessKeyId": check_secret, "AccessKeySecret": check_secret, "SecurityToken": check_secret,
    "Expiration": unix_seconds,
}  # fmt: skip


class AccessKey(Credentials):
    """An access key that ends at `end` (unix seconds); `role` says whose it is, "" where that is not known."""

    def __init__(self, key_id: str, secret: str, token: str, end: float = float("inf"), role: str = "") -> None:
        super().__init__(key_id, secret, token)
        self.end, self.role = end, role

    def __str__(self) -> str:
        tense = "ended" if time.time() >= self.end else "ends"
        return "%s%s %s" % ("role %s, " % self.role if self.role else "", tense, format_with_utc(self.end))


def http_request(method: str, url: str, headers: Mapping[str, str] = USER_AGENT, form: object = None) -> str:
    """Sends one short request and returns the text of an answer 200. Raises CallError for any other, and for none.

    http:// is for what is near, and asked without a proxy; https:// is for STS. requests' timeout begins again with
    each byte: so the body is read byte by byte, as long as there is time.
    """
    is_far, body = url.startswith("https:"), b""
    seconds = STS_TIMEOUT if is_far else LOCAL_TIMEOUT
    end = time.monotonic() + seconds
    options: Any = {"headers": headers, "data": form, "timeout": seconds, "allow_redirects": False, "stream": True}
    no_auth = (lambda request: request) if is_far else None  # else requests would send what ~/.netrc has by default
    try:
        with requests.Session() as session:
            session.trust_env = is_far  # its proxies, its CAs
            with session.request(method, url, auth=no_auth, **options) as answer:
                for byte in answer.iter_content(1):
                    body += byte
                    if time.monotonic() > end or len(body) > MAX_ANSWER_BYTES:
                        raise requests.Timeout("the answer has no end")
    except requests.RequestException as error:
        reason = getattr(error.args[0], "reason", error) if error.args else error  # without the URL, a secret maybe
        is_untrusted = isinstance(next(iter(reason.args), None), ssl.SSLCertVerificationError)
        code = "CertificateNotTrusted" if is_untrusted else "NoKey"
        raise CallError(code, "%s: %s" % (type(reason).__name__, reason)) from None
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
    name = ""
    values: list[Any] = []
    try:
        answer = json.loads(text)
        answer = answer.get("Credentials", answer)
        if answer.get("Code", "Success") != "Success":
            raise CallError("KeyRefused", "%s: %s" % (answer["Code"], answer.get("Message")))
        for name, check in CREDENTIAL_FIELDS.items():
            values.append(check(answer[name]))
        key_id, key_secret, token, end = values
        return AccessKey(key_id, key_secret, token, end, role)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):  # their text may show what was to be read
        words = "what came isn't JSON with " + ", ".join(CREDENTIAL_FIELDS)
        hints = {"": "", "Expiration": "; look at Expiration, a time with its zone such as 2026-11-25T21:55:47Z"}
        raise CallError("NoKey", words + hints.get(name, "; look at " + name)) from None  # the field that was read last


def from_ecs_metadata(role: str) -> AccessKey:
    """From the metadata service of the ECS instance: in its hardened form or, where it has none, in the older one."""
    headers = {"X-aliyun-ecs-metadata-token-ttl-seconds": "21600"}
    try:
        headers = {"X-aliyun-ecs-metadata-token": http_request("PUT", ECS_METADATA_URL + "api/token", headers)}
        redactor.add(time.time(), *headers.values())
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
    redactor.add(time.time() + STS_DURATION, token)
    query = {"Action": "AssumeRoleWithOIDC", "Version": "2015-04-01", "Format": "JSON",
             "Timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
    form = {"RoleArn": role, "OIDCProviderArn": provider, "OIDCToken": token, "DurationSeconds": STS_DURATION,
            "RoleSessionName": os.environ.get("ALIBABA_CLOUD_ROLE_SESSION_NAME") or "dispatch_data"}  # fmt: skip
    host = os.environ.get("ALIBABA_CLOUD_STS_ENDPOINT") or "sts.aliyuncs.com"  # the cluster sets that of its region
    return parse_credentials(http_request("POST", "https://%s/?%s" % (host, urlencode(query)), form=form), role)


def from_file(path: str) -> AccessKey:
    """From a file that a sidecar rewrites. Raises CallError, OSError."""
    with open(path, encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_mode & 0o007:
            raise CallError("KeyFileExposed", "others can get at " + path)
        return parse_credentials(file.read())


# What stands before the colon of SLS_CREDENTIALS -> how to get a key by what stands after it.
KEY_FETCHERS = {
    "ecs": from_ecs_metadata,
    "oidc": from_oidc,
    "http": lambda rest: parse_credentials(http_request("GET", "http:" + rest)),
    "file": from_file,
}


class CredentialSource(CredentialsProvider):
    """The access key of one source for all who sign with it: the SDK asks at each signature, from many threads.

    One thread refreshes it ahead of its end, and everybody else goes on with the key there is until that has really
    ended. A key of the settings stays what it is.
    """

    def __init__(self, config: LogstoreConfig) -> None:
        self.kind, _, self.detail = config.credentials.partition(":")  # see KEY_FETCHERS; "" for a key of the settings
        self.name = config.variables.get("SLS_CREDENTIALS" if self.kind else "SLS_STS_TOKEN", "")
        self.refresh_retries = RetryLog(self.name, "renewals", "no new key yet, trying again", config)
        self.key = None if self.kind else AccessKey(config.access_key_id, config.access_key, config.security_token)
        self.failure: CallError | None = None  # of the last try
        self.first_try_done = threading.Event()
        self.refresh_at = 0.0  # unix seconds
        self.refreshed_at = 0.0  # by the monotonic clock
        self.is_expired = False  # for good: the service has said so of a token of the settings
        if self.kind == "http":
            url = urlsplit(config.credentials)
            redactor.add(float("inf"), url.password, unquote(url.password or ""), url.query)

    def start(self) -> CredentialSource:
        """Has the key refreshed from now on, in a thread of its own. Returns itself."""
        if self.kind:
            threading.Thread(target=self.refresh_loop, name="refreshes credentials", daemon=True).start()
        return self

    def __str__(self) -> str:
        """Where the key comes from, whose it is, and when it ends."""
        shown = "//" + urlsplit(self.detail).netloc.rpartition("@")[2] if self.kind == "http" else self.detail
        return "%s, %s" % (":".join(filter(None, [self.kind, shown])), self.key or "no key yet")

    def get_credentials(self) -> AccessKey:
        """Called by the SDK. Waits for nothing but the outcome of the very first try. Raises CallError."""
        if not self.key:
            self.first_try_done.wait(FIRST_CREDENTIALS_TIMEOUT)
            self.first_try_done.set()  # also after a wait in vain: no thread is to wait a second time
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
        never = CancelToken()
        while True:
            if time.time() >= self.refresh_at:
                self.refresh_retries.retry("key", self.refresh, never)
            time.sleep(REFRESH_POLL)

    def refresh(self) -> None:
        """Gets a key from its source; the one before stays where that fails. Raises CallError."""
        try:
            key = KEY_FETCHERS[self.kind](self.detail)
            redactor.add(key.end, key.access_key_secret, key.security_token)
            now = time.time()
            if key.end <= now:
                raise CallError("NoKey", "what came is dead: %s, now is %s" % (key, format_with_utc(now)))
            # A file may be written anew at any time, and costs nothing to look at.
            self.refresh_at = 0.0 if self.kind == "file" else key.end - min(REFRESH_MARGIN, (key.end - now) / 2)
            self.key, self.refreshed_at, self.failure = key, time.monotonic(), None
        except Exception as error:  # any: the only thread that can get a key must not end
            if not isinstance(error, CallError):
                error = CallError("NoKey", "%s: %s" % (type(error).__name__, error))
            self.failure = CallError(error.code, redactor.redact(error.message), error.status)
            raise self.unavailable() from None
        finally:
            self.first_try_done.set()

    def on_auth_failure(self, failure: CallError, token: str) -> None:
        """For a call that failed, signed with the key of this security token. If it was for the key, and another can be
        had, makes the failure transient, so that the call is retried, and asks for that key, unless it has come since.
        """
        if not token or failure.kind != ErrorKind.CREDENTIALS:
            return
        if not self.kind:
            self.is_expired |= failure.hint == EXPIRED_TOKEN_HINT
            return
        failure.kind, failure.hint = ErrorKind.TRANSIENT, "{SLS_CREDENTIALS} is asked for another key"
        # One that has just come is not to blame at once: it may not be known everywhere yet.
        if self.key and self.key.security_token == token and time.monotonic() - self.refreshed_at > MAX_BACKOFF:
            self.refresh_at = 0.0


class CredentialSources:
    """A CredentialSource for each distinct key of the settings, made when it is first asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards:
        self.by_key: dict[tuple[str, ...], CredentialSource] = {}

    def of(self, config: LogstoreConfig) -> CredentialSource:
        """The same for all logstores whose key comes from the same source."""
        key = config.credentials, config.access_key_id, config.access_key, config.security_token
        with self.lock:
            if key not in self.by_key:
                self.by_key[key] = CredentialSource(config).start()
            return self.by_key[key]

    def expiring(self, settings: Settings) -> list[CredentialSource]:
        """The CredentialSources whose keys end, each once, the source logstore's first."""
        ending = [config for config in settings.logstores() if config.credentials or config.security_token]
        return list(dict.fromkeys(map(self.of, ending)))


# ---- the service: connections and calls ------------------------------------------------------------------------------

CONNECT_TIMEOUT = 10  # seconds
RESPONSE_TIMEOUT = 30  # seconds for a call, and more as long as bytes move, see Deadline
MAX_RESPONSE_TIMEOUT = 120  # seconds: after a call that ran out of time the next one gets twice as much, up to this
MIN_THROUGHPUT = 10 * 1000  # bytes a second; what moves no faster is given up
# Bytes that an answer to a pull may have, its head included. A pull is asked for as much as the memory suits, but one
# LogGroup may have 10 MB (the SDKs' own limit is 30), and nothing says how many more come with it.
MAX_PULL_BYTES = 100 * 1000 * 1000
MAX_PUT_ANSWER_BYTES = 100 * 1000  # an answer is empty, or an error; whenever more has come it is read anew, whole
MAX_IDLE = 50  # seconds after which a connection isn't used again: a NAT or firewall may have forgotten it
MAX_AGE = 300  # seconds, too: the host may have another address by now, and the CAs may be others
# What may be raised, beside CallError, where a connection is opened, a request sent or its answer read.
NETWORK_ERRORS = (OSError, ValueError, http.client.HTTPException, urllib3.exceptions.HTTPError)


def forget_unsent(sock: socket.socket) -> None:
    """Has the kernel forget, once a socket is closed, what it has not sent: else a put or a checkpoint that was given
    up might arrive much later. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Deadline:
    """By when a connection has to be opened, or an answer to be there. An open connection has no timeout of its socket:
    that would begin again with each byte, so that an answer may trickle for ever; it would cut off a large put on a
    slow line; and it doubles the number of system calls. The watchdog ends those whose deadline has passed."""

    def __init__(self, connection: Any, seconds: float) -> None:
        self.connection, self.end = connection, time.monotonic() + seconds

    def __enter__(self) -> Deadline:
        watchdog.deadlines.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        watchdog.deadlines.discard(self)

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def abort(self) -> None:
        """Called by the watchdog's thread: shuts the connection down. Whoever waits for it wakes up and closes it."""
        sock = self.connection.sock
        if sock:
            with contextlib.suppress(OSError):
                tcp_socket = getattr(sock, "socket", sock)  # what is below urllib3's TLS inside of TLS
                forget_unsent(tcp_socket)
                # An SSLSocket's own `shutdown` would take its TLS away from the thread that waits.
                socket.socket.shutdown(tcp_socket, socket.SHUT_RDWR)


class TrustedCAs:
    """The CAs of a file or directory, read again when they change, by whatever way: somebody appends to a file, renames
    another to it, leads a link elsewhere; and after a certificate that was not trusted, for not every change shows."""

    REREAD_INTERVAL = 5.0  # seconds at least between two readings after certificates that were not trusted

    def __init__(self, path: str) -> None:
        """Without a path they are those of the system or, where it has none, as in some containers and for a Python
        that was built elsewhere, those that requests brings."""
        system, of_system = ssl.get_default_verify_paths(), []
        with contextlib.suppress(OSError):
            of_system = [system.cafile] if system.cafile else []
            of_system += [system.capath] if system.capath and hashed_cas(system.capath) else []
        self.path = path or ("" if of_system else requests.utils.DEFAULT_CA_BUNDLE_PATH)
        self.watched = [self.path] if self.path else of_system
        self.lock = threading.Lock()  # guards:
        self.loaded: Any = None  # an SSLContext, one for all connections: to read takes 20 ms, to keep half a MB
        self.state: list[Any] | None = None  # of what is watched, when that was loaded; None: it is to be read again
        self.loaded_at = 0.0  # by the monotonic clock

    def context(self) -> ssl.SSLContext:
        """For a new connection. If files that have changed can't be read, the CAs read before stay in use. Raises
        CallError if there are none, or they were in doubt."""
        with self.lock:
            try:
                state = [(it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns) for it in map(os.stat, self.watched)]
                if state != self.state:
                    self.loaded, self.state, self.loaded_at = load_cas(self.path), state, time.monotonic()
            except (OSError, ValueError) as error:
                if self.state is None:
                    raise CallError("CAsUnreadable", str(error)) from error
            return self.loaded

    def doubt(self) -> None:
        """Takes note of a certificate that they don't vouch for."""
        with self.lock:
            if time.monotonic() - self.loaded_at > self.REREAD_INTERVAL:
                self.state = None


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
        self.uses_tunnel = bool(pool.proxy) and origin.startswith("https:")
        # TLS through an HTTPS proxy is TLS inside of TLS: urllib3's own, which can't send or receive without waiting.
        self.is_blocking = self.uses_tunnel and pool.proxy.scheme == "https"
        self.trusted_cas = TrustedCAs(pool.ca_certs or pool.ca_cert_dir or "") if pool.scheme == "https" else None
        pool.conn_kw.pop("ssl_context", None)  # some releases of requests share one among all pools, see `load_cas`
        if self.trusted_cas and not self.is_blocking:
            pool.ca_certs = pool.ca_cert_dir = None
        elif self.trusted_cas and not pool.ca_cert_dir:  # urllib3 makes a TLS context of them for each connection
            pool.ca_certs = self.trusted_cas.path or None
        # An HTTP proxy without a tunnel is told the whole URL, and who asks, with each request.
        sends_absolute_url = pool.proxy and not self.uses_tunnel
        self.url_prefix = origin if sends_absolute_url else ""
        self.headers = dict(USER_AGENT, **(pool.proxy_headers if sends_absolute_url else {}))

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        """The request as it is sent."""
        lines = "".join("%s: %s\r\n" % pair for pair in {**headers, **self.headers}.items())
        return ("%s %s%s HTTP/1.1\r\n%s\r\n" % (method, self.url_prefix, path, lines)).encode("latin-1") + body

    def connect(self, seconds: float) -> Any:
        """A new HTTPConnection, open, with so much time for each address that the host has. Raises NETWORK_ERRORS, and
        CallError."""
        context = self.trusted_cas and self.trusted_cas.context()  # raises CAsUnreadable also where it isn't used
        if context and not self.is_blocking:
            self.pool.conn_kw["ssl_context"] = context
        connection: Any = self.pool._new_conn()
        connection.timeout = seconds
        try:
            with Deadline(connection, 3 * seconds):
                self.pool._prepare_proxy(connection) if self.uses_tunnel else connection.connect()
                connection.sock.settimeout(None)  # see Deadline
        except BaseException as error:
            connection.close()
            if self.trusted_cas and isinstance(error.__cause__ or error, ssl.SSLCertVerificationError):
                self.trusted_cas.doubt()
            raise
        connection.opened = time.monotonic()
        return connection


class ResponseStream(io.RawIOBase):
    """What an answer of at most `limit` bytes is read from."""

    limit: int
    received = 0  # bytes so far

    def readable(self) -> bool:
        return True

    def receive(self, buffer: Any) -> int:
        """As RawIOBase.readinto."""
        raise NotImplementedError

    def readinto(self, buffer: Any) -> int:
        count = self.receive(buffer)
        self.received += count
        self.check_size(self.received)
        return count

    def check_size(self, size: int) -> None:
        """Raises CallError where the answer may not have so many bytes."""
        if size > self.limit:
            raise CallError("NotTheService", "an answer of more than %d bytes, or without end" % self.limit)


class DeadlineStream(ResponseStream):
    """Waits for what comes over a connection, until a deadline; each byte that comes extends it, by MIN_THROUGHPUT."""

    def __init__(self, deadline: Deadline, limit: int) -> None:
        self.sock, self.deadline, self.limit = deadline.connection.sock, deadline, limit

    def receive(self, buffer: Any) -> int:
        """Raises OSError, TimeoutError when the deadline has passed."""
        count = self.sock.recv_into(buffer)
        if not count and self.deadline.is_over():
            raise TimeoutError("timed out")  # for an answer without a length this would be its end
        self.deadline.end += count / MIN_THROUGHPUT
        return count


class NeedsMore(Exception):
    """What has come of an answer is not all of it."""


class ReceivedStream(ResponseStream):
    """What has come of the answer to a put; NeedsMore is raised at its end, unless `is_end`: nothing more will come."""

    limit = MAX_PUT_ANSWER_BYTES

    def __init__(self, data: bytes, is_end: bool) -> None:
        self.data, self.is_end = io.BytesIO(data), is_end

    def receive(self, buffer: Any) -> int:
        count = self.data.readinto(buffer)
        if not count and not self.is_end:
            raise NeedsMore
        return count


class ResponseReader(io.BufferedReader):
    """What http.client reads an answer from. By itself http.client would take a head without its blank line for a whole
    one, cut off in the middle of a header's value maybe, and make room for as much as is announced."""

    raw: ResponseStream

    def makefile(self, *_: object) -> ResponseReader:
        """Called by http.client, to which this stands for the socket."""
        return self

    def readline(self, size: int | None = -1) -> bytes:
        """For heads, and what is between chunks."""
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.RemoteDisconnected("the answer ends within its head, or before it")
        return line

    def read(self, size: int | None = -1) -> bytes:
        self.raw.check_size(size or 0)
        return super().read(size)


class Response(NamedTuple):
    """One answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]  # names in lower case; of one that comes twice the first counts, but x-log-* are joined
    is_last: bool  # its connection isn't used again


def read_response(stream: ResponseStream, before_body: Callable[[Mapping[str, str]], None] | None = None) -> Response:
    """Reads one answer. `before_body` is called with the headers of an answer 200 before its body is received.

    Raises OSError, HTTPException or, for one that is too long, CallError; what the stream and `before_body` raise.
    """
    response: Any = http.client.HTTPResponse(ResponseReader(stream))  # type: ignore[arg-type]
    response.begin()
    while 100 <= response.status < 200:  # such as 103 Early Hints; http.client knows 100 alone
        response.headers = response.msg = None
        response.begin()
    if response.status != 200:
        stream.limit = min(stream.limit, MAX_ANSWER_BYTES)  # an error is short, whatever was asked for
    headers: dict[str, str] = {}
    for name, value in ((name.lower(), value) for name, value in response.headers.items()):
        if name not in headers:
            headers[name] = value
        elif name.startswith("x-log-"):  # the service's, and there twice: joined, it fails the checks of its value
            headers[name] += ", " + value
    if before_body and response.status == 200:
        before_body(headers)
    stream.check_size(response.length or 0)  # up to Python 3.9 http.client reads a body in pieces
    # After an error another server may answer otherwise; but 403 and 429 are what a quota gives by the thousand.
    is_last = response.will_close or response.status not in (200, 403, 429) or REQUEST_ID not in headers
    return Response(response.status, response.read(), headers, is_last)


def check_pull(response: Response, shard: str) -> None:
    """Raises CallError where the head of a pull can't be right, before the SDK believes it: that makes room for as many
    bytes as are announced, and passes over the body where none are. A header that is missing is for the SDK to miss."""
    size, count = [response.headers.get(name, "0") for name in ("x-log-bodyrawsize", "x-log-count")]
    are_numbers = re.fullmatch("[0-9]{1,9}", size) and re.fullmatch("[0-9]{1,9}", count)
    # lz4, the one compression that is asked for, makes one byte of an empty body.
    if are_numbers and int(size) <= MAX_PULL_BYTES and (int(size) or len(response.body) <= 1):
        return
    words = shard, len(response.body), escape_for_log(size, 30), escape_for_log(count, 30)
    raise CallError("UnreadablePull", "shard %s: a body of %d bytes, announced as %s bytes of %s LogGroups" % words)


ANSWERED_TOO_EARLY = "an answer 200 before the request was sent whole"


def answer_time(request: bytes, seconds: float) -> float:
    """Seconds for an answer, and for sending the request before it: the kernel takes that at once, and sends it as fast
    as the line is."""
    return seconds + len(request) / MIN_THROUGHPUT


def is_reusable(connection: Any, since: float) -> bool:
    """Whether nobody has closed a connection that has been idle since then, nothing lies unread on it, and it is none
    of long ago."""
    now = time.monotonic()
    is_young = now - since < MAX_IDLE and now - connection.opened < MAX_AGE
    return is_young and is_silent(connection.sock)


def is_silent(sock: Any) -> bool:
    """Whether nothing lies unread on a connection, and nobody has closed it. What TLS 1.3 sends by itself, tickets
    right after a handshake, is read here."""
    is_tls = isinstance(sock, ssl.SSLSocket)
    if is_tls and sock.pending():
        return False
    if not urllib3.util.wait_for_read(sock, 0):
        return True
    if not is_tls or sock.version() != "TLSv1.3":
        return False
    timeout, end = sock.gettimeout(), 0
    try:
        # Only if TLS records have come whole, by their lengths, may OpenSSL read them: part of one it would take away.
        data = socket.socket.recv(sock, 65536, socket.MSG_PEEK)
        while end < len(data):
            end += 5 + int.from_bytes(data[end + 3 : end + 5], "big")
        if data and end == len(data):
            sock.settimeout(0.0)
            sock.recv(1)  # an answer, or the end; where nothing but tickets has come it raises SSLWantReadError
        return False
    except ssl.SSLWantReadError:
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            sock.settimeout(timeout)


class CallContext(threading.local):
    """What LogstoreApi, which makes the SDK's calls, and `_getHttpResponse` below, which sends them, tell each other of
    a call: LogClient, which stands between them, hands no such things on. Each thread has its own."""

    before_body: Callable[[Mapping[str, str]], None] | None = None  # of a pull, see read_response
    sent = 0.0  # when the call was sent, by the clock of leases
    has_answer = False  # the service has answered it


class PooledLogClient(LogClient):
    """A LogClient that talks to one project, from many threads, over a connection pool. It repeats no call but one
    whose idle connection turns out to be closed.

    `judge` is the one place where answers are believed, those to puts as well: only if the service gave them.
    `_getHttpResponse`, behind which the SDK has requests, is overridden. It raises no LogException, for LogClient._send
    would repeat the call.
    """

    http_type: str  # and so on: LogClient's
    _endpoint: str
    _isRowIp: bool
    _logHost: str

    def __init__(
        self,
        config: LogstoreConfig,
        credential_source: CredentialSource | None = None,
        response_timeout: float | None = None,
        keep_alive: bool = True,
    ) -> None:
        """Without a `credential_source` it has its own. `response_timeout` is in seconds; None is RESPONSE_TIMEOUT, and
        more for what has run out of that."""
        self.credential_source = credential_source or CredentialSource(config).start()
        super().__init__(
            config.endpoint, None, None, None, "dispatch_data", AUTH_VERSION_4 if config.region else AUTH_VERSION_1,
            config.region, credentials_provider=self.credential_source,
        )  # fmt: skip
        # The SDK's switches the process's locale for the Date of each request, which costs as much as compressing it.
        self._auth._getGMT = functools.partial(email.utils.formatdate, usegmt=True)  # type: ignore[attr-defined]
        # Where all calls go; an endpoint that is an IPv4 address gets no project in front.
        self.origin = self.http_type + ("" if self._isRowIp else config.project + ".") + self._endpoint
        self.response_timeout = response_timeout or RESPONSE_TIMEOUT
        self.max_response_timeout = response_timeout or MAX_RESPONSE_TIMEOUT
        self.connect_timeout = min(CONNECT_TIMEOUT, self.response_timeout)
        self.longer_timeouts: dict[tuple[object, ...], float] = {}  # of calls that ran out of time: for the same call
        self.keep_alive = keep_alive
        # The pool: each connection and since when it is idle, the last used last.
        self.idle_connections: deque[tuple[Any, float]] = deque()
        self.last_date = "", 0.0  # that of the last answer, and when it came, by the monotonic clock
        self.of_thread = CallContext()
        # Closes a connection. Of a PutClient it is PutLoop.close_connection, which takes it from the selector as well;
        # such a client's idle connections are closed by the loop alone, never by `close_stale`.
        self.discard: Callable[[Any], None] = lambda connection: connection.close()
        watchdog.start()

    def _getHttpResponse(
        self, method: str, url: str, params: Mapping[str, Any], body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Called by LogClient with what it has signed; (status, body, headers) of the answer. Raises CallError."""
        watchdog.excuse()
        began, kind = time.monotonic(), (method, url, params.get("type"))
        seconds = self.longer_timeouts.get(kind, self.response_timeout)
        is_pull = params.get("type") == "log"
        try:
            path = urlsplit(url).path + ("?" + urlencode(params) if params else "")
            request = self.factory.request(method, path, headers, body or b"")
            response = self.round_trip(request, MAX_PULL_BYTES if is_pull else MAX_ANSWER_BYTES, seconds)
            if time.monotonic() - began < self.response_timeout:
                self.longer_timeouts.pop(kind, None)
        except NETWORK_ERRORS as error:
            if isinstance(error, TimeoutError):
                self.longer_timeouts[kind] = min(2 * seconds, self.max_response_timeout)
            raise CallError.from_exception(error) from error
        finally:
            watchdog.beat()
        self.judge(response, url.endswith("/shards/lb"), headers.get("x-acs-security-token", ""))
        if is_pull:
            check_pull(response, url.rpartition("/")[2])
        self.last_date = response.headers.get("date", ""), time.monotonic()
        self.of_thread.has_answer = True
        return response.status, response.body, response.headers

    @functools.cached_property
    def factory(self) -> ConnectionFactory:
        """Made when it is first needed, so that the call fails that can't have one. Raises OSError, ValueError."""
        return ConnectionFactory(self.origin)

    def judge(self, response: Response, is_put: bool, token: str) -> None:
        """Raises CallError unless the service says that it has done what it was asked for, by a call of this token."""
        # The service answers a put with an empty 200; one with a body is somebody else's, a captive portal's say.
        if response.status != 200 or REQUEST_ID not in response.headers or (is_put and response.body):
            failure = CallError.from_response(response.status, response.headers, response.body)
            self.credential_source.on_auth_failure(failure, token)
            raise failure

    def round_trip(self, request: bytes, limit: int, seconds: float, may_reuse: bool = True) -> Response:
        """Sends a request over an idle connection, if there is one, and reads its answer, of `limit` bytes at the most,
        for which there are so many seconds. Where that connection was closed meanwhile, the request is sent once more
        over a fresh one. Any other failure is for the caller: the service may have heard the request.

        Raises NETWORK_ERRORS and CallError, and what `before_body` does.
        """
        idle = self.take_idle() if may_reuse else None
        connection: Any = idle or self.factory.connect(self.connect_timeout)
        deadline = Deadline(connection, answer_time(request, seconds))
        stream = DeadlineStream(deadline, limit)
        is_kept, is_sent = False, True
        try:
            with deadline:
                self.of_thread.sent = Lease.now()
                try:
                    connection.sock.sendall(request)
                except ConnectionError:  # whoever won't read it all may have said why, as gateways do with 413
                    if not urllib3.util.wait_for_read(connection.sock, 0):
                        raise
                    is_sent = False
                response = read_response(stream, self.of_thread.before_body)
                if response.status == 200 and not is_sent:
                    raise http.client.HTTPException(ANSWERED_TOO_EARLY)
            is_kept = self.keep_alive and is_sent and not response.is_last
            return response
        except OSError as error:
            if deadline.is_over():
                raise TimeoutError("timed out") from None
            was_closed = isinstance(error, ConnectionError) and not stream.received  # RemoteDisconnected is one, too
            if not (idle and was_closed):
                raise
            # else it is sent once more, below
        finally:
            if is_kept:
                self.idle_connections.append((connection, time.monotonic()))
            else:
                connection.close()
        return self.round_trip(request, limit, seconds, may_reuse=False)

    def take_idle(self) -> Any:
        """A connection to use again, if there is one."""
        with contextlib.suppress(IndexError):
            while True:
                connection, since = self.idle_connections.pop()
                if is_reusable(connection, since):
                    return connection
                self.discard(connection)
        return None

    def open_ahead(self, seconds: float) -> None:
        """Opens a connection where all that are idle will be too old in so many seconds. Raises what `connect` does."""
        idle, now = list(self.idle_connections), time.monotonic()
        if idle and all(now + seconds - one.opened > MAX_AGE for one, _ in idle):
            self.idle_connections.append((self.factory.connect(self.connect_timeout), time.monotonic()))

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


# What may come before an answer, such as 103 Early Hints.
INTERIM_ANSWERS = re.compile(rb"\A(?:HTTP/1\.1 1[0-9][0-9][ \r].*?\r\n\r\n)+", re.DOTALL)
PUT_ACCEPTED = Response(200, b"", {REQUEST_ID: ""}, is_last=False)


def is_usual_acceptance(received: bytes) -> bool:
    """Whether a put is answered as nearly all are: by the service, with a 200 that says nothing, and the connection
    stays open. read_response would take longer to tell than the rest of the put takes."""
    head = received.lower()
    return (
        head.startswith(b"http/1.1 200 ")
        and head.find(b"\r\n\r\n") == len(head) - 4
        and b"\r\n%s:" % REQUEST_ID.encode() in head
        and b"\r\ntransfer-encoding:" not in head
        and head.count(b"\r\ncontent-length:") == 1
        and b"\r\ncontent-length: 0\r\n" in head
        and head.count(b"\r\nconnection:") == head.count(b"\r\nconnection: keep-alive\r\n")
    )


class PutInFlight:
    """A put that was begun: what is still to be sent of its request, and what has come of its answer."""

    __slots__ = (
        "claimed", "client", "connection", "deadline", "is_early", "is_fresh", "received", "request", "sent", "sock",
        "timeout", "token",
    )  # fmt: skip

    def __init__(self, client: PutClient, request: bytes, token: str, timeout: float = 0.0) -> None:
        """`timeout`: seconds for the answer, no less than the client's."""
        self.client, self.request, self.token = client, request, token
        self.timeout = max(timeout, client.response_timeout)
        self.claimed = threading.Lock()  # once, and never released
        self.need_connection()

    def claim(self) -> bool:
        """True for the first who calls it: a thread of PutLoop.opener, which then sends the put, or the loop, which
        then ends it, for its deadline has passed."""
        return self.claimed.acquire(blocking=False)

    def need_connection(self) -> None:
        """Gives up its connection; another has to be open by the deadline."""
        self.connection: Any = None
        self.deadline = time.monotonic() + 3 * CONNECT_TIMEOUT

    def use(self, connection: http.client.HTTPConnection, is_fresh: bool) -> None:
        """Takes a connection, over which nothing was sent yet. `is_fresh`: it was opened for this put."""
        self.connection, self.sock, self.is_fresh = connection, connection.sock, is_fresh
        self.sent, self.received = 0, b""
        self.is_early = False  # an answer began before the request was sent whole: it can't say that all was accepted
        self.deadline = time.monotonic() + answer_time(self.request, self.timeout)

    def send(self) -> bool:
        """Sends what the kernel takes; whether that was all. Raises OSError."""
        try:
            while self.sent < len(self.request):
                self.sent += self.sock.send(memoryview(self.request)[self.sent :] if self.sent else self.request)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return False
        return True

    def receive(self) -> Response | None:
        """Takes what has come; the answer, once it is whole. Raises OSError, HTTPException."""
        is_end = False
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            while True:  # a TLS connection may hold bytes that no selector sees
                data = self.sock.recv(65536)
                self.received += data
                self.deadline += len(data) / MIN_THROUGHPUT
                is_end = not data
                if is_end or not isinstance(self.sock, ssl.SSLSocket) or len(self.received) > MAX_PUT_ANSWER_BYTES:
                    break
        if self.sent < len(self.request) and INTERIM_ANSWERS.sub(b"", self.received):
            self.is_early = True  # even if the rest is sent later
        if not (self.is_early or is_end) and is_usual_acceptance(self.received):
            return PUT_ACCEPTED
        try:
            response = read_response(ReceivedStream(self.received, is_end))
        except NeedsMore:
            return None
        if self.is_early and response.status == 200:
            raise http.client.HTTPException(ANSWERED_TOO_EARLY)
        # After a usual refusal the connection is used again; after anything odd nobody knows what else comes.
        body = INTERIM_ANSWERS.sub(b"", self.received).partition(b"\r\n\r\n")[2]
        is_usual_refusal = response.headers.get("content-length") == str(len(body)) and response.status >= 400
        is_odd = is_end or self.is_early or "transfer-encoding" in response.headers
        return response._replace(is_last=response.is_last or is_odd or not is_usual_refusal)


PUT_HEADERS = {
    "Content-Type": "application/x-protobuf", "x-log-apiversion": API_VERSION, "x-log-compresstype": "lz4",
}  # fmt: skip


class PutClient(PooledLogClient):
    """A PooledLogClient whose puts are begun, not waited for: all of them by one thread, see PutLoop.

    They are signed as the SDK's AuthV1 and AuthV4 do it; what many share is made once.
    """

    def __init__(self, config: LogstoreConfig, credential_source: CredentialSource | None = None) -> None:
        super().__init__(config, credential_source)
        self.host, self.region = "%s.%s" % (config.project, self._logHost), config.region
        self.scope, self.signing_key = "", b""  # of signatures in version 4; another day has another scope
        self.key: AccessKey | None = None  # that `signing_key` was made of
        self.second, self.date = 0, ""  # the time in unix seconds, and as signatures spell it
        self.heads: dict[str, bytes] = {}  # resource -> the beginning of its requests
        self.unopened: deque[PutInFlight] = deque()  # those that wait for a connection to be opened
        self.opening = 0  # that are being opened

    def prepare(self) -> None:
        """Waits for what a put must not wait for: the first key, what the environment says of proxies and CAs. Raises
        NETWORK_ERRORS, and CallError."""
        self.credential_source.get_credentials()
        _ = self.factory

    def put_log_raw(self, _project: str, logstore: str, log_group: Any) -> PutInFlight:  # type: ignore[override]
        """PutLogs, begun: compresses, signs and, over an idle connection if there is one, sends what the kernel takes.
        Raises NETWORK_ERRORS, and CallError where there is no key."""
        body = log_group.SerializeToString()
        size, body = len(body), Compressor.compress(body, CompressType.LZ4)
        request, token = self.sign("/logstores/%s/shards/lb" % logstore, size, body)
        in_flight = PutInFlight(self, request, token, getattr(log_group, "timeout", 0.0))
        idle = None if self.factory.is_blocking else self.take_idle()
        if idle:
            in_flight.use(idle, is_fresh=False)
            with contextlib.suppress(OSError):  # the answer, or that there is none, will say why
                in_flight.send()
        return in_flight

    def sign(self, resource: str, size: int, body: bytes) -> tuple[bytes, str]:
        """(request, token) of a put. `body` is compressed, `size` its bytes before that."""
        key, now = self.credential_source.get_credentials(), int(time.time())
        if now != self.second:
            iso, rfc = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now)), email.utils.formatdate(now, usegmt=True)
            self.second, self.date = now, iso if self.region else rfc
        if resource not in self.heads:
            headers = {**PUT_HEADERS, "Host": self.host}
            if not self.region:
                headers["x-log-signaturemethod"] = "hmac-sha1"
            self.heads[resource] = self.factory.request("POST", resource, headers, b"")[:-2]
        token = key.security_token or ""
        # The headers that both versions sign, in the order of the alphabet; their own come after these.
        signed = "%sx-log-apiversion:%s\nx-log-bodyrawsize:%d\nx-log-compresstype:lz4\n"
        signed %= ("x-acs-security-token:%s\n" % token if token else ""), API_VERSION, size
        signature = (self.sign_v4 if self.region else self.sign_v1)(key, resource, signed, body)
        lines = "x-log-bodyrawsize: %d\r\nContent-Length: %d\r\n%s%s\r\n"
        lines %= size, len(body), signature, ("x-acs-security-token: %s\r\n" % token if token else "")
        return b"".join([self.heads[resource], lines.encode("latin-1"), body]), token

    def sign_v1(self, key: AccessKey, resource: str, signed: str, body: bytes) -> str:
        """The header lines of the signature."""
        md5 = hashlib.md5(body).hexdigest().upper()  # noqa: S324 - the protocol's
        text = "POST\n%s\napplication/x-protobuf\n%s\n%sx-log-signaturemethod:hmac-sha1\n%s"
        text %= md5, self.date, signed, resource
        signature = base64.b64encode(hmac.digest(key.access_key_secret.encode(), text.encode(), "sha1")).decode()
        lines = "Content-MD5: %s\r\nDate: %s\r\nx-log-date: %s\r\nAuthorization: LOG %s:%s\r\n"
        return lines % (md5, self.date, self.date, key.access_key_id, signature)

    def sign_v4(self, key: AccessKey, resource: str, signed: str, body: bytes) -> str:
        """The same of version 4."""
        scope = "%s/%s/sls/aliyun_v4_request" % (self.date[:8], self.region)
        if key is not self.key or scope != self.scope:
            self.key, self.scope, self.signing_key = key, scope, b"aliyun_v4" + key.access_key_secret.encode()
            for part in scope.split("/"):
                self.signing_key = hmac.digest(self.signing_key, part.encode(), "sha256")
        sha256, names = hashlib.sha256(body).hexdigest(), "x-acs-security-token;" if key.security_token else ""
        canonical = (
            "POST\n%s\n\ncontent-type:application/x-protobuf\nhost:%s\n%sx-log-content-sha256:%s\nx-log-date:%s\n\n"
            "content-type;host;%sx-log-apiversion;x-log-bodyrawsize;x-log-compresstype;x-log-content-sha256;x-log-date\n%s"
            % (resource, self.host, signed, sha256, self.date, names, sha256)
        )  # fmt: skip
        text = "SLS4-HMAC-SHA256\n%s\n%s\n%s" % (self.date, scope, hashlib.sha256(canonical.encode()).hexdigest())
        signature = hmac.digest(self.signing_key, text.encode(), "sha256").hex()
        lines = (
            "x-log-content-sha256: %s\r\nx-log-date: %s\r\n"
            "Authorization: SLS4-HMAC-SHA256 Credential=%s/%s,Signature=%s\r\n"
        )
        return lines % (sha256, self.date, key.access_key_id, scope, signature)


def cursor_position(cursor: str) -> int:
    """A cursor as a number that grows along the shard. The service's pages have the base64 of a decimal, and the SDK
    computes with that. -1 for anything else, which is no cursor: it moves nothing and is never saved."""
    with contextlib.suppress(ValueError):
        digits = base64.b64decode(cursor, validate=True)
        return int(digits) if digits.isdigit() else -1
    return -1


def short_hash(*parts: bytes) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


class PullResult(NamedTuple):
    """What a pull brought: a batch, unless it has neither LogGroups nor moved the cursor."""

    log_groups: list[LogGroup]
    size: int  # bytes, uncompressed
    next_cursor: str
    shard: int

    def place_of(self, log_group: LogGroup) -> str:
        """Shard and position of one of its LogGroups: the same whatever pull brings it, for the service numbers the
        LogGroups of a shard. A gap after it in one pull would shift that; the service is not known to make any."""
        index = next(index for index, each in enumerate(self.log_groups) if each is log_group)
        return "%d-%d" % (self.shard, cursor_position(self.next_cursor) - len(self.log_groups) + index)


def is_list(answer: object, **types: Any) -> bool:
    """Whether it is a list of objects with fields of these types."""
    return isinstance(answer, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in types.items()) for one in answer
    )


class LogstoreApi:
    """The calls for one logstore, each tried once, its answer held to the form it must have; else CallError."""

    def __init__(self, config: LogstoreConfig, *options: Any, **more: Any) -> None:
        """The options are those of PooledLogClient."""
        self.config = config
        self.client = PooledLogClient(config, *options, **more)

    def call(self, method: Callable[..., Any], *arguments: object) -> Any:
        """What the SDK makes of the answer. One that it can't read counts as not the service's. Raises CallError."""
        self.client.of_thread.has_answer = False
        try:
            return method(self.config.project, self.config.logstore, *arguments)
        except (CallError, Cancelled):
            raise
        except MemoryError as error:
            raise CallError("OutOfMemory", repr(error)) from error
        except Exception as error:  # any: the SDK reads all answers as if they were right
            if not self.client.of_thread.has_answer:
                raise CallError("LocalFailure", repr(error)) from error
            raise CallError("NotTheService", "200, but %s" % escape_for_log(repr(error), 100)) from error

    @staticmethod
    def validate(answer: Any, is_valid: object) -> Any:
        """Returns the answer if it is valid; else raises CallError, which shows it."""
        if not is_valid:
            raise CallError("NotTheService", "200, but %s" % escape_for_log(repr(answer), 100))
        return answer

    def list_shards(self) -> list[dict[str, Any]]:
        """ListShards: shardID and status ("readwrite" or "readonly") of each, at least one."""
        shards = self.call(self.client.list_shards).get_shards_info()
        if shards == []:
            raise CallError("NoShards", "its list of shards is empty")
        return self.validate(shards, is_list(shards, shardID=int, status=str))

    def get_cursor(self, shard: int, start: str | int) -> str:
        """GetCursor: of "begin", "end", or of the first LogGroup that arrived at a time (unix seconds) or later."""
        cursor = self.call(self.client.get_cursor, shard, start).get_cursor()
        return self.validate(cursor, isinstance(cursor, str) and cursor_position(cursor) >= 0)

    def arrival_time(self, shard: int, cursor: str) -> int:
        """GetCursorTime: when the LogGroup at the cursor arrived, in unix seconds."""
        seconds = self.call(self.client.get_cursor_time, shard, cursor).get_cursor_time()
        return self.validate(seconds, isinstance(seconds, int))

    def pull_logs(
        self, shard: int, cursor: str, count: int, end: str = "", make_room: Callable[[int, int], None] | None = None
    ) -> PullResult:
        """PullLogs: at most `count` (1 to 1000) LogGroups from the cursor on, and none from the cursor `end` on.

        `make_room` is called before they are received, with the bytes that this takes, compressed and not, and how many
        they are. Raises what that raises.
        """

        def before_body(headers: Mapping[str, str]) -> None:
            texts = [headers.get(name, "") for name in ("x-log-bodyrawsize", "content-length", "x-log-count")]
            size, length, announced = [int(text) if re.fullmatch("[0-9]{1,9}", text) else 0 for text in texts]
            if make_room:
                make_room(min(size, MAX_PULL_BYTES + 1) + length, max(1, announced))

        self.client.of_thread.before_body = before_body
        try:
            response = self.call(self.client.pull_logs, shard, cursor, count, end)
        finally:
            self.client.of_thread.before_body = None
        next_cursor, announced = response.get_next_cursor(), response.get_loggroup_count()
        position, next_position = cursor_position(cursor), cursor_position(next_cursor)
        try:
            log_groups = log_groups_of(response)
            if len(log_groups) != announced:
                raise ValueError("a pull of %d LogGroups, announced as %d" % (len(log_groups), announced))
            if next_position < 0:
                raise ValueError("the next cursor is none: %s" % escape_for_log(next_cursor, 60))
            # Between any two LogGroups there is a cursor, for `count` may be 1: so n LogGroups move the cursor by n at
            # least. It may move farther, over positions without any, a gap or what retention has dropped. A cache or a
            # proxy in confusion may give the answer of an earlier pull, which would lead back, or of a larger one.
            if next_position - position < len(log_groups) or len(log_groups) > count:
                words = len(log_groups), cursor, next_cursor
                raise ValueError("an answer to another pull: %d LogGroups from %s to %s" % words)
        except ValueError as error:
            raise CallError("UnreadablePull", "shard %d: %s" % (shard, error)) from error
        return PullResult(log_groups, response.get_raw_size(), next_cursor, shard)

    def consumer_groups(self) -> dict[str, Any] | None:
        """ListConsumerGroup: the SDK's ConsumerGroupEntity by name; None where the key may not list them."""
        try:
            groups = self.call(self.client.list_consumer_group).get_consumer_groups()
        except CallError as error:
            if error.hint == PERMISSION_HINT:
                return None
            raise
        return {group.get_consumer_group_name(): group for group in groups}

    def make_consumer_group(self, name: str, timeout: int) -> None:
        """CreateConsumerGroup; `timeout` in seconds. Not in order: a split's shards are assigned without waiting for
        their parent to be over."""
        self.call(self.client.create_consumer_group, name, timeout, False)

    def get_checkpoints(self, group: str, shard: int = -1) -> dict[int, dict[str, Any]]:
        """GetCheckPoint of every shard or of one: checkpoint (as it was saved, a cursor or not), updateTime (unix
        microseconds), consumer."""
        entries = self.call(self.client.get_check_point, group, shard).get_consumer_group_check_points()
        nothing = type(None)
        types = dict(shard=int, checkpoint=(str, nothing), updateTime=(int, nothing), consumer=(str, nothing))
        self.validate(entries, is_list(entries, **types))
        return {entry["shard"]: {"checkpoint": "", **entry} for entry in entries}

    def save_checkpoint(self, group: str, consumer: str, shard: int, cursor: str) -> None:
        """UpdateCheckPoint, refused where another consumer holds the shard."""
        # The SDK forces its update: a copy that was frozen and lost the shard would write over the new holder's.
        self.call(self.client.update_check_point, group, shard, cursor, consumer, False)

    def heartbeat(self, group: str, consumer: str, shards: Sequence[int]) -> list[int]:
        """HeartBeat: tells the shards that are held, returns those that may be."""
        held = self.call(self.client.heart_beat, group, consumer, list(shards)).get_shards()
        return self.validate(held, isinstance(held, list) and all(isinstance(shard, int) for shard in held))


THREAD_LIMIT_HINT = "the limit is `ulimit -u`, or the container's"


class ThreadPool(concurrent.futures.ThreadPoolExecutor):
    """Threads made as needed. Where the machine gives no more, work waits for those that there are, one at least."""

    def __init__(self, most: int, name: str) -> None:
        """`name` is what the names of its threads begin with."""
        super().__init__(most, thread_name_prefix=name)
        self.throttle = LogThrottle()
        self.submit(int).result()  # starts the first thread: where not even that can be, RuntimeError

    def _adjust_thread_count(self) -> None:
        """The standard library's, called with the work in the queue already."""
        try:
            super()._adjust_thread_count()
        except (RuntimeError, MemoryError) as error:  # the work is queued: raised, this would have it submitted again
            if not self._threads:
                raise
            if self.throttle.allow():
                log.warning("%s: %d threads go on; %s", error, len(self._threads), THREAD_LIMIT_HINT)


# ---- check and status: what a start, --check, --status and --drain find out, changing nothing ------------------------

CHECK_TIMEOUT = 10.0  # seconds for an answer
START_PATIENCE = 15.0  # seconds that a start waits for what the targets say
PROBE_CONCURRENCY = 32  # shards or logstores that are asked of at a time, each over a connection of its own
GROUP_LIMITS = (10, 30)  # consumer groups a logstore may have, by the service's older and newer pages
HAS_BEGUN = "consumer group %s has checkpoints and goes on from these, whatever SLS_CURSOR_START says"
# How consumers of this program are called, see Consumer: group, host, routes, process id, when the group began, chance.
# Those of older releases lack some of that.
CONSUMER_NAME = re.compile(r".+?(?:_(?P<routes>[0-9a-f]{6}))?-\d+-(?P<start>[0-9a-f]{8})?[0-9a-f]{12}")


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


def read_shard_status(
    logstore: LogstoreApi, group: str, only: Sequence[int] | None = None, mapper: Callable[..., Iterable[Any]] = map
) -> list[ShardStatus]:
    """Asks the service of every shard, or of some. It goes by checkpoints: what was pulled is not yet delivered.

    `mapper` is `map`, or an executor's to ask of many at a time. Raises CallError.
    """
    entries = logstore.get_checkpoints(group)
    shards = [shard for shard in logstore.list_shards() if only is None or shard["shardID"] in only]
    statuses = mapper(lambda shard: read_one_shard(logstore, shard, entries.get(shard["shardID"], {})), shards)
    return sorted(statuses, key=lambda status: status.shard)


def read_one_shard(logstore: LogstoreApi, shard: Mapping[str, Any], entry: Mapping[str, Any]) -> ShardStatus:
    """Asks of one shard, as LogstoreApi.list_shards has it; `entry` is of `get_checkpoints`. Raises CallError.

    A shard that holds no log has nothing left to deliver, with a checkpoint, an expired one or none. With logs and no
    checkpoint nobody knows how far behind it is: where it begins is decided when a copy first gets it.
    """
    number, checkpoint = shard["shardID"], entry.get("checkpoint") or ""
    end = logstore.get_cursor(number, "end")
    try:
        arrival = logstore.arrival_time(number, checkpoint) if cursor_position(checkpoint) >= 0 else None
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
        checkpoint_time=arrival, behind_seconds=behind, updated_time=updated,
    )  # fmt: skip


def largest_lag(statuses: Sequence[ShardStatus]) -> float | None:
    """Seconds that the last of these shards is behind; None when that is unknown of one of them."""
    known = [status.behind_seconds for status in statuses if status.behind_seconds is not None]
    return max(known, default=0.0) if len(known) == len(statuses) else None


class Drain:
    """What a consumer group has left to deliver, for --drain: of what the shards held when this copy started or, with
    `until` (unix seconds), of what had arrived before that time; with `until` nothing later is pulled. Checkpoints
    decide, whoever has delivered.

    LogGroups are counted by the positions of cursors: where there is a gap between these, they are fewer.
    """

    LOOK_INTERVAL = 1.0  # seconds
    RATE_SECONDS = 60.0  # for which the rate is told

    def __init__(self, config: LogstoreConfig, until: int | None = None) -> None:
        self.until = until
        self.retries = RetryLog("source %s" % config, "looks", "can't tell what is left, looking again", config)
        self.ends: dict[int, str] = {}  # shard -> cursor
        self.totals: dict[int, int] = {}  # shard -> LogGroups that were left when its first checkpoint was seen
        self.left: dict[int, int] = {}  # shard -> LogGroups, by the last look, of each that is not done
        self.looks: deque[tuple[float, int]] = deque()  # when, by the monotonic clock, and how many were left

    def find_ends(self, logstore: LogstoreApi) -> None:
        """To be called before anything is pulled. Raises CallError."""
        end: str | int = "end" if self.until is None else self.until
        self.ends = {shard["shardID"]: logstore.get_cursor(shard["shardID"], end) for shard in logstore.list_shards()}

    def check_start(self, start: str | int) -> None:
        """For a group that begins where SLS_CURSOR_START says. Raises StartupError where that is after all that is to
        be drained: each shard would have a checkpoint there then, and a later run go on from it."""
        if self.until is not None and (start == "end" or (isinstance(start, int) and self.until <= start)):
            words = "SLS_CURSOR_START: the group begins at %s, after all that --until asks for; set an earlier time"
            raise StartupError(words % (format_with_utc(start) if isinstance(start, int) else start))

    def end_of_pulls(self, shard: int, cursor: str) -> str:
        """The cursor at which pulls of a shard end, "" for none. A shard that a split has made since the start has
        nothing that arrived before `until`."""
        return "" if self.until is None else self.ends.get(shard, cursor)

    def look(self, logstore: LogstoreApi, group: str) -> None:
        """Finds what is left; to be called again and again, for what fails is told."""
        try:
            # A shard that is gone has taken all its logs with it.
            statuses = {shard["shardID"]: shard["status"] for shard in logstore.list_shards()}
            checkpoints = logstore.get_checkpoints(group)
            left: dict[int, int] = {}
            for shard in statuses.keys() & self.ends.keys():
                checkpoint = checkpoints.get(shard, {}).get("checkpoint") or ""
                has_begun = cursor_position(checkpoint) >= 0
                position = cursor_position(checkpoint if has_begun else logstore.get_cursor(shard, "begin"))
                count = max(0, cursor_position(self.ends[shard]) - position)
                if has_begun:
                    self.totals.setdefault(shard, count)
                # A drain is over only when each shard has a checkpoint, even a shard without logs. But if that is
                # read-only it may never get one: in a group that consumes in order nobody is given it.
                # One that is no cursor has to be mended first.
                needs_begin = not has_begun and (checkpoint or statuses[shard] != "readonly")
                if count or needs_begin:
                    left[shard] = count
        except Exception as error:
            self.retries.on_failure("left", error)
        else:
            self.retries.on_success("left")
            self.left, now = left, time.monotonic()
            self.looks.append((now, sum(left.values())))
            while now - self.looks[0][0] > self.RATE_SECONDS:
                self.looks.popleft()
        self.retries.report_recovery()

    def is_done(self) -> bool:
        return bool(self.looks) and not self.left

    def share_done(self) -> float:
        """From 0 to 1, after a look."""
        total = sum({**self.left, **self.totals}.values())
        return max(0.0, 1 - sum(self.left.values()) / total) if total else float(not self.left)

    def __str__(self) -> str:
        (began, before), (now, left) = self.looks[0], self.looks[-1]
        rate = (before - left) / max(now - began, 0.1)
        time_left = ", %s to go" % timedelta(seconds=int(left / rate)) if rate > 0 else ""
        return "%d %% done, %d LogGroups left, %d/s%s" % (100 * self.share_done(), left, max(0, rate), time_left)


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
    cause: str = ""  # equal where the same thing is wrong: a start then tells it once
    group_has_begun: bool = True  # unless a check of the source has shown that no shard has a checkpoint

    def __str__(self) -> str:
        return "%s: %s" % (self.verdict.value, self.text)


def unreadable_checkpoint(shard: int, entry: Mapping[str, Any]) -> CallError:
    """What there is to say of a checkpoint that is no cursor, an entry of LogstoreApi.get_checkpoints."""
    text, by = escape_for_log(entry["checkpoint"], 60), escape_for_log(entry.get("consumer") or "nobody", 70)
    return CallError("UnreadableCheckPoint", f"the checkpoint of shard {shard} is no cursor: {text}, saved by {by}")


def has_checkpoints(checkpoints: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether a group with these checkpoints, by shard, has any."""
    return any(entry["checkpoint"] for entry in checkpoints.values())


def group_warnings(group: Any, checkpoints: Mapping[int, Mapping[str, Any]], interval: int) -> Iterator[str]:
    """What there is to say of a consumer group that exists: an SDK's ConsumerGroupEntity, its checkpoints by shard.

    `interval` is SLS_HEARTBEAT_INTERVAL. The group's timeout and order are the service's, and stay as they are found.
    """
    name, timeout = "consumer group " + group.get_consumer_group_name(), group.get_timeout()
    if timeout != 2 * interval:
        words = "%s keeps its timeout of %g s, where SLS_HEARTBEAT_INTERVAL=%d would make it %d; heartbeats every %g s"
        yield words % (name, timeout, interval, 2 * interval, min(interval, timeout / 2))
    if group.is_in_order():
        yield "%s consumes in order, and keeps that: children of a split wait for their parent" % name
    for shard, entry in checkpoints.items():
        if entry["checkpoint"] and cursor_position(entry["checkpoint"]) < 0:
            yield "%s: %s" % (name, unreadable_checkpoint(shard, entry))
    holders = {entry.get("consumer") or "" for entry in checkpoints.values()} - {""}
    strange = sorted(escape_for_log(holder, 60) for holder in holders if not CONSUMER_NAME.fullmatch(holder))
    if strange:
        words = " has checkpoints of another program (%s); if that still runs, each of the two gets a part of the logs"
        yield name + words % ", ".join(strange[:3])


def probe_group(settings: Settings, logstore: LogstoreApi) -> tuple[str, bool]:
    """What a start would find of its consumer group, in words, and whether the group has begun. Raises CallError."""
    name, groups = settings.consumer_group, logstore.consumer_groups()
    if groups is None:
        text = ", could not verify the consumer group, for the key may not list them"
        try:
            return text, has_checkpoints(logstore.get_checkpoints(name))
        except CallError as error:
            if error.code != "ConsumerGroupNotExist":
                raise
            return text, False
    if name in groups:
        checkpoints = logstore.get_checkpoints(name)
        remarks = group_warnings(groups[name], checkpoints, settings.heartbeat_interval)
        return "; ".join([", consumer group %s exists" % name, *remarks]), has_checkpoints(checkpoints)
    full = ", which may be as many as the logstore takes" if len(groups) in GROUP_LIMITS else ""
    return ", consumer group %s will be made, beside %d others%s" % (name, len(groups), full), False


def probe(
    subject: str, config: LogstoreConfig, sources: CredentialSources, group_settings: Settings | None = None
) -> CheckResult:
    """Tries a logstore with calls that only read; `subject` is what it is called in what is shown.

    With `group_settings` it is the source, and its consumer group is looked at as well. A target's key may lack the
    permission to list shards: that is UNVERIFIED, not WRONG.
    """
    logstore = LogstoreApi(config, sources.of(config), CHECK_TIMEOUT, keep_alive=False)
    try:
        count = len(logstore.list_shards())
        of_group, group_has_begun = probe_group(group_settings, logstore) if group_settings else ("", True)
        text = "%d shard%s%s" % (count, "" if count == 1 else "s", of_group)
        return CheckResult(subject, Verdict.OK, text, group_has_begun=group_has_begun)
    except CallError as failure:
        text = describe_error(failure, config)
        if failure.is_transient():
            return CheckResult(subject, Verdict.UNREACHABLE, text)
        if failure.hint == PERMISSION_HINT and not group_settings:
            words = "the key may not look, whether it may write the first put will show: %s"
            return CheckResult(subject, Verdict.UNVERIFIED, words % failure)
        return CheckResult(subject, Verdict.WRONG, text, cause=failure.code + failure.hint.format(**config.variables))


def probe_all(settings: Settings, sources: CredentialSources, patience: float = float("inf")) -> list[CheckResult]:
    """Probes the source and every target at the same time; the source comes first. A target that has said nothing when
    `patience`, in seconds, is over is not waited for: nobody can tell how long its name takes to be found."""
    end = time.monotonic() + patience
    threads = ThreadPool(PROBE_CONCURRENCY, "probe")
    of_source = threads.submit(probe, settings.source_name, settings.source, sources, settings)
    of_targets = [(target, threads.submit(probe, target.name, target.config, sources)) for target in settings.targets]
    threads.shutdown(wait=False)
    results = [of_source.result()]
    for target, result in of_targets:
        try:
            results.append(result.result(min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)))
        except concurrent.futures.TimeoutError:
            text = "nothing is known of it after %g s" % patience
            results.append(CheckResult(target.name, Verdict.UNREACHABLE, text))
    return results


def check_before_start(settings: Settings, sources: CredentialSources) -> None:
    """Probes every logstore and says what is wrong, or could not be found out. Raises StartupError.

    A target that is wrong stops only a group that has not begun: there it may be a typo. Later it holds up its own
    logs, as one that goes missing while the copies run.
    """
    watchdog.excuse()
    results = probe_all(settings, sources, START_PATIENCE)
    watchdog.beat()
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
        log.error("%s; its logs wait until that is mended, and so does what lies behind them in their shards", line)


def table(rows: Iterable[Sequence[str]]) -> str:
    """The rows, aligned; what others have written in them is escaped."""
    rows = [[escape_for_log(cell, 2000) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def routes_fingerprint(settings: Settings) -> str:
    """Six digits, the same where the same topics go to logstores of the same names, by whatever endpoints."""
    routes = [(topic, str(target.config)) for target in settings.targets
              for topic in sorted(target.topics, key=lambda topic: topic.spelling)]  # fmt: skip
    exact = sorted((topic.exact_topic, place) for topic, place in routes if topic.exact_topic is not None)
    patterns = [(topic.spelling, place) for topic, place in routes if topic.exact_topic is None]
    return short_hash(repr((exact, patterns)).encode())[:6]


def describe_routes(settings: Settings) -> Iterator[tuple[str, str]]:
    """What each target takes, and what becomes of the rest, in words."""
    for target in settings.targets:
        patterns = [topic.spelling for topic in target.topics if topic.exact_topic is None and topic != ALL_TOPICS]
        parts = ['"%s"' % spell_out(topic.exact_topic) for topic in target.topics if topic.exact_topic]
        if any(topic.exact_topic == "" for topic in target.topics):
            parts.append("what has no topic")
        if patterns:
            parts.append("what is like " + " or ".join(patterns))
        if ALL_TOPICS in target.topics:
            parts.append("what is left")
        yield target.name, "takes " + ", ".join(parts)
    if not any(ALL_TOPICS in target.topics for target in settings.targets):
        yield "what no target takes", "is left out, and counted"


def show_check(settings: Settings, offline: bool) -> int:
    """Prints what was found, a line for each logstore, and the routes; the exit status: 1 when any is wrong or not
    reachable. `offline` asks nobody, and prints what the settings alone say."""
    results, lines = [], []
    if not offline:
        sources = CredentialSources()
        results = probe_all(settings, sources)
        keys = [(source.name, str(source)) for source in sources.expiring(settings) if source.kind]
        lines.append(table([(result.subject, str(result)) for result in results] + keys))
    lines += [table([*describe_routes(settings), ("routes", routes_fingerprint(settings))]), *settings.notes]
    if results and results[0].verdict is Verdict.OK and results[0].group_has_begun:
        lines.append(HAS_BEGUN % settings.consumer_group)
    show("\n".join([*lines, *("warning: " + warning for warning in settings.warnings)]))
    return int(any(result.verdict in (Verdict.WRONG, Verdict.UNREACHABLE) for result in results))


def show_route(settings: Settings, topics: Sequence[str]) -> int:
    """Prints where each topic goes, and by which variable; the exit status: 1 when one of them goes nowhere."""
    routes = Routes({target.number: target.topics for target in settings.targets})
    targets: dict[int | None, TargetSettings] = {target.number: target for target in settings.targets}
    found = [(topic, targets.get(routes.target_of(topic))) for topic in map(decode_utf8, topics)]
    rows = []
    for topic, target in found:
        name, by = "nowhere", "no SLS_TOPIC_TO<n> has it"
        if target:
            name = target.name
            by = "SLS_TOPIC_TO%d=%s" % (target.number, ",".join(each.spelling for each in target.topics))
        rows.append((spell_out(topic), name, by))
    show(table(rows))
    return int(not all(target for _, target in found))


def status_table(statuses: Sequence[ShardStatus], behind: float | None, now: float) -> str:
    """As --status shows it; `behind` is that of all of them, `now` in unix seconds."""
    rows = [("shard", "status", "holder", "checkpoint", "behind", "updated")]
    for shard in statuses:
        arrival = format_local(shard.checkpoint_time) if shard.checkpoint_time else "expired"
        if cursor_position(shard.checkpoint) < 0:
            arrival = "no cursor" if shard.checkpoint else "none"
        rows.append((
            str(shard.shard),
            shard.status,
            shard.holder or "-",
            arrival,
            "-" if shard.behind_seconds is None else "%.0f s" % shard.behind_seconds,
            "%.0f s ago" % max(0.0, now - shard.updated_time) if shard.updated_time else "never",
        ))  # fmt: skip
    holders = {status.holder for status in statuses} - {""}
    total = "unknown" if behind is None else "%.0f s" % behind
    return table([*rows, ("all", "%d in all" % len(statuses), "%d in all" % len(holders), "", total, "")])


def show_status(settings: Settings, as_json: bool, max_lag: float | None) -> int:
    """Prints how far the group is; the exit status: 1 when it can't be told, or is more than `max_lag` seconds behind.

    A shard without a valid checkpoint counts as behind: nobody knows how far.
    """
    source, group = settings.source, settings.consumer_group
    logstore = LogstoreApi(source, CredentialSources().of(source), CHECK_TIMEOUT)
    try:
        statuses = read_shard_status(logstore, group, mapper=ThreadPool(PROBE_CONCURRENCY, "probe").map)
    except CallError as error:
        text = describe_error(error, source)
        if error.code == "ConsumerGroupNotExist":  # here nobody knows that it was ever there
            text = "%s; it is not made yet, the first copy that starts makes it" % error
        show("%s, consumer group %s: %s" % (settings.source_name, group, text), sys.stderr)
        return 1
    now = logstore.client.server_time()
    ahead = time.time() - now
    if abs(ahead) > CLOCK_TOLERANCE:
        where = "ahead of" if ahead > 0 else "behind"
        show("this machine's clock is %.0f s %s the service's, by which this is told" % (abs(ahead), where), sys.stderr)
    behind = largest_lag(statuses)
    if as_json:
        shards = [{name: redactor.redact(value) if isinstance(value, str) else value
                   for name, value in vars(each).items()} for each in statuses]  # fmt: skip
        print(json.dumps({"project": source.project, "logstore": source.logstore, "consumer_group": group,
                          "time": now, "behind_seconds": behind, "shards": shards}, indent=2))  # fmt: skip
    else:
        show(status_table(statuses, behind, now))
    return int(max_lag is not None and (behind is None or behind > max_lag))


# ---- delivery: every put until the target has taken it --------------------------------------------------------------

SLOW_PUT_SECONDS, SLOW_PUT_RATE = 5.0, 250 * 1000  # seconds, bytes a second: slower puts don't raise the limit
DOUBT_SECONDS = 5.0  # after which a target that fails and accepts nothing is in doubt, see Target.is_doubtful
FEW_LOG_GROUPS = 20  # see rule 1 of Batch
HOLD_SECONDS = 60.0  # see rule 2 of Batch
LONGEST_BATCH = 5.0  # seconds, after which a batch is cut, see Batch
GRACE = 7.0  # seconds for a batch in flight when its copy is told to stop, or its shard is revoked or lost
MAX_REJECTIONS = 3  # times that a LogGroup must be refused, alone, before it counts as refused for good
# For the rules of Target.is_content_at_fault:
UNDISPUTED_BYTES = MAX_MERGED_BYTES  # of a put, that every region takes: a larger one may be at fault by its size alone
REJECTION_PATIENCE, REJECTION_LOOKBACK, UNPROVEN_INTERVAL = 10.0, 60.0, 60.0  # seconds
MAX_UNPROVEN = 3  # LogGroups


class DeadLetterDirectory:
    """Keeps LogGroups that a target refuses for good as files: one each, for the owner alone, on disk for certain.

    A file has the bytes of one LogGroup. Its name says whose they are, where in the source they stood, and by what code
    they were refused: two that are equal are two files, one that is refused again after a crash is the same file again.
    """

    MAX_BYTES = 1000 * 1000 * 1000  # of all such files; what goes beyond is not set aside
    MAX_NAME = 64  # characters of a project's or logstore's, for a file's name must not have more than 255
    RESCAN_INTERVAL = 30.0  # seconds between looks at what other copies keep, and what has been taken away
    NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW  # nothing that somebody else has laid there

    def __init__(self, directory: str, source: str = "") -> None:
        """`source` is what the source logstore is called: other programs may use the directory for other sources."""
        self.directory, self.source = directory, source
        self.lock = threading.Lock()  # guards:
        self.used, self.looked = 0, float("-inf")

    @classmethod
    def beginning_of_name(cls, target: int, config: LogstoreConfig) -> str:
        """Of all files of one target."""
        return "TO%d-%s-%s-" % (target, config.project[: cls.MAX_NAME], config.logstore[: cls.MAX_NAME])

    def save(self, target: int, config: LogstoreConfig, log_group: LogGroup, place: str, code: str = "") -> str:
        """Returns the path of the file, which is there whole or not at all, whenever the machine stops. `place` is
        PullResult.place_of, `code` one of REJECTION_CODES.

        Raises OSError, also when the directory has MAX_BYTES.
        """
        data = log_group.SerializeToString()
        name = self.beginning_of_name(target, config) + "%s-%s" % (place, short_hash(self.source.encode(), data))
        endings = ["-" + each if each else "" for each in (code, *REJECTION_CODES, "")]
        paths = [os.path.join(self.directory, "%s%s.loggroup" % (name, ending)) for ending in endings]
        # The file that is there already, by whatever code it was refused before; else a new one by this code.
        path = next(filter(os.path.lexists, paths), paths[0])
        with self.lock:
            if time.monotonic() - self.looked > self.RESCAN_INTERVAL:
                with os.scandir(self.directory) as entries:
                    kept = [entry.stat(follow_symlinks=False) for entry in entries if ".loggroup" in entry.name]
                self.used, self.looked = sum(each.st_size for each in kept), time.monotonic()
            is_new = not os.path.lexists(path)
            if is_new and self.used + len(data) > self.MAX_BYTES:
                used = "it holds %d bytes, as many as are kept; make room" % self.used
                raise OSError(errno.EDQUOT, used, self.directory)
            self.used += is_new * len(data)
        unfinished = os.path.join(self.directory, "%s.loggroup.unfinished" % uuid.uuid4().hex)
        try:
            with open(os.open(unfinished, self.NEW_FILE, 0o600), "wb") as file:
                os.fchmod(file.fileno(), 0o600)  # whatever the umask
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)  # a link as well: it is replaced, not followed
        except OSError:
            self.looked = float("-inf")  # what there is of it now doesn't count
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


class Outcome(NamedTuple):
    """LogGroups that a target has accepted with one put, or one that it has refused for what that brings."""

    when: float  # by the monotonic clock
    size: int  # bytes of the put
    accepted: int  # LogGroups; 0 for one that was refused, however often


class Histogram:
    """How often something has taken how long, as Prometheus counts that. One thread observes, any may look."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)  # up to each bound, beyond the one before; the last beyond all
        self.sum = 0.0  # seconds

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def samples(self, name: str, labels: str) -> Iterator[tuple[str, str, float]]:
        """Name, labels and value of each; `labels` as prometheus_labels has them."""
        count, seconds = 0, self.sum
        for bound, more in zip((*("%g" % bound for bound in self.BOUNDS), "+Inf"), self.counts[:]):
            count += more
            yield name + "_bucket", '%s,le="%s"}' % (labels[:-1], bound), count
        yield name + "_sum", labels, seconds
        yield name + "_count", labels, count


def blames_put(error: Exception | None) -> bool:
    """Whether the service blames what the put brings, or something on the way its size: smaller ones may pass. It says
    nothing of other puts."""
    return isinstance(error, CallError) and error.kind in (ErrorKind.REJECTED, ErrorKind.BLOCKED)


class Target:
    """One target logstore: what waits for it, how much of that may begin, and its counts.

    A put that fails begins a pause, its backoff. Which puts may begin depends on how many pauses there were in a row
    without a put accepted between them:

        no pause    all, up to `limit` puts in flight
        one         those never tried at once, for it may be one put in many that fails; those that failed, after it
        more        after each pause up to a quarter of `limit`: in turn those never tried and those that failed, so
                    that one that always fails bars no others

    A target that is in doubt and fails has one put in flight, and batches hold what is for others, by rule 2 of Batch.
    """

    def __init__(
        self, settings: TargetSettings, client: PutClient, max_in_flight: int, dead_letters: DeadLetterDirectory | None
    ) -> None:
        self.number, self.config, self.name = settings.number, settings.config, settings.name
        self.client = client
        self.write = functools.partial(client.put_log_raw, self.config.project, self.config.logstore)
        self.max_in_flight = max_in_flight
        self.dead_letters = dead_letters
        self.put_retries = RetryLog(self.name, "puts", "a put failed and is tried again until it is taken", self.config)
        self.dead_letter_retries = RetryLog(
            self.name, "setting aside", "a refused LogGroup can't be set aside yet", self.config
        )
        self.dead_letter_throttles = {code: LogThrottle() for code in REJECTION_CODES}
        self.distrust_throttle = LogThrottle()
        # Of the PutLoop's thread alone:
        self.queue: dict[Batch, None] = {}  # those whose next put is for this target, the first to wait first
        self.failed: deque[tuple[PutRequest, Batch]] = deque()  # to be tried again
        self.limit = 1  # of puts in flight
        self.timeout = 0.0  # seconds for an answer, twice what the last put took; see PutInFlight for the least
        self.in_flight = 0
        self.failures = 0  # pauses in a row
        self.retry_at = 0.0  # when the last of these ends, by the monotonic clock
        # Written by that thread, read by any:
        self.log_groups = self.logs = self.bytes = self.retries = 0
        self.latencies = Histogram()  # of puts that were accepted
        self.lock = threading.Lock()  # guards:
        self.outcomes: deque[Outcome] = deque(maxlen=1000)  # the last
        self.rejected: set[PutRequest] = set()  # of one LogGroup each, refused for what they bring, to be tried again
        self.last_accepted = 0.0  # when, by the monotonic clock
        self.unproven = 0  # LogGroups set aside since then by rule 3 of `is_content_at_fault`
        self.last_unproven = 0.0  # when, the last of these
        self.refuted_at = 0.0  # when the target accepted last what it had refused, by the monotonic clock
        self.dead_lettered = 0

    # ---- how much may begin

    def adapt(self, put: PutRequest, error: Exception | None) -> None:
        """Adapts to how a put went. The limit follows by AIMD: one put more in flight after each that was quick, half
        as many after one that was slow and failed. The pause grows as long as nothing is accepted."""
        now = time.monotonic()
        seconds = now - put.began
        is_slow = seconds > SLOW_PUT_SECONDS + put.size / SLOW_PUT_RATE
        if error is None:
            self.failures, self.retry_at = 0, 0.0
            self.latencies.observe(seconds)
            self.timeout = min(2 * seconds, MAX_RESPONSE_TIMEOUT)
            self.limit = self.limit if is_slow else min(self.limit + 1, self.max_in_flight)
        elif not blames_put(error):
            self.limit = max(1, self.limit // 2) if is_slow else self.limit
            if put.began >= self.retry_at:  # else it is one of those that were in flight when the pause began
                self.failures += 1
                # A pause is at most 1/16 of the time since the last acceptance: while that time doubles there are over
                # ten tries (16 ln 2 = 11), so that a target that accepts one in ten is soon found to accept.
                longest = max(INITIAL_BACKOFF / 2, (now - self.last_accepted) / 16)
                self.retry_at = now + backoff(self.failures, longest)

    def is_doubtful(self) -> bool:
        """Whether nobody knows that it takes puts: it has taken none so far, or some have failed and none was taken for
        a while."""
        is_known = bool(self.last_accepted) and not self.failures
        return not is_known and time.monotonic() - self.last_accepted > DOUBT_SECONDS

    def next_queue(self) -> deque[tuple[PutRequest, Batch]] | dict[Batch, None] | None:
        """The queue that the next put comes from, `failed` or `queue`, see above; None while there is none to begin."""
        is_due = not self.retry_at or time.monotonic() >= self.retry_at
        if self.failures > 1 and not is_due:
            return None
        if self.failed and is_due and (self.failures < 2 or self.failures % 2 or not self.queue):
            return self.failed
        return self.queue or None

    def most_in_flight(self) -> int:
        """Puts at a time, see above."""
        if self.failures and self.is_doubtful():
            return 1
        return self.limit if self.failures < 2 else max(1, self.limit // 4)

    # ---- what came of puts

    def on_result(self, put: PutRequest, error: Exception | None) -> None:
        """Counts a try of a put; `error` is None when the target has accepted it."""
        if error:
            self.retries += 1
            put.failures += 1
            if isinstance(error, CallError) and error.kind is ErrorKind.REJECTED:
                self.on_rejection(put)
            self.put_retries.on_failure(put, error)
            return
        self.settle(put)
        now = time.monotonic()
        with self.lock:
            if put.rejections:
                self.refuted_at = now
            self.outcomes.append(Outcome(now, put.size, len(put.log_groups)))
            self.last_accepted, self.unproven = now, 0
        self.log_groups += len(put.log_groups)
        self.logs += put.log_count
        self.bytes += put.size

    def on_rejection(self, put: PutRequest) -> None:
        """Counts a rejection of a put. When the target accepts something that it had rejected, it was itself at fault
        until then: earlier rejections don't count any more."""
        with self.lock:
            if put.first_rejection < self.refuted_at:  # also where it is -1, for there was none
                put.first_rejection, put.rejections = time.monotonic(), 0
            if len(put.log_groups) == 1 and not put.rejections:
                self.rejected.add(put)
                self.outcomes.append(Outcome(put.first_rejection, put.size, 0))
            put.rejections += 1

    def settle(self, put: PutRequest) -> None:
        """To be called when a put is accepted or set aside."""
        self.put_retries.on_success(put)
        self.dead_letter_retries.on_success(put)
        self.forget(put)

    def forget(self, put: PutRequest) -> None:
        """To be called when a put need not be retried: it is accepted, split, set aside, or its batch is over."""
        self.put_retries.on_done(put)
        self.dead_letter_retries.on_done(put)
        if put.rejections:
            with self.lock:
                self.rejected.discard(put)

    def split_or_reject(self, put: PutRequest, error: CallError, pull: PullResult) -> list[PutRequest]:
        """What is to be tried in the place of a put that was blamed: the LogGroups of `pull` that were merged into it,
        each for itself; or nothing, once a single one has become a dead letter; else the same put."""
        if len(put.log_groups) > 1:
            self.forget(put)
            singles = [PutRequest(single.envelope).add(single) for single in put.log_groups]
            for single in singles:
                single.target, single.first_rejection = self, put.first_rejection
            return singles
        is_refused = error.kind is ErrorKind.REJECTED and put.rejections >= MAX_REJECTIONS
        if not is_refused or not self.is_content_at_fault(put, error) or not self.dead_letters:
            return [put]
        log_group = put.log_groups[0]
        try:
            path = self.dead_letters.save(self.number, self.config, log_group, pull.place_of(log_group), error.code)
        except OSError as failure:
            self.dead_letter_retries.on_failure(put, failure)
            return [put]
        self.settle(put)
        with self.lock:
            if self.last_accepted < put.first_rejection:
                self.unproven, self.last_unproven = self.unproven + 1, time.monotonic()
            self.dead_lettered += 1
        if self.dead_letter_throttles[error.code].allow():
            log.error(
                "%s: a LogGroup of topic '%s', %d logs, is refused for good and set aside as %s (%d so far): %s",
                self.name, escape_for_log(log_group.Topic, 60), put.log_count, path, self.dead_lettered, error,
            )  # fmt: skip
        return []

    def is_content_at_fault(self, put: PutRequest, error: CallError) -> bool:
        """Whether a LogGroup that was refused is at fault, and not the target: that is so if the target has accepted at
        least as many LogGroups as it refused. Not all that it has accepted count, but:

        1. those since the first refusal, for the target may have broken then;
        2. where the size is blamed, those in puts of at least that size, unless it is beyond UNDISPUTED_BYTES;
        3. after REJECTION_PATIENCE seconds also those of the REJECTION_LOOKBACK seconds before the refusal,
           for where a single shard waits for its refused LogGroup, no other put shows how the target is. By this rule
           alone MAX_UNPROVEN LogGroups at the most, those that wait included, are set aside until the target accepts
           something; beyond that one each UNPROVEN_INTERVAL seconds, counted from the last one accepted or set aside.
        """
        size = put.size if error.code == "PostBodyTooLarge" and put.size <= UNDISPUTED_BYTES else 0
        since = put.first_rejection
        with self.lock:
            now = time.monotonic()
            is_late = now - since > REJECTION_PATIENCE
            waiting = max(1, len(self.rejected))
            are_few = waiting + self.unproven <= MAX_UNPROVEN
            if is_late and (are_few or now - max(self.last_accepted, self.last_unproven) > UNPROVEN_INTERVAL):
                since -= REJECTION_LOOKBACK  # rule 3
            recent = [each for each in self.outcomes if each.when >= since]
        accepted = sum(each.accepted for each in recent if each.size >= size)
        refused = max(waiting, sum(not each.accepted for each in recent))  # some that wait were refused before
        if accepted >= refused:
            return True
        if (is_late or not are_few) and self.distrust_throttle.allow():
            log.error(
                "%s: it refuses %d LogGroups and has accepted %d others%s meanwhile, so the target itself seems to be "
                "wrong: none is set aside, and their shards wait; look at its settings and key, and at gateways and "
                "proxies on the way, which may change headers or what is put",
                self.name, refused, accepted, " of that size" if size else "",
            )  # fmt: skip
        return False

    def summary(self) -> str:
        return (
            f"target={self.number} logstore={self.config} groups={self.log_groups} logs={self.logs} bytes={self.bytes} "
            f"retries={self.retries} failing={len(self.put_retries.failing)} set_aside={self.dead_lettered}"
        )


class Batch:
    """One delivery of a batch (a PullResult): its puts, and what has become of them. A latch for whoever delivers it.

    A checkpoint is one cursor: all that is delivered after the first LogGroup that isn't will be delivered again. So
    its puts begin in the order of the pull; but the first put to each target that is failing begins before the others,
    to show early whether it still fails. And while a put fails the next one is held,

    1. if it has LogGroups more than FEW_LOG_GROUPS after the first that fails;
    2. or if the failing put's target is in doubt, but for HOLD_SECONDS at the most. Then what is for other targets goes
       first, see `defer`.

    A batch is over when each LogGroup is accepted or set aside. When it is cut, no new put begins, but for LogGroups
    that lie before one whose put has begun: a checkpoint leaves no gap, so without them that put would be for nothing.
    Puts that failed are retried. It is over then once none is in flight and what is delivered has no gap. A batch that
    is given up is over at once.
    """

    def __init__(self, log_groups: Sequence[LogGroup], puts: list[PutRequest]) -> None:
        """The `puts` as by Delivery.route, of these LogGroups."""
        self.positions = {id(log_group): position for position, log_group in enumerate(log_groups)}
        self.puts = puts
        # Written by the PutLoop's thread alone:
        self.unfinished = set(puts)  # what is neither accepted nor set aside
        # The puts that fail. It begins as the first put (hence `reversed`) for each target that is failing already.
        self.failing = set({put.target: put for put in reversed(puts) if put.target.failures}.values())
        self.failing_since = time.monotonic()  # when the first of them failed; until then, when it was made
        self.waiting = deque(sorted(puts, key=lambda put: (put not in self.failing, self.first(put))))  # never tried
        self.is_cut = False
        self.is_over = False  # nothing of it begins any more
        self.accepted_at = 0.0  # when one of its puts was last accepted, by the monotonic clock
        self.blamed: deque[tuple[PutRequest, CallError]] = deque()  # puts for Target.split_or_reject
        self.failure: Exception | None = None  # one of this process
        self.change = threading.Event()  # it is over, has failed, or has puts in `blamed`

    def first(self, put: PutRequest) -> int:
        """The position of its first LogGroup."""
        return self.positions[id(put.log_groups[0])]

    def last(self, put: PutRequest) -> int:
        return self.positions[id(put.log_groups[-1])]

    def is_held(self) -> bool:
        """Whether the next put is held, see above."""
        put = self.waiting[0]
        if not self.failing or put in self.failing:
            return False
        is_doubtful = any(each.target.is_doubtful() for each in self.failing)
        return self.is_far(put) or (is_doubtful and time.monotonic() < self.failing_since + HOLD_SECONDS)

    def is_far(self, put: PutRequest) -> bool:
        """Whether it has LogGroups that are too far after one that fails."""
        return bool(self.failing) and self.last(put) > min(map(self.first, self.failing)) + FEW_LOG_GROUPS

    def defer(self, target: Target) -> None:
        """Puts what is for a target that takes nothing behind the rest: first what is for others, then this, then what
        rule 1 holds anyway."""
        self.waiting = deque(sorted(self.waiting, key=lambda put: (self.is_far(put), put.target is target)))

    def is_disputed(self) -> bool:
        """Whether a put of it was refused for what it brings, and it will be clear soon whose fault that is."""
        recently = time.monotonic() - 2 * REJECTION_PATIENCE
        return any(put.rejections and put.first_rejection > recently for put in list(self.unfinished))

    def positions_of(self, puts: Iterable[PutRequest]) -> set[int]:
        return {self.positions[id(log_group)] for put in puts for log_group in put.log_groups}

    def delivered(self) -> tuple[int, int]:
        """How many LogGroups are done with, from the first on, and how many were delivered beyond these."""
        left = self.positions_of(list(self.unfinished))
        done = min(left, default=len(self.positions))
        delivered = self.positions_of(self.puts) - left
        return done, sum(position > done for position in delivered)

    def cut(self) -> None:
        """Calls off what was never tried, but for what stands before a LogGroup whose put has begun."""
        waiting = sorted(self.waiting, key=self.first)
        last = max(self.positions_of(set(self.puts).difference(waiting)), default=-1)
        self.waiting.clear()
        for put in waiting:
            if self.first(put) < last:
                last = max(last, self.last(put))
                self.waiting.append(put)
            else:
                self.failing.discard(put)
        self.is_cut = True

    def fail(self, failure: Exception) -> None:
        """Has whoever delivers it give it up."""
        self.failure = failure
        self.change.set()


def connection_budget() -> int:
    """How many puts may be in flight, and again how many connections idle: a third each of the files we may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft // 3)


class PutLoop(threading.Thread):
    """Sends all puts of all batches and targets, takes all their answers and tries again what failed, in one thread,
    which waits for nothing.

    Batches, and the queues, limits and connections of the targets, are its own, so that they need no lock. What may
    block is done by others: threads of `opener` open connections, and do a put as a whole where its connection can't be
    used without waiting (ConnectionFactory.is_blocking); whoever delivers a batch writes dead letters. Whatever fails
    within this process, as for want of memory, costs a put or a batch another try, no more.

    A put begins (`begin_put`): its target's queue gives it, it is sent over an idle connection or one that is opened
    (`open_soon`, `on_opened`). It ends by an answer (`on_response`) or without (`on_failure`): then its connection is
    left (`leave`), it is in flight no longer (`land`), and what comes of it is settled (`finish`).
    """

    MAX_BYTES = 32 * 1000 * 1000  # of requests in flight; beyond it a target has one
    MAX_OPENING, MAX_BLOCKING = 8, 64  # connections that a client opens at once; or puts, where these block
    TURN_SECONDS = 0.005  # for which puts are begun before it looks for answers
    HOUSEKEEPING_INTERVAL = 0.2  # seconds between looks at deadlines and idle connections

    def __init__(self, targets: Sequence[Target], max_in_flight: int) -> None:
        super().__init__(name="puts", daemon=True)
        self.targets, self.max_in_flight = targets, max_in_flight
        self.clients = {target.client for target in targets}
        for client in self.clients:
            client.discard = self.close_connection
        self.opener = ThreadPool(256, "opens connections")
        self.ready: dict[Target, None] = {}  # those that may begin a put, in this order
        self.flights: dict[PutInFlight, tuple[PutRequest, Batch]] = {}  # what each is a try of
        self.by_file: dict[int, PutInFlight] = {}  # those that wait for an answer, by the number of their socket
        # By the number of their socket, too: idle connections, as they stand in the pools of their clients.
        self.idle: dict[int, tuple[PutClient, tuple[http.client.HTTPConnection, float]]] = {}
        self.timers: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []  # a heap by due time
        self.timer_numbers = itertools.count()  # which tell apart what is due at the same time
        self.batches: set[Batch] = set()  # those that are not over
        self.bytes_in_flight = 0
        self.next_housekeeping = 0.0
        self.selector = selectors.DefaultSelector()
        # Filled by other threads, who then wake the loop; a deque's appends need no lock.
        self.calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.is_asleep = False
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)
        self.selector.register(self.wake_receiver, selectors.EVENT_READ)
        self.start()

    # ---- called by other threads

    def call(self, method: Callable[..., None], *arguments: object) -> None:
        """Has the loop's thread call one of the methods below, in the order of these calls."""
        self.calls.append((method, arguments))
        if self.is_asleep:
            with contextlib.suppress(BlockingIOError):  # so full that it wakes all the same
                self.wake_sender.send(b"x")

    def submit(self, batch: Batch) -> None:
        """Has the puts of a batch tried until each is accepted, or blamed for what it brings."""
        for client in {put.target.client for put in batch.puts}:
            with contextlib.suppress(Exception):  # any: the put fails by it, too, and tells
                client.prepare()
        self.call(self.begin, batch)

    def open_connection(self, flight: PutInFlight) -> None:
        """In a thread of `opener`."""
        try:
            client = flight.client
            if client.factory.is_blocking:
                if not flight.claim():
                    raise Cancelled
                outcome: Any = client.round_trip(flight.request, MAX_PUT_ANSWER_BYTES, flight.timeout)
            else:
                outcome = client.factory.connect(client.connect_timeout)
        except Exception as error:
            outcome = error
        self.call(self.on_opened, flight, outcome)

    # ---- the loop

    def run(self) -> None:
        with watchdog.watching(self.name, is_permanent=True):
            while True:
                watchdog.beat()
                try:
                    self.turn()
                except Exception:  # any, such as MemoryError: the loop goes on
                    with contextlib.suppress(Exception):
                        log.exception("a defect of this program")
                    time.sleep(INITIAL_BACKOFF)

    def turn(self) -> None:
        while self.calls:
            self.perform(*self.calls.popleft())
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            self.perform(*heapq.heappop(self.timers)[2:])
        while self.ready and len(self.flights) < self.max_in_flight and time.monotonic() < now + self.TURN_SECONDS:
            self.begin_put(next(iter(self.ready)))
        wait = min(self.timers[0][0] - now, self.HOUSEKEEPING_INTERVAL) if self.timers else self.HOUSEKEEPING_INTERVAL
        self.is_asleep = True  # before the last look at what others have filled
        is_busy = self.calls or (self.ready and len(self.flights) < self.max_in_flight)
        events = self.selector.select(0 if is_busy else max(0.0, wait))
        self.is_asleep = False
        for key, _ in events:
            self.on_event(key.fd)
        if time.monotonic() >= self.next_housekeeping:
            self.next_housekeeping = time.monotonic() + self.HOUSEKEEPING_INTERVAL
            self.end_what_is_over()
            self.keep_moving()

    def call_at(self, when: float, method: Callable[..., None], *arguments: object) -> None:
        """As `call`, for the loop itself, at a time by the monotonic clock."""
        heapq.heappush(self.timers, (when, next(self.timer_numbers), method, arguments))

    def perform(self, method: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            method(*arguments)
        except Exception as failure:  # any, such as MemoryError: the batch is tried again as a whole
            for batch in arguments:
                if isinstance(batch, Batch):
                    batch.fail(failure)
            raise

    # ---- batches

    def begin(self, batch: Batch) -> None:
        self.batches.add(batch)
        self.queue_next(batch)
        self.end_if_over(batch)  # where none of it is routed

    def queue_next(self, batch: Batch) -> None:
        """Has the next put of a batch wait for its turn at its target, unless it is held."""
        if not batch.waiting:
            return
        target = batch.waiting[0].target
        if batch.is_held():  # which it may not have been before
            self.unqueue(batch)
        else:
            target.queue[batch] = None  # where it stands if it is there already
            self.make_ready(target)

    def unqueue(self, batch: Batch) -> None:
        if batch.waiting:
            batch.waiting[0].target.queue.pop(batch, None)

    def replace(self, batch: Batch, put: PutRequest, puts: Sequence[PutRequest]) -> None:
        """Has these puts tried in the place of one that was blamed."""
        if batch.is_over:
            for one in {put, *puts}:
                one.target.forget(one)
            return
        batch.unfinished.update(puts)
        if put not in puts:
            batch.unfinished.remove(put)
        for one in puts:
            self.call_at(time.monotonic() + backoff(max(1, one.failures)), self.retry, one, batch)
        self.end_if_over(batch)

    def retry(self, put: PutRequest, batch: Batch) -> None:
        if not batch.is_over:
            put.target.failed.append((put, batch))
            self.make_ready(put.target)

    def cut(self, batch: Batch, least: int) -> None:
        """Cuts a batch, if `least` LogGroups are done with."""
        if batch.is_cut or batch.is_over or batch.delivered()[0] < least:
            return
        self.unqueue(batch)
        batch.cut()
        self.queue_next(batch)
        self.end_if_over(batch)

    def end_if_over(self, batch: Batch) -> None:
        is_in_flight = batch.is_cut and any(each is batch for _, each in self.flights.values())
        if not batch.unfinished or (batch.is_cut and not is_in_flight and not batch.delivered()[1]):
            self.end(batch)

    def end(self, batch: Batch) -> None:
        """No put of a batch begins any more, and what becomes of those in flight no longer matters."""
        self.unqueue(batch)
        batch.waiting.clear()
        for target in {put.target for put in batch.unfinished}:
            target.failed = deque(pair for pair in target.failed if pair[1] is not batch)
        for put in batch.unfinished:
            put.target.forget(put)
        self.batches.discard(batch)
        batch.is_over = True
        batch.change.set()

    # ---- puts

    def make_ready(self, target: Target) -> None:
        """Gives a target its turn to begin a put, if it may begin one."""
        most = target.most_in_flight() if self.bytes_in_flight < self.MAX_BYTES else 1
        if target.in_flight < most and target not in self.ready and target.next_queue():
            self.ready[target] = None

    def begin_put(self, target: Target) -> None:
        """Begins the next put of a target that is ready."""
        del self.ready[target]
        queue = target.next_queue()
        if not queue:  # a batch is over meanwhile
            return
        if queue is target.failed:
            put, batch = target.failed.popleft()
        else:
            batch = next(iter(target.queue))
            del target.queue[batch]
            put = batch.waiting.popleft()
        target.in_flight += 1
        try:
            put.began, put.timeout = time.monotonic(), max(put.timeout, target.timeout)
            flight = target.write(put)
            self.flights[flight] = put, batch
        except Exception as error:  # any, such as MemoryError: nothing was sent, and nobody else is to blame
            code = "OutOfMemory" if isinstance(error, MemoryError) else "LocalFailure"
            self.finish(put, batch, error if isinstance(error, CallError) else CallError(code, repr(error)))
            return
        self.bytes_in_flight += len(flight.request)
        try:
            if flight.connection:
                self.idle.pop(flight.sock.fileno(), None)
                self.wait_for_answer(flight)
            else:
                self.open_soon(flight.client, flight)
        except Exception as error:  # any
            self.on_failure(flight, error)
        with contextlib.suppress(Exception):  # any: then `keep_moving` does it
            self.queue_next(batch)
            self.make_ready(target)

    def open_soon(self, client: PutClient, *flights: PutInFlight) -> None:
        """Has connections opened for puts; where that blocks, has the puts done as a whole. Few at once, lest many
        targets need many threads."""
        client.unopened.extend(flights)
        most = self.MAX_BLOCKING if client.factory.is_blocking else self.MAX_OPENING
        while client.unopened and client.opening < most:
            flight = client.unopened.popleft()
            if flight in self.flights:  # else its time was over meanwhile
                self.opener.submit(self.open_connection, flight)
                client.opening += 1

    def on_opened(self, flight: PutInFlight, outcome: Any) -> None:
        """A connection was opened for a put, or couldn't be; or, where that blocks, the put was answered."""
        flight.client.opening -= 1
        with contextlib.suppress(Exception):  # any, such as no thread: what waits has a deadline
            self.open_soon(flight.client)
        if flight not in self.flights:  # its time was over meanwhile
            if not isinstance(outcome, (Exception, Response)):
                outcome.close()
        elif isinstance(outcome, Exception):
            self.on_failure(flight, outcome)
        elif isinstance(outcome, Response):
            self.on_response(flight, outcome)
        else:
            try:
                outcome.sock.setblocking(False)
                flight.use(outcome, is_fresh=True)
                self.selector.register(flight.sock, selectors.EVENT_READ)  # where idle connections stand, too
                if self.flights[flight][1].is_over:
                    self.leave(flight, is_reusable=True)
                    self.land(flight, Cancelled())
                    return
                flight.send()
                self.wait_for_answer(flight)
            except Exception as error:
                self.on_failure(flight, error)

    def wait_for_answer(self, flight: PutInFlight) -> None:
        self.by_file[flight.sock.fileno()] = flight
        if flight.sent < len(flight.request):
            self.selector.modify(flight.sock, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def on_event(self, file: int) -> None:
        """Something has come over a connection, it has been closed, or it takes more."""
        if file == self.wake_receiver.fileno():
            with contextlib.suppress(BlockingIOError):
                self.wake_receiver.recv(4096)
            return
        flight = self.by_file.get(file)
        if flight is None:
            self.close_idle(file)
            return
        try:
            response = flight.receive()  # before more is sent: for so it shows whether it is early
            if response:
                self.leave(flight, not response.is_last)
                self.on_response(flight, response)
            elif flight.sent < len(flight.request):
                with contextlib.suppress(ConnectionError):  # who won't read it all may have said why, as gateways do
                    if flight.send():
                        self.selector.modify(flight.sock, selectors.EVENT_READ)
        except Exception as error:
            self.on_failure(flight, error)

    def on_response(self, flight: PutInFlight, response: Response) -> None:
        error: Exception | None = None
        try:
            flight.client.judge(response, True, flight.token)
        except Exception as failure:  # any, such as RecursionError; `leave` has given its connection back already
            error = failure
        self.land(flight, error)

    def on_failure(self, flight: PutInFlight, error: Exception) -> None:
        """No answer has come, the connection is closed. Where an idle one was closed before, the put is sent again."""
        if flight.connection:
            self.leave(flight, is_reusable=False)
            if isinstance(error, ConnectionError) and not (flight.is_fresh or flight.received):
                flight.need_connection()
                with contextlib.suppress(Exception):  # any, such as no thread: then it has failed
                    self.open_soon(flight.client, flight)
                    return
        if isinstance(error, TimeoutError):
            self.flights[flight][0].timeout = min(2 * flight.timeout, MAX_RESPONSE_TIMEOUT)
        self.land(flight, error)

    def land(self, flight: PutInFlight, error: Exception | None) -> None:
        """It is in flight no longer."""
        put, batch = self.flights.pop(flight)
        self.bytes_in_flight -= len(flight.request)
        self.finish(put, batch, error)

    def finish(self, put: PutRequest, batch: Batch, error: Exception | None) -> None:
        """Settles how a try of a put went: it is done with, blamed, or tried again after a pause."""
        target = put.target
        target.in_flight -= 1
        try:
            error = error and error.with_traceback(None)  # its frames hold the request
            if isinstance(error, NETWORK_ERRORS):
                error = CallError.from_exception(error)
            if not isinstance(error, Cancelled):
                target.on_result(put, error)
                target.adapt(put, error)
        except Exception as failure:  # any, such as MemoryError: it is tried again, even if it was accepted
            error = error or failure
        try:
            if error is None or blames_put(error):
                batch.failing.discard(put)
            if batch.is_over:
                target.forget(put)
            elif error is None:
                batch.accepted_at = time.monotonic()
                batch.unfinished.remove(put)
            elif isinstance(error, CallError) and blames_put(error):
                batch.blamed.append((put, error))
                batch.change.set()
            else:
                if not batch.failing:
                    batch.failing_since = time.monotonic()
                batch.failing.add(put)
                target.failed.append((put, batch))
                self.call_at(target.retry_at, self.make_ready, target)
        except Exception as failure:  # any, such as MemoryError: the batch is tried again as a whole
            batch.fail(failure)
        with contextlib.suppress(Exception):  # any: then `keep_moving` does it
            self.queue_next(batch)
            self.end_if_over(batch)
            self.make_ready(target)

    # ---- connections

    def leave(self, flight: PutInFlight, is_reusable: bool) -> None:
        """A put has done with its connection: it is idle, or closed."""
        file = flight.sock.fileno()
        self.by_file.pop(file, None)
        if is_reusable:
            idle = flight.connection, time.monotonic()
            flight.client.idle_connections.append(idle)
            self.idle[file] = flight.client, idle
        else:
            self.close_connection(flight.connection)

    def close_connection(self, connection: http.client.HTTPConnection) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError, AttributeError):
            self.idle.pop(connection.sock.fileno(), None)
            self.selector.unregister(connection.sock)
        connection.close()

    def close_idle(self, file: int) -> None:
        """Closes a connection that the other side has closed, or over which came what nobody has asked for."""
        if file in self.idle:
            if is_silent(self.idle[file][1][0].sock):
                return
            client, idle = self.idle.pop(file)
            with contextlib.suppress(ValueError):  # a put has taken it, and failed within this process
                client.idle_connections.remove(idle)
            self.close_connection(idle[0])
        else:  # nobody's: else it would be told for ever
            with contextlib.suppress(KeyError, OSError):
                self.selector.unregister(file)

    def end_what_is_over(self) -> None:
        """Ends puts whose deadline has passed, and closes connections that were idle for too long, or are too many."""
        now = time.monotonic()
        for flight in [flight for flight in self.flights if now > flight.deadline]:
            if flight.connection:
                with contextlib.suppress(OSError):
                    forget_unsent(flight.sock)
            elif not flight.claim():  # it is under way, with deadlines of its own
                continue
            self.on_failure(flight, TimeoutError("timed out"))
        surplus = len(self.idle) - connection_budget()
        for client in self.clients:
            idle = client.idle_connections  # the last used last
            with contextlib.suppress(IndexError):  # for threads of `opener` use those of a client that blocks
                while idle and (surplus > 0 or now - idle[0][1] >= MAX_IDLE):
                    self.close_connection(idle.popleft()[0])
                    surplus -= 1

    def keep_moving(self) -> None:
        """For what time alone brings, and what has failed within this process, as for want of memory."""
        long_ago = time.monotonic() - HOLD_SECONDS
        for target in self.targets:
            with contextlib.suppress(Exception):
                # Those that have failed, or waited, for HOLD_SECONDS while the target took nothing: by rule 2 of Batch
                # what is for others goes first.
                for batch in list(target.queue):
                    if max(target.last_accepted, batch.failing_since) < long_ago:
                        self.unqueue(batch)
                        batch.defer(target)
                self.make_ready(target)
        for batch in list(self.batches):
            with contextlib.suppress(Exception):
                self.queue_next(batch)
                self.end_if_over(batch)


class UnmatchedCounter:
    """Counts the LogGroups that are put nowhere: no route matches their topic, or they have no logs."""

    MAX_TOPICS = 1000  # that are counted one by one
    MAX_TOPIC_LENGTH = 60  # characters of one that are shown

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards:
        self.log_groups = self.logs = self.empty = 0
        self.topics: Counter[str] = Counter()

    def add(self, log_group: LogGroup) -> None:
        topic = log_group.Topic
        if len(topic) > self.MAX_TOPIC_LENGTH or topic not in self.topics:
            topic = spell_out(escape_for_log(topic, self.MAX_TOPIC_LENGTH))
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
            pairs = ("%s %d" % (redactor.redact(topic), count) for topic, count in self.topics.most_common(10))
            named = json.dumps(", ".join(pairs), ensure_ascii=False)
            counts = f"empty_groups={self.empty} unmatched_groups={self.log_groups} unmatched_logs={self.logs}"
            return f"{counts} unmatched_topics={named}"


class Delivery:
    """Takes batches of LogGroups to their targets."""

    def __init__(self, settings: Settings, credential_sources: CredentialSources) -> None:
        self.routes = Routes({target.number: target.topics for target in settings.targets})
        source = str(settings.source)
        dead_letters = DeadLetterDirectory(settings.rejected_dir, source) if settings.rejected_dir else None
        clients: dict[LogstoreConfig, PutClient] = {}
        self.targets: dict[int, Target] = {}
        for target in settings.targets:
            connection = target.config.connection
            if connection not in clients:
                clients[connection] = PutClient(target.config, credential_sources.of(target.config))
            self.targets[target.number] = Target(target, clients[connection], settings.writers, dead_letters)
        most = min(settings.writers * len(self.targets), connection_budget())
        self.loop = PutLoop(list(self.targets.values()), most)
        self.merge_packs = settings.merge_packs
        self.unmatched = UnmatchedCounter()

    def route(self, log_groups: Iterable[LogGroup]) -> list[PutRequest]:
        """What is to be put, in the order of each target's LogGroups: merged, unless the target is failing or in doubt.
        Those without logs and those that no route matches go nowhere."""
        shares: dict[Target, list[LogGroup]] = {}
        for log_group in log_groups:
            number = self.routes.target_of(log_group.Topic) if log_group.log_count else None
            if number is not None:
                shares.setdefault(self.targets[number], []).append(log_group)
        puts: list[PutRequest] = []
        for target, share in shares.items():
            is_sure = not target.failures and not target.is_doubtful()
            for part in [share] if is_sure else [[log_group] for log_group in share]:
                for put in merge_log_groups(part, self.merge_packs):
                    put.target = target
                    puts.append(put)
        return puts

    def deliver(
        self, pull: PullResult, soft_stop: CancelToken, hard_stop: CancelToken, wanted_back: CancelToken
    ) -> tuple[int, int]:
        """The callback that a batch is consumed by: returns once each routed LogGroup was accepted or set aside.

        The value is (how many LogGroups are done with, from the first on, how many were delivered beyond these). That
        is all of them and none, unless the batch is cut: when `soft_stop` is cancelled, when it takes longer than
        LONGEST_BATCH, or, where no refusal waits to be judged, when `wanted_back` is cancelled. It is given up when
        `hard_stop` is cancelled, or GRACE seconds after `soft_stop` or the last acceptance since, whichever is later.
        These tokens stand in the table at the head of the section on the consumer.

        On any exception no put of these begins any more.
        """
        batch = Batch(pull.log_groups, self.route(pull.log_groups))
        cut_at = time.monotonic() + LONGEST_BATCH
        try:
            self.loop.submit(batch)
            while not batch.is_over:
                batch.change.wait(0.2)
                batch.change.clear()
                watchdog.beat()
                if batch.failure:
                    raise batch.failure
                self.settle_blamed(batch, pull)
                if soft_stop.is_cancelled():
                    self.loop.call(self.loop.cut, batch, 0)
                    last_progress = max(soft_stop.cancelled_at(), batch.accepted_at)
                    if hard_stop.is_cancelled() or time.monotonic() > last_progress + GRACE:
                        break
                elif wanted_back.is_cancelled() and not batch.is_disputed():
                    self.loop.call(self.loop.cut, batch, 0)
                elif time.monotonic() > cut_at:
                    cut_at = time.monotonic() + LONGEST_BATCH
                    # Where nothing is done of a large batch, its first few LogGroups are tried next, alone: see
                    # ShardConsumer.cut_batch. A batch as small as that goes on until something is done of it, or it
                    # would begin anew again and again.
                    self.loop.call(self.loop.cut, batch, 1 if len(pull.log_groups) <= FEW_LOG_GROUPS else 0)
        finally:
            if not batch.is_over:
                self.loop.call(self.loop.end, batch)
        done, beyond = batch.delivered()
        routed = batch.positions_of(batch.puts)
        for position, log_group in enumerate(pull.log_groups[:done]):
            if position not in routed:
                self.unmatched.add(log_group)
        return done, beyond

    def settle_blamed(self, batch: Batch, pull: PullResult) -> None:
        """Has puts that were blamed for what they bring split, set aside, or tried again."""
        while batch.blamed and not batch.is_over:
            put, error = batch.blamed.popleft()
            self.loop.call(self.loop.replace, batch, put, put.target.split_or_reject(put, error, pull))


# ---- consumer: what was delivered, and only that, is checkpointed ---------------------------------------------------
#
# A consumer is one name in the consumer group, from joining it to losing its lease. What holds for it:
#   1. a batch's checkpoint is saved before the next batch of its shard is delivered; if it was cut, and nobody can tell
#      any more at which cursor, the checkpoint of its rest stands for both parts, see ShardConsumer.cut_batch;
#   2. whoever has lost the lease saves nothing;
#   3. the group is made at the first join only, never at a later one;
#   4. nobody else saves checkpoints: none of the SDK's own shard consumer or its tracker is there;
#   5. RetryLog.retry, or for puts the PutLoop, retries until a CancelToken says that it isn't wanted.
# A shard is assigned by an answer to a heartbeat: the SDK's loop makes a ShardConsumer for it. These are its tokens,
# what cancels each, and what becomes of the shard then. After any of the first three nothing of it begins any more but
# its checkpoint, as long as the lease holds:
#
#   revoked           Consumer.revoke, by an answer     the batch ends with what has begun, or is given up GRACE seconds
#                     without the shard                 after this or, if that is later, after the last put accepted
#                                                       since; hard_stop does not follow. Its checkpoint has GRACE
#                                                       seconds more; then the shard moves
#   member.soft_stop  GroupMember.stop                  the same, but the batch has GRACE seconds in all; heartbeats go
#                                                       on until the process ends
#   consumer.lease    whoever finds it lost, and so     the batch has GRACE seconds, no checkpoint is saved; another
#                     for all shards at once            consumer joins and begins at the service's checkpoints
#   soft_stop         any of these three
#   hard_stop         GRACE seconds after the lease     the batch is given up
#                     or member.soft_stop, but not
#                     by `revoked`
#   wanted_back       Consumer.take_memory              this one batch ends with what has begun: others need the memory
#   saving()          GRACE seconds after soft_stop or  the checkpoint is given up; made anew for each
#                     the end of the batch, whichever
#                     is later

MAIN_LOOP_INTERVAL = 0.1  # seconds between looks at whether something is to be done


class SetByHand(Cancelled):
    """Somebody has set a shard's checkpoint: what was under way is of before."""


class ShardCheckpoint:
    """How far one shard is, by the service and by what was delivered, from when it is assigned to a consumer until that
    lets go of it. One task at a time finds it, looks at it or saves it."""

    GONE_ANSWERS, GONE_PATIENCE = 3, 10.0  # answers, and seconds, without a checkpoint that was there: then it is gone

    def __init__(self, consumer: Consumer, shard: int, revoked: CancelToken) -> None:
        self.consumer, self.shard, self.revoked = consumer, shard, revoked
        self.member, self.source = consumer.member, consumer.member.source
        self.saved = ""  # the service's, as far as this copy knows
        self.delivered = ""  # the cursor up to which all is delivered; beyond `saved` while that is not saved
        # The checkpoint that it made where there was none, and GroupMember.group_start when it did.
        self.made, self.made_by_start = "", 0
        # Cursors whose saving failed: the service may apply them still, after later ones.
        self.may_come_late: deque[str] = consumer.may_come_late.setdefault(shard, deque(maxlen=4))
        self.seen = 0, ""  # updateTime and checkpoint of the service's entry, as last looked at
        self.next_look = time.monotonic() + consumer.heart_beat.interval
        # Since when, by the monotonic clock, and in how many answers it is gone: see `doubt_that_it_is_gone`.
        self.gone_since, self.gone_answers = float("inf"), 0
        # Entries asked for earlier are stale: they may show the former holder's checkpoint, or an earlier one.
        self.entry_since = consumer.heart_beat.assigned_at

    def find(self) -> None:
        """Asks for it or, where the shard has none, makes one, before anything is read. Raises CallError.

        Else a copy killed before its first checkpoint would let the next begin at a later "end". With
        SLS_CURSOR_START=end it begins where the shard ended when the group began, at GroupMember.group_start. Another
        copy's checkpoint may tell that this was earlier than this copy thought: see GroupMember.

        What the consumer before this one has delivered, but could not save, is saved if nobody else has saved since.
        """
        shard, member = self.shard, self.member
        while True:
            entries = member.entries_since(self.entry_since)
            assert entries is not None  # noqa: S101 - it waits for others that ask; nothing would mean: no checkpoint
            self.entry_since = time.monotonic()  # if there is another round, the entry is asked for anew
            entry = entries.get(shard, {})
            found = entry.get("checkpoint") or ""
            self.seen = entry.get("updateTime") or 0, found
            member.take_older_start(entries)
            if found:
                self.gone_since, self.gone_answers = float("inf"), 0
            elif shard in member.begun_shards:
                self.doubt_that_it_is_gone()
            # What the first round has made the second reads back, and makes it anew if another copy's checkpoint says
            # by then that the group is older (rule 4 of GroupMember): nothing was pulled yet.
            if found and (found != self.made or self.made_by_start == member.group_start):
                break
            self.made_by_start = member.group_start
            self.made = member.first_cursor(shard)
            self.send(self.made)
            if member.settings.cursor_start != "end":  # of a new group, no other place depends on when it began
                return
        if cursor_position(found) < 0:
            raise unreadable_checkpoint(shard, entry)
        former = member.former.get(shard)
        if former and former.was_last_to_save(entry):  # even what is there: a save that failed may come late
            self.send(max(found, former.delivered, key=cursor_position))
        else:
            self.saved = self.delivered = found
        member.former.pop(shard, None)

    def doubt_that_it_is_gone(self) -> None:
        """For a shard that had a checkpoint when this process last looked, and has none by an answer now: begun anew it
        would be delivered again from where the group began. Raises CallError for some time; then somebody has made the
        group anew."""
        now = time.monotonic()
        self.gone_since, self.gone_answers = min(self.gone_since, now), self.gone_answers + 1
        if self.gone_answers < self.GONE_ANSWERS or now - self.gone_since < self.GONE_PATIENCE:
            raise CallError("MissingCheckPoint", "shard %d had a checkpoint, and has none by this answer" % self.shard)
        log.warning(
            "%s: shard %s: its checkpoint is gone, as where a group is made anew: it begins as in a new group, by "
            "SLS_CURSOR_START", self.member.subject, self.shard,
        )  # fmt: skip
        self.member.begun_shards.discard(self.shard)
        self.gone_since, self.gone_answers = float("inf"), 0

    def was_last_to_save(self, entry: Mapping[str, Any]) -> bool:
        """Whether nobody has saved or set a checkpoint since this consumer did: by an entry of
        LogstoreApi.get_checkpoints."""
        found, by = entry.get("checkpoint") or "", entry.get("consumer") or ""
        is_own = by == self.consumer.name_in_group and found in (self.saved, *self.may_come_late)
        return is_own or self.seen == (entry.get("updateTime") or 0, found)

    def get_entry(self) -> dict[str, Any]:
        """The shard's, of LogstoreApi.get_checkpoints; empty where it has none. Raises CallError."""
        return self.source.get_checkpoints(self.member.group, self.shard).get(self.shard, {})

    def look(self, is_fresh: bool = True) -> str:
        """Returns the service's. Obeys one that somebody has set by hand since it was looked at last, and raises
        SetByHand then. Raises CallError.

        Unless `is_fresh`, an answer for all shards of not long ago will do; while another thread asks, Cancelled is
        raised: later.

        By hand means: it is not the last that this consumer has saved, nor one whose saving failed, for that may come
        late, nor one of another consumer of this program, such as the holder before. The service's pages don't say whom
        the entry names then: the tool, nobody, or still this consumer.
        """
        now, interval = time.monotonic(), self.consumer.heart_beat.interval
        self.next_look = now + interval
        if is_fresh:
            entry = self.get_entry()
            self.entry_since = time.monotonic()
        else:
            entries = self.member.entries_since(max(self.entry_since, now - interval / 2), is_look=True)
            if entries is None:
                self.next_look = now + 1.0
                raise Cancelled
            entry = entries.get(self.shard, {})
        found, by = entry.get("checkpoint") or "", entry.get("consumer") or ""
        latest = entry.get("updateTime") or 0, found
        if latest == self.seen or latest[0] < self.seen[0]:
            return found
        self.seen = latest
        own_name = self.consumer.name_in_group
        is_own = found == self.saved or (by == own_name and found in self.may_come_late)
        is_of_a_copy = by != own_name and CONSUMER_NAME.fullmatch(by)
        if not found or is_own or is_of_a_copy:
            return found
        if cursor_position(found) < 0:  # moves nothing, and is written over
            log.warning("%s: %s", self.member.subject, unreadable_checkpoint(self.shard, entry))
            return found
        is_back = cursor_position(found) < cursor_position(self.saved)
        log.warning(
            "%s: shard %s: its checkpoint was set by hand to %s (by %s), where this copy had saved %s: it goes on from "
            "there, %s", self.member.subject, self.shard, found, escape_for_log(by, 70) or "nobody", self.saved,
            "and what was delivered since is delivered again" if is_back else "what lies between is SKIPPED",
        )  # fmt: skip
        self.saved = self.delivered = found
        raise SetByHand

    def save(self, token: CancelToken) -> None:
        """Saves what is delivered. Raises SetByHand; and Cancelled once `token` or the lease is cancelled.

        UpdateCheckPoint can't compare: so the service's is looked at before, a small call for each batch, and again
        while saving fails.
        """
        token = CancelToken(token, self.consumer.lease)
        self.next_look = 0.0

        def look_and_save() -> None:
            if time.monotonic() >= self.next_look:
                self.look()
                token.check()
            self.send(self.delivered)

        self.member.checkpoint_retries.retry(self.shard, look_and_save, token)

    def save_again(self, token: CancelToken, is_last: bool) -> None:
        """Saves what is delivered where that is not saved yet, or the service has an older one whose saving had failed
        and was applied since. Raises as `save` does."""
        token = CancelToken(token, self.consumer.lease)
        found = self.member.checkpoint_retries.retry(self.shard, lambda: self.look(is_fresh=is_last), token)
        if found != self.delivered and (self.saved != self.delivered or found in self.may_come_late):
            self.save(token)

    def send(self, cursor: str) -> None:
        """Saves a cursor, tried once. A refusal cancels the lease, unless the shard is revoked, or the cursor was saved
        before. Raises CallError."""
        try:
            self.source.save_checkpoint(self.member.group, self.consumer.name_in_group, self.shard, cursor)
        except CallError as error:
            if cursor not in self.may_come_late:
                self.may_come_late.append(cursor)
            # A revoked shard may be another's by now: that is no sign of a lost lease.
            if error.kind != ErrorKind.FENCED or self.revoked.is_cancelled():
                raise
            # A read-only shard is nobody's once its end is saved: if the answer to that was lost, saving it again is
            # refused.
            if error.code != "ConsumerNotMatch" or not self.was_saved(cursor):
                self.consumer.lease.cancel("the checkpoint of shard %d was refused: %s" % (self.shard, error))
                raise
        self.saved = self.delivered = cursor
        self.member.begun_shards.add(self.shard)
        self.entry_since = time.monotonic()

    def was_saved(self, cursor: str) -> bool:
        """Whether this consumer has saved that last, by the service. Raises CallError."""
        entry = self.get_entry()
        return (entry.get("checkpoint"), entry.get("consumer")) == (cursor, self.consumer.name_in_group)


class ShardConsumer:
    """One shard from when it is assigned until it is revoked or lost: its pulls, batches and checkpoint.

    It works in tasks of GroupMember.tasks: one that pulls, up to three batches ahead, and at the same time one of the
    others, which load the checkpoint, deliver or save. A batch that fails stays the first in memory and is delivered
    again.
    """

    PULL_BYTES = 4 * 1000 * 1000  # what is asked of one pull, and less where many shards share the memory
    MIN_PULL_BYTES = 500 * 1000  # but no less: else calls for pulls and checkpoints would cost more than the puts
    SHORT_AFTER = 2.0  # seconds without the memory for a whole pull: then one brings what fits into the shard's share
    MAX_BATCHES = 3  # that a shard may hold before it pulls another; one that is cut counts as two
    MAX_IDLE_PULLS = 100  # a second, of all shards of the copy that have brought nothing for a while
    INITIAL_SIZE = 100 * 1000  # bytes that a LogGroup is taken to have, until a pull has shown otherwise
    FEW_SHARDS = 8  # more than these, and their first pulls bring one LogGroup each
    INITIAL_COUNT, MAX_COUNT = 20, 1000  # LogGroups asked of a pull; 1000 is the service's limit
    TARGET_BATCH_SECONDS = 1.0  # that a batch should take: it holds up a stop, and is repeated after a crash
    BEYOND_PATIENCE = 60.0  # seconds that a cursor has to lie beyond the shard's end before that is believed

    def __init__(self, consumer: Consumer, shard: int) -> None:
        self.consumer, self.shard = consumer, shard
        self.member, self.source = consumer.member, consumer.member.source
        self.revoked = CancelToken()
        # After soft_stop nothing begins any more, after hard_stop a batch in flight is given up: see the table above.
        self.soft_stop = CancelToken(self.revoked, consumer.lease, consumer.member.soft_stop)
        self.hard_stop = CancelToken(consumer.lease, consumer.member.soft_stop, grace=GRACE)
        self.checkpoint = ShardCheckpoint(consumer, shard, self.revoked)
        self.count_for_target_time = float(self.INITIAL_COUNT)  # LogGroups, by the last batch
        # Written by the task that pulls, and where a checkpoint was loaded or set by hand, or memory was given back:
        self.cursor = ""  # where to pull next; "" until the checkpoint is loaded
        self.mean_log_group_size = 0.0  # bytes, by the last pull; 0 before the first
        self.beyond_since = float("inf")  # since when its cursor lies beyond the shard's end, by the monotonic clock
        self.needed = 0  # bytes that the next pull takes, by the last; 0 where that brought nothing
        self.next_pull = 0.0  # by the monotonic clock
        self.interval = consumer.member.settings.fetch_interval  # seconds between pulls
        self.pull_size, self.is_short = float(self.MIN_PULL_BYTES), False  # see `reserve_for_pull`
        self.denied_since = float("inf")  # since when it has not been given the memory it needs, by the monotonic clock
        self.lock = threading.Lock()  # guards:
        self.running: set[Callable[[], None]] = set()  # `pull`, and one of the other tasks
        self.has_begun_last_save = False
        self.batches: deque[PullResult] = deque()  # not yet delivered, the one in flight included
        self.restarts = 0  # calls of `restart_at`: what a pull brings that began before the last of them is dropped
        self.reserved = 0  # bytes, for the pull under way
        self.batch_began = 0.0  # when the first batch began to be delivered, by the monotonic clock
        self.wanted_back = CancelToken()  # that batch: by Consumer.take_memory, for others that need the memory
        self.given_back = 0  # batches, since one was delivered

    # ---- tasks

    def consume(self) -> None:
        """Called by the SDK's loop in each turn, mostly for a shard that is idle."""
        if self.batches or not self.cursor or time.monotonic() >= min(self.next_pull, self.checkpoint.next_look):
            self.begin_tasks()

    def begin_tasks(self) -> None:
        """Begins the tasks that may begin: to be called again and again, also when one has ended."""
        with self.lock:
            now, is_ending = time.monotonic(), self.soft_stop.is_cancelled()
            if not self.is_busy():
                if is_ending and self.owes_last_save():
                    self.begin(self.save_last, "its last checkpoint")
                    self.has_begun_last_save = True
                elif is_ending:
                    return
                elif not self.cursor:
                    self.begin(self.load_checkpoint, "its beginning")
                elif self.batches:
                    self.begin(self.deliver, "a batch")
                elif now >= self.checkpoint.next_look:
                    self.begin(self.save_again, "its checkpoint")
            is_due = self.cursor and now >= self.next_pull and self.pull not in self.running and not is_ending
            if is_due and len(self.batches) < self.MAX_BATCHES and self.reserve_for_pull(now):
                self.begin(self.pull, "a pull")

    def begin(self, task: Callable[[], None], what: str) -> None:
        """Called with `lock` held."""
        self.member.tasks.submit(self.run, task, what)
        self.running.add(task)

    def run(self, task: Callable[[], None], what: str) -> None:
        """Whatever ends the task, the next one may begin."""
        try:
            task()
        except SetByHand:
            self.restart_at(self.checkpoint.saved)
        except Cancelled:
            pass
        except Exception:
            with contextlib.suppress(Exception):  # telling must not fail where the task did
                log.exception("shard %s: %s failed and is tried again", self.shard, what)
            with contextlib.suppress(Cancelled):
                self.soft_stop.sleep(MAX_BACKOFF)
        finally:
            with self.lock:
                self.running.discard(task)
            self.begin_tasks()

    def is_busy(self) -> bool:
        """Whether a task is under way that isn't a pull. Called with `lock` held."""
        return bool(self.running - {self.pull})

    def restart_at(self, cursor: str, pause: float = 0.0) -> None:
        """Drops what was pulled, and what a pull brings that is under way; the next one begins there, after so many
        seconds."""
        with self.lock:
            self.batches.clear()
            self.cursor, self.next_pull = cursor, time.monotonic() + pause
            self.restarts += 1
            self.count_memory()

    # ---- pulls

    def load_checkpoint(self) -> None:
        """A task: finds where the shard begins. Until that is known nothing is pulled."""
        self.member.begin_retries.retry(self.shard, self.checkpoint.find, self.soft_stop)
        self.cursor = self.checkpoint.saved

    def pull(self) -> None:
        """A task: pulls once, and retries until there is an answer."""
        shards, shortest = len(self.consumer.heart_beat.owned), self.member.settings.fetch_interval
        self.next_pull = time.monotonic() + self.interval
        size = self.pull_size
        mean = self.mean_log_group_size or (self.INITIAL_SIZE if shards <= self.FEW_SHARDS else size)
        count = int(max(1, min(self.MAX_COUNT, size / mean, self.count_for_target_time)))
        restarts = self.restarts
        try:
            pull = self.member.pull_retries.retry(self.shard, lambda: self.pull_once(count), self.soft_stop)
            # Many idle shards are looked at less often, each time a little.
            longest = shards / self.MAX_IDLE_PULLS
            self.interval = shortest if pull.log_groups else max(shortest, min(self.interval * 1.5, longest))
            if pull.log_groups:
                self.mean_log_group_size = max(1, pull.size) / len(pull.log_groups)
            if not self.is_short or not pull.log_groups:  # else as much is needed as before
                self.expect(2 * pull.size, max(1, len(pull.log_groups)))  # compressed and not
            with self.lock:
                self.soft_stop.check()  # else nobody would give the memory back
                if restarts != self.restarts:
                    return
                # The cursor may move without LogGroups, over a gap: that is a batch, too, so that it is saved.
                if pull.next_cursor != self.cursor:
                    self.batches.append(pull)
                    self.cursor = pull.next_cursor
            if len(pull.log_groups) >= count or pull.size >= size / 2:
                self.next_pull = time.monotonic()  # there is more
        finally:
            self.release()

    def pull_once(self, count: int) -> PullResult:
        """One pull. Where the service no longer knows the cursor, it is one from the oldest log there is: the logs at
        the cursor have expired or, where it stays beyond the shard's end, it is another logstore's. Raises CallError.
        """
        cursor = self.cursor
        try:
            pull = self.pull_from(cursor, count)
            self.beyond_since = float("inf")
            return pull
        except CallError as error:
            self.release()  # for there may be many tries
            # By this code the SDK would go on at the newest log and skip what lies between.
            if error.code != "InvalidCursor":
                raise
            oldest = self.source.get_cursor(self.shard, "begin")
            newest = self.source.get_cursor(self.shard, "end")
            is_beyond = cursor_position(cursor) > cursor_position(newest)
            self.beyond_since = min(self.beyond_since, time.monotonic()) if is_beyond else float("inf")
            has_expired = cursor_position(cursor) < cursor_position(oldest)
            if not has_expired and time.monotonic() - self.beyond_since < self.BEYOND_PATIENCE:
                raise  # the cursor is fine, or beyond an end of a moment ago: so will be the next answer
        pull = self.pull_from(oldest, count)
        if is_beyond:
            self.beyond_since = float("inf")
            log.error(
                "%s: shard %s: cursor %s, the checkpoint, lies beyond the shard's end, as where a logstore was made "
                "anew: all logs that it holds now are delivered", self.member.subject, self.shard, cursor,
            )  # fmt: skip
            return pull
        saved, arrived = "an unknown time", "now"
        with contextlib.suppress(CallError, KeyError, TypeError):  # it may not be known
            saved = format_local(self.source.get_checkpoints(self.member.group)[self.shard]["updateTime"] / 1e6)
            arrived = format_local(self.source.arrival_time(self.shard, oldest))
        log.error(
            "%s: shard %s: the service no longer knows cursor %s, the checkpoint of %s; logs that arrived from then on "
            "and before %s have reached the end of their retention time and are SKIPPED, not delivered",
            self.member.subject, self.shard, cursor, saved, arrived,
        )  # fmt: skip
        return pull

    def pull_from(self, cursor: str, count: int) -> PullResult:
        """One pull, or nothing where a drain has reached its end. Raises CallError."""
        end = self.member.drain.end_of_pulls(self.shard, cursor) if self.member.drain else ""
        if end and cursor_position(cursor) >= cursor_position(end):
            return PullResult([], 0, cursor, self.shard)
        return self.source.pull_logs(self.shard, cursor, count, end, self.make_room)

    # ---- batches

    def deliver(self) -> None:
        """A task: delivers the oldest batch, then saves its checkpoint; unless both are done, it stays the oldest."""
        with watchdog.watching("delivers shard %d" % self.shard):
            self.soft_stop.check()
            while self.member.expired_sts_tokens():  # what is begun now would be delivered again by the next start
                self.soft_stop.sleep(MAX_BACKOFF)
            batch = self.batches[0]
            if batch.log_groups and batch.next_cursor != self.checkpoint.delivered:  # else only saving is left
                batch = self.deliver_to_targets(batch)
            self.checkpoint.delivered = batch.next_cursor
            self.checkpoint.save(self.saving())
            with self.lock:
                if self.batches:  # else the shard was let go of meanwhile
                    self.batches.popleft()
                self.count_memory()

    def deliver_to_targets(self, batch: PullResult) -> PullResult:
        """Delivers the first batch. Returns what is to be saved now: all of it, or its beginning, if that alone was
        delivered. Raises Cancelled where there is nothing to save."""
        self.batch_began, self.wanted_back = time.monotonic(), CancelToken()
        done, beyond = self.member.delivery.deliver(batch, self.soft_stop, self.hard_stop, self.wanted_back)
        if not (done or beyond) and self.wanted_back.is_cancelled():
            self.soft_stop.check()
            self.given_back += 1
            self.restart_at(self.checkpoint.delivered, MAX_BACKOFF * min(4, self.given_back))
            raise Cancelled
        self.given_back = 0
        seconds = max(0.001, time.monotonic() - self.batch_began)
        self.count_for_target_time = done * self.TARGET_BATCH_SECONDS / seconds
        if beyond:
            log.warning(
                "%s: shard %s: a batch ends in the middle; %d LogGroups after its end were delivered already, and are "
                "delivered again", self.member.subject, self.shard, beyond,
            )  # fmt: skip
        return batch if done == len(batch.log_groups) else self.cut_batch(batch, done)

    def cut_batch(self, batch: PullResult, done: int) -> PullResult:
        """Makes the first `done` LogGroups of the first batch, which are done with, a batch of their own, and returns
        that; what is left comes to be the next.

            done      end found
            some      yes           both parts are batches, and the first is to be saved
            some      no            the rest is the batch, and its checkpoint will stand for both
            none      yes           both are batches, the first of FEW_LOG_GROUPS, which are tried next
            none      no            it stays as it is

        The end is the cursor after the first part. In all cases but the first it raises Cancelled: there is nothing to
        save.
        """
        if not done:
            self.soft_stop.check()
        count = done or FEW_LOG_GROUPS
        first, rest = batch.log_groups[:count], batch.log_groups[count:]
        token = self.saving()
        cursor = self.member.pull_retries.retry((self.shard, "end"), lambda: self.find_end(first), token)
        with self.lock:
            if not self.batches:  # the shard was let go of meanwhile
                raise Cancelled
            if cursor or done:
                self.batches[0] = batch._replace(log_groups=rest)
            if cursor:
                self.batches.appendleft(PullResult(first, 0, cursor, self.shard))  # its bytes count with the rest
            if not (cursor and done):
                raise Cancelled
            return self.batches[0]

    def find_end(self, log_groups: Sequence[LogGroup]) -> str:
        """The cursor after LogGroups that begin at the checkpoint, by pulling them once more; "" where others are
        there now. Raises CallError."""
        cursor, pulled = self.checkpoint.delivered, 0
        mean = max(1.0, sum(len(each.logs) + len(each.envelope) for each in log_groups) / len(log_groups))
        most = max(1, int(self.consumer.memory_share() / mean))  # at a time: these pulls reserve no memory
        while pulled < len(log_groups):
            try:
                again = self.source.pull_logs(self.shard, cursor, min(most, len(log_groups) - pulled))
            except CallError as error:
                if error.code == "InvalidCursor":
                    return ""
                raise
            end = pulled + len(again.log_groups)
            if again.next_cursor == cursor or again.log_groups != list(log_groups[pulled:end]):
                return ""
            pulled, cursor = end, again.next_cursor
        return cursor

    def save_again(self) -> None:
        """A task: now and then as long as there is nothing to deliver."""
        self.checkpoint.save_again(self.saving(), is_last=False)

    def save_last(self) -> None:
        """A task: once at the end, if saving a checkpoint has failed."""
        self.checkpoint.save_again(self.saving(), is_last=True)

    def saving(self) -> CancelToken:
        """Cancelled GRACE seconds after soft_stop, or from now on if that is cancelled already."""
        late = max(0.0, time.monotonic() - self.soft_stop.cancelled_at())
        return CancelToken(self.soft_stop, grace=late + GRACE)

    # ---- the end, once nothing begins any more

    def shut_down(self) -> None:
        """Called by the SDK's loop in each turn while the shard is no longer assigned."""
        self.revoked.cancel()
        self.begin_tasks()

    def owes_last_save(self) -> bool:
        """Whether its checkpoint is to be saved again, since saving one has failed. Called with `lock` held."""
        return bool(self.checkpoint.may_come_late and self.checkpoint.saved) and not self.has_begun_last_save

    def is_shutdown(self) -> bool:
        """Called by the SDK's loop in each turn: whether the shard may move, for nothing of it is in flight, but for a
        pull perhaps, which is dropped."""
        if not self.revoked.is_cancelled():
            return False
        with self.lock:
            return not self.is_busy() and not self.owes_last_save()

    def hand_over(self) -> None:
        """To be called when it is shut down: whoever of this copy holds the shard next pulls anew, but is told of the
        checkpoint."""
        if self.checkpoint.saved:  # else it is not known yet, and the former one is still the last
            self.member.former[self.shard] = self.checkpoint
        with self.lock:
            self.batches.clear()
            self.count_memory()

    def log_groups_in_flight(self) -> int:
        """Of the batch that is being delivered, 0 without one."""
        with self.lock:
            return len(self.batches[0].log_groups) if self.deliver in self.running and self.batches else 0

    def is_saving_last(self) -> bool:
        """Whether that is under way, or due."""
        with self.lock:
            return self.owes_last_save() or self.save_last in self.running

    # ---- the memory that pulls and batches take, see Consumer.take_memory

    def largest_pull(self) -> int:
        """Bytes that a pull may be asked for."""
        return min(self.PULL_BYTES, max(self.MIN_PULL_BYTES, int(self.consumer.memory_share())))

    def reserve_for_pull(self, now: float) -> bool:
        """Whether the next pull was given the memory it needs or, where it has waited for long, what the share allows:
        those that hold the rest may have to wait for a target. Sets `pull_size`, the bytes that the pull is to bring,
        and `is_short`. Called with `lock` held."""
        share = int(self.consumer.memory_share())
        self.pull_size, self.is_short = self.largest_pull(), False
        if self.reserve(self.needed or 1):
            self.denied_since = float("inf")
            return True
        if self.batches:  # delivering these makes room
            return False
        self.denied_since = min(self.denied_since, now)
        if now - self.denied_since > 10 * self.SHORT_AFTER:
            self.denied_since = now  # it waits once more for as much as it needs
        if now - self.denied_since < self.SHORT_AFTER:
            return False
        self.pull_size, self.is_short = share / 2, True  # compressed and not
        return self.reserve(min(self.needed, max(share, int(2 * self.mean_log_group_size))))

    def reserve(self, size: int) -> bool:
        """Whether so many bytes more were reserved, for the pull under way. Called with `lock` held."""
        is_reserved = self.consumer.take_memory(self, size)
        self.reserved += size if is_reserved else 0
        return is_reserved

    def make_room(self, size: int, count: int) -> None:
        """For what a pull is about to bring: bytes, and how many LogGroups. Raises Cancelled where that is too much
        now, or at any time: then the next one is asked for less, or waits."""
        with self.lock:
            # More than is believed of any answer: fewer LogGroups may be less, unless that has been tried.
            is_too_large = size > MAX_PULL_BYTES and size / count > self.mean_log_group_size
            if is_too_large or (size > self.reserved and not self.reserve(size - self.reserved)):
                self.mean_log_group_size, self.next_pull = size / count, time.monotonic()
                self.expect(size, count)
                raise Cancelled
        if size > self.PULL_BYTES and platform.python_implementation() == "PyPy":
            gc.collect()  # by itself it leaves several times what is in use, where that is in large pieces

    def release(self) -> None:
        """Gives back what is reserved."""
        with self.lock:
            self.reserved = 0
            self.count_memory()

    def count_memory(self) -> None:
        """To be called whenever it has less than before. Called with `lock` held."""
        self.consumer.set_held(self, sum(batch.size for batch in self.batches) + self.reserved)

    def expect(self, size: int, count: int) -> None:
        """For LogGroups that have taken so many bytes: as many are reserved before the next pull, but no more than
        twice what that may be asked for, compressed and not, unless one LogGroup alone takes more."""
        most = 2 * self.largest_pull()
        self.needed = max(size // count, min(size, most))

    def is_slow(self) -> bool:
        """Whether its targets take longer than they should for the first batch."""
        return self.deliver in self.running and time.monotonic() - self.batch_began > self.TARGET_BATCH_SECONDS


class Heartbeat(threading.Thread):
    """Renews the consumer's lease, and learns what shards it holds.

    Stands in the place of the SDK's, which counts in wall time, waits a whole interval after a failure, and believes an
    answer that came too late. Here the SDK's loop waits for its next turn, too.

    An answer may take nearly as long as the group's timeout: the next heartbeat doesn't wait for it. One connection is
    kept; a heartbeat that is sent while another waits for its answer opens one of its own. Since answers may overtake
    each other, that to the heartbeat sent last counts, and none gives back a shard that was let go of since.
    """

    LOOP_INTERVAL = 0.05  # seconds between turns of the SDK's loop, in which pulls that are due begin
    MAX_VISITS = 1500  # shards that the loop visits in a second while all are idle: more than 75 make turns longer
    MAX_IN_FLIGHT = 4  # heartbeats

    def __init__(self, consumer: Consumer, group_timeout: float) -> None:
        super().__init__(name="begins heartbeats", daemon=True)
        self.consumer, self.group_timeout = consumer, group_timeout
        settings = consumer.member.settings
        self.interval = min(settings.heartbeat_interval, group_timeout / 2)  # seconds
        credential_source = consumer.member.credential_sources.of(settings.source)
        self.source = LogstoreApi(settings.source, credential_source, group_timeout)
        self.source.client.connect_timeout = min(CONNECT_TIMEOUT, group_timeout / 4)  # a host may have two addresses
        self.wake_up = threading.Event()  # for the SDK's loop
        self.tried = 0.0  # when the last try began, by the monotonic clock
        self.lock = threading.Lock()  # guards:
        self.owned: set[int] = set()
        self.reported: set[int] = set()  # to the service: those owned, and those that were revoked and end a batch
        self.let_go: dict[int, float] = {}  # shard -> when it was, by the lease's clock
        self.answered = 0.0  # when the last heartbeat was sent that was answered, by the same
        self.assigned_at: float = 0.0  # when a shard was assigned last, by the monotonic clock

    def get_held_shards(self) -> Iterable[int]:
        """Called by the SDK's loop at the beginning of each turn, which so waits here, and then visits them in this
        order: those that wait for memory first."""
        watchdog.beat()
        longest = len(self.owned) / self.MAX_VISITS if self.consumer.is_idle() else 0.0
        self.wake_up.wait(max(self.LOOP_INTERVAL, longest))
        self.wake_up.clear()
        with self.lock:
            # One that was revoked before the loop made a ShardConsumer for it would never be let go of.
            self.let_go_of(self.reported - {*self.owned, *self.consumer.shard_consumers})
            owned = self.owned
        return dict.fromkeys([*filter(owned.__contains__, self.consumer.waiting_shards()), *owned])

    def let_go_of(self, shards: set[int]) -> None:
        """Called with `lock` held."""
        self.reported -= shards
        self.let_go.update(dict.fromkeys(shards, self.consumer.lease.now()))

    def remove_heart_shard(self, shard: int) -> None:
        """Called by the SDK's loop when nothing of a revoked shard is in flight: now it may move."""
        self.consumer.shard_consumers[shard].hand_over()
        with self.lock:
            self.let_go_of({shard})

    def shutdown(self) -> None:
        """Called by the SDK's worker at its end; `run` looks at the lease."""

    def run(self) -> None:
        lease, member = self.consumer.lease, self.consumer.member
        in_flight: list[concurrent.futures.Future[Any]] = []
        with watchdog.watching(self.name), contextlib.suppress(Cancelled):
            while True:
                began = self.tried = time.monotonic()
                last = member.beats.submit(self.send_one)
                in_flight = [*(one for one in in_flight if not one.done()), last]
                # The next begins an interval after this one did; while this one has no answer, half an interval after
                # the last try of any that has none.
                while time.monotonic() < (began + self.interval if last.done() else self.tried + self.interval / 2):
                    lease.sleep(MAIN_LOOP_INTERVAL / 2)
                while len(in_flight) >= self.MAX_IN_FLIGHT:
                    in_flight = [one for one in in_flight if not one.done()]
                    lease.sleep(MAIN_LOOP_INTERVAL / 2)

    def send_one(self) -> None:
        """A task: tries until it is answered. Raises Cancelled."""
        with watchdog.watching("sends heartbeats"):
            self.consumer.member.heartbeat_retries.retry("heartbeat", self.send, self.consumer.lease, self.interval / 2)

    def send(self) -> None:
        """Sends a heartbeat and takes in its answer. Raises CallError."""
        consumer, lease, client = self.consumer, self.consumer.lease, self.source.client
        self.tried = time.monotonic()
        client.response_timeout = max(0.5, min(self.group_timeout, lease.expires - lease.now()))
        with self.lock:
            reported = sorted(self.reported)
        try:
            answer = self.source.heartbeat(consumer.member.group, consumer.name_in_group, reported)
        except CallError as error:
            if error.kind == ErrorKind.FENCED:
                lease.cancel(str(error))
            raise
        self.take_in(answer, client.of_thread.sent)
        client.close_stale(all_idle=False)
        watchdog.excuse()  # to find a host's name may take longer than any loop may stand still
        with contextlib.suppress(Exception):  # any: then the next one opens its own
            client.open_ahead(2 * self.interval)
        watchdog.beat()

    def take_in(self, answer: list[int], sent: float) -> None:
        """For an answer, the shards that may be held, to a heartbeat that was sent then, by the lease's clock."""
        consumer = self.consumer
        consumer.member.last_heartbeat = time.time()
        if not consumer.lease.renew(sent):
            return
        with self.lock:
            if sent < self.answered:
                return
            self.answered = sent
            # A shard that was revoked and still ends a batch isn't taken back before it was let go of.
            releasing = self.reported - self.owned
            owned = {shard for shard in answer if shard not in releasing and self.let_go.get(shard, 0.0) < sent}
            revoked = self.owned - owned
            if owned - self.owned:
                self.assigned_at = time.monotonic()
            self.reported |= owned
            self.owned = owned
        for shard in revoked:
            consumer.revoke(shard)
        self.wake_up.set()


class Consumer(ConsumerWorker):
    """One consumer, from joining the group to losing its lease: the SDK's worker, with ours in the place of its own
    client, heartbeat and shard consumers. What its loop does, in essence:

        while not self.shut_down_flag:
            for shard in self.heart_beat.get_held_shards(): self._get_shard_consumer(shard).consume()
            for each other one of self.shard_consumers: one.shut_down()
            for each that is_shutdown(): self.heart_beat.remove_heart_shard(shard), and it is dropped
    """

    MAX_BYTES = 32 * 1000 * 1000  # of what its shards have pulled, or pull, together; a third is shared out among them

    # The SDK's name for a client that ConsumerWorker makes itself, and by which it makes the group, nothing else: it
    # gets this object instead, and the method below.
    consumer_client = property(lambda self: self, lambda *_: None)

    def ensure_consumer_group_created(self, timeout: int, in_order: bool) -> None:
        """All that ConsumerWorker asks of its client: done by GroupMember.join_group, once."""

    def __init__(self, member: GroupMember, group_timeout: float) -> None:
        """`group_timeout` in seconds, the service's."""
        config = member.settings.source
        self.member = member
        self.lease = Lease(group_timeout)
        self.lock = threading.Lock()  # guards:
        self.held: dict[ShardConsumer, int] = {}  # bytes of their batches, and of pulls under way
        self.waiting: deque[ShardConsumer] = deque()  # those that need more memory than there is, the first is next
        self.may_come_late: dict[int, deque[str]] = {}  # see ShardCheckpoint; here, for a shard may come back
        # No other consumer has this name of at most 63 characters, also not one of this copy before, for host and
        # process id repeat themselves in containers. In the checkpoints, other copies read of it what the routes are,
        # see GroupMember.compare_routes, and when the group began, see GroupMember.find_group_start.
        host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())
        words = member.group[:13], host[:12], member.fingerprint, os.getpid(), member.group_start, uuid.uuid4().hex[:12]
        self.name_in_group = "%s-%s_%s-%d-%08x%s" % words
        hub_config = LogHubConfig(
            config.endpoint, config.access_key_id, config.access_key, config.project, config.logstore,
            member.group, self.name_in_group, shared_executor=member.tasks,
            # Its loop counts in wall time, which may step: so it never sleeps, see Heartbeat.get_held_shards.
            data_fetch_interval=float("-inf"),  # type: ignore[arg-type]
        )  # fmt: skip
        super().__init__(None, hub_config)
        self.daemon, self.name = True, "gives out work"
        self.heart_beat = Heartbeat(self, group_timeout)  # the SDK's spelling

    def run(self) -> None:
        with watchdog.watching(self.name):
            super().run()

    def shutdown_and_wait(self) -> None:
        """Called by the SDK's loop at its end; see `finish_batches`."""

    def _get_shard_consumer(self, shard: int) -> ShardConsumer:
        """Called by the SDK's loop for each shard that is held. Its own goes on with the next batch where one fails,
        and the checkpoint of that comes to lie beyond the one that failed."""
        if shard not in self.shard_consumers:
            self.shard_consumers[shard] = ShardConsumer(self, shard)
            if shard not in self.heart_beat.owned:  # it was revoked a moment ago, when there was nothing to cancel
                self.revoke(shard)
        return self.shard_consumers[shard]

    def set_held(self, one: ShardConsumer, size: int) -> None:
        with self.lock:
            self.held[one] = size
            if not size:
                del self.held[one]

    def memory_share(self) -> float:
        """Bytes that each shard may hold whatever the others do."""
        return self.MAX_BYTES / 3 / max(1, len(self.heart_beat.owned))

    def take_memory(self, one: ShardConsumer, size: int) -> bool:
        """Whether a shard was given so many bytes more. Within its share it is; beyond that where there is room, and no
        shard waits that asked before it. One that gets none and has no batch to deliver, which would make room, is put
        in the queue; nobody waits here, it asks again in each turn of the SDK's loop.

        The first in the queue has others give back their batches, those that hold more than their share and are stuck,
        until that will be enough."""
        with self.lock:
            held, share = self.held.get(one, 0), self.memory_share()
            while self.waiting and self.waiting[0].soft_stop.is_cancelled():
                self.waiting.popleft()
            # Two thirds of MAX_BYTES are beyond the shares. A request for more than that waits until these are free,
            # and goes beyond MAX_BYTES then.
            missing = sum(self.held.values()) + min(size, self.MAX_BYTES * 2 // 3) - self.MAX_BYTES
            is_next = not self.waiting or self.waiting[0] is one
            can_wait = not one.batches
            if held + size <= share or (is_next and missing <= 0):
                if one in self.waiting:
                    self.waiting.remove(one)
                self.held[one] = held + size
                return True
            if can_wait and one not in self.waiting:
                self.waiting.append(one)
            if is_next and can_wait:
                for other, other_holds in self.held.items():
                    if missing > 0 and other_holds > share and other.is_slow():
                        other.wanted_back.cancel()
                        # Its memory counts as coming for MAX_BACKOFF seconds: a shard that hasn't given it back by then
                        # has delivered a part of the batch, and keeps it.
                        is_soon = time.monotonic() < other.wanted_back.cancelled_at() + MAX_BACKOFF
                        missing -= other_holds if is_soon else 0
            return False

    def waiting_shards(self) -> list[int]:
        """Those that wait for memory, the first to wait first."""
        with self.lock:
            return [one.shard for one in self.waiting]

    def is_idle(self) -> bool:
        """Whether no shard has anything to deliver, or waits for memory to pull. Called by the SDK's loop."""
        return not self.waiting and not any(one.batches for one in self.shard_consumers.values())

    def revoke(self, shard: int) -> None:
        one = self.shard_consumers.get(shard)
        if one:
            one.revoked.cancel()

    def in_flight(self) -> dict[int, int]:
        """Shard -> LogGroups of its batch in flight."""
        found = {shard: one.log_groups_in_flight() for shard, one in list(self.shard_consumers.items())}
        return {shard: log_groups for shard, log_groups in found.items() if log_groups}

    def finish_batches(self, seconds: float) -> dict[int, int]:
        """Ends the SDK's loop and waits, `seconds` at the most, for the batches in flight and last checkpoints; returns
        what is left of the former. The token of the stop must be cancelled by then: only last checkpoints begin."""
        self.shut_down_flag = True
        self.heart_beat.wake_up.set()
        end = time.monotonic() + seconds
        while True:
            shard_consumers = list(self.shard_consumers.values())
            for one in shard_consumers:
                one.begin_tasks()
            left = self.in_flight()
            is_saving = any(one.is_saving_last() for one in shard_consumers)
            if not (left or is_saving) or time.monotonic() > end:
                return left
            watchdog.beat()
            time.sleep(0.05)


class GroupMember(threading.Thread):
    """This copy in the consumer group: joins it, and joins again whenever its consumer has lost the lease.

    Where is the end, when SLS_CURSOR_START says end? Several copies may start at once, and a call take any time. What
    arrives after the group was made must not be skipped, in any shard, whoever gets that:

      1. A copy looks at all ends, then lists the groups again. If the group is still missing, or this copy makes it
         only now, it has looked before the group was made: what arrives after that lies beyond these ends.
      2. Any other copy waits, before it joins, until the group has a checkpoint. If there is none after
         FIRST_CHECKPOINT_TIMEOUT, since the group was made by hand or who made it has died, it takes the ends that it
         saw itself: that is all there is to know.
      3. The first to write a checkpoint decides: its name says when the group began, see Consumer. Who finds one begins
         its shards at that time, by GetCursor.
      4. Who has made a checkpoint by its own ends looks again, before it pulls, and takes an older start if there is
         one. Of two such copies the one whose checkpoint came later is sure to find the other's, so that no shard
         begins later than whoever was first has decided.
    """

    FIRST_CHECKPOINT_TIMEOUT = 60.0  # seconds: room for a few slow calls, and for one that runs out of time
    RECENT_SAVE = 60.0  # seconds; who has saved a checkpoint within them, or the group's timeout, is there

    def __init__(
        self, settings: Settings, delivery: Delivery, credential_sources: CredentialSources, drain: Drain | None = None
    ) -> None:
        super().__init__(name="joins", daemon=True)
        config = settings.source
        self.settings, self.delivery, self.drain = settings, delivery, drain
        self.credential_sources = credential_sources
        self.group, self.subject = settings.consumer_group, settings.source_name
        self.source = LogstoreApi(config, credential_sources.of(config))
        self.expiring_credentials = credential_sources.expiring(settings)
        self.tasks = ThreadPool(2048, "shard task")
        self.beats = ThreadPool(2 * Heartbeat.MAX_IN_FLIGHT, "sends heartbeats")  # for a lost consumer's, too
        self.soft_stop = CancelToken()  # asked to stop: no batch begins
        self.join_retries = RetryLog(self.subject, "joining", "can't join the consumer group yet, trying again", config)
        self.begin_retries = RetryLog(self.subject, "beginning", "a shard can't begin yet", config)
        self.heartbeat_retries = RetryLog(self.subject, "heartbeats", "a heartbeat failed and is tried again", config)
        self.pull_retries = RetryLog(self.subject, "pulls", "a pull failed and is tried again", config)
        self.checkpoint_retries = RetryLog(self.subject, "checkpoints", "a checkpoint is not saved yet", config)
        self.failure: StartupError | None = None
        self.consumer: Consumer | None = None  # the present one, or the last
        self.last_heartbeat: float | None = None  # unix seconds
        self.lag: float | None = None  # seconds, as last measured
        self.fingerprint = routes_fingerprint(settings)
        self.differing: list[str] | None = []  # consumers with other routes than this copy; None: unknown by now
        self.differing_told, self.differing_throttle = False, LogThrottle()
        self.group_start = 0  # unix seconds, the service's; 0 when nobody can tell any more
        self.end_cursors_at_start: dict[int, str] = {}  # shard -> its end at `group_start`, if this copy looked then
        self.is_older_than_group = False  # whether that look certainly came before the group was made
        self.had_checkpoints = False  # the group, when this copy joined first
        # Of whoever held a shard last: what was delivered without being saved, and which checkpoints may come late.
        self.former: dict[int, ShardCheckpoint] = {}
        self.begun_shards: set[int] = set()  # those that were seen with a checkpoint, or got one from this copy
        # When the group's entries, of LogstoreApi.get_checkpoints, were asked for, by the monotonic clock, and these.
        self.entries: tuple[float, dict[int, dict[str, Any]]] = -1.0, {}
        self.begin_lock, self.look_lock = threading.Lock(), threading.Lock()  # one call at a time

    def run(self) -> None:
        try:
            lapses = 0  # consumers lost in a row; all but the first had lived for less than the group's timeout
            with watchdog.watching(self.name):
                check_before_start(self.settings, self.credential_sources)
                if self.drain:
                    drain, source = self.drain, self.source
                    self.join_retries.retry("ends", lambda: drain.find_ends(source), self.soft_stop)
                while not self.expired_sts_tokens():  # as one may be from the start
                    consumer = self.join_retries.retry("join", self.join_group, self.soft_stop)
                    joined = time.monotonic()
                    # At a stop the SDK's loop ends first, and heartbeats go on until nothing is in flight.
                    while not consumer.lease.is_cancelled() and (consumer.is_alive() or self.soft_stop.is_cancelled()):
                        watchdog.beat()
                        time.sleep(MAIN_LOOP_INTERVAL)
                    lapses = lapses + 1 if time.monotonic() - joined < consumer.lease.seconds else 1
                    self.give_up(consumer)
                    self.soft_stop.sleep(backoff(lapses))
        except StartupError as error:
            self.failure = error
        except Cancelled:
            pass
        except Exception:
            log.exception("a defect of this program")

    def expired_sts_tokens(self) -> list[str]:
        """The variables of STS tokens that have run out and can't be renewed: then the copy is to end."""
        return [source.name for source in self.expiring_credentials if source.is_expired]

    def give_up(self, consumer: Consumer) -> None:
        """Ends a consumer without lease. What it has delivered, but may not save, is kept for the next."""
        consumer.lease.cancel("the SDK's loop has ended by itself")  # unless there was another reason before
        with contextlib.suppress(Exception):  # telling may fail
            words = self.subject, consumer.name_in_group, consumer.lease.reason
            log.warning("%s: consumer %s is lost, another joins: %s", *words)
        shard_consumers = list(consumer.shard_consumers.values())  # before they are dropped
        consumer.finish_batches(GRACE + 1)
        for one in shard_consumers:
            one.hand_over()

    def join_group(self) -> Consumer:
        """Joins as a new consumer; at the first time it makes the group where there is none. Raises CallError, and
        StartupError."""
        timeout = 2 * self.settings.heartbeat_interval
        try:
            groups = self.source.consumer_groups()
            may_make = not self.consumer and self.group not in (groups or {})
            if may_make and self.settings.cursor_start == "end":
                self.look_at_ends()
                groups = self.source.consumer_groups()
                self.is_older_than_group |= groups is not None and self.group not in groups
            group = (groups or {}).get(self.group)
            if may_make and not group:
                self.source.make_consumer_group(self.group, timeout)
                self.is_older_than_group = bool(self.end_cursors_at_start)
        except CallError as error:
            if error.code == "ConsumerGroupAlreadyExist":  # another copy was faster, or the key may not list groups
                group = (self.source.consumer_groups() or {}).get(self.group)
            elif error.is_transient() or self.consumer:
                raise
            else:  # what will not pass by itself ends a start; later there may be somebody to mend it
                text = "%s: can't join the consumer group: %s"
                raise StartupError(text % (self.subject, describe_error(error, self.settings.source))) from error
        is_first = not self.consumer
        if is_first:
            self.find_group_start(group)
        self.consumer = Consumer(self, group.get_timeout() if group else timeout)
        self.consumer.start()
        targets = self.settings.targets
        routes = ["%s <- %s" % (each.config, ",".join(topic.spelling for topic in each.topics)) for each in targets]
        log.info("consumer %s of %s, targets: %s", self.consumer.name_in_group, self.settings.source, ", ".join(routes))
        for note in self.settings.notes if is_first else ():
            log.info("%s", note)
        return self.consumer

    def find_group_start(self, group: Any) -> None:
        """Finds when the group began, and tells what there is to say of it. `group` is the SDK's ConsumerGroupEntity,
        or None. Raises CallError, Cancelled, StartupError."""
        checkpoints = self.source.get_checkpoints(self.group)
        self.begun_shards = {shard for shard, entry in checkpoints.items() if entry["checkpoint"]}
        for line in group_warnings(group, checkpoints, self.settings.heartbeat_interval) if group else ():
            log.warning("%s: %s", self.subject, line)
        if self.drain and not has_checkpoints(checkpoints):
            self.drain.check_start(self.settings.cursor_start)
        if self.is_older_than_group:
            self.take_older_start(checkpoints)
            return
        if self.settings.cursor_start == "end" and not has_checkpoints(checkpoints):
            self.look_at_ends()
            checkpoints = self.wait_for_first_checkpoint(checkpoints)
        if has_checkpoints(checkpoints):
            log.info("%s: " + HAS_BEGUN, self.subject, self.group)
            self.group_start, self.end_cursors_at_start = self.start_by_names(checkpoints), {}
            self.had_checkpoints = True
        elif not self.end_cursors_at_start:
            self.group_start = int(self.source.client.server_time())

    def look_at_ends(self) -> None:
        """Finds the end of each shard, once. Raises CallError."""
        if not self.end_cursors_at_start:
            shards = [shard["shardID"] for shard in self.source.list_shards()]
            start = int(self.source.client.server_time())  # before the ends are asked for: no log is between
            ends = {shard: self.source.get_cursor(shard, "end") for shard in shards}
            self.group_start, self.end_cursors_at_start = start, ends

    def wait_for_first_checkpoint(self, checkpoints: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The group's checkpoints as soon as there is one, or none after some time. Raises CallError, Cancelled."""
        words = self.subject, self.group, self.FIRST_CHECKPOINT_TIMEOUT
        log.info("%s: consumer group %s has no checkpoint yet: for %g s the copy that made it may write one", *words)
        end = time.monotonic() + self.FIRST_CHECKPOINT_TIMEOUT
        while not has_checkpoints(checkpoints) and time.monotonic() < end:
            self.soft_stop.sleep(1.0)
            checkpoints = self.source.get_checkpoints(self.group)
        return checkpoints

    def start_by_names(self, checkpoints: Mapping[int, Mapping[str, Any]]) -> int:
        """When the group began (unix seconds), as the consumers of its checkpoints say, this one aside; 0 where none of
        them is of this program."""
        own_name = self.consumer.name_in_group if self.consumer else ""
        names = {entry.get("consumer") or "" for entry in checkpoints.values()} - {own_name}
        found = [CONSUMER_NAME.fullmatch(name) for name in names]
        return min([int(name["start"], 16) for name in found if name and name["start"]], default=0)

    def take_older_start(self, checkpoints: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes over when another copy says that the group began, if that is earlier. Of the same second, the unit of
        GetCursor, nobody can tell which was earlier: then it is the other's, unless this copy has certainly looked at
        the ends before the group was made."""
        found = self.start_by_names(checkpoints)
        is_older = found < self.group_start or (found == self.group_start and not self.is_older_than_group)
        if found and is_older:
            self.end_cursors_at_start, self.group_start = {}, found

    def entries_since(self, moment: float, is_look: bool = False) -> dict[int, dict[str, Any]] | None:
        """The group's, asked for since then, by the monotonic clock: once for many shards that begin together, or look
        together. A look waits for no other: it gets None while one is under way. Raises CallError."""
        latest, lock = self.entries, self.look_lock if is_look else self.begin_lock
        if latest[0] < moment:
            if not lock.acquire(blocking=not is_look):
                return None
            try:
                latest = self.entries  # of whoever has asked while this one waited
                if latest[0] < moment:
                    latest = self.entries = time.monotonic(), self.source.get_checkpoints(self.group)
                    self.begun_shards.update(shard for shard, entry in latest[1].items() if entry["checkpoint"])
            finally:
                lock.release()
        return latest[1]

    def first_cursor(self, shard: int) -> str:
        """Where a shard without a checkpoint begins. Raises CallError."""
        start: str | int = self.settings.cursor_start
        if start == "end":
            # That of when the group began; a shard that a split has made since holds later logs only.
            start = self.group_start or "begin"
        elif isinstance(start, int) and self.had_checkpoints and start > self.group_start:
            start = "begin"  # it was set since, and may mean anything: nothing of this shard was ever delivered
        return self.end_cursors_at_start.get(shard) or self.source.get_cursor(shard, start)

    def stop(self, seconds: float) -> dict[int, int]:
        """Begins no new batch and waits, `seconds` at the most, for those in flight; the shards of those that did not
        end, and how many LogGroups they have."""
        self.soft_stop.cancel()
        return self.consumer.finish_batches(seconds) if self.consumer else {}

    def held_shards(self) -> list[int]:
        """None from when the lease is lost until another consumer has joined, and was assigned some."""
        consumer = self.consumer
        return sorted(consumer.heart_beat.owned) if consumer and not consumer.lease.is_cancelled() else []

    def report_recoveries(self) -> None:
        """Has each RetryLog tell what is over."""
        logs = [self.join_retries, self.begin_retries, self.heartbeat_retries, self.pull_retries]
        logs.append(self.checkpoint_retries)
        logs += [credential_source.refresh_retries for credential_source in self.expiring_credentials]
        for target in self.delivery.targets.values():
            logs += [target.put_retries, target.dead_letter_retries]
        for retry_log in logs:
            retry_log.report_recovery()

    def measure_lag(self) -> None:
        """Asks for the lag of the shards held; None where it is unknown."""
        try:
            consumer, held = self.consumer, self.held_shards()
            has_lapsed = consumer and consumer.lease.is_cancelled()
            self.lag = None if has_lapsed else largest_lag(read_shard_status(self.source, self.group, held))
        except Exception:  # any: the thread that tells must go on telling
            self.lag = None

    def compare_routes(self) -> None:
        """Tells, at growing intervals, while others that save checkpoints have other routes than this copy: then it
        depends on the shard what becomes of a log. Raises CallError."""
        consumer, held = self.consumer, self.held_shards()
        if not consumer:
            return
        try:
            entries = self.source.get_checkpoints(self.group)
        except CallError:
            self.differing = None
            raise
        recent = self.source.client.server_time() - max(consumer.heart_beat.group_timeout, self.RECENT_SAVE)
        others = [entry for shard, entry in entries.items() if shard not in held]
        names = {entry.get("consumer") or "" for entry in others if (entry.get("updateTime") or 0) / 1e6 > recent}
        found = [name for name in map(CONSUMER_NAME.fullmatch, sorted(names)) if name and name["routes"]]
        differing = [name for name in found if name["routes"] != self.fingerprint]
        self.differing = [name.group() for name in differing]
        if differing and self.differing_throttle.allow():
            self.differing_told = True
            words = "%s: consumer %s has the routes %s, this copy has %s: a shard's logs go by those of its holder; "
            words += "all copies are to have the same SLS_LOGSTORE_TO<n> and SLS_TOPIC_TO<n>"
            log.warning(words, self.subject, ", ".join(self.differing[:3]), differing[0]["routes"], self.fingerprint)
        elif self.differing_told and not differing:
            self.differing_told = False
            log.warning("%s: no other consumer has other routes than this copy any more", self.subject)

    def summary(self, lag_seconds: float | None = None) -> list[str]:
        """What became of the logs so far: a line for each target and one for the source, to be read by programs too."""
        lag = "unknown" if lag_seconds is None else "%d" % lag_seconds
        lines = ["summary " + target.summary() for target in self.delivery.targets.values()]
        shards = ",".join(map(str, self.held_shards())) or "none"
        state = f"source={self.settings.source} group={self.group} shards={shards} lag_seconds={lag}"
        return [*lines, f"summary {state} {self.delivery.unmatched.summary()}"]


# ---- monitoring: what the process counts, and whether its loops stand still, over HTTP -------------------------------

WATCHDOG_TIMEOUT = 60.0  # seconds; a loop of the process that has stood still for longer is stuck
REQUEST_TIMEOUT = 5.0  # seconds that a client has for its request, for taking the answer, and for hanging up
MAX_REQUEST = 16 * 1024  # bytes
MAX_CLIENTS = 64  # connections at once; fewer where this process may open fewer than 1024 files


class Metric(NamedTuple):
    """One metric of each subject of a kind: "target", "copy" (GroupMember), "key" (CredentialSource), "program"."""

    kind: str
    name: str  # without the prefix; one that ends in _total is a counter
    meaning: str
    read: Callable[[Any], float | Histogram | None]  # the value of a subject; None is unknown


METRICS = (
    Metric("target", "log_groups_total", "LogGroups that the target has taken.", lambda it: it.log_groups),
    Metric("target", "logs_total", "Logs that the target has taken.", lambda it: it.logs),
    Metric("target", "bytes_total", "Bytes that the target has taken, uncompressed.", lambda it: it.bytes),
    Metric("target", "put_retries_total", "Puts that failed and were tried again.", lambda it: it.retries),
    Metric("target", "set_aside_total", "LogGroups that the target refused for good.", lambda it: it.dead_lettered),
    Metric("target", "puts_failing", "Puts that have failed and are being tried again.",
           lambda it: len(it.put_retries.failing)),
    Metric("target", "put_duration_seconds", "Time from the begin of a put to the answer that the target has taken it.",
           lambda it: it.latencies),
    Metric("copy", "unmatched_log_groups_total", "LogGroups that no route matches.",
           lambda it: it.delivery.unmatched.log_groups),
    Metric("copy", "unmatched_logs_total", "Logs that no route matches.", lambda it: it.delivery.unmatched.logs),
    Metric("copy", "shards_held", "Shards that this copy holds.", lambda it: len(it.held_shards())),
    Metric("copy", "lag_seconds", "Age of the oldest log of these shards that is not yet delivered.",
           lambda it: it.lag if it.held_shards() else None),
    Metric("copy", "routes_differ", "Consumers of the group that have other routes than this copy.",
           lambda it: None if (differing := it.differing) is None else len(differing)),
    Metric("copy", "last_heartbeat_timestamp_seconds", "When the service took the last heartbeat.",
           lambda it: it.last_heartbeat),
    Metric("key", "credentials_expire_timestamp_seconds", "When the key ends.", lambda it: it.key and it.key.end),
    Metric("program", "build_info", "Always 1.", lambda _: 1),
)  # fmt: skip


def prometheus_labels(**labels: object) -> str:
    """Labels as Prometheus has them, whose strings are quoted as JSON's."""
    return "{%s}" % ",".join("%s=%s" % (name, json.dumps(str(value))) for name, value in labels.items())


class MetricsServer:
    """Serves what there is to tell of this copy, in one thread that waits for no client: those that are silent, trickle
    or don't read hold up nobody. It asks nobody either, the lag is as last measured."""

    def __init__(self, settings: Settings, member: GroupMember) -> None:
        """A port that is taken, perhaps by another copy, is no reason to stop: then this copy goes on without."""
        address = settings.metrics_host, int(settings.metrics_port)
        is_ipv6 = ":" in settings.metrics_host
        family, is_dual = socket.AF_INET6 if is_ipv6 else socket.AF_INET, is_ipv6 and socket.has_dualstack_ipv6()
        self.member = member
        self.max_clients = min(MAX_CLIENTS, max(4, connection_budget() // 5))
        # What goes on with each client, the oldest first, and what ends it in time.
        self.conversations: dict[asyncio.Task[None], asyncio.TimerHandle] = {}
        try:
            # Who finds the backlog full tries again after a second.
            self.listener = socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=is_dual)
            self.listener.setblocking(False)
            threading.Thread(target=lambda: asyncio.run(self.serve()), name="serves metrics", daemon=True).start()
        except (OSError, RuntimeError) as error:
            log.warning("SLS_METRICS_PORT: this copy goes on without: can't listen on %s port %d: %s", *address, error)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self.listener)
                conversation = loop.create_task(self.converse(client))
                self.conversations[conversation] = loop.call_later(REQUEST_TIMEOUT, self.hang_up, conversation)
                conversation.add_done_callback(self.hang_up)
                is_full, pause = len(self.conversations) > self.max_clients, 0.0
            except (OSError, MemoryError) as error:  # it has gone already; or this process may open no more files
                is_full, pause = getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE), 0.01
            if is_full and self.conversations:
                self.hang_up(next(iter(self.conversations)))  # the oldest
            await asyncio.sleep(pause)  # also when it is 0, the conversations go on meanwhile

    def hang_up(self, conversation: asyncio.Task[None]) -> None:
        if conversation in self.conversations:
            self.conversations.pop(conversation).cancel()
            conversation.cancel()

    async def converse(self, client: socket.socket) -> None:
        """Answers one request."""
        loop, request = asyncio.get_running_loop(), b""
        with client, contextlib.suppress(Exception):  # a client that goes away in the middle is no news
            while not re.search(rb"\r?\n\r?\n", request):
                data = await loop.sock_recv(client, 4096)
                request += data
                if not data or len(request) > MAX_REQUEST:
                    return
            await loop.sock_sendall(client, self.answer(request))
            client.shutdown(socket.SHUT_WR)
            # Closed with something unread the connection is reset, and the answer lost.
            for _ in range(MAX_REQUEST // 4096):
                if not await loop.sock_recv(client, 4096):
                    return

    def answer(self, request: bytes) -> bytes:
        """To a whole request, GET or HEAD."""
        method, path, *_ = [*request.partition(b"\n")[0].decode("latin-1").split(), "", ""]
        page = {"/metrics": self.metrics, "/healthz": self.health}.get(path.partition("?")[0])
        status, text = page() if page else (404, "")
        if method not in ("GET", "HEAD"):
            status, text = 405 if path else 400, ""
        body = text.encode()
        lines = [
            "HTTP/1.0 %d %s" % (status, http.HTTPStatus(status).phrase),
            "Server: " + USER_AGENT["User-Agent"],
            "Content-Type: text/plain; version=0.0.4; charset=utf-8",
            "Content-Length: %d" % len(body),
            "Allow: GET, HEAD\r\n\r\n",
        ]
        return "\r\n".join(lines).encode() + (b"" if method == "HEAD" else body)

    def metrics(self) -> tuple[int, str]:
        """HTTP's status, and the text, in Prometheus' format."""
        targets, sources = self.member.delivery.targets.values(), self.member.expiring_credentials
        python = "%s %s" % (platform.python_implementation(), platform.python_version())
        labels_and_subjects: dict[str, list[tuple[str, Any]]] = {
            "target": [(prometheus_labels(target=one.number, logstore=one.config), one) for one in targets],
            "copy": [("", self.member)],
            "key": [(prometheus_labels(source=one.name), one) for one in sources if one.kind],
            "program": [(prometheus_labels(version=__version__, python=python), None)],
        }
        text = ""
        for metric in METRICS:
            name = "dispatch_data_" + metric.name
            type_name, known = "counter" if name.endswith("_total") else "gauge", []
            for labels, subject in labels_and_subjects[metric.kind]:
                value = metric.read(subject)
                if isinstance(value, Histogram):
                    type_name = "histogram"
                    known += ["%s%s %s\n" % sample for sample in value.samples(name, labels)]
                elif value is not None:
                    known.append("%s%s %s\n" % (name, labels, value))
            if known:
                text += "# HELP %s %s\n# TYPE %s %s\n%s" % (name, metric.meaning, name, type_name, "".join(known))
        return 200, text

    def health(self) -> tuple[int, str]:
        """HTTP's status, and a line for each loop that stands still, of those that are watched."""
        words = "the loop that %s has stood still for %.0f s\n"
        problems = "".join(words % stuck for stuck in watchdog.stuck(WATCHDOG_TIMEOUT).items())
        return (503, problems) if problems else (200, "ok\n")


# ---- command line ---------------------------------------------------------------------------------------------------

REPORT_LOOP_INTERVAL = 0.5  # seconds between looks at what is over, and which connections are stale
SUMMARY_INTERVAL = 30.0  # seconds
SHUTDOWN_TIMEOUT = 8.0  # seconds for an orderly stop, which as a whole must not take 10
LAST_LINES_TIMEOUT = 1.0  # seconds that the end waits, after that, for lines which are not written yet


def secret_values(settings: Settings) -> list[str]:
    """All that must never be shown: secrets, tokens, and the passwords of proxies, as written and decoded."""
    secrets = [text for config in settings.logstores() for text in (config.access_key, config.security_token)]
    for name in PROXY_VARIABLES:  # with a scheme or without; those that aren't used may be no URLs at all
        place = re.sub("^.*?://", "", os.environ.get(name, ""))
        passwords = [place.rpartition("@")[0].partition(":")[2]]
        with contextlib.suppress(ValueError):
            passwords.append(urlsplit("//" + place).password or "")
        secrets += [text for password in passwords for text in (password, unquote(password))]
    return [text for text in secrets if text]


class RedactingFormatter(logging.Formatter):
    """Hides secrets, and makes sure that nothing which is logged looks like a line of its own or is without end.

    A format ends with the message; what stands before it is never hidden, nor are the lines of a summary, whose keys
    are read by programs: in them the topics are the only foreign words, and have been redacted.
    """

    LONGEST_LINE = 2000  # characters

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        start = len(self.formatMessage(record)) - len(record.message)
        if not hasattr(record, "is_redacted"):
            text = text[:start] + redactor.redact(text[start:])
        lines = (line[: self.LONGEST_LINE] + "..." * (len(line) > self.LONGEST_LINE) for line in text.splitlines())
        return "\n    ".join(map(escape, lines))


class LogWriter(logging.Handler):
    """Has another handler write what is logged, in a thread of its own, so that nobody else waits for a pipe that
    nobody reads, or for a file system that hangs. What finds the queue full is dropped, and counted."""

    MAX_LINES = 10000  # that wait

    def __init__(self, handler: logging.Handler, name: str) -> None:
        """`name` is the thread's. Raises RuntimeError where it can't be started."""
        super().__init__()
        self.setFormatter(RedactingFormatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
        self.handler = handler
        self.lines: queue.Queue[str] = queue.Queue(self.MAX_LINES)
        self.dropped = 0  # lines; counted under this handler's own lock
        threading.Thread(target=self.run, name=name, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # such as arguments that don't fit: no reason to fail for who logs
            self.add_line(self.format(record))

    def add_line(self, line: str) -> None:
        """Never waits, never fails."""
        try:
            self.lines.put_nowait(line)
        except queue.Full:
            self.acquire()
            self.dropped += 1
            self.release()

    def run(self) -> None:
        told = 0  # of those dropped
        while True:
            line = self.lines.get()
            with contextlib.suppress(Exception):  # any, such as MemoryError: the next lines are written
                self.handler.handle(logging.makeLogRecord({"msg": line}))
            dropped = self.dropped - told
            if dropped and self.lines.empty():
                told += dropped
                words = "%d lines are missing here, for nobody took them in time"
                self.handle(log.makeRecord(log.name, logging.WARNING, "", 0, words, (dropped,), None))
            self.lines.task_done()

    def finish(self, seconds: float) -> None:
        """Waits until all is written, but no longer than so many seconds."""
        with self.lines.all_tasks_done:
            self.lines.all_tasks_done.wait_for(lambda: not self.lines.unfinished_tasks, seconds)


def try_lock(file: Any) -> bool:
    """Locks an open file or directory, until it is closed; False where somebody else has. Where the file system knows
    no locks, anybody may."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class QuietLogFile(logging.handlers.RotatingFileHandler):
    """A log file whose trouble, such as a full disk, is told on stderr and stops nothing. Where somebody has moved or
    deleted it, as logrotate does, it is begun anew. Its process holds a lock on it, by which others tell that it is
    written to: processes of one id, in containers that share a directory, and whoever makes room."""

    NAME = re.compile(r"(dispatch_data_\d+(?:-\d+)?\.log)(?:\.\d+)?")  # one that is full gets a number at its end
    KEPT = 20  # files

    def __init__(self, directory: str, stderr: LogWriter) -> None:
        self.stem = os.path.join(os.path.abspath(directory), "dispatch_data_%d" % os.getpid())
        super().__init__(self.stem + ".log", maxBytes=100 * 1000 * 1000, backupCount=5, encoding="utf-8", delay=True)
        self.stderr = stderr
        self.throttle = LogThrottle()
        with contextlib.suppress(OSError):  # each line tries again
            self.stream = self._open()
        self.make_room(directory)

    def _open(self) -> Any:
        """Called by RotatingFileHandler: opens the first file of those that may be meant that nobody else writes to."""
        for number in itertools.count(1):
            self.baseFilename = self.stem + ("-%d" % number if number > 1 else "") + ".log"
            file = super()._open()
            if try_lock(file):
                return file
            file.close()

    def make_room(self, directory: str) -> None:
        """Deletes all but the newest files and those that are written to."""
        files = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(directory):
                name = self.NAME.fullmatch(entry.name)
                if name and entry.is_file(follow_symlinks=False):
                    files.append((entry.stat().st_mtime, entry.path, os.path.join(directory, name.group(1))))
        for _, path, written_to in sorted(files)[: -self.KEPT]:
            with contextlib.suppress(OSError):
                if not is_locked(written_to):
                    os.unlink(path)

    def shouldRollover(self, record: logging.LogRecord) -> Any:
        """Called with each record before it is written, and opens the file where there is none."""
        path, stream = self.baseFilename, self.stream
        if stream and not (os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(stream.fileno()))):
            self.stream = None
            stream.close()
        return super().shouldRollover(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's signature
        if self.throttle.allow():
            words = "dispatch_data.py: can't write the log file %s: %s"
            self.stderr.add_line(escape_for_log(words % (self.baseFilename, sys.exc_info()[1]), 2000))


def is_locked(path: str) -> bool:
    """Whether somebody holds a lock on a file, if it is there."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def set_up_logging(settings: Settings) -> list[LogWriter]:
    """To stderr, and to a file of this process's own; stderr gets only warnings when it is no terminal but a file.

    From then on nothing else is to write to stderr: its lock is held by the thread that may wait for whoever reads it.
    Raises RuntimeError where no thread can be started.
    """
    writers = [LogWriter(logging.StreamHandler(), "writes stderr")]
    if settings.log_dir:
        writers[0].setLevel(logging.NOTSET if sys.stderr.isatty() else logging.WARNING)
        writers.append(LogWriter(QuietLogFile(settings.log_dir, writers[0]), "writes the log file"))
    logging.basicConfig(level=settings.log_level, handlers=writers)
    if settings.log_level != "DEBUG":
        # What the SDK would say of failing calls, once each, RetryLog says in sums.
        logging.getLogger("aliyun").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # what can't be told, on a full disk, is no reason for a traceback
    logging.captureWarnings(True)
    threading.excepthook = lambda end: log.error("a defect of this program", exc_info=end.exc_value)
    return writers


def help_text() -> str:
    """The table of settings and the exit statuses, for --help."""

    def rows(settings: Iterable[Setting], suffix: str = "") -> Iterator[str]:
        for setting in settings:
            default = "required" if setting.default is None else "default: %s" % (setting.default or "none")
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
        "  0  stopped as asked; --check: nothing is wrong; --route: each goes somewhere; --status: within --max-lag;",
        "     --drain: nothing is left",
        "  1  could not start, or ended by itself; --check: something is wrong; --route: one goes nowhere;",
        "     --status: beyond --max-lag, or unknown; --drain: stopped before the end;",
        "     --put-rejected: not all was taken",
        "  2  the settings or the arguments are wrong",
    ])  # fmt: skip


def install_signal_handlers() -> CancelToken:
    """A token that SIGTERM, SIGINT and SIGHUP cancel, and nothing else does.

    An exception raised out of the blue, as Ctrl-C does by default, could strike where a lock is held. SIGINT is caught
    also where a shell had it ignored; nohup has SIGHUP ignored, so it stays.
    """
    stop = CancelToken()
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # some supervisors leave theirs blocked
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with contextlib.suppress(OSError, IndexError), open("/proc/self/status", encoding="latin-1") as file:
        mask = file.read().partition("SigIgn:")[2].split()[0]  # for PyPy, whose getsignal doesn't know
        is_ignored = bool(int(mask, 16) >> (signal.SIGHUP - 1) & 1)
    for number in numbers:
        if number != signal.SIGHUP or not is_ignored:
            signal.signal(number, lambda *_: stop.cancel())
    return stop


def log_summary(member: GroupMember, lag_seconds: float | None = None) -> None:
    for line in member.summary(lag_seconds):
        log.info("%s", line, extra={"is_redacted": True})


def progress_line() -> LogWriter | None:
    """Shows each text that is added in the place of the one before, on the terminal that stderr is; what is logged
    overwrites it. None where stderr is no terminal. Raises RuntimeError."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("\x1b[K%(message)s"))
    handler.terminator = "\r"
    return LogWriter(handler, "writes progress") if sys.stderr.isatty() else None


class News:
    """Tells once what has changed: the shards held, and that a target has taken its first logs."""

    def __init__(self, member: GroupMember) -> None:
        self.member = member
        self.shards: list[int] = []
        self.waiting = list(member.delivery.targets.values())  # targets that have taken nothing yet

    def tell(self) -> None:
        shards, before = self.member.held_shards(), self.shards
        if shards != before:
            named = [",".join(map(str, some)) or "none" for some in (shards, before)]
            log.info("%s: holds shards %s, before: %s", self.member.subject, *named)
            self.shards = shards
        for target in [target for target in self.waiting if target.logs]:
            log.info("%s: has taken its first %d logs", target.name, target.logs)
            self.waiting.remove(target)


def report_loop(member: GroupMember, progress: LogWriter | None) -> None:
    """Tells how it goes, for ever; in a thread of its own, for the service may take its time to say the lag. `progress`
    is for that of a drain."""
    next_summary = time.monotonic() + SUMMARY_INTERVAL
    next_look, drain, news = 0.0, member.drain, News(member)
    with watchdog.watching("tells", is_permanent=True):
        while True:
            time.sleep(REPORT_LOOP_INTERVAL)
            with contextlib.suppress(Exception):  # any, such as MemoryError: it goes on telling
                watchdog.beat()
                member.report_recoveries()
                news.tell()
                client = member.source.client
                client.close_stale(all_idle=len(client.idle_connections) > connection_budget())
                if drain and member.consumer and not drain.is_done() and time.monotonic() > next_look:
                    drain.look(member.source, member.group)
                    next_look = time.monotonic() + drain.LOOK_INTERVAL
                    if progress and drain.looks:
                        full = int(20 * drain.share_done())
                        progress.add_line("[%s%s] %s" % ("#" * full, "." * (20 - full), drain))
                if time.monotonic() > next_summary:
                    member.measure_lag()
                    log_summary(member, member.lag)
                    if drain and drain.left:
                        log.info("drain: %s, in shards %s", drain, ",".join(map(str, sorted(drain.left))))
                    next_summary = time.monotonic() + SUMMARY_INTERVAL
                    member.compare_routes()


def tune_process() -> None:
    """Lets the process open more files, and keep less memory, than the system would have it by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # the soft limit is often 1024, each put in the air takes a file
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(ImportError, OSError, AttributeError):  # glibc alone would keep as much for each thread
        import ctypes  # not sooner: libffi keeps a file open

        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


class PutAgain:
    """Puts LogGroups that were set aside into one target, and deletes each file once the target has taken it."""

    def __init__(self, target: TargetSettings, credential_source: CredentialSource) -> None:
        self.name, self.config = target.name, target.config
        self.client = PooledLogClient(self.config, credential_source)
        self.retries = RetryLog(self.name, "puts", "a put failed and is tried again", self.config)
        self.lock = threading.Lock()  # guards:
        self.throttles: dict[str, LogThrottle] = defaultdict(LogThrottle)  # by the code of refusals

    def try_put(self, log_group: LogGroup) -> CallError | None:
        """None once it is taken, else why it is not. Raises CallError where time alone may mend that."""
        try:
            self.client.put_log_raw(self.config.project, self.config.logstore, log_group)
        except CallError as error:
            if error.is_transient():
                raise
            return error
        return None

    def put(self, path: str, stop: CancelToken) -> str:
        """What has become of a file: "put", "refused" or "left"."""
        try:
            with open(path, "rb") as file:
                log_group = LogGroup("", 0, file.read(), b"")
            refusal = self.retries.retry(path, functools.partial(self.try_put, log_group), stop)
            if not refusal:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return "put"
            with self.lock:
                if self.throttles[refusal.code].allow():
                    why = describe_error(refusal, self.config)
                    log.error("%s: %s is refused still, and kept: %s", self.name, path, why)
            return "refused"
        except Cancelled:
            return "left"
        except Exception as error:  # such as no permission
            log.error("%s: %s", path, escape_for_log(repr(error)))
            return "left"


def rejected_files(directory: str, targets: Sequence[TargetSettings]) -> list[tuple[TargetSettings, str]]:
    """The targets and paths of what was set aside in a directory. Raises OSError, and StartupError where a file is of
    another logstore than its target is by the settings."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    by_number = {target.number: target for target in targets}
    rest = re.compile(r"[0-9]+-[0-9]+-[0-9a-f]{32}(-[A-Za-z]+)?\.loggroup")
    files, problems = [], []
    for name in names:
        number = re.fullmatch(r"TO([1-9][0-9]{0,8})-.*\.loggroup", name)
        target, path = by_number.get(int(number.group(1))) if number else None, os.path.join(directory, name)
        beginning = DeadLetterDirectory.beginning_of_name(target.number, target.config) if target else ""
        if target and name.startswith(beginning) and rest.fullmatch(name, len(beginning)):
            files.append((target, path))
        elif target:
            problems.append("%s: is not of %s, as the settings have it" % (path, target.name))
        elif number:
            problems.append("%s: the settings have no such target" % path)
    if problems:
        raise StartupError("\n".join([*problems[:10], "%d of %d files; nothing is put" % (len(problems), len(names))]))
    return files


def put_rejected(settings: Settings, directory: str) -> int:
    """Puts what was set aside in a directory into the targets, and deletes it there; the exit status: 1 unless all of
    it was taken."""
    stop = install_signal_handlers()
    tune_process()
    outcomes: list[str] = []  # of PutAgain.put, one for each file that is done with
    try:
        if not try_lock(os.open(directory, os.O_RDONLY)):  # two of these at a time would put all of it twice
            raise StartupError("%s: another --put-rejected works on it" % directory)
        files = rejected_files(directory, settings.targets)
        sources, progress = CredentialSources(), progress_line()
        putters = {target: PutAgain(target, sources.of(target.config)) for target in {target for target, _ in files}}
        # One for each, lest a target that is down holds up the others.
        pools = {target: ThreadPool(settings.writers, "puts again TO%d" % target.number) for target in putters}
    except (OSError, RuntimeError, StartupError) as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        return 1
    for target, path in files:
        task = pools[target].submit(putters[target].put, path, stop)
        task.add_done_callback(lambda done: outcomes.append(done.result()))
    began, end = time.monotonic(), float("inf")
    next_line = began + SUMMARY_INTERVAL
    while len(outcomes) < len(files) and time.monotonic() < end:
        time.sleep(MAIN_LOOP_INTERVAL)
        now, put = time.monotonic(), outcomes.count("put")
        words = "%d of %d LogGroups put, %d refused still, %d/s"
        text = words % (put, len(files), outcomes.count("refused"), put / (now - began))
        if stop.is_cancelled() and end == float("inf"):
            log.info("told to stop: puts in flight have %g s", SHUTDOWN_TIMEOUT)
            end = now + SHUTDOWN_TIMEOUT
        elif progress:
            progress.add_line(text)
        elif now > next_line:
            log.info("%s", text)
            next_line = now + SUMMARY_INTERVAL
    put, refused = outcomes.count("put"), outcomes.count("refused")
    left = len(files) - put - refused
    show("%d LogGroups put and deleted, %d refused still and kept, %d left" % (put, refused, left))
    return int(put < len(files))


class Ending(enum.Enum):
    """Why a run has ended, and its exit status."""

    STOPPED = "told to stop", 0
    DRAINED = "nothing is left to drain", 0
    UNDRAINED = "told to stop before all was drained", 1
    EXPIRED = "a token has run out that can't be refreshed", 1
    FAILED = "it could not start, or has a defect", 1


def why_to_end(member: GroupMember, stop: CancelToken) -> Ending | None:
    """None as long as there is no reason."""
    if member.drain and member.drain.is_done():
        return Ending.DRAINED
    if stop.is_cancelled():
        return Ending.UNDRAINED if member.drain else Ending.STOPPED
    if member.expired_sts_tokens():
        return Ending.EXPIRED
    return None if member.is_alive() else Ending.FAILED


def run(settings: Settings, drain: Drain | None = None) -> int:
    """Joins the group and dispatches until it is told to stop, or the group is drained; the process's exit status."""
    stop = install_signal_handlers()
    tune_process()
    try:
        credential_sources = CredentialSources()
        member = GroupMember(settings, Delivery(settings, credential_sources), credential_sources, drain)
        progress = progress_line() if drain else None
        if settings.metrics_port:
            MetricsServer(settings, member)
        member.start()
        threading.Thread(target=report_loop, args=(member, progress), name="tells", daemon=True).start()
    except RuntimeError as error:
        log.error("%s; %s", error, THREAD_LIMIT_HINT)
        return 1
    while not (ending := why_to_end(member, stop)):
        time.sleep(MAIN_LOOP_INTERVAL)
    for name in member.expired_sts_tokens():
        log.error("%s has run out, says the service: this copy ends, to be started again with another", name)
    left = member.stop(SHUTDOWN_TIMEOUT)
    # The last lines are the sums of the run: after them nobody else tells anything.
    log.addFilter(lambda record: record.threadName == threading.main_thread().name)
    if left:
        log.warning(
            "stopped in the middle of a batch of shard %s, %d LogGroups; whoever takes the shard next delivers again "
            "what was delivered of it", ",".join(map(str, sorted(left))), sum(left.values()),
        )  # fmt: skip
    for line in str(member.failure or "").splitlines():
        log.error("%s", line)
    reason, status = ending.value
    if member.consumer:  # else the lines above say all there is to say
        log.info("ends with status %d: %s", status, reason)
        log_summary(member)
    return status


def non_negative_float(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def time_before_now(text: str) -> tuple[str, int]:
    """The value of --until, as written and in unix seconds. Raises argparse.ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        until = parse_cursor_start(text)
        if isinstance(until, int):
            return text, until
    words = "%r is wrong; right would be a time that has passed, such as 2018-12-26T00:00:00+08:00"
    raise argparse.ArgumentTypeError(words % text)


def settings_for(parsed: argparse.Namespace) -> Settings:
    """The settings in the environment, as far as these arguments need them. Raises SettingsError."""
    environment = dict(os.environ)
    if parsed.status or parsed.route or parsed.offline:
        environment.update(SLS_LOG_DIR="", SLS_REJECTED_DIR="")  # nothing is written: they may be another machine's
    settings = read_settings(environment)
    if not parsed.until:
        return settings
    text, until = parsed.until
    warnings = *settings.warnings, *local_time_warnings("--until", text, until)
    notes = *settings.notes, "--until, before which a log must have arrived: %s" % format_with_utc(until)
    return replace(settings, warnings=warnings, notes=notes)


def first_run_hints() -> Iterator[str]:
    """What whoever has set nothing yet may do."""
    if os.path.exists(".env"):
        yield "dispatch_data.py: .env is there, but nobody has exported what it sets: set -a; . ./.env; set +a"
    text, directory = "dispatch_data.py: every setting is explained in .env.example", os.path.dirname(__file__) or "."
    if os.path.isdir(os.path.join(directory, "tests", "local_log_service")):
        where = shlex.quote(os.path.abspath(directory)), shlex.quote(sys.executable)
        text += "; to see the program work without a cloud account: cd %s && %s -m tests.local_log_service demo" % where
    yield text


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dispatch_data.py",
        usage="dispatch_data.py [--check [--offline] | --route TOPIC ... | --status [--json] [--max-lag SECONDS] | "
        "--drain [--until TIME] | --put-rejected DIR | --version | --help]",
        description=(__doc__ or "").partition("\n")[0],
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version="dispatch_data.py " + __version__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="try the settings, the source and the targets, and end")
    action.add_argument("--status", action="store_true", help="show how far the consumer group is, and end")
    action.add_argument("--route", nargs="+", metavar="TOPIC", help='show where each topic goes ("": none), and end')
    parser.add_argument("--offline", action="store_true", help="with --check: of the settings alone, and ask nobody")
    action.add_argument(
        "--drain", action="store_true", help="dispatch until nothing is left of what the source holds now, and end"
    )
    parser.add_argument(
        "--until", type=time_before_now, metavar="TIME", help="with --drain: only what had arrived before then"
    )
    action.add_argument(
        "--put-rejected", metavar="DIR", help="put what was set aside in a directory, delete what is taken, and end"
    )
    parser.add_argument("--json", action="store_true", help="with --status: for programs")
    parser.add_argument(
        "--max-lag", type=non_negative_float, metavar="SECONDS", help="with --status: exit status 1 beyond it"
    )
    parsed = parser.parse_args()
    if not parsed.status and (parsed.json or parsed.max_lag is not None):
        parser.error("--json and --max-lag go with --status")
    if parsed.offline and not parsed.check:
        parser.error("--offline goes with --check")
    if parsed.until is not None and not parsed.drain:
        parser.error("--until goes with --drain")
    if parsed.put_rejected is not None:
        try:
            check_directory(parsed.put_rejected)
        except ValueError as expected:
            parser.error("--put-rejected: %r is wrong; right would be %s" % (parsed.put_rejected, expected))
    return parsed


def show_what_is_asked(settings: Settings, parsed: argparse.Namespace) -> int:
    """Prints it; the exit status."""
    if parsed.check:
        return show_check(settings, parsed.offline)
    if parsed.route:
        return show_route(settings, parsed.route)
    return show_status(settings, parsed.json, parsed.max_lag)


def main() -> int:
    """The program; returns the exit status: see `help_text`."""
    parsed = read_arguments()
    try:
        settings = settings_for(parsed)
    except SettingsError as error:
        lines = ["dispatch_data.py: %s" % problem for problem in error.args]
        if any(" is missing: " in problem for problem in error.args):
            lines += first_run_hints()
        show("\n".join(lines), sys.stderr)
        return 2
    redactor.add(float("inf"), *secret_values(settings))
    if parsed.check or parsed.status or parsed.route:
        logging.disable(logging.CRITICAL)  # what there is to say goes to stdout
        return show_what_is_asked(settings, parsed)
    try:
        writers = set_up_logging(settings)
    except RuntimeError as error:
        show("dispatch_data.py: %s; %s" % (error, THREAD_LIMIT_HINT), sys.stderr)
        return 1
    try:
        for warning in settings.warnings:
            log.warning("%s", warning)
        if parsed.put_rejected:
            return put_rejected(settings, parsed.put_rejected)
        until = parsed.until[1] if parsed.until else None
        return run(settings, Drain(settings.source, until) if parsed.drain else None)
    except Exception:
        log.exception("a defect of this program")
        return 1
    finally:
        end = time.monotonic() + LAST_LINES_TIMEOUT
        for writer in writers:
            writer.finish(end - time.monotonic())


if __name__ == "__main__":
    status = 1  # unless all that there was to say is said
    try:
        try:
            end_status = main()
        except SystemExit as end:  # argparse's way
            sys.stderr.flush()
            end_status = int(end.code or 0)
        sys.stdout.flush()
        status = end_status
    except BrokenPipeError:  # as by `head`: who took the first lines wants no more, and no word about that
        pass
    except OSError as error:  # such as stdout on a full disk
        with contextlib.suppress(OSError):
            show("dispatch_data.py: %s" % error, sys.stderr)
    except Exception:
        with contextlib.suppress(OSError):
            show("a defect of this program\n" + traceback.format_exc(), sys.stderr)
    finally:
        # A thread that waits for an answer from a dead target, up to MAX_RESPONSE_TIMEOUT, or for a reader of stderr,
        # must not hold up the end.
        os._exit(status)
