"""Disruptions around the copies that are no faults of single calls: each lasts as long as its `with` block.

What a copy says of it, or "" where it says nothing in particular, is the value of the block.
"""

import contextlib
import functools
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Union

from harness import PROJECT
from local_log_service import LocalLogService
from local_log_service.key_services import KeyServices


@contextlib.contextmanager
def outage(service: Union[LocalLogService, KeyServices]) -> Iterator[str]:
    """The whole service, or who hands out keys, is gone, and what was under way is broken off."""
    service.stop()
    try:
        yield ""
    finally:
        service.start()


@contextlib.contextmanager
def changed_key(service: LocalLogService, access_key_id: str, secret: Optional[str]) -> Iterator[str]:
    """The secret of a key is another, or with None the key is deleted."""
    right = service.access_keys[access_key_id]
    if secret is None:
        del service.access_keys[access_key_id]
    else:
        service.access_keys[access_key_id] = secret
    try:
        yield "Unauthorized" if secret is None else "SignatureNotMatch"
    finally:
        service.access_keys[access_key_id] = right


@contextlib.contextmanager
def wrong_clock(service: LocalLogService, offset: float) -> Iterator[str]:
    """The clocks of service and copies differ by `offset` seconds, which is to be more than 15 minutes."""
    service.clock_offset = offset
    try:
        yield "RequestTimeExpired"
    finally:
        service.clock_offset = 0.0


def break_connections(service: LocalLogService) -> None:
    """Breaks off every connection, so that what only strikes a new one strikes."""
    service.stop()
    service.start()


@contextlib.contextmanager
def untrusted_certificate(service: LocalLogService) -> Iterator[str]:
    """Somebody else seems to answer in the service's place; https only."""
    service.present_certificate(trusted=False)
    break_connections(service)
    try:
        yield "certificate verify failed"
    finally:
        service.present_certificate(trusted=True)


def no_names_while_it_exists(program, switch):
    import os
    import socket

    resolve = socket.getaddrinfo

    def failing_while_the_file_exists(*arguments, **named):
        if os.path.exists(switch):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(*arguments, **named)

    socket.getaddrinfo = failing_while_the_file_exists


def names_switched_by(switch: Path) -> Callable[..., None]:
    """A patch for `Copies.start` with which a copy takes part in `unknown_names`."""
    return functools.partial(no_names_while_it_exists, str(switch))


@contextlib.contextmanager
def unknown_names(service: LocalLogService, switch: Path) -> Iterator[str]:
    """Name resolution fails, for the copies that were started to look at this switch."""
    switch.touch()
    break_connections(service)
    try:
        yield "gaierror"
    finally:
        switch.unlink()


@contextlib.contextmanager
def deleted_logstore(service: LocalLogService, logstore: str, ledger: List[bytes]) -> Iterator[str]:
    """A target is deleted, then created again, empty; what it had taken is added to `ledger`."""
    ledger += [entry.log_group for entry in service.delete_logstore(PROJECT, logstore)]
    try:
        yield "LogStoreNotExist"
    finally:
        service.create_logstore(PROJECT, logstore, 2)
