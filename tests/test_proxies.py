"""Proxies and gateways that none of us wrote stand before the service: all that they say and do costs no log.

Skipped where they are not installed (Debian: squid tinyproxy privoxy apache2-bin nginx-light haproxy varnish).
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from assertions import assert_all_delivered_once, assert_nothing_lost, logs_arrived, logs_beyond_checkpoints
from conftest import create_logstores
from harness import LIMIT, PROJECT, SOURCE, Copies, SteadyFeed, feed, free_port, make_log_group, wait_until_delivered
from local_log_service import LocalLogService

SQUID = """
http_port 127.0.0.1:{port}
cache_peer 127.0.0.1 parent {service} 0 no-query no-digest default
never_direct allow all
http_access allow all
pid_filename {directory}/pid
cache_log {directory}/log
access_log none
coredump_dir {directory}
shutdown_lifetime 0 seconds
"""
TINYPROXY = """
Listen 127.0.0.1
Port {port}
Upstream http 127.0.0.1:{service}
MaxClients 100
Timeout 600
LogFile "{directory}/log"
PidFile "{directory}/pid"
"""
PRIVOXY = """
listen-address 127.0.0.1:{port}
forward / 127.0.0.1:{service}
keep-alive-timeout 5
connection-sharing 1
confdir {directory}
logdir {directory}
"""
MODULES = "/usr/lib/apache2/modules/mod_"
APACHE = f"""
ServerName localhost
Listen 127.0.0.1:{{port}}
PidFile {{directory}}/pid
ErrorLog {{directory}}/log
LoadModule mpm_event_module {MODULES}mpm_event.so
LoadModule authz_core_module {MODULES}authz_core.so
LoadModule proxy_module {MODULES}proxy.so
LoadModule proxy_http_module {MODULES}proxy_http.so
LoadModule proxy_connect_module {MODULES}proxy_connect.so
ProxyRequests On
ProxyRemote "*" "http://127.0.0.1:{{service}}"
"""
NGINX = """
daemon off;
pid {directory}/pid;
error_log {directory}/log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {directory}/1;
  proxy_temp_path {directory}/2;
  fastcgi_temp_path {directory}/3;
  uwsgi_temp_path {directory}/4;
  scgi_temp_path {directory}/5;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{service}; proxy_set_header Host $host; }}
  }}
}}
"""
# As an endpoint in TLS, which ends each connection after so many requests and notes which came over which.
NGINX_TLS = NGINX.replace("access_log off;", "log_format number $connection; access_log {directory}/requests number;")
NGINX_TLS = NGINX_TLS.replace(
    "listen 127.0.0.1:{port};",
    "listen 127.0.0.1:{port} ssl; keepalive_requests 50;\n"
    "    ssl_certificate {directory}/certificate; ssl_certificate_key {directory}/key; ssl_protocols TLSv1.2 TLSv1.3;",
)
HAPROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 50s
  timeout server 50s
frontend near
  bind 127.0.0.1:{port}
  default_backend far
backend far
  server service 127.0.0.1:{service}
"""
VARNISH = """
vcl 4.1;
backend default {{ .host = "127.0.0.1"; .port = "{service}"; }}
"""
CONFIGURATION = "{directory}/configuration"
# Command, configuration, and whether it passes on HTTPS as a proxy does.
PROXIES = {
    "squid": (["squid", "-N", "-f", CONFIGURATION], SQUID, True),
    "tinyproxy": (["tinyproxy", "-d", "-c", CONFIGURATION], TINYPROXY, True),
    "privoxy": (["privoxy", "--no-daemon", CONFIGURATION], PRIVOXY, True),
    "apache": (["apache2", "-X", "-f", CONFIGURATION], APACHE, True),
    "nginx": (["nginx", "-c", CONFIGURATION, "-p", "{directory}"], NGINX, False),
    "nginx-tls": (["nginx", "-c", CONFIGURATION, "-p", "{directory}"], NGINX_TLS, False),
    "haproxy": (["haproxy", "-db", "-f", CONFIGURATION], HAPROXY, False),
    "varnish": (
        ["varnishd", "-F", "-a", "127.0.0.1:{port}", "-f", CONFIGURATION, "-n", "{directory}/work"],
        VARNISH,
        False,
    ),
}


