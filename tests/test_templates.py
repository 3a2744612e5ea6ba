"""Key templates: refused at decoration or filled from the call."""

from __future__ import annotations

import collections
import datetime
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum, IntFlag
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from govredis._templates import KeyTemplate
from govredis.keys import check_id


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
        ("{agent_id}/{other}", positional, ("a1", 5), {}, "a1/int=5"),
        ("{user.id}", of_user, (User(7, []),), {}, "7"),
        ("{user.names[0]}", of_user, (User(7, ["ann"]),), {}, "ann"),
        ("{user.id:0{width}d}", of_user, (User(7, []), 3), {}, "007"),
        ("{agent_id!r}", plain, ("a1",), {}, "'a1'"),
        ("{agent_id}", Service.method, (Service(), "a1"), {}, "a1"),
        # One field: as direct calls have it, whatever is in it, and of whatever type.
        ("agent:{agent_id}", plain, ("a:1%=/é",), {}, "agent:a:1%=/é"),
        ("{agent_id}", plain, (5,), {}, "5"),
        ("100%{agent_id}", plain, ("",), {}, "100%"),
        # Several: a value does not hold what ends it.
        ("{kind}:{agent_id}", plain, ("a:1",), {}, "kg:a%3A1"),
        ("{kind}-{agent_id}", plain, ("a-1",), {}, "kg-:a-1"),
        ("{kind}{agent_id}!", plain, ("a",), {}, "kg:a!"),
        ("{kind}:{agent_id}", plain, ("{\x00 é}",), {}, "kg:%7B%00%20é%7D"),
        ("{kind}:{agent_id}", plain, ("",), {}, "kg:str="),
        ("{kind}%:{agent_id}", plain, ("a",), {}, "kg%25:a"),
        ("{kind}:{agent_id!r}", plain, ("a",), {}, "kg:%27a%27"),
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


def test_an_argument_of_none_identifies_nobody() -> None:
    def store(agent_id: str | None) -> None: ...

    with pytest.raises(ValueError, match="agent_id is None"):
        KeyTemplate("{agent_id}", store).fill((None,), {})


class Plan(Enum):
    FREE = 1


class StrPlan(str, Enum):
    FREE = "a"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Many(IntFlag):
    A = 1
    B = 2


class Text(str): ...


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


class Other(Named): ...


NUMBER = uuid.UUID(int=1)
#: Each another argument than all the others.
DIFFERENT = [
    1, "1", True, 1.0, Decimal(1), "True", "int=1", "int%3D1", b"1", b"\xff", "b'1'", None, "None", "", "str=",
    "NoneType=None", NUMBER, str(NUMBER), NUMBER.bytes, Plan.FREE, StrPlan.FREE, "a", "Plan.FREE", Named("a"),
    Other("a"), datetime.date(2026, 1, 2), "2026-01-02", [], [""], [None], ["a", "b"], ["a,b"], [["a"], "b"],
    ("a", "b"), {"a", "b"}, frozenset("ab"), {"a": "b"}, {"a": {"b": 1}}, {"a": [1]}, "{", "}", "%7B", "\x00",
    "\ud800", "x" * 600, "x" * 601,
]  # fmt: skip


def of_one(a: Any) -> None: ...


def of_two(a: Any, b: Any) -> None: ...


