"""Every Lua script says what it takes and what it replies, and uses what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import govredis

SCRIPTS = sorted(Path(govredis.__file__).parent.rglob("*.lua"))
_NAMED = re.compile(r"\b(KEYS|ARGV)\[(\d+)\]")
#: Words between some commands' names and their keys.
_BEFORE_KEY = re.compile(r"(?<=', )'(?:STREAM|GROUPS|CONSUMERS|CREATE|DELCONSUMER|GROUP', [^K]*'STREAMS)', ")
_REST = re.compile(r"for \w+ = (?P<first>\d+), #(?P<kind>KEYS|ARGV)|unpack\((?P<of>KEYS|ARGV), (?P<from>\d+)\)")


def parts(source: str) -> tuple[str, str]:
    """The comment that a script begins with, and its code without comments."""
    lines = source.splitlines()
    end = next(n for n, line in enumerate(lines) if not line.startswith("--"))
    code = [line.split("--")[0] for line in lines[end:]]
    return "\n".join(lines[:end]), "\n".join(code)


def disagreements(source: str) -> set[tuple[str, int]]:
    """Keys and arguments in only one of header and body. `for i = n, #ARGV` and unpack(ARGV, n) use all from n on."""
    header, body = parts(source)
    documented = {(kind, int(n)) for kind, n in _NAMED.findall(header)}
    used = {(kind, int(n)) for kind, n in _NAMED.findall(body)}
    for rest in _REST.finditer(body):
        kind, first = rest["kind"] or rest["of"], int(rest["first"] or rest["from"])
        used |= {(k, n) for k, n in documented if k == kind and n >= first}
    return documented ^ used


def test_there_are_scripts_and_each_lies_in_its_features_folder_lua() -> None:
    assert len(SCRIPTS) >= 10
    assert {path.parent.name for path in SCRIPTS} == {"lua"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parents[1].name}/{p.name}")
class TestEachScript:
    def test_header_documents_what_the_body_uses_and_nothing_else(self, path: Path) -> None:
        assert disagreements(path.read_text()) == set()

    def test_header_says_what_the_reply_is(self, path: Path) -> None:
        header, _ = parts(path.read_text())
        assert re.search(r"^-- Reply: \S", header, re.MULTILINE)

    def test_takes_its_keys_from_KEYS_only(self, path: Path) -> None:
        """Cluster routes by KEYS: a key that a script makes up itself may live elsewhere."""
        body = _BEFORE_KEY.sub("", parts(path.read_text())[1])
        local_keys = set(re.findall(r"local ([\w, ]+) = KEYS", body))
        names = {name.strip() for group in local_keys for name in group.split(",")}
        first_arguments = re.findall(r"redis\.call\('(?!TIME')\w+',\s*([^,)]+)", body)
        # A name that adds a suffix to a key has the key's hash tag, and so lives where the key does.
        names |= set(re.findall(r"local (\w+) = KEYS\[\d\] \.\. ':' \.\. ", body))
        assert all(a.startswith("KEYS[") or a in names for a in first_arguments), first_arguments


def test_the_check_itself() -> None:
    good = "-- KEYS[1]  a\n-- ARGV[1]  b\n-- Reply: 1.\n\nreturn redis.call('SET', KEYS[1], ARGV[1])\n"
    assert disagreements(good) == set()
    assert disagreements(good.replace("ARGV[1])", "ARGV[2])")) == {("ARGV", 1), ("ARGV", 2)}
    assert disagreements(good.replace("-- ARGV[1]  b\n", "")) == {("ARGV", 1)}
    assert disagreements(good + "-- KEYS[2] in a comment of the body\n") == set()
