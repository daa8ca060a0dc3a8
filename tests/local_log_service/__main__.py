"""The command line: ``serve`` runs the service for other processes, ``demo`` shows a dispatcher at work."""

import argparse
import contextlib
import shlex
import signal
import sys
import threading
from typing import Dict, List, Optional

from . import LocalLogService
from .key_services import KeyServices

_PROJECT = "demo-project"
_SOURCE = "source"
_TARGETS = ("nginx", "sql-audit", "click")
_CONSUMER_GROUP = "dispatch-data"


def _exports(service: LocalLogService, key_services: Optional[KeyServices]) -> Dict[str, str]:
    """Return every environment variable that a dispatcher needs to work with the service."""
    access_key_id, secret = next(iter(service.access_keys.items()))
    variables = service.environment()
    variables.update(
        SLS_ENDPOINT=service.endpoint,
        SLS_AK_ID=access_key_id,
        SLS_AK_KEY=secret,
        SLS_PROJECT=_PROJECT,
        SLS_LOGSTORE=_SOURCE,
        SLS_CG=_CONSUMER_GROUP,
    )
    for number, target in enumerate(_TARGETS, 1):
        variables["SLS_LOGSTORE_TO{}".format(number)] = target
    if key_services is not None:
        del variables["SLS_AK_ID"], variables["SLS_AK_KEY"]
        variables["SLS_CREDENTIALS"] = "uri"
        # STS is reached through a proxy of its own, for which there is room while the service speaks HTTP.
        is_taken = bool(variables["https_proxy"])
        for name, value in key_services.environment().items():
            if name == "ALIBABA_CLOUD_CREDENTIALS_URI" or not is_taken:
                variables[name] = value
    return variables


def serve(arguments: argparse.Namespace) -> int:
    """Run a service with a source and target logstores until SIGINT or SIGTERM; return the exit status."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    service = LocalLogService(https=arguments.https, port=arguments.port)
    service.create_logstore(_PROJECT, _SOURCE, arguments.shards)
    for target in _TARGETS:
        service.create_logstore(_PROJECT, target)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(service)
        except OSError as error:
            print("cannot listen on port {}: {}".format(arguments.port, error.strerror), file=sys.stderr)
            return 1
        key_services = None
        if arguments.key_life is not None:
            key_services = stack.enter_context(KeyServices(service, arguments.key_life))
        for name, value in _exports(service, key_services).items():
            print("export {}={}".format(name, shlex.quote(value)))
        if key_services is not None:
            sources = "uri asks the agent" + ("" if arguments.https else ", oidc STS")
            print("# Keys live for {} s; SLS_CREDENTIALS={}.".format(arguments.key_life, sources))
        print("# The service runs until interrupted; run these lines in another shell.", flush=True)
        ended.wait()
    return 0


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(command_line: Optional[List[str]] = None) -> int:
    """Run a command line, by default that of the process; return the exit status."""
    if command_line is None:
        command_line = sys.argv[1:]
    parser = argparse.ArgumentParser(
        prog="python -m tests.local_log_service", description="A local, in-memory double of Simple Log Service (SLS)."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    serve_parser = commands.add_parser(
        "serve",
        help="run a service and print the environment variables with which to use it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serve_parser.add_argument("--port", type=port_number, default=0, help="port to listen on, 0 for a free one")
    serve_parser.add_argument("--https", action="store_true", help="speak HTTPS, behind a CONNECT proxy")
    serve_parser.add_argument("--shards", type=positive_number, default=4, help="shards of the source logstore")
    serve_parser.add_argument(
        "--key-life", type=positive_number, help="hand out keys that live so many seconds, as STS and local agents do"
    )
    serve_parser.set_defaults(run=serve)

    demo_parser = commands.add_parser("demo", help="show a dispatcher at work on a service of its own")
    if command_line[:1] == ["demo"]:
        from . import demo  # here, so that serving needs nothing of what the demonstration needs

        demo.add_arguments(demo_parser)
        demo_parser.set_defaults(run=demo.run)

    arguments = parser.parse_args(command_line)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
