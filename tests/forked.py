"""Starts copies of the program by forking a process that has imported what it needs: hundreds of starts add up.

A copy is a process of its own all the same, with its environment, files, directory and signals; only that nobody waits
for the interpreter, and for the SDK to be imported. Those whose interpreter reads its environment are started in full.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from multiprocessing import forkserver
from pathlib import Path
from typing import Mapping, Optional, Sequence

import dispatch_data  # noqa: F401 - for all that this imports

PROGRAM = Path(__file__).resolve().parent.parent / "dispatch_data.py"
MAIN = '\nif __name__ == "__main__":\n'
READ_BY_THE_INTERPRETER = ("PYTHON", "PYPY", "LC_", "LANG", "LD_", "PROTOCOL_BUFFERS")

beginning, _, end = PROGRAM.read_text(encoding="utf-8").rpartition(MAIN)
# Compiled in the process that is forked, which imports this module first.
CODE = [compile(text, str(PROGRAM), "exec") for text in (beginning, MAIN + end)]

context = multiprocessing.get_context("forkserver")
# How PyPy collects garbage: as the program has it, which would start its interpreter anew for it.
GARBAGE = {"PYPY_GC_NURSERY": "16MB", "PYPY_GC_MAX_DELTA": "48MB"}


def start_server() -> None:
    """Starts the process that is forked, unless it runs."""
    context.set_forkserver_preload([__name__])
    changes = {
        "PYTHONPATH": os.pathsep.join(sys.path),  # older Pythons don't hand over sys.path in time
        **GARBAGE,
    }
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        forkserver.ensure_running()
    finally:
        for name in changes:
            del os.environ[name]
        os.environ.update({name: before[name] for name in changes if name in before})


def is_as_here(environment: Mapping[str, str]) -> bool:
    """Whether an interpreter that is started with this environment would be like the one that runs."""
    changed = dict(set(environment.items()) ^ set(os.environ.items()))
    return not any(name.startswith(READ_BY_THE_INTERPRETER) for name in changed)


def run(
    environment: Mapping[str, str],
    changes: str,
    command: Sequence[str],
    directory: str,
    stdout: str,
    stderr: str,
    ignored: Sequence[int],
) -> None:
    """In the new process: becomes a copy. `command` begins with the program's path; `changes` are lines of Python that
    come before its main part."""
    os.closerange(3, 1024)
    files = [os.open(os.devnull, os.O_RDONLY), os.open(stdout, os.O_WRONLY), os.open(stderr, os.O_WRONLY)]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update({**GARBAGE, **os.environ})
    time.tzset()
    os.chdir(directory)
    for number in (signal.SIGHUP, signal.SIGTERM, *ignored):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    program, *_ = sys.argv = list(command)
    sys.path[0] = os.path.dirname(program)
    main = types.ModuleType("__main__")
    main.__file__ = program
    sys.modules["__main__"] = main
    for code in (CODE[0], compile(changes, program, "exec"), CODE[1]):
        exec(code, vars(main))  # noqa: S102


class ForkedProcess:
    """A copy that was started so; as much of a subprocess.Popen as tests need."""

    def __init__(self, *arguments: object) -> None:
        """The arguments of `run`."""
        start_server()
        self.process = context.Process(target=run, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> Optional[int]:
        return self.process.exitcode

    @property
    def returncode(self) -> Optional[int]:
        return self.poll()

    def wait(self, timeout: Optional[float] = None) -> int:
        self.process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("dispatch_data.py", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
