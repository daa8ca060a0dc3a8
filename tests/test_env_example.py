""".env.example, as each of the programs reads it that people load such files with: all must read the same."""

import base64
import json
import os
import shlex
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from harness import LIMIT
from test_project import VARIABLES, example_in_full

import dispatch_data

pytestmark = pytest.mark.quick

SHELL_ENVIRONMENT = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}


def output_of(command, directory, **environment):
    ended = subprocess.run(
        command,
        cwd=str(directory),
        env={**SHELL_ENVIRONMENT, "HOME": str(directory), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def pairs(lines):
    return dict(line.split("=", 1) for line in lines if line.startswith("SLS_"))


def by_a_shell(script, shell="sh"):
    return lambda directory: pairs(output_of([shell, "-c", script + "; env"], directory).splitlines())


def by_dotenv(directory):
    return pytest.importorskip("dotenv").dotenv_values(str(directory / ".env"))


def by_node(directory):
    version = output_of(["node", "--version"], directory).strip().lstrip("v").split(".")
    if tuple(map(int, version[:2])) < (20, 6):
        pytest.skip("this Node.js is too old to have --env-file")
    return json.loads(output_of(["node", "--env-file=.env", "-p", "JSON.stringify(process.env)"], directory))


def by_direnv(directory):
    return json.loads(output_of(["direnv", "dotenv", "json", ".env"], directory))


def by_kubectl(directory):
    command = [
        "kubectl",
        "create",
        "secret",
        "generic",
        "name",
        "--from-env-file=.env",
        "--dry-run=client",
        "-o",
        "json",
    ]
    data = json.loads(output_of(command, directory, KUBECONFIG="/dev/null"))["data"]
    return {name: base64.b64decode(value or "").decode() for name, value in data.items()}


def by_docker(directory):
    """What its client asks of a daemon, which need not be there: the client reads the file."""
    bodies = []

    class Daemon(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.do_GET(201)

        def do_GET(self, status=200):
            body = b'{"Id": "x", "Warnings": []}'
            self.send_response(status)
            for name, value in {"Api-Version": "1.41", "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Daemon) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = "tcp://127.0.0.1:%d" % server.server_port
        output_of(["docker", "create", "--env-file", ".env", "image"], directory, DOCKER_HOST=host)
        server.shutdown()
    return pairs(bodies[0]["Env"])


SYSTEMD_READER = "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator"


def by_systemd(directory):
    """What reads EnvironmentFile= reads environment.d, too, and that without a systemd that runs."""
    folder = directory / "environment.d"
    folder.mkdir()
    shutil.copy(str(directory / ".env"), str(folder / "dispatch_data.conf"))
    lines = output_of([SYSTEMD_READER], directory, XDG_CONFIG_HOME=str(directory)).splitlines()
    return pairs(shlex.split(line)[0] for line in lines)


# Each with the program that it needs.
LOADERS = {
    "set -a": ("sh", by_a_shell("set -a; . ./.env; set +a")),
    "export xargs": ("sh", by_a_shell("export $(grep -v '^#' .env | xargs)")),
    "export xargs, bash": ("bash", by_a_shell("export $(grep -v '^#' .env | xargs)", "bash")),
    "export each line": ("bash", by_a_shell('while read -r line; do export "$line"; done < <(grep = .env)', "bash")),
    "python-dotenv": ("sh", by_dotenv),
    "node --env-file": ("node", by_node),
    "direnv": ("direnv", by_direnv),
    "docker --env-file": ("docker", by_docker),
    "kubectl --from-env-file": ("kubectl", by_kubectl),
    "systemd": (SYSTEMD_READER, by_systemd),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_example_is_read_alike_by(name, tmp_path):
    program, load = LOADERS[name]
    if not shutil.which(program):
        pytest.skip("there is no %s here" % program)
    text = example_in_full()
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    expected = pairs(text.splitlines())
    assert {variable.rstrip("0123456789") for variable in expected} >= set(VARIABLES)
    found = load(tmp_path)
    # One that is empty is none, to the program too.
    assert {variable: found.get(variable) or "" for variable in expected} == expected


def test_the_example_s_topics_are_those_that_it_means(tmp_path):
    environment = pairs(example_in_full().splitlines())
    environment.update(SLS_CREDENTIALS="", SLS_REJECTED_DIR=str(tmp_path), SLS_LOG_DIR="")
    settings = dispatch_data.read_settings(environment)
    assert settings.warnings == ()
    topics = [[topic.exact_topic for topic in target.topics] for target in settings.targets]
    assert topics == [["ngnix", "nginx"], ["sql_audit"], ["click"], [""], [None]]
