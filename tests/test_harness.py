"""How copies are patched: a test that patches what the program no longer has must say so, and start nothing."""

import functools
import subprocess
import sys

import pytest
from harness import PROGRAM, program_with

import dispatch_data

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", ["NO_SUCH_CONSTANT", "ShardConsumer.NO_SUCH_CONSTANT", "NoSuchClass.GRACE"])
def test_a_constant_that_is_gone_is_told(tmp_path, name):
    with pytest.raises(AssertionError, match="a test changes %s, which is not in the program" % name):
        program_with(tmp_path, constants={name: 1})


def patch_of_what_is_gone(program):
    program.Heartbeat.no_such_method = None


def patch_that_imports_nothing(program):
    program.log.log = lambda *_: sys.exit()


def test_a_patch_that_could_not_work_is_told(tmp_path):
    with pytest.raises(AssertionError, match=r"Heartbeat\.no_such_method"):
        program_with(tmp_path, patch_of_what_is_gone)
    with pytest.raises(AssertionError, match=r"patch_that_imports_nothing .* has to import {'sys'} itself"):
        program_with(tmp_path, patch_that_imports_nothing)
    with pytest.raises(SyntaxError):
        program_with(tmp_path, constants={"GRACE": object()})


def ending_at_once(program, *texts, end):
    def tell(*_):
        print(program.GRACE, *texts, end=end)  # GRACE is another by then
        return 7

    assert program.main
    program.main = tell


def test_constants_and_patches_are_those_of_a_copy(tmp_path):
    patches = [functools.partial(ending_at_once, "it's", end="!"), looking_on]
    program = program_with(tmp_path, patches, {"GRACE": 0.25})
    ended = subprocess.run([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stdout) == (7, "0.25 it's!")
    assert dispatch_data.GRACE != 0.25
    assert program_with(tmp_path) == PROGRAM


def looking_on(program):
    """Patches may be several."""
    assert program.GRACE == 0.25
