"""The `cached` decorator: calls are get_or_load, and what belongs to a call can be dropped, renewed or passed by."""

from __future__ import annotations

from typing import Any

import pytest

from govredis import GovRedis


def test_a_call_is_answered_from_the_cache(gov: GovRedis, plain_redis: Any) -> None:
    calls = []

    @gov.cache("report", ttl=60).cached("{agent_id}:{month}")
    def report(agent_id: str, month: str = "05", *, full: bool = False) -> dict[str, Any]:
        """The report."""
        calls.append((agent_id, month))
        return {"agent": agent_id, "n": len(calls)}

    assert report.__name__ == "report"
    assert report.__doc__ == "The report."
    assert report("a") == report("a", "05") == report(agent_id="a", month="05", full=True) == {"agent": "a", "n": 1}
    assert report("a", "06")["n"] == 2
    assert plain_redis.exists("report:a:05", "report:a:06") == 2
    assert calls == [("a", "05"), ("a", "06")]
    report.invalidate("a")
    assert report("a")["n"] == 3
    assert report("a", "06")["n"] == 2
    assert report.refresh("a")["n"] == 4
    assert report("a")["n"] == 4
    assert report.uncached("a")["n"] == 5
    assert report("a")["n"] == 4


def test_a_load_under_way_at_a_refresh_is_not_cached(gov: GovRedis) -> None:
    names = iter(["old", "new"])

    @gov.cache("report").cached("{agent_id}")
    def report(agent_id: str) -> str:
        name = next(names)
        if name == "old":
            assert report.refresh(agent_id) == "new"
        return name

    assert report("a") == "old"
    assert report("a") == "new"


def test_the_old_value_is_used_until_it_is_refreshed_and_where_that_fails(gov: GovRedis) -> None:
    cache = gov.cache("report")
    seen: list[Any] = []
    fails = False

    @cache.cached("{agent_id}")
    def report(agent_id: str) -> int:
        seen.append(cache.get(agent_id))
        if fails:
            raise KeyError(agent_id)
        return len(seen)

    assert report("a") == 1
    assert report.refresh("a") == 2
    fails = True
    with pytest.raises(KeyError):
        report.refresh("a")
    assert seen == [None, 1, 2]
    assert report("a") == 2


def test_methods(gov: GovRedis) -> None:
    class Reports:
        def __init__(self, team: str) -> None:
            self.team = team
            self.calls = 0

        @gov.cache("report").cached("{self.team}:{month}")
        def of(self, month: str) -> int:
            self.calls += 1
            return self.calls

        @staticmethod
        @gov.cache("report").cached("{month}")
        def all(month: str) -> str:
            return month

    one, two = Reports("a"), Reports("b")
    assert [one.of("05"), one.of("05"), two.of("05"), one.calls] == [1, 1, 1, 1]
    one.of.invalidate("05")
    assert [one.of("05"), two.of("05")] == [2, 1]
    assert one.of.refresh("05") == 3
    assert one.of.uncached("05") == 4
    assert Reports.of(one, "05") == 3
    assert one.all("x") == "x"


def test_templates_that_identify_nothing_are_refused_at_decoration(gov: GovRedis) -> None:
    def report(agent_id: str) -> int:
        return 1

    for template in ("{agent}", "all", "{agent_id", "{}", None, len):
        with pytest.raises(ValueError, match="key"):
            gov.cache("report").cached(template)(report)  # type: ignore[arg-type]

    async def later(agent_id: str) -> int:
        return 1

    with pytest.raises(ValueError, match="only begins"):
        gov.cache("report").cached("{agent_id}")(later)


def test_a_function_without_arguments_may_have_a_plain_key(gov: GovRedis, plain_redis: Any) -> None:
    calls: list[int] = []
    cache = gov.cache("exchange")

    @cache.cached("rates")
    def rates() -> int:
        calls.append(1)
        return len(calls)

    assert [rates(), rates()] == [1, 1]
    assert plain_redis.exists("exchange:rates")
    rates.invalidate()
    assert [rates(), rates.refresh(), rates(), rates.uncached()] == [2, 3, 3, 4]
    with pytest.raises(ValueError, match="could have a key of"):
        cache.cached("rates")(lambda: 2)
    with pytest.raises(ValueError, match="could have a key of"):
        cache.cached("{pair}")(lambda pair: 2)
    assert cache.cached("names")(lambda: "x")() == "x"


def test_a_plain_key_is_refused_where_calls_could_differ(gov: GovRedis) -> None:
    class Bank:
        def rates(self) -> None: ...

    for function in (Bank.rates, lambda day=None: 1, lambda *days: 1, lambda **more: 1):
        with pytest.raises(ValueError, match=r"key 'rates' of .* names no argument"):
            gov.cache("exchange").cached("rates")(function)


@pytest.mark.parametrize("key", ["", "a\nb", "{{}}"])
def test_a_plain_key_that_is_no_id_is_refused_at_decoration(gov: GovRedis, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        gov.cache("exchange").cached(key)(lambda: 1)


def test_calls_that_do_not_fit_or_have_no_key_are_refused(gov: GovRedis) -> None:
    @gov.cache("report").cached("{agent_id}")
    def report(agent_id: Any) -> int:
        raise AssertionError("called")

    for call in (report, report.invalidate, report.refresh):
        with pytest.raises(ValueError, match="agent_id is <object"):
            call(object())
        with pytest.raises(TypeError):
            call()  # type: ignore[call-arg]


def test_an_argument_may_be_none_or_hold_what_no_id_may(gov: GovRedis) -> None:
    @gov.cache("report").cached("{agent_id}")
    def report(agent_id: Any) -> str:
        return repr(agent_id)

    for _ in range(2):
        assert [report(value) for value in (None, "None", "{", "\0", "")] == ["None", "'None'", "'{'", "'\\x00'", "''"]


def test_a_result_of_none_is_cached_only_with_a_negative_ttl(gov: GovRedis) -> None:
    calls = []

    def report(agent_id: str) -> None:
        calls.append(agent_id)

    plain = gov.cache("report").cached("{agent_id}")(report)
    kept = gov.cache("report", negative_ttl=60).cached("{agent_id}")(report)
    assert [plain("a"), plain("a"), kept("b"), kept("b")] == [None] * 4  # type: ignore[func-returns-value]
    assert calls == ["a", "a", "b"]
