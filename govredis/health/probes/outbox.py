"""The outbox: how far Redis is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...client import Command
from .. import deadlines
from ..report import Check

if TYPE_CHECKING:
    from ...outbox import FreshnessLease


class OutboxProbe:
    """Its check "outbox" is there where cached values are used with PostgreSQL."""

    name = "outbox"
    commands: tuple[Command, ...] = ()

    def __init__(self, freshness: FreshnessLease) -> None:
        self._freshness = freshness

    def check(self, replies: Sequence[Any]) -> list[Check]:
        valid, lag, foreign = self._freshness.state(timeout=deadlines.POSTGRES)
        if foreign:
            output = (
                "the key of the freshness lease holds a value that govredis has not written: cached values are not used"
                " until the relay runs next"
            )
            return [Check("outbox", "warn", output, {"fresh": False})]
        if lag is None:
            return []
        data: dict[str, Any] = {"entries": lag.entries, "oldest": round(lag.oldest, 3), "fresh": valid}
        if lag.oldest <= self._freshness.staleness:
            return [Check("outbox", "pass", "", data)]
        output = (
            f"Redis has not been told of {lag.changes}, the oldest {lag.oldest:.0f} s ago, so cached values are not"
            " used until their next reader tells it, or govredis.drain_outbox, which beat runs"
        )
        return [Check("outbox", "warn", output, data)]