class Proxy:
    """One of them, as a process between the copies and the service. Use it as a context manager."""

    def __init__(self, name, service, directory):
        self.service = service
        command, configuration, _ = PROXIES[name]
        self.values = dict(directory=directory, port=free_port(), service=service.port)
        self.command = [word.format(**self.values) for word in command]
        os.chmod(directory, 0o777)  # noqa: S103 - some give up root
        Path(directory, "configuration").write_text(configuration.format(**self.values))
        self.output = Path(directory, "output")

    def settings(self, https):
        name = "https_proxy" if https else "http_proxy"
        return dict.fromkeys((name, name.upper()), "http://127.0.0.1:%d" % self.values["port"])

    def listens(self):
        assert self.process.poll() is None, self.output.read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.values["port"])) == 0

    def start(self):
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=output, start_new_session=True)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)  # with the processes that it has begun
        self.process.wait()

    def __enter__(self):
        self.start()
        self.service.wait_for(self.listens, LIMIT, "a proxy that listens")
        return self

    def __exit__(self, *_):
        self.kill()


def skip_without(name):
    if not shutil.which(PROXIES[name][0][0]):
        assert os.environ.get("FOREIGN_CLIENTS") != "required", "there is no %s" % name
        pytest.skip("there is no %s" % name)


# Of a call; or of a lease that was lost just before, on a machine that stood still.
WORD = re.compile(" failed and is |can't join the consumer group yet")


@contextmanager
def gone(_, service):
    service.stop()
    yield
    service.start()


@contextmanager
def hanging(_, service):
    with service.add_fault("*", hold=True):
        yield


@contextmanager
def killed(proxy, _):
    proxy.kill()
    yield
    proxy.start()


@pytest.mark.parametrize(
    ("name", "https"),
    [(name, https) for name in PROXIES for https in (False, True)[: 1 + PROXIES[name][2]] if name != "nginx-tls"],
    ids=lambda value: {False: "http", True: "https"}.get(value, value),
)
def test_whatever_stands_before_the_service_costs_no_log(tmp_path, name, https):
    """Also when it has nobody to ask, or goes away itself; then batches in flight may be repeated."""
    skip_without(name)
    with LocalLogService(https=https) as service, tempfile.TemporaryDirectory() as directory:
        create_logstores(service)
        with Proxy(name, service, directory) as proxy, Copies(service, tmp_path) as copies:
            tell_all = {"LogThrottle.FIRST": 0.0, "LogThrottle.LONGEST": 0.0}
            soon = {"RESPONSE_TIMEOUT": 5, "MAX_RESPONSE_TIMEOUT": 5}
            copy = copies.start(constants={**tell_all, **soon}, SLS_HEARTBEAT_INTERVAL="2", **proxy.settings(https))
            feed(service, 40)
            # Far more than any buffer on the way takes.
            service.put(PROJECT, SOURCE, [make_log_group("nginx", Source=secrets.token_hex(200000)) for _ in range(4)])
            wait_until_delivered(service)
            assert_all_delivered_once(service)
            steady, most_repeated = SteadyFeed(service), 0
            for trouble in (gone, hanging, killed):
                enough, seen = logs_arrived(service) + 100, len(copy.stderr())
                steady.wait_for(lambda enough=enough: logs_arrived(service) > enough, "logs that flow")
                most_repeated += sum(logs_beyond_checkpoints(service).values())
                with trouble(proxy, service):
                    steady.wait_for(lambda seen=seen: WORD.search(copy.stderr()[seen:]), "a word about it")
                wait_until_delivered(service)
                assert_nothing_lost(service, most_repeated)
            assert copy.stop() == 0


def every_name_is_local(program):
    import socket

    look_up = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *others, **named: look_up("127.0.0.1", *others, **named)


def test_tls_that_is_not_python_s_keeps_connections_and_ends_them_now_and_then(service, copies):
    """Under TLS 1.3 there is something to read on an idle connection that no answer brings: session tickets."""
    skip_without("nginx-tls")
    host = urlsplit(service.endpoint).hostname
    authority = trustme.CA()
    certificate = authority.issue_cert("*." + host)
    with tempfile.TemporaryDirectory() as directory:
        certificate.cert_chain_pems[0].write_to_path(directory + "/certificate")
        certificate.private_key_pem.write_to_path(directory + "/key")
        authority.cert_pem.write_to_path(directory + "/authority")
        with Proxy("nginx-tls", service, directory) as proxy:
            copy = copies.start(
                patch=every_name_is_local,
                SLS_ENDPOINT="https://%s:%d" % (host, proxy.values["port"]),
                REQUESTS_CA_BUNDLE=directory + "/authority",
                SLS_HEARTBEAT_INTERVAL="20",
                **dict.fromkeys(service.environment()),
            )
            for _ in range(10):
                feed(service, 40)
                wait_until_delivered(service)
            assert_all_delivered_once(service)
            assert copy.stop() == 0
            assert copy.stderr() == ""
            numbers = Path(directory, "requests").read_text().splitlines()
            assert len(numbers) > 4 * len(set(numbers)), "most requests come over connections that were used before"