#: Arguments that are digests in a template with one field; each another than all the others.
DIGESTED = [
    {}, {1: 1}, {"1": 1}, {True: 1}, {None: 1}, {1.0: 1}, {"a": 1}, {"a": "1"}, {"a": True}, {"a": None}, {"a": 1.0},
    {"a": Decimal(1)}, {"a": b"1"}, {"a": "None"}, {"a": "int=1"}, {"a": [1]}, {"a": ["1"]}, {"a": (1,)}, {"a": {1}},
    {"a": frozenset([1])}, {"a": {"b": 1}}, {"a": {"b": "1"}}, {"a": {"b": True}}, {"a": {"b": None}}, {"a": {}},
    {"a": []}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": {"b": 1}, "c": 1}, {"a": {"b": 1, "c": 1}}, {"a,b": 1},
    {"a": "b,c:d"}, {"a": "b", "c": "d"}, {1}, {"1"}, {True, 2}, {1, 2}, frozenset([1, 2]), [{}], [{1}], [{"1"}],
    [{"a": 1}], ["{'a': 1}"], ({"a": 1},), [[{"a": 1}]], [{"a": 1}, {}], ["x" * 600], ["x" * 601], ("x" * 600,),
    ["x" * 599, "x"], list(range(200)), list(map(str, range(200))), [[*range(100)], [*range(100, 200)]], [NUMBER] * 20,
    [str(NUMBER)] * 20, {"a": Plan.FREE}, {"a": StrPlan.FREE}, {"a": Many.A}, {"a": Many.A | Many.B},
    {"a": Level.LOW}, {"a": Level.HIGH}, {"a": datetime.date(2026, 1, 2)}, {"a": datetime.datetime(2026, 1, 2)},
    {"a": "2026-01-02"}, {"a": datetime.time(1)}, {"a": datetime.timedelta(1)}, {"a": float("inf")},
]  # fmt: skip


@pytest.mark.parametrize("template", ["{a}", "word:{a}", "{a}:word", "{a[0]}"])
def test_a_list_or_dict_that_makes_no_id_is_a_digest_that_no_other_argument_gives(template: str) -> None:
    fill = KeyTemplate(template, of_one).fill
    plain = [1, "1", True, None, [], (), [1], ["1"], [None], "{'a': 1}", "x" * 400, ["x" * 400], [[1], 2], [1, [2]]]
    plain.remove(None)  # identifies nobody
    values = [[value] for value in (*DIGESTED, *plain)] if "[0]" in template else [*DIGESTED, *plain]
    digests = [fill((value,), {}) for value in values[: len(DIGESTED)]]
    assert all(re.fullmatch(r"(word:)?%sha256=[0-9a-f]{64}(:word)?", check_id(key)) for key in digests)
    others = {fill((value,), {}) for value in values[len(DIGESTED) :]}
    assert len({*digests, *others}) == len(digests) + len(others)
    digest = digests[1].removeprefix("word:").removesuffix(":word")
    forged = fill(([digest] if "[0]" in template else digest,), {})
    assert forged not in digests, "nobody can write another's digest"
    assert check_id(forged)


def test_digests_are_equal_in_all_processes_and_versions_of_python() -> None:
    fill = KeyTemplate("job:{a}", of_one).fill
    options = {
        "name": "x", "n": [1, "1", True, None, 1.5, -0.0], "by": {"b": {"a", "b", "c"}, "a": frozenset("de")},
        "raw": b"\xff", "price": Decimal("1.50"), "id": NUMBER, "at": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
        "zoned": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), "day": datetime.date(2026, 1, 2),
        "hour": datetime.time(3), "span": datetime.timedelta(1, 2, 3), "pair": ("é", "\ud800"), 7: {},
    }  # fmt: skip
    written = "job:%sha256=a0039c3188a74c94810170c67c077915254bfc336a570d82b6cb8a4e4b46b59c"
    assert fill((options,), {}) == written
    assert fill((dict(reversed(options.items())),), {}) == written, "the order of a dict's items makes no difference"
    level, many = IntEnum("Level", "LOW HIGH", module="shop"), IntFlag("Many", "A B", module="shop")
    sold = Enum("Plan", {"FREE": "a"}, module="shop", type=str)
    plans = {"level": level["LOW"], "many": many["A"] | many["B"], "plan": sold["FREE"]}
    assert fill((plans,), {}) == "job:%sha256=447d525f9b0f77da4cafd8534072fb8f96251bbfd41b99372f5db59df57a2ede"


def test_a_list_is_its_text_as_long_as_the_whole_key_is_an_id() -> None:
    for template in ("job:{a}", "{a}:job"):
        fill = KeyTemplate(template, of_one).fill
        assert fill((["x" * 504],), {}) == template.format(a=f"['{'x' * 504}']"), "512 bytes"
        assert fill((["x" * 505],), {}).strip("job:").startswith("%sha256=")
        assert fill((["é" * 253],), {}).strip("job:").startswith("%sha256="), "bytes count, not characters"


