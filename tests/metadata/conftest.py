"""psql, and two processes, as it were, by one clock."""

from clocked_pair import clock, connect, make_pair, pair, sql

__all__ = ["clock", "connect", "make_pair", "pair", "sql"]
