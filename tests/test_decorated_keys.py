"""For every decorator: different arguments are never one limit, one lock or one cached answer."""

from __future__ import annotations

import contextlib
import importlib
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from govredis import GovRedis, LockTimeout, RateLimitExceeded, configure
from govredis.contrib.celery import exclusive, rate_limited
from govredis.contrib.flask import FlaskGovRedis

pytestmark = [pytest.mark.one_redis]

Call = Callable[[str, str], Any]


@pytest.fixture
def process_wide(gov: GovRedis) -> Iterator[GovRedis]:
    """As the tasks of Celery without an app of their own find it."""
    configure(gov)
    yield gov
    configure(None)


def limited(gov: GovRedis) -> Call:
    @gov.limits.rate_limited("1/hour", key="{user}:{doc}", operation="a")
    def call(user: str, doc: str) -> None: ...

    return call


def limited_task(gov: GovRedis) -> Call:
    @rate_limited("1/hour", key="{user}:{doc}", operation="b", on_limit="raise")
    def call(user: str, doc: str) -> None: ...

    return call


def limited_view(gov: GovRedis) -> Call:
    site = Flask("test")
    ext = FlaskGovRedis(site, gov)

    @site.get("/<user>/<doc>")
    @ext.rate_limited("1/hour", key="{user}:{doc}", operation="c")
    def view(user: str, doc: str) -> str:
        return "ok"

    def call(user: str, doc: str) -> None:
        answer = site.test_client().get(f"/{user}/{doc}")
        if answer.status_code == 429:
            raise RateLimitExceeded
        assert answer.status_code == 200

    return call


@pytest.mark.parametrize("decorate", [limited, limited_task, limited_view])
def test_a_users_limit_is_not_anothers(process_wide: GovRedis, decorate: Callable[[GovRedis], Call]) -> None:
    call = decorate(process_wide)
    call("u:1", "2")
    call("u", "1:2")
    for args in (("u:1", "2"), ("u", "1:2")):
        with pytest.raises(RateLimitExceeded):
            call(*args)


@pytest.mark.parametrize("of", ["locked", "exclusive"])
def test_a_users_lock_is_not_anothers(process_wide: GovRedis, of: str) -> None:
    within: list[tuple[str, str]] = []

    def enter(user: str, doc: str) -> None:
        within.append((user, doc))
        if within == [("u:1", "2")]:
            call("u", "1:2")
            with pytest.raises(LockTimeout):
                call("u:1", "2")

    call = (
        process_wide.locks.locked("{user}:{doc}", timeout=0)(enter)
        if of == "locked"
        else exclusive("{user}:{doc}", on_conflict="raise")(enter)
    )
    call("u:1", "2")
    assert within == [("u:1", "2"), ("u", "1:2")]


def test_a_users_answer_is_not_anothers(gov: GovRedis) -> None:
    calls: list[Any] = []

    @gov.cache("report").cached("{user}:{doc}")
    def report(user: Any, doc: Any) -> str:
        calls.append((user, doc))
        return repr((user, doc))

    number = uuid.UUID(int=5)
    different = [
        ("u:1", "2"), ("u", "1:2"), ("u", 1), ("u", "1"), ("u", True), ("u", 1.0), ("u", None), ("u", "None"), ("", ""),
        ("u", number), ("u", str(number)), ("u", b"1"), ("{", "\x00"), ("x" * 600, ""), ("x" * 601, ""),
    ]  # fmt: skip
    for _ in range(2):
        assert [report(*args) for args in different] == list(map(repr, different))
    assert calls == different
    for drop in (report.invalidate, report.refresh, report.uncached):
        calls.clear()
        drop("u", 1)
        assert [report(*args) for args in different] == list(map(repr, different))
        assert calls == [("u", 1)]


def test_a_key_of_one_field_is_that_of_a_direct_call_and_of_the_async_service(
    process_wide: GovRedis, plain_redis: Any
) -> None:
    number = uuid.UUID(int=7)

    @process_wide.limits.rate_limited("9/hour", key="{agent_id}", operation="op")
    @process_wide.locks.locked("agent:{agent_id}")
    def call(agent_id: Any) -> Any:
        return plain_redis.exists(f"lock:agent:{agent_id}")

    for agent_id in ("a:1%", 7, "7", number):
        assert call(agent_id) == 1
        assert plain_redis.exists(f"rate_limit:op:{agent_id}")
    assert process_wide.limits.get_count("7", window=3600, operation="op") == 2


def test_a_dict_of_one_field_is_a_key_in_any_order(process_wide: GovRedis) -> None:
    """A filter, as JSON has it, is limited and locked like any other argument."""

    def one(what: Any) -> int:
        return 1

    raises: Any = {"operation": "op", "on_limit": "raise"}
    for call, limited in (
        (process_wide.limits.rate_limited("1/hour", key="{what}", operation="plain")(one), True),
        (rate_limited("1/hour", key="{what}", **raises)(one), True),
        (process_wide.locks.locked("{what}", timeout=0)(one), False),
        (exclusive("{what}", on_conflict="raise")(one), False),
    ):
        assert [call({"a": 1, "b": [2, None]}), call({"a": "1", "b": [2, None]}), call([{"a": 1}])] == [1, 1, 1]
        if limited:
            with pytest.raises(RateLimitExceeded):
                call({"b": [2, None], "a": 1})
        for bad in ({"a": {1j}}, [{"a": Path("x")}]):
            with pytest.raises(ValueError, match=r"^what is, or holds, a"):
                call(bad)

    within: list[Any] = []

    @process_wide.locks.locked("{what}", timeout=0)
    def enter(what: Any) -> None:
        within.append(what)
        if len(within) == 1:
            enter({"a": 2, "b": 1})
            with pytest.raises(LockTimeout):
                enter({"b": 2, "a": 1})

    enter({"a": 1, "b": 2})
    assert within == [{"a": 1, "b": 2}, {"a": 2, "b": 1}]


