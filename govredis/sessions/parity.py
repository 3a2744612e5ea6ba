"""SessionParity: how PostgreSQL's rows and their copies in Redis agree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionParity:
    """How rows and copies agree.

    Attributes:
        rows: rows of sessions that are bound, and of revoked sessions that are still remembered.
        bound: those of them that are bound.
        copied: bound sessions whose copy in Redis says the same.
        others: sessions whose value in Redis is no copy: a client without rows has bound them.
        differing: sessions whose copy says something else than the row. metadata_staleness bounds for how long.

    A bound session without any value in Redis is no difference: nobody has asked for it.
    """

    rows: int
    bound: int
    copied: int
    others: int
    differing: tuple[str, ...]
