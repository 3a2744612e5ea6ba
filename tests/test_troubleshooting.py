"""docs/troubleshooting.md quotes the beginnings of our messages: each of them stands in the source, word by word."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from govredis import errors

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/troubleshooting.md").read_text()
#: The items of the page that begin with a message. A message that has backticks stands between two of them.
MESSAGES = [" ".join(found[2].split()) for found in re.finditer(r"^- (`+)(.+?)\1(?!`)", TEXT, re.MULTILINE | re.DOTALL)]

#: A message as the source has it: its texts, in order, with None for each value between them.
Template = tuple[str | None, ...]

#: A value, as the page writes it.
_VALUE = re.compile(r"<[a-z]+>")
#: A value, as `logging`, `str.format` and Lua's string.format have it.
_PLACE = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?[srdfgx]|\{\w*\}")
_LUA_TEXTS = re.compile(r"(?:'[^'\n]*'|[\w.]+)(?:\s*\.\.\s*(?:'[^'\n]*'|[\w.]+))*")
#: Messages within messages: `Redis at <host>` within `<server> is away: <why>` within `<lock>: <why>`.
_DEPTH = 3


def _files(pattern: str) -> Iterator[Path]:
    """The sources that a user's process runs."""
    for path in sorted((ROOT / "govredis").rglob(pattern)):
        if not {"demo", "testing"} & set(path.relative_to(ROOT).parts):
            yield path


def _with_places(text: str) -> Iterator[str | None]:
    end = 0
    for place in _PLACE.finditer(text):
        yield from (text[end : place.start()], None)
        end = place.end()
    yield text[end:]


def _template_of(node: ast.expr) -> Template:
    """The template of a string, or of an f-string; () for any other expression."""
    pieces: list[str | None] = []
    if isinstance(node, ast.JoinedStr):
        pieces = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        pieces = [*_with_places(node.value)]
    return tuple(piece for piece in pieces if piece != "")


def _templates_of_python(tree: ast.Module) -> Iterator[Template]:
    """All strings but docstrings. The parts of an f-string are no strings of their own."""
    no_messages = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    no_messages |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and id(node) not in no_messages:
            yield _template_of(node)


def _templates_of_lua(source: str) -> Iterator[Template]:
    source = re.sub(r"--.*", "", source)
    for chain in _LUA_TEXTS.findall(source):
        pieces: list[str | None] = []
        for part in re.split(r"\s*\.\.\s*(?=(?:[^']*'[^']*')*[^']*$)", chain):
            pieces += _with_places(part[1:-1]) if part.startswith("'") else [None]
        joined: list[str | None] = []
        for piece in pieces:
            if piece is not None and joined and joined[-1] is not None:
                joined[-1] += piece
            elif piece != "":
                joined.append(piece)
        yield tuple(joined)


def _says_nothing(template: Template) -> bool:
    """Is it made of values alone? With two next to each other, any two texts of the source would be one."""
    return None in template and (
        all(piece is None for piece in template) or (None, None) in itertools.pairwise(template)
    )


def _read_templates() -> tuple[dict[str, list[Template]], list[Template]]:
    """The templates that begin with a text, by its first letters, and those that begin with a value."""
    found: set[Template] = set()
    for path in _files("*.py"):
        found.update(_templates_of_python(ast.parse(path.read_text())))
    for path in _files("*.lua"):
        found.update(_templates_of_lua(path.read_text()))
    known = sorted((each for each in found if each and not _says_nothing(each)), key=repr)
    with_text: dict[str, list[Template]] = {}
    for each in known:
        if each[0] is not None:
            with_text.setdefault(each[0][:_LETTERS], []).append(each)
    return with_text, [each for each in known if each[0] is None]


#: So many letters find the templates that may fit.
_LETTERS = 6
WITH_TEXT, WITH_VALUE = _read_templates()