def test_an_argument_without_a_text_of_its_own_is_refused_by_all(process_wide: GovRedis) -> None:
    def one(what: Any) -> int:
        return 1

    for call in (
        process_wide.limits.rate_limited("9/hour", key="{what}", operation="op")(one),
        process_wide.locks.locked("{what}")(one),
        rate_limited("9/hour", key="{what}", operation="op", on_limit="raise")(one),
        exclusive("{what}")(one),
        process_wide.cache("report").cached("{what}")(one),
    ):
        with pytest.raises(ValueError, match=r"what is <object object at 0x.*give it a __str__"):
            call(object())


class TestNamesakes:
    """Functions that share a namespace, and could share a key."""

    def decorate(self, gov: GovRedis, template: str, *, name: str, module: str = "here", **options: Any) -> Any:
        def function(a: Any, b: Any = 1) -> str:
            return f"{module}.{name}"

        function.__qualname__, function.__module__ = name, module
        return gov.cache("report", options.pop("ttl", 60)).cached(template, **options)(function)

    def test_are_refused(self, gov: GovRedis) -> None:
        self.decorate(gov, "{a}:{b}", name="one")
        for template in ("{a}:{b}", "{b}:{a}", "x:{a}"):
            with pytest.raises(
                ValueError,
                match=r"here\.two with the template .* have a key of here\.one with '\{a\}:\{b\}'; .* shared=True",
            ):
                self.decorate(gov, template, name="two")
        with pytest.raises(ValueError, match=r"there\.one"):
            self.decorate(gov, "{a}:{b}", name="one", module="there")
        with pytest.raises(ValueError, match=r"here\.two"):
            self.decorate(gov, "{a}:{b}", name="two", ttl=5)
        self.decorate(gov, "{a}", name="two")
        self.decorate(gov, "x:{a}:{b}", name="three")

    def test_a_refused_function_is_not_remembered(self, gov: GovRedis) -> None:
        self.decorate(gov, "x:{a}", name="one")
        with pytest.raises(ValueError, match=r"here\.two"):
            self.decorate(gov, "x:{a}", name="two")
        self.decorate(gov, "y:{a}", name="one")
        self.decorate(gov, "x:{a}", name="two")

    def test_share_where_both_say_so(self, gov: GovRedis) -> None:
        one = self.decorate(gov, "{a}", name="one", shared=True)
        two = self.decorate(gov, "{a}", name="two", shared=True)
        assert one("x") == two("x") == "here.one"
        with pytest.raises(ValueError, match=r"here\.three"):
            self.decorate(gov, "{a}", name="three")

    def test_functions_of_other_namespaces_and_of_another_govredis_are_no_namesakes(
        self, gov: GovRedis, make_gov: Callable[..., GovRedis]
    ) -> None:
        self.decorate(gov, "{a}", name="one")
        gov.cache("other").cached("{a}")(lambda a: a)
        self.decorate(make_gov(key_prefix="b:"), "{a}", name="two")

    def test_lambdas_are_told_apart(self, gov: GovRedis) -> None:
        cache = gov.cache("report")
        cache.cached("{a}")(lambda a: 1)
        with pytest.raises(ValueError, match="<lambda>"):
            cache.cached("{a}")(lambda a: 2)

    def test_a_module_that_is_loaded_again(
        self, gov: GovRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "reloaded.py").write_text(
            "from govredis import get_metadata_cache, api\n"
            "cache = api.get_gov().cache('report')\n"
            "@cache.cached('{a}')\n"
            "def report(a): return 1\n"
            "plain = cache.cached('l:{a}')(lambda a: 1)\n"
            "class Base:\n"
            "    @cache.cached('m:{self.n}')\n"
            "    def of(self): return self.n\n"
            "class Sub(Base): n = 5\n"
            "assert Sub().of() == 5\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        configure(gov)
        with contextlib.ExitStack() as stack:
            stack.callback(sys.modules.pop, "reloaded", None)
            module = importlib.import_module("reloaded")
            importlib.reload(module)
        with pytest.raises(ValueError, match=r"reloaded\.report"):
            self.decorate(gov, "{a}", name="one")

    def test_a_method_that_overrides_another_is_another(self, gov: GovRedis) -> None:
        cache = gov.cache("report")

        class Base:
            @cache.cached("{month}")
            def of(self, month: str) -> str:
                return "base"

        class Sub(Base): ...

        assert Sub().of("05") == "base"
        with pytest.raises(ValueError, match=r"Other\.of with the template '\{month\}' could have a key of .*Base\.of"):

            class Other(Base):
                @cache.cached("{month}")
                def of(self, month: str) -> str:
                    return "other"
