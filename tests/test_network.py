"""A network of the kernel's own between a copy and the service: it is cut, loses one direction, changes its address.

Needs root, who may make network namespaces, and `ip` (Debian: iproute2); skipped elsewhere.
"""

import functools
import itertools
import os
import shutil
import subprocess

import pytest
from assertions import assert_nothing_lost, logs_arrived, logs_beyond_checkpoints
from harness import Copies, SteadyFeed, wait_until_delivered
from relays import Relay

NOWHERE = "02:00:00:00:00:01"  # a hardware address that nobody has: what is sent there gets lost in silence


def enter_network(program, namespace):
    import ctypes
    import os
    import sys

    if ctypes.CDLL(None).setns(os.open(namespace, os.O_RDONLY), 0x40000000):  # CLONE_NEWNET
        sys.exit("no such namespace")


class Link:
    """A pair of network devices; one end is here, the other in a network namespace. Use it as a context manager."""

    numbers = itertools.count()

    def __init__(self):
        number = os.getpid() % 10000 * 100 + next(self.numbers)
        self.namespace, self.near, self.far = "dispatch%d" % number, "near%d" % number, "far%d" % number
        network = "10.%d.%d." % (128 + number // 250 % 100, number % 250)
        self.near_address, self.far_address, self.other_address = (network + host for host in "123")

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def ip_there(self, *words):
        self.ip("-n", self.namespace, *words)

    def __enter__(self):
        if os.geteuid() or not shutil.which("ip"):
            pytest.skip("only root can make network namespaces, with ip")
        try:
            self.ip("netns", "add", self.namespace)
            self.ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.namespace)
        except subprocess.CalledProcessError as error:
            pytest.skip("this machine gives nobody a network namespace with a link: %s" % error.stderr)
        try:
            self.ip("address", "add", self.near_address + "/24", "dev", self.near)
            self.ip("link", "set", self.near, "up")
            self.ip_there("address", "add", self.far_address + "/24", "dev", self.far)
            self.ip_there("link", "set", self.far, "up")
        except BaseException:
            self.__exit__()  # what stayed would be in the way of others
            raise
        return self

    def __exit__(self, *_):
        self.ip("link", "delete", self.near)
        self.ip("netns", "delete", self.namespace)

    def entering(self):
        """A patch with which a copy goes to the far end."""
        return functools.partial(enter_network, "/run/netns/" + self.namespace)

    def still_to_be_sent(self):
        """Bytes that the far end's kernel goes on trying to send, of connections which their process has closed."""
        command = ["ip", "netns", "exec", self.namespace, "cat", "/proc/net/tcp"]
        rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[1:]
        of_nobody = [row.split() for row in rows if row.split()[9] == "0"]
        return sum(max(0, int(row[4].split(":")[0], 16) - 1) for row in of_nobody)  # a farewell counts as one

    # Each goes on until its opposite is called.

    def cut(self):
        self.ip("link", "set", self.near, "down")

    def join(self):
        self.ip("link", "set", self.near, "up")

    def lose_requests(self):
        self.ip_there("neighbour", "replace", self.near_address, "lladdr", NOWHERE, "dev", self.far)

    def pass_requests(self):
        self.ip_there("neighbour", "delete", self.near_address, "dev", self.far)

    def lose_answers(self):
        self.ip("neighbour", "replace", self.far_address, "lladdr", NOWHERE, "dev", self.near)

    def pass_answers(self):
        self.ip("neighbour", "delete", self.far_address, "dev", self.near)

    def change_address(self):
        """Connections that there are have no address any more."""
        self.ip_there("address", "delete", self.far_address + "/24", "dev", self.far)
        self.ip_there("address", "add", self.other_address + "/24", "dev", self.far)

    def leave_address(self):
        """As it is: new connections are made from it."""


TROUBLES = {
    "cut": (Link.cut, Link.join),
    "requests lost": (Link.lose_requests, Link.pass_requests),
    "answers lost": (Link.lose_answers, Link.pass_answers),
    "address changed": (Link.change_address, Link.leave_address),
}


@pytest.mark.parametrize(
    ("trouble", "until"),
    [(trouble, "NoAnswer") for trouble in TROUBLES]
    + [(trouble, "is lost, another joins") for trouble in TROUBLES if trouble != "address changed"],  # a new one works
)
def test_a_network_that_fails_loses_nothing(service, tmp_path, trouble, until):
    """And repeats the batches in flight at the most. What a copy has given up is not sent later by its kernel."""
    begin, end = TROUBLES[trouble]
    with Link() as link, Relay(service, link.near_address) as relay, Copies(service, tmp_path) as copies:
        # Half of the group's timeout: what hangs is given up before the lease is.
        constants = {"RESPONSE_TIMEOUT": 2, "MAX_RESPONSE_TIMEOUT": 2, "CONNECT_TIMEOUT": 1}
        copy = copies.start(patch=link.entering(), constants=constants, SLS_HEARTBEAT_INTERVAL="2", **relay.settings())
        feed = SteadyFeed(service)
        service.add_fault("PutLogs", delay=0.1)  # so that some are in the air
        feed.wait_for(lambda: logs_arrived(service) > 500, "logs that flow")
        seen = len(copy.stderr())
        most_repeated = sum(logs_beyond_checkpoints(service).values())  # the batches in flight are of these
        begin(link)
        feed.wait_for(lambda: until in copy.stderr()[seen:], "a word about the network")
        assert not link.still_to_be_sent()
        end(link)
        wait_until_delivered(service)
        assert_nothing_lost(service, most_repeated=most_repeated)
        assert copy.stop() == 0