def _matches(template: Template, text: str, *, whole: bool, depth: int) -> bool:
    """Is `text` all of that message, or, unless `whole` is asked for, its beginning?"""
    if not text:
        return not whole or not template
    if not template:
        return False
    first, rest = template[0], template[1:]
    if first is not None:
        if text.startswith(first):
            return _matches(rest, text[len(first) :], whole=whole, depth=depth)
        return not whole and first.startswith(text)
    for end in _ends_of_value(text, rest[0] if rest else None):
        is_value = _is_value(text[:end], whole or end < len(text), depth)
        if is_value and _matches(rest, text[end:], whole=whole, depth=depth):
            return True
    return False


def _ends_of_value(text: str, after: str | None) -> Iterator[int]:
    """Where a value that begins `text` may end: before the text that comes after it, or a few letters of that."""
    at = 0 if after is None else text.find(after[:_LETTERS], 1)
    while after is not None and at > 0:
        if text.startswith(after, at) or after.startswith(text[at:]):
            yield at
        at = text.find(after[:_LETTERS], at + 1)
    yield len(text)


@functools.cache
def _is_value(text: str, whole: bool, depth: int) -> bool:
    return bool(_VALUE.fullmatch(text)) or (depth > 1 and _stands(text, whole=whole, depth=depth - 1))


def _stands(text: str, *, whole: bool, depth: int) -> bool:
    keys = {text[:length] for length in range(1, _LETTERS + 1)}
    if len(text) < _LETTERS and not whole:
        keys = {key for key in WITH_TEXT if key.startswith(text) or text.startswith(key)}
    # A value alone is found by its own template.
    with_value = [each for each in WITH_VALUE if (each[1] or "")[:_LETTERS] in text]
    found = [*with_value, *(each for key in keys for each in WITH_TEXT.get(key, []))]
    return any(_matches(template, text, whole=whole, depth=depth) for template in found)


def stands_in_the_source(message: str) -> bool:
    """Does a message of ours begin so?"""
    return _stands(message, whole=False, depth=_DEPTH)


def with_another_word(message: str) -> Iterator[str]:
    """The message, each time with another word misspelled: as after a renaming in the source."""
    for word in re.finditer(r"(?<![<\w])[A-Za-z]{2,}(?![\w>])", message):
        yield f"{message[: word.start()]}{word[0][:-1]}qz{message[word.end() :]}"


def test_the_page_has_many_messages() -> None:
    assert len(MESSAGES) > 100
    assert len(MESSAGES) == len(set(MESSAGES))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_begins_as_it_is_quoted(message: str) -> None:
    assert stands_in_the_source(message)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_was_renamed_is_not_found(message: str) -> None:
    renamed = [*with_another_word(message)]
    assert renamed
    assert [text for text in renamed if stands_in_the_source(text)] == []


def _log_lines() -> Iterator[Template]:
    """The templates of all warnings and errors that we log, and of Python's warnings."""
    for path in _files("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                level = node.func.attr
                if (of in {"log", "logger"} and level in {"warning", "error", "exception"}) or level == "warn":
                    yield _template_of(node.args[0])


def test_every_warning_that_we_log_is_on_the_page() -> None:
    lines = [line for line in _log_lines() if any(line)]
    assert len(lines) > 25
    assert [
        line for line in lines if not any(_matches(line, said, whole=False, depth=_DEPTH) for said in MESSAGES)
    ] == []


def test_every_public_error_is_on_the_page() -> None:
    assert [name for name in errors.__all__ if not re.search(rf"\b{name}\b", TEXT)] == []


def test_the_tests_would_notice() -> None:
    assert stands_in_the_source("Redis at <host> is away (<why>): fallbacks take over")
    assert not stands_in_the_source("Redis at <host> is gone (<why>): fallbacks take over")
    assert not stands_in_the_source("Redis at nowhere is away (<why>): fallbacks take over")
    assert not stands_in_the_source("Every exception govredis raises, in one tree")  # a docstring