def test_a_number_without_a_text_is_refused_by_the_name_of_its_argument() -> None:
    if not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this version writes any number")
    with pytest.raises(ValueError, match=r"^a has no text that could be part of a key: Exceeds the limit"):
        KeyTemplate("{a}", of_one).fill(({"n": 10**5000},), {})


@pytest.mark.parametrize(
    ("template", "typed", "args", "key"),
    [
        ("{a}", False, (["a", "b"],), "['a', 'b']"),
        ("x:{a}", False, ([1, "1", None, True],), "x:[1, '1', None, True]"),
        ("{a}", False, ((),), "()"),
        ("{a}", False, ([datetime.date(2026, 1, 2)],), "[datetime.date(2026, 1, 2)]"),
        ("{a}", False, (("x" * 507,),), f"('{'x' * 507}',)"),
        ("{a!s:.2}", False, ([1, 2],), "[1"),
        ("{a}", True, (["a", 1],), "list=a%2Cint%3D1%2C"),
        ("{a}", True, ({"b": 1, "a": [None]},), "dict=a%3Alist%3DNoneType%253DNone%252C%2Cb%3Aint%3D1%2C"),
        ("{a}", True, (Plan.FREE,), f"{__name__}.Plan=Plan.FREE"),
        ("{a}:{b}", False, ({"b": 1}, ["x"]), "dict=b%3Aint%3D1%2C:list=x%2C"),
        (
            "{a}:{b}",
            False,
            (["x" * 600], 2),
            "%sha256=211d471f9fc48864486be1e1b45073b5b153c10758fb6a74273bbbfd69557ada",
        ),
    ],
)
def test_keys_are_those_of_older_versions(template: str, typed: bool, args: tuple[Any, ...], key: str) -> None:
    """Both versions of a rolling deploy count, lock and cache under one key."""
    assert KeyTemplate(template, of_two if len(args) == 2 else of_one, typed=typed).fill(args, {}) == key


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"a": User(1, [])}, "User"),
        ([{"a": Path("/x")}], "PosixPath"),
        ({Named("a"): 1}, "Named"),
        ({"a": collections.OrderedDict(b=1)}, "OrderedDict"),
        (collections.Counter(a=1), "Counter"),
        ({"a": Text("b")}, "Text"),
        ({"a": [complex(1)]}, "complex"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_digest_of_a_value_whose_text_may_change_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^a is, or holds, a {kind}; a list or dict in a key may hold what JSON has, and bytes, ",
    ):
        KeyTemplate("{a}", of_one).fill((value,), {})


@pytest.mark.parametrize("template", ["{a}", "word:{a}", "{a}word", "1{a}%"])
def test_typed_values_of_different_types_give_different_keys(template: str) -> None:
    keys = {KeyTemplate(template, of_one, typed=True).fill((value,), {}) for value in DIFFERENT}
    assert len(keys) == len(DIFFERENT)
    assert {check_id(key) for key in keys} == keys, "each can be an id"


def test_common_values_stay_readable() -> None:
    fill = KeyTemplate("{a}:{b}", of_two, typed=True).fill
    assert fill(("agent-1", "2026-11"), {}) == "agent-1:2026-11"
    assert fill(("ann@example.org", 5), {}) == "ann@example.org:int=5"
    assert fill((NUMBER, "Zoë"), {}) == f"uuid.UUID={NUMBER}:Zoë"


TEMPLATES = [
    "{a}:{b}",
    "{a}{b}",
    "{a}-{b}",
    "{a}x{b}",
    "{a}={b}",
    "{a}%{b}",
    "{a}%3A{b}",
    "a{a}:b{b}c",
    "{a}:{b}:{a}",
    "{a} 1{b}",
]
PIECES = st.text(
    st.sampled_from(["a", "x", "1", "3", "A", "-", ":", "=", "%", "{", "\x00", "é", ",", " ", "\ud800"]), max_size=6
)
SCALARS = (
    PIECES | st.text(max_size=700) | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.binary(max_size=5)
)
VALUES = st.recursive(
    SCALARS | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(PIECES, inner, max_size=2)
    ),
    max_leaves=4,
)


