"""Fixtures: a local Log Service with a source and targets, and copies of dispatch_data.py as processes."""

import platform
import ssl
import threading

import hypothesis
import pytest
import trustme
from assertions import checkpoints_watched
from harness import PROJECT, SOURCE, Copies
from local_log_service import LocalLogService

from dispatch_data import LogstoreConfig, settings_of

# Machines that run tests are slow at times; a property is no less true for that.
hypothesis.settings.register_profile("steady", deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("steady")


@pytest.fixture
def service():
    """A running service with a source of 4 shards and the targets nginx, sql-audit and click."""
    with LocalLogService() as running:
        create_logstores(running)
        yield running


@pytest.fixture
def copies(service, tmp_path):
    """Starts copies of dispatch_data.py against `service`; what still runs at the end is killed.

    Whatever happens to them, none may ever set a checkpoint back.
    """
    with checkpoints_watched() as set_back, Copies(service, tmp_path) as started:
        yield started
        assert set_back == []


def create_logstores(service, shard_count=4):
    service.create_logstore(PROJECT, SOURCE, shard_count)
    for logstore in ("nginx", "sql-audit", "click"):
        service.create_logstore(PROJECT, logstore, 2)


def logstore_config(project=PROJECT, logstore="nginx", **values):
    """A LogstoreConfig with these values, all others empty."""
    empty = dict.fromkeys(settings_of(LogstoreConfig), "")
    return LogstoreConfig(**{**empty, **values, "project": project, "logstore": logstore})


# What these prove, of tools, of other programs and of how files are read, no other interpreter changes.
OF_ONE_INTERPRETER = ("test_benchmark.py", "test_env_example.py", "test_foreign_clients.py", "test_live.py")


def pytest_collection_modifyitems(items):
    """The slow ones come first: else they come last, and keep everybody waiting in the end."""
    if platform.python_implementation() == "PyPy":
        for item in items:
            if item.path.name in OF_ONE_INTERPRETER:
                item.add_marker(pytest.mark.skip(reason="CPython runs it, and it is no other on PyPy"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def speak_tls(here, there):
    """Both ends of a connection, as client and server of sls.test."""
    authority, ends = trustme.CA(), []
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("sls.test").configure_cert(server)
    authority.configure_trust(client)
    thread = threading.Thread(target=lambda: ends.append(server.wrap_socket(there, server_side=True)), daemon=True)
    thread.start()
    here = client.wrap_socket(here, server_hostname="sls.test")
    thread.join()
    return here, ends[0]
