"""psql, and two processes, as it were, by one clock."""

import pytest
from clocked_pair import clock, connect, make_pair, pair, sql

from govredis.metadata import entry_keys

__all__ = ["clock", "connect", "make_pair", "pair", "shipped_lease", "sql"]


@pytest.fixture(autouse=True)
def shipped_lease(monkeypatch: pytest.MonkeyPatch) -> str:
    """Leases stand for as long as they may: a machine that stalls in a load ends none. Returns the shipped LEASE_MS."""
    shipped = entry_keys.LEASE_MS
    monkeypatch.setattr(entry_keys, "LEASE_MS", entry_keys._LONGEST_LEASE_MS)
    return shipped
