"""What changes around copies that run: the CAs they trust, the address of a name, files and directories they write."""

import contextlib
import functools
import os
import shutil
import subprocess

import pytest
import trustme
from assertions import assert_all_delivered_once
from conftest import create_logstores
from disruptions import break_connections
from harness import (
    LIMIT,
    PROJECT,
    SOURCE,
    Copies,
    SteadyFeed,
    feed,
    make_log_group,
    wait_until_begun,
    wait_until_delivered,
    wait_until_forgotten,
)
from local_log_service import LocalLogService
from relays import Relay

import dispatch_data

# ---- CAs


def beside(path, data):
    path.with_name("new").write_bytes(data)
    return path.with_name("new")


def appended(path, old, new):
    with path.open("ab") as file:
        file.write(new)


def renamed(path, old, new):
    beside(path, old + new).replace(path)


def led_elsewhere(path, old, new):
    """As Kubernetes does with what is mounted from a Secret: the file is a link through a link to a directory."""
    data = path.parent / "..data"
    for name, content in (("..1", old), ("..2", old + new)):
        directory = path.parent / name
        directory.mkdir(exist_ok=True)
        (directory / "cas").write_bytes(content)
    if not data.is_symlink():
        data.symlink_to("..1")
        path.unlink()
        path.symlink_to("..data/cas")
    else:
        path.parent.joinpath("..data_tmp").symlink_to("..2")
        path.parent.joinpath("..data_tmp").replace(data)


def unseen(path, old, new):
    """Nothing but the content changes: some file systems tell no times to the second."""
    before = path.stat()
    padded = new.ljust(before.st_size, b"\n")
    assert len(padded) == before.st_size
    with path.open("r+b") as file:
        file.write(padded)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def hashed(path, old, new):
    """A directory, in which OpenSSL finds a CA by the hash of its name."""
    if not path.is_dir():
        path.unlink()
        path.mkdir()
    for content in (old, new):
        file = path.parent / "one"
        file.write_bytes(content)
        named = subprocess.run(
            ["openssl", "x509", "-noout", "-subject_hash", "-in", str(file)], check=True, stdout=subprocess.PIPE
        )
        file.replace(path / (named.stdout.decode().strip() + ".0"))


@pytest.mark.quick
def test_a_directory_of_cas_is_read_before_connections_are_opened(tmp_path):
    """So that it shows at once whether there are any; what can't be read of it is passed over, as by OpenSSL."""
    if not shutil.which("openssl"):
        pytest.skip("openssl names the files of such a directory")
    path = tmp_path / "cas"
    path.write_bytes(b"")
    hashed(path, *(trustme.CA().cert_pem.bytes() for _ in range(2)))
    (path / "01234567.0").write_bytes(b"no certificate")
    (path / "89abcdef.0").symlink_to("nowhere")
    assert len(dispatch_data.load_cas(str(path)).get_ca_certs()) == 2


@contextlib.contextmanager
def copy_with_cas(tmp_path, prepare=None, **options):
    """(service, copy, the file of CAs): a copy that has delivered something over HTTPS."""
    with LocalLogService(https=True) as service, Copies(service, tmp_path) as copies:
        create_logstores(service)
        directory = tmp_path / "mounted"
        directory.mkdir()
        path = directory / "cas"
        path.write_bytes(service.authority(True) + b"\n" * 3000)
        if prepare:
            prepare(path, service.authority(True), service.authority(True))
        copy = copies.start(REQUESTS_CA_BUNDLE=str(path), **options)
        feed(service, 40)
        wait_until_delivered(service)
        yield service, copy, path
        wait_until_delivered(service)
        assert_all_delivered_once(service)
        assert copy.stop() == 0


@pytest.mark.parametrize(
    "change, prepare",
    [(appended, None), (renamed, None), (led_elsewhere, led_elsewhere), (unseen, None), (hashed, hashed)],
    ids=["appended", "renamed", "link", "unseen", "directory"],
)
@pytest.mark.parametrize("is_ahead", [True, False], ids=["ahead of the certificate", "after it"])
def test_cas_that_change_are_read_again(tmp_path, change, prepare, is_ahead):
    if prepare is hashed and not shutil.which("openssl"):
        pytest.skip("openssl names the files of such a directory")
    with copy_with_cas(tmp_path, prepare) as (service, copy, path):
        if is_ahead:
            change(path, service.authority(True), service.authority(False))
        service.present_certificate(trusted=False)
        break_connections(service)
        if not is_ahead:
            service.wait_for(lambda: "CertificateNotTrusted" in copy.stderr(), LIMIT, "a word about it")
            change(path, service.authority(True), service.authority(False))
        feed(service, 40)


