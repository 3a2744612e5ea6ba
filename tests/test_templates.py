"""Key templates: refused at decoration or filled from the call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from govredis._templates import KeyTemplate


@dataclass
class User:
    id: int
    names: list[str]


def plain(agent_id: str, discovery: Any = None, *, kind: str = "kg") -> None: ...


def many(*args: str, agent_id: str = "nobody", **kwargs: str) -> None: ...


def positional(agent_id: str, /, other: int) -> None: ...


def of_user(user: User, width: int = 0) -> None: ...


def bare() -> None: ...


class Service:
    def method(self, agent_id: str) -> None: ...


@pytest.mark.parametrize(
    ("template", "function", "args", "kwargs", "filled"),
    [
        ("agent:{agent_id}", plain, ("a1",), {}, "agent:a1"),
        ("agent:{agent_id}", plain, (), {"agent_id": "a1"}, "agent:a1"),
        ("{kind}:{agent_id}", plain, ("a1",), {}, "kg:a1"),
        ("{kind}:{agent_id}", plain, ("a1",), {"kind": "x"}, "x:a1"),
        ("{agent_id}", many, ("x", "y"), {}, "nobody"),
        ("{agent_id}", many, ("x", "y"), {"agent_id": "a1", "more": "z"}, "a1"),
        ("{agent_id}/{other}", positional, ("a1", 5), {}, "a1/5"),
        ("{user.id}", of_user, (User(7, []),), {}, "7"),
        ("{user.names[0]}", of_user, (User(7, ["ann"]),), {}, "ann"),
        ("{user.id:0{width}d}", of_user, (User(7, []), 3), {}, "007"),
        ("{agent_id!r}", plain, ("a1",), {}, "'a1'"),
        ("{agent_id}", Service.method, (Service(), "a1"), {}, "a1"),
    ],
)
def test_fill(
    template: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], filled: str
) -> None:
    assert KeyTemplate(template, function).fill(args, kwargs) == filled


@pytest.mark.parametrize(
    ("template", "function", "message"),
    [
        (
            "{agent}",
            plain,
            "^key '{agent}' of plain names 'agent'; the function's arguments are agent_id, disc.*, kind$",
        ),
        ("{agent_id}:{agent}", plain, "names 'agent'"),
        ("{agent.id}", plain, "names 'agent.id'"),
        ("{agent[0]}", plain, r"names 'agent\[0\]'"),
        ("{agent_id:{width}}", plain, "names 'width'"),
        ("{args}", many, "names 'args'"),
        ("{kwargs}", many, "names 'kwargs'"),
        ("{}", plain, "names ''"),
        ("{0}", plain, "names '0'"),
        ("agent", plain, "^key 'agent' of plain names no argument; it must name at least one of agent_id"),
        ("", plain, "names no argument"),
        ("{{agent_id}}", plain, "names no argument"),
        ("agent", bare, r"names no argument; it must name at least one of \(none\)$"),
        ("{x}", bare, r"the function's arguments are \(none\)$"),
        ("{agent_id", plain, "^key '{agent_id': expected '}'"),
        ("agent_id}", plain, "^key 'agent_id}': Single '}'"),
        ("{agent_id}", functools.partial(bare), "names 'agent_id'"),
    ],
)
def test_refused_at_decoration(template: str, function: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyTemplate(template, function)


def test_a_call_that_does_not_fit_raises_as_the_call_would() -> None:
    template = KeyTemplate("{agent_id}", plain)
    for args, kwargs in [((), {}), (("a", "b", "c"), {}), (("a",), {"unknown": 1})]:
        with pytest.raises(TypeError):
            template.fill(args, kwargs)


def test_none_identifies_nobody() -> None:
    def store(agent_id: str | None) -> None: ...

    with pytest.raises(ValueError, match="agent_id is None"):
        KeyTemplate("{agent_id}", store).fill((None,), {})
