"""The parity check: do the copies in Redis say what the rows say?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .binding import Record
from .copies import Copies
from .postgres_store import SessionRow, SessionRows

_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class SessionParity:
    """How rows and copies agree.

    Attributes:
        rows: of sessions that are bound, and of revoked ones that are still remembered.
        bound: those of them that are bound.
        copied: bound ones whose copy in Redis says the same.
        others: those for which there is a record in Redis that is no copy: somebody without rows has bound them.
        differing: those whose copy says something else than the row: the guard bounds for how long.

    A bound one without any record in Redis is no difference: it has not been asked for.
    """

    rows: int
    bound: int
    copied: int
    others: int
    differing: tuple[str, ...]


def compare(rows: SessionRows, copies: Copies) -> SessionParity:
    seen = bound = copied = others = 0
    differing: list[str] = []
    last: str | None = None
    while some := rows.after(last, _AT_ONCE):
        records = copies.sessions.read_many(list(some))
        doubtful = [sid for sid, row in some.items() if _differ(row, records.get(sid))]
        # One that was changed between the two reads is read once more: the copy first, which is never ahead.
        again = copies.sessions.read_many(doubtful)
        differing += _still(rows.get_many(doubtful), again) if doubtful else []
        seen += len(some)
        bound += sum(row.alive for row in some.values())
        for sid, row in some.items():
            record = records.get(sid)
            others += record is not None and record.stamp is None
            copied += record is not None and record.stamp is not None and not _differ(row, record)
        last = next(reversed(some))
    return SessionParity(seen, bound, copied, others, tuple(differing))


def _differ(row: SessionRow, record: Record | None) -> bool:
    if record is None or record.stamp is None:
        return False
    return not row.alive or record.stamp.version != row.version


def _still(rows: Mapping[str, SessionRow], records: Mapping[str, Record]) -> list[str]:
    return [sid for sid, row in rows.items() if _differ(row, records.get(sid))]
