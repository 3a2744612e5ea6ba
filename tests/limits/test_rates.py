"""Rates: their forms, and the refusal of everything else."""

from __future__ import annotations

from typing import Any

import pytest

from govredis import Limit
from govredis.limits.rates import parse_rate


@pytest.mark.parametrize(
    ("rate", "limits"),
    [
        ("20/hour", [(20, 3600)]),
        ("20 per hour", [(20, 3600)]),
        ("100/15 minutes", [(100, 900)]),
        ("20/hour;3/second", [(20, 3600), (3, 1)]),
        (" 20 / hour ; 3 per 2 s ", [(20, 3600), (3, 2)]),
        ("1/0.5 seconds", [(1, 0.5)]),
        ("5/DAY", [(5, 86400)]),
        ("1000000/week", [(1_000_000, 604800)]),
        ("7/min", [(7, 60)]),
        (Limit(20, 3600), [(20, 3600)]),
        ([Limit(20, 3600), Limit(3, 1.5)], [(20, 3600), (3, 1.5)]),
        ((Limit(1, 0.001),), [(1, 0.001)]),
    ],
)
def test_good_rates(rate: Any, limits: list[tuple[int, float]]) -> None:
    assert parse_rate(rate) == tuple(Limit(*limit) for limit in limits)


@pytest.mark.parametrize(
    "rate",
    [
        "",
        " ",
        "0/hour",
        "20/fortnight",
        "20/hour;",
        ";20/hour",
        "-1/hour",
        "20/-1 hours",
        "20/0 hours",
        "20",
        "hour",
        "20/",
        "/hour",
        "2.5/hour",
        "20//hour",
        "20/hour 3/second",
        "1000001/hour",
        "1/400 days",
        "1/0.0001 s",
        "x/hour",
        "20/hour,3/second",
        "20 hour",
        "1e3/hour",
        "inf/hour",
        "20/nan s",
        "9" * 400 + "/hour",
        "1/" + "9" * 400 + " s",
        "1/0.0009 s",
        "20 per\n",
        None,
        20,
        20.0,
        b"20/hour",
        [],
        (),
        ["20/hour"],
        [Limit(1, 1), None],
        {"20/hour"},
    ],
)
def test_bad_rates_say_what_a_rate_may_be(rate: Any) -> None:
    with pytest.raises(ValueError, match="it must be") as refused:
        parse_rate(rate)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "3", None, 1_000_001])
def test_bad_counts(count: Any) -> None:
    with pytest.raises(ValueError, match=r"limit is .*it must be a whole number from 1 to 1000000"):
        Limit(count, 1)


@pytest.mark.parametrize("window", [0, -1, 0.0009, float("nan"), float("inf"), True, "1", None, 367 * 86400])
def test_bad_windows(window: Any) -> None:
    with pytest.raises(ValueError, match=r"window is .*it must be seconds, from 0.001 to 366 days"):
        Limit(1, window)


def test_a_limit_is_exact_to_the_microsecond_and_says_what_it_is() -> None:
    assert Limit(1, 0.1 + 0.2).window_us == 300_000
    assert Limit(1, 366 * 86400).window_us == 366 * 86400 * 1_000_000
    assert str(Limit(20, 3600)) == "20 per 3600 s"
    assert {Limit(20, 3600)} == {Limit(20, 3600.0)}


class TestCounters:
    def test_may_be_very_large(self) -> None:
        limit = Limit(10**12, 3600, algorithm="sliding_window_counter")
        assert parse_rate(limit) == parse_rate([limit]) == (limit,)
        assert limit.counted
        assert not Limit(5, 3600).counted
        assert Limit(5, 3600) != Limit(5, 3600, "sliding_window_counter")
        with pytest.raises(ValueError, match=r"limit is .* from 1 to 1000000000000 for a sliding_window_counter"):
            Limit(10**12 + 1, 3600, algorithm="sliding_window_counter")

    @pytest.mark.parametrize("algorithm", ["", "token_bucket", None, 5, ["sliding_window_log"]])
    def test_bad_algorithms(self, algorithm: Any) -> None:
        with pytest.raises(ValueError, match=r'algorithm is .*; it must be "sliding_window_log" or "sliding_window_c'):
            Limit(1, 1, algorithm=algorithm)

    def test_a_rate_of_both_algorithms_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"rate is .*it must be limits of one algorithm"):
            parse_rate([Limit(3, 1), Limit(10**9, 3600, algorithm="sliding_window_counter")])