def meaning(value: Any) -> Any:
    """Equal for arguments that are equal and of one type, all the way down."""
    if isinstance(value, list | tuple):
        return type(value), tuple(map(meaning, value))
    if isinstance(value, dict):
        return dict, frozenset((key, meaning(item)) for key, item in value.items())
    return type(value), value


@given(template=st.sampled_from(TEMPLATES), one=st.tuples(VALUES, VALUES), other=st.tuples(VALUES, VALUES))
@example("{a}:{b}", ("u:1", "2"), ("u", "1:2"))
@example("{a}{b}", ("a", "bc"), ("ab", "c"))
@example("{a}%3A{b}", ("a", "b"), ("a%3A", "b"))
@example("{a}={b}", ("int", 1), (1, "int"))
@example("{a}:{b}", (0.0, "a"), (-0.0, "a"))
@pytest.mark.parametrize("typed", [False, True])
def test_keys_are_equal_where_the_arguments_are_and_only_there(
    typed: bool, template: str, one: Any, other: Any
) -> None:
    fill = KeyTemplate(template, of_two, typed=typed).fill
    same = meaning(one) == meaning(other)
    assert (fill(one, {}) == fill(other, {})) is same
    assert check_id(fill(one, {})) == fill(one, {})


@given(one=VALUES, other=VALUES)
@example({"a": 1, "b": [{"c": 1, "d": 2}]}, {"b": [{"d": 2, "c": 1}], "a": 1})
@example({"a": 1}, {"a": True})
@example({"a": {"b": (1, "1", None)}}, {"a": {"b": (1, 1, None)}})
@example(["\x00", -0.0, {}], ["\x00", 0.0, {}])
def test_digests_are_equal_where_the_arguments_are_and_only_there(one: Any, other: Any) -> None:
    fill = KeyTemplate("{a}", of_one).fill
    pair = [fill(([value, {}],), {}) for value in (one, other)]
    assert all(check_id(key).startswith("%sha256=") for key in pair)
    assert (pair[0] == pair[1]) is (meaning(one) == meaning(other))


@given(pairs=st.lists(st.tuples(PIECES, PIECES), unique=True, min_size=2, max_size=20))
@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_that_are_cut_otherwise_give_different_keys(template: str, pairs: list[tuple[str, str]]) -> None:
    fill = KeyTemplate(template, of_two).fill
    assert len({fill(pair, {}) for pair in pairs}) == len(pairs)


def test_keys_are_equal_in_all_processes() -> None:
    code = """
import json, uuid, decimal
from govredis._templates import KeyTemplate
fill = KeyTemplate("{a}:{b}", lambda a, b: None, typed=True).fill
print(json.dumps([fill(pair, {}) for pair in [
    (set("abcdefgh"), frozenset(map(str, range(9)))),
    ({"b": 1, "a": {2}}, uuid.UUID(int=5)),
    (decimal.Decimal("1.5"), "x" * 2000),
]]))
"""
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(seen) == 1
    assert all(json.loads(seen.pop()))
    fill = KeyTemplate("{a}", of_one, typed=True).fill
    assert fill(({"a": 1, "b": 2},), {}) == fill(({"b": 2, "a": 1},), {})


def test_a_long_key_is_a_hash_that_no_other_key_can_be() -> None:
    fill = KeyTemplate("{a}:{b}", of_two).fill
    longest = "x" * 510
    assert fill((longest, "y"), {}) == f"{longest}:y", "512 bytes"
    hashed = fill((longest, "yz"), {})
    assert hashed.startswith("%sha256=")
    assert len(hashed) == 8 + 64
    digest = hashed.removeprefix("%sha256=")
    others: list[tuple[str, Any]] = [
        ("{a}{b}", (hashed, "")),
        ("%sha256={a}{b}", (digest, "")),
        ("%sha256{a}={b}", ("", digest)),
        ("{a}={b}", ("%sha256", digest)),
        ("{a}{b}", ("", hashed)),
    ]
    for template, args in others:
        assert KeyTemplate(template, of_two).fill(args, {}) != hashed
    assert fill((longest, "é"), {}).startswith("%sha256="), "bytes count, not characters"


