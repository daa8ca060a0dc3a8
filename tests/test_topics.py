"""Topics against patterns: as fnmatch has it, in steps that grow with the topic as its length does."""

import fnmatch
import re
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dispatch_data import TopicPattern

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it has moved to re._parser, which older versions don't have
    import sre_parse

pytestmark = pytest.mark.quick


class TooManySteps(Exception):
    pass


class Backtracking:
    """Matches as re does, and counts the steps: an item of the regular expression tried at a place of the text."""

    def __init__(self, regex, text, most_steps):
        self.tree, self.text, self.steps_left, self.groups = sre_parse.parse(regex), text, most_steps, {}

    def matches(self):
        return next(self.ends(list(self.tree), 0), None) is not None

    def ends(self, items, at):
        """Where these items may end that begin at `at`, in the order in which re tries them."""
        if not items:
            yield at
            return
        (kind, value), rest = items[0], items[1:]
        for end in self.ends_of_item(kind.name, value, at):
            yield from self.ends(rest, end)

    def ends_of_item(self, kind, value, at):  # noqa: C901 - one case for each kind of item
        self.steps_left -= 1
        if self.steps_left < 0:
            raise TooManySteps
        if kind in ("ANY", "LITERAL"):
            if at < len(self.text) and (kind == "ANY" or ord(self.text[at]) == value):
                yield at + 1
        elif kind == "AT":
            if at == len(self.text):
                yield at
        elif kind == "SUBPATTERN":
            for end in self.ends(list(value[3]), at):
                self.groups[value[0]] = self.text[at:end]
                yield end
        elif kind in ("ASSERT", "ATOMIC_GROUP"):  # entered once
            for end in self.ends(list(value[1] if kind == "ASSERT" else value), at):
                yield at if kind == "ASSERT" else end
                return
        elif kind == "GROUPREF":
            group = next(text for number, text in self.groups.items() if number == value)
            self.steps_left -= len(group)
            if self.text.startswith(group, at):
                yield at + len(group)
        else:
            yield from self.ends_of_repeat(kind, value, at)

    def ends_of_repeat(self, kind, value, at):
        assert kind in ("MIN_REPEAT", "MAX_REPEAT") and value[2][0][0].name == "ANY"
        ends = range(at, len(self.text) + 1)
        for end in ends if kind == "MIN_REPEAT" else reversed(ends):
            self.steps_left -= 1
            if self.steps_left < 0:
                raise TooManySteps
            yield end


def translate_of_python_38(spelling):
    """What fnmatch.translate gives there, where there are no brackets."""
    return r"(?s:%s)\Z" % "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in spelling)


HOSTILE = [
    ("*.*.*.*.log", "." * 4000),
    ("*.*.*.log", "a.log" * 800 + "."),
    ("*a*a*a*a*a*b", "a" * 4000),
    ("*ab?*ab?*ab?*c", "ab" * 2000),
    ("a*?*?*?*b", "a" * 4000),
    ("*aaaaaaaab*", "a" * 4000),
]


@pytest.mark.parametrize("translate", [fnmatch.translate, translate_of_python_38], ids=["this", "3.8"])
@pytest.mark.parametrize("spelling, topic", HOSTILE, ids=[spelling for spelling, _ in HOSTILE])
def test_no_topic_takes_more_than_linear_time(spelling, topic, translate, monkeypatch):
    monkeypatch.setattr(fnmatch, "translate", translate)
    pattern = TopicPattern(spelling).compile()
    most_steps = 4 * len(topic) * len(spelling)
    assert not Backtracking(pattern.pattern, topic, most_steps).matches()
    match = topic + spelling.replace("*", "").replace("?", "a")
    assert Backtracking(pattern.pattern, match, 2 * most_steps).matches() and pattern.match(match)


def test_the_counter_of_steps_finds_what_takes_forever():
    with pytest.raises(TooManySteps):
        Backtracking(translate_of_python_38("*.*.*.*.log"), "." * 4000, 1000000).matches()


@given(st.text("**?[]!-abc.\\^&\n", min_size=1, max_size=9), st.text("abc.*[]-!\n", max_size=8))
@example("[!]*]*", "a*")
@example("[]*", "[]x")
@example("a[*]*b", "a*xb")
def test_a_pattern_matches_what_fnmatch_has_it_match(spelling, topic):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            theirs = re.compile(fnmatch.translate(spelling))
        except re.error:
            with pytest.raises(re.error):
                TopicPattern(spelling).compile()
            return
        assert bool(TopicPattern(spelling).compile().match(topic)) == bool(theirs.match(topic))