def test_cas_that_cannot_be_read_any_more_are_told_once_they_are_missed(tmp_path):
    """Until then those before do: the file may be about to be written."""
    with copy_with_cas(tmp_path, constants={"TrustedCAs.REREAD_INTERVAL": 0.1}) as (service, copy, path):
        path.write_bytes(b"")
        break_connections(service)
        feed(service, 40)
        wait_until_delivered(service)
        assert "CAsUnreadable" not in copy.stderr()
        service.present_certificate(trusted=False)
        break_connections(service)
        service.wait_for(lambda: "CAsUnreadable" in copy.stderr(), LIMIT, "what is wrong")
        line = next(line for line in copy.stderr().splitlines() if "CAsUnreadable" in line)
        assert str(path) in line and "REQUESTS_CA_BUNDLE must name a file of CA certificates" in line
        assert "ENDPOINT" not in line
        wait_until_forgotten(service)
        path.write_bytes(service.authority(False))
        feed(service, 40)


def test_cas_that_are_gone_at_the_first_connection_are_told_by_name(tmp_path):
    with LocalLogService(https=True) as service, Copies(service, tmp_path) as copies:
        create_logstores(service)
        path = tmp_path / "cas"
        path.write_bytes(service.authority(True))
        copy = copies.start(REQUESTS_CA_BUNDLE=str(path), patch=functools.partial(without_the_file, str(path)))
        service.wait_for(lambda: "CAsUnreadable" in copy.stderr(), LIMIT, "what is wrong")
        assert "REQUESTS_CA_BUNDLE must name" in copy.stderr() and "SLS_ENDPOINT" not in copy.stderr()
        path.write_bytes(service.authority(True))
        feed(service, 40)
        wait_until_delivered(service)
        assert_all_delivered_once(service)


def without_the_file(program, path):
    """Once the settings have been checked."""
    import os

    run = program.run

    def without(*arguments):
        os.unlink(path)
        return run(*arguments)

    program.run = without


# ---- addresses


def names_by_file(program, path):
    """Every name is at 127.0.0.1, and at the port in that file."""
    import pathlib
    import socket

    def look_up(*_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(pathlib.Path(path).read_text())))]

    socket.getaddrinfo = look_up


def test_a_name_that_gets_another_address_is_followed_though_the_old_one_answers(service, copies, tmp_path):
    address = tmp_path / "address"
    with Relay(service) as old, Relay(service) as new:
        address.write_text(old.settings()["http_proxy"].rpartition(":")[2])
        copies.start(
            patch=functools.partial(names_by_file, str(address)),
            constants={"MAX_AGE": 2.0},
            http_proxy="http://proxy.test:1",
            HTTP_PROXY="http://proxy.test:1",
        )
        steady = SteadyFeed(service)
        steady.wait_for(lambda: old.puts_at_once > 0, "puts by way of the old address")
        beside(address, new.settings()["http_proxy"].rpartition(":")[2].encode()).replace(address)
        steady.wait_for(lambda: not old.connections() and new.puts_at_once > 0, "nothing on the old address")
        wait_until_delivered(service)
        assert_all_delivered_once(service)


# ---- what is written to


@pytest.mark.parametrize("way", [lambda path: path.rename(path.with_suffix(".1")), os.unlink], ids=["moved", "deleted"])
def test_a_log_file_that_was_taken_away_is_begun_anew(service, copies, way):
    """As logrotate does it, or somebody who wants room."""
    copy = copies.start(constants={"SUMMARY_INTERVAL": 0.2}, SLS_HEARTBEAT_INTERVAL="20")
    wait_until_begun(service)
    (path,) = copy.directory.glob("dispatch_data_*.log")
    service.wait_for(lambda: "summary source=" in path.read_text(), LIMIT, "lines")
    way(path)
    service.wait_for(lambda: path.exists() and "summary source=" in path.read_text(), LIMIT, "lines in another file")
    assert copy.stop() == 0
    assert copy.stderr() == ""


def test_a_directory_of_dead_letters_that_was_made_again_is_written_to(service, copies, tmp_path):
    directory = tmp_path / "rejected"
    directory.mkdir()
    refused = [make_log_group("click", Source=name) + b"\x28\x01" for name in "ab"]
    copy = copies.start(SLS_REJECTED_DIR=str(directory))
    for log_group in refused:
        service.put(PROJECT, SOURCE, [log_group])
        flow = SteadyFeed(service)
        flow.wait_for(
            lambda one=log_group: any(path.read_bytes() == one for path in directory.glob("*.loggroup")), "a file"
        )
        shutil.rmtree(directory)
        directory.mkdir()
    wait_until_delivered(service)
    assert copy.stop() == 0