class Bare: ...


@dataclass
class Holder:
    what: Any


@pytest.mark.parametrize(
    "value",
    [object(), Bare(), Holder(Bare()), [Bare()], {"a": Bare()}, {Bare()}, (1, (Bare(),)), of_one, lambda: 1, iter([])],
    ids=lambda value: type(value).__name__,
)
def test_an_object_without_a_text_of_its_own_is_refused(value: Any) -> None:
    for template in (
        KeyTemplate("{a}", of_one),
        KeyTemplate("{a!r}", of_one),
        KeyTemplate("{a}", of_one, typed=True),
        KeyTemplate("x:{a}:{a}", of_one),
    ):
        with pytest.raises(
            ValueError, match=r"^a is .* at 0x.*, a text that differs .*; name an attribute .*, such as \{a.id\},"
        ):
            template.fill((value,), {})


def test_a_text_that_speaks_of_addresses_is_one() -> None:
    for typed in (False, True):
        assert KeyTemplate("{a}", of_one, typed=typed).fill((" at 0xff",), {})


def test_an_argument_nested_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deep"):
        KeyTemplate("{a}", of_one, typed=True).fill((endless,), {})


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("{a}", "{a}", True),
        ("{a}", "{b}", True),
        ("user:{a}", "team:{a}", False),
        ("user:{a}", "{b}:{a}", True),
        ("user:{a}", "user{a}", False),
        ("{a}:{b}", "{b}:{a}", True),
        ("{a}:{b}", "{a}:{b}:x", False),
        ("{a}:{b}", "{a}/{b}", False),
        ("{a}{b}", "{a}:{b}", True),
        ("u-{a}", "{a}", True),
        ("user:{a}:x", "user:{a}:y", False),
        ("{a}:x", "{a}:{b}", True),
    ],
)
def test_templates_that_could_give_one_key(one: str, other: str, meet: bool) -> None:
    mine, others = KeyTemplate(one, of_two, typed=True), KeyTemplate(other, of_two, typed=True)
    assert mine.may_meet(others) is others.may_meet(mine) is meet
    values = ["", "a", "x", "u", "user", "b", "-", 1, "u-x", "x:y", ":"]
    pairs = list(itertools.product(values, values))
    found = {mine.fill(pair, {}) for pair in pairs} & {others.fill(pair, {}) for pair in pairs}
    assert bool(found) is meet


class Array:
    """An array like numpy's: it says its shape, and its text leaves out the values in the middle."""

    def __init__(self, *values: int) -> None:
        self.values = values
        self.shape = (len(values),)

    def __array__(self) -> object:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"[{self.values[0]} ... {self.values[-1]}]"


class Scalar(Array):
    """Like numpy's, too: its shape is that of a single value, and it has a whole text."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.shape = ()


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a], lambda a: {"x": a}], ids=["itself", "list", "dict"])
@pytest.mark.parametrize(("template", "typed"), [("{agent_id}", True), ("{agent_id}:{kind}", False)])
def test_an_array_whose_text_leaves_some_out_is_refused(template: str, typed: bool, wrap: Callable[[Any], Any]) -> None:
    filling = KeyTemplate(template, plain, typed=typed)
    with pytest.raises(ValueError, match="agent_id is of Array, whose text leaves some of it out"):
        filling.fill((wrap(Array(1, 2, 3)),), {})
    assert filling.fill((wrap(Scalar(1)),), {}) != filling.fill((wrap(Scalar(2)),), {})


def test_an_array_is_no_identity_of_a_limit_either() -> None:
    with pytest.raises(ValueError, match="agent_id is of Array"):
        KeyTemplate("{agent_id}", plain).fill((Array(1, 2),), {})


def test_a_container_with_a_format_of_its_own_keeps_its_key() -> None:
    class Formatted(list[int]):
        def __format__(self, spec: str) -> str:
            return "its own"

    assert KeyTemplate("{a}", lambda a: None, shared=True).fill((Formatted([1]),), {}) == "its own"
