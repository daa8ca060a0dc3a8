"""Makes LogGroups as agents send them: web server access, SQL audit, click events, and some that nobody routes."""

import random
from typing import Callable, Dict, Iterator, Sequence

from aliyun.log.proto import LogGroup

USER_AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5",
    "Mozilla/5.0 (X11; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0",
    "curl/8.5.0",
    "",
)
PAGES = ("/", "/login", "/cart", "/search?q=%E8%8C%B6", "/item/{}", "/api/v1/orders/{}", "/static/app.{}.js")
STATEMENTS = (
    "SELECT id, name, price FROM items WHERE id = {}",
    "SELECT o.id, SUM(l.price) FROM orders o JOIN lines l ON l.order_id = o.id WHERE o.user = {} GROUP BY 1",
    "UPDATE stock SET amount = amount - 1 WHERE item_id = {} AND amount > 0",
    "INSERT INTO payments (order_id, state, note) VALUES ({}, 'new', 'überprüfen')",
    "DELETE FROM sessions WHERE expires < {}",
)
ELEMENTS = ("buy", "加入购物车", "menu", "search", "close", "banner-left")


def address(choice: random.Random) -> str:
    return ".".join(str(choice.randint(11, 223)) for _ in range(4))


def access_line(choice: random.Random) -> Dict[str, str]:
    """One request to a web server."""
    seconds = choice.expovariate(20)
    return {
        "remote_addr": address(choice),
        "request_method": choice.choice(("GET", "GET", "GET", "POST", "HEAD")),
        "request_uri": choice.choice(PAGES).format(choice.randrange(100000)),
        "status": choice.choice(("200", "200", "200", "200", "302", "304", "404", "502")),
        "body_bytes_sent": str(int(choice.lognormvariate(8, 2))),
        "request_time": "%.3f" % seconds,
        "upstream_response_time": "%.3f" % (seconds * choice.random()) if choice.random() < 0.7 else "-",
        "http_referer": "https://www.example.com" + choice.choice(PAGES[:4]) if choice.random() < 0.5 else "",
        "http_user_agent": choice.choice(USER_AGENTS),
    }


def audit_record(choice: random.Random) -> Dict[str, str]:
    """One statement that a database has run."""
    failed = choice.random() < 0.02
    return {
        "instance_id": "rm-%06x" % choice.randrange(5),
        "db": choice.choice(("shop", "billing")),
        "user": choice.choice(("web", "batch", "report")),
        "client_ip": "10.0.%d.%d" % (choice.randrange(4), choice.randint(1, 254)),
        "thread_id": str(choice.randrange(1000)),
        "sql": choice.choice(STATEMENTS).format(choice.randrange(10**7)),
        "latency_us": str(int(choice.lognormvariate(7, 1.5))),
        "return_rows": "0" if failed else str(choice.randrange(200)),
        "fail": "1205" if failed else "0",
    }


def click_event(choice: random.Random) -> Dict[str, str]:
    """One click on a page."""
    return {
        "event": choice.choice(("click", "click", "scroll", "view")),
        "session": "%016x" % choice.getrandbits(64),
        "user_id": str(choice.randrange(10**6)) if choice.random() < 0.6 else "",
        "page": choice.choice(PAGES).format(choice.randrange(100000)),
        "element": choice.choice(ELEMENTS),
        "x": str(choice.randrange(1920)),
        "y": str(choice.randrange(4000)),
    }


def debug_message(choice: random.Random) -> Dict[str, str]:
    """One line that somebody forgot to switch off."""
    outcome = choice.choice(("hit", "miss"))
    return {"level": "DEBUG", "message": "cache %s, %d entries" % (outcome, choice.randrange(5000))}


class Agent:
    """Reads one file of one host and sends what it finds in packs, which it numbers."""

    def __init__(self, choice: random.Random, topic: str, path: str, make_log: Callable) -> None:
        self.choice = choice
        self.topic = topic
        self.path = path
        self.make_log = make_log
        self.source = "10.1.%d.%d" % (choice.randrange(256), choice.randint(1, 254))
        self.machine = "%08X-%04X-%04X" % (choice.getrandbits(32), choice.getrandbits(16), choice.getrandbits(16))
        self.pack_prefix = "%016X" % choice.getrandbits(64)
        self.pack_number = choice.randrange(0x1000)
        self.has_nanoseconds = choice.random() < 0.5

    def send(self, log_count: int, unix_time: int) -> bytes:
        """The next pack: a serialised LogGroup of `log_count` logs, all of the second `unix_time`."""
        log_group = LogGroup(Topic=self.topic, Source=self.source, MachineUUID=self.machine)
        for nanoseconds in sorted(self.choice.randrange(10**9) for _ in range(log_count)):
            log = log_group.Logs.add(Time=unix_time)
            if self.has_nanoseconds:
                log.Time_ns = nanoseconds
            for key, value in self.make_log(self.choice).items():
                log.Contents.add(Key=key, Value=value)
        self.pack_number += 1
        tags = {
            "__hostname__": "host-" + self.source.replace(".", "-"),
            "__path__": self.path,
            "__pack_id__": "%s-%X" % (self.pack_prefix, self.pack_number),
        }
        for key, value in tags.items():
            log_group.LogTags.add(Key=key, Value=value)
        return log_group.SerializeToString()


# For each topic its share of all LogGroups, the file that is read, and what makes a log of it.
KINDS = {
    "nginx": (40, "/var/log/nginx/access.log", access_line),
    "ngnix": (10, "/var/log/nginx/access.log", access_line),  # a misspelling that became tradition
    "sql_audit": (25, "/var/lib/mysql/audit.log", audit_record),
    "click": (20, "/srv/web/logs/click.json", click_event),
    "debug": (5, "/srv/web/logs/debug.log", debug_message),
}


def log_groups(
    seed: int = 0, topics: Sequence[str] = tuple(KINDS), hosts: int = 3, now: Callable[[], float] = lambda: 1700000000
) -> Iterator[bytes]:
    """Serialised LogGroups without end, each of 10 to 100 logs of one of `topics`, sent by agents on `hosts` hosts.

    The same arguments make the same LogGroups; `now` gives the time of the logs as unix seconds, such as time.time.
    Raises KeyError for a topic that is not in KINDS.
    """
    choice = random.Random(seed)
    agents = {topic: [Agent(choice, topic, *KINDS[topic][1:]) for _ in range(hosts)] for topic in topics}
    shares = [KINDS[topic][0] for topic in topics]
    while True:
        (topic,) = choice.choices(topics, shares)
        yield choice.choice(agents[topic]).send(choice.randint(10, 100), int(now()))
