"""The prose rule of CONTRIBUTING.md, held by a search for the turns that a native reader stumbles on."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob(".github/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
#: Rooms of govredis/, tasks/ and examples/, each with its docstrings, comments and the headers of its scripts.
ROOMS = [
    *sorted(path for path in (ROOT / "govredis").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()),
    ROOT / "tasks",
    ROOT / "examples",
]
#: The suite, each folder and file of it with its docstrings and comments: a string there is often a test's input.
SUITE = [
    path
    for path in sorted((ROOT / "tests").iterdir())
    if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))
]
LONGEST = 30

TURNS = {
    "shall": r"(?i)\bshall\b",
    "whoever": r"(?i)\bwho(so)?ever\b",
    "whom": r"(?i)\bwhom(ever)?\b",
    "that which": r"\bthat which\b",
    "is to be": r"\b(is|are|was|were) (still )?to be\b",
    "of which": r"\bof which\b",
    "a leading Of": r"^Of\b",
    "What, Who, One or None as the subject": r"^((What|Who)\b(?!.*\?$)|(One|None) (\w+s|has|was|were|had|can|may)\b)",
}

#: Finds that are right: a part of the sentence, and the reason.
ALLOWED = {
    '"whoever", "one", "none" or': "the rule itself, which quotes the turns",
    'No "shall", no': "the rule itself",
    "What it does.": "a docstring that a test of the Flask extension compares with a string",
}


def paragraphs_of(markdown: str) -> Iterator[str]:
    """Paragraphs, items and cells, without code blocks and the targets of links; a piece of code is one word."""
    text = re.sub(r"^---\n.*?^---\n|^```.*?^```$|^( {4}\S[^\n]*\n)+", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"``.+?``|`[^`]+`", "CODE", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("*", "")
    text = re.sub(r"^ *(- |\d+\. |#+ )", "\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        for part in re.split(r" ?\| ?|\n(?=\|)", paragraph):
            if part.strip(" -\n"):
                yield " ".join(part.split())


def sentences_of(markdown: str) -> Iterator[str]:
    for paragraph in paragraphs_of(markdown):
        yield from re.split(r"(?<=[.!?:])\)? +(?=\S)", paragraph)


def finds_in(markdown: str) -> Iterator[str]:
    for sentence in sentences_of(markdown):
        for turn, pattern in TURNS.items():
            if re.search(pattern, sentence) and not any(allowed in sentence for allowed in ALLOWED):
                yield f"{turn}: {sentence}"
        if len(sentence.split()) > LONGEST and not any(allowed in sentence for allowed in ALLOWED):
            yield f"{len(sentence.split())} words: {sentence}"


def docstrings_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def strings_of(tree: ast.Module) -> Iterator[str]:
    """Errors, log lines and help: strings of more than three words, a value in one being a word. SQL is none."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "CODE" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        if len(text.split()) > 3 and not re.match(r"\s*(SELECT|INSERT|UPDATE|CREATE|DELETE|WITH)\b", text):
            yield text


def comments_of(source: str) -> Iterator[str]:
    """Comments, each with those on the lines that follow it."""
    block, last = [""], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(type:|noqa|mypy)", token.string):
            if token.start[0] != last + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("#: "))
            last = token.start[0]
    yield " ".join(block)


def texts_of(room: Path) -> Iterator[tuple[Path, str]]:
    for path in [room] if room.is_file() else sorted(room.rglob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        strings = () if path.is_relative_to(ROOT / "tests") else strings_of(tree)
        for text in (*docstrings_of(tree), *strings, *comments_of(source)):
            yield path, text
    for path in sorted(room.rglob("*.lua")):
        text = re.sub(r"^(?!-- ).*$|^-- ", "", path.read_text(), flags=re.MULTILINE)
        yield path, re.sub(r"^ *(?=KEYS|ARGV|Reply)", "\n", text, flags=re.MULTILINE)  # a paragraph each


@pytest.mark.parametrize("room", [*ROOMS, *SUITE], ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_has_none_of_the_banned_turns(room: Path) -> None:
    found = [f"{path.relative_to(ROOT)}: {find}" for path, text in texts_of(room) for find in finds_in(text)]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_none_of_the_banned_turns(page: Path) -> None:
    assert list(finds_in(page.read_text())) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "A row shall be deleted.",
        "Whoever, or whomever, asks.",
        "It holds. Of two callers one waits.",
        "A page. What was lost is told.",
        "- one\n- a lock of which nobody knows",
        "| a | the row that is to be written |",
        f"It is {'very ' * 28}long.",
    ],
)
def test_the_search_finds(sentence: str) -> None:
    assert list(finds_in(sentence))


def test_the_search_leaves_out_code_and_short_sentences() -> None:
    assert not list(finds_in("```\nwhom\n```\nA `whom` is code. What is a lease?\n\n    shall\n"))


def test_no_allowed_find_is_stale() -> None:
    read = [*(page.read_text() for page in PAGES), *(text for room in [*ROOMS, *SUITE] for _, text in texts_of(room))]
    texts = [" ".join(sentences_of(text)) for text in read]
    assert [allowed for allowed in ALLOWED if not any(allowed in text for text in texts)] == []


def test_no_name_of_before_is_left() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| before |")[2]
    before = {
        name for row in re.findall(r"^\| ([^|]+)", table, re.MULTILINE) for name in re.findall(r"\b_?[A-Z]\w+", row)
    }
    assert {"Shelf", "Arbiter", "HostGuard", "Mirror"} <= before
    pattern = re.compile(rf"(?<!\w)({'|'.join(before)})(?!\w)")
    files = [path for room in ("govredis", "tasks", "tests", "examples") for path in (ROOT / room).rglob("*.py")]
    files.remove(Path(__file__))
    assert [
        (str(path.relative_to(ROOT)), found[0]) for path in files for found in pattern.finditer(path.read_text())
    ] == []
