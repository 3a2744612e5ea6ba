"""The parity check: do the copies in Redis say what the rows say?"""

from __future__ import annotations

from collections.abc import Mapping

from ..binding import SessionRecord
from ..parity import SessionParity
from .row_cache import RowCache
from .rows import SessionRow, SessionRows

_AT_ONCE = 500


def compare(rows: SessionRows, cache: RowCache) -> SessionParity:
    seen = bound = copied = others = 0
    differing: list[str] = []
    last: str | None = None
    while some := rows.after(last, _AT_ONCE):
        records = cache.records.read_many(list(some))
        doubtful = [sid for sid, row in some.items() if _differ(row, records.get(sid))]
        # A session that was changed between the two reads is read once more: the copy first, which is never ahead.
        again = cache.records.read_many(doubtful)
        differing += _still(rows.get_many(doubtful), again) if doubtful else []
        seen += len(some)
        bound += sum(row.alive for row in some.values())
        for sid, row in some.items():
            record = records.get(sid)
            others += record is not None and record.stamp is None
            copied += record is not None and record.stamp is not None and not _differ(row, record)
        last = next(reversed(some))
    return SessionParity(seen, bound, copied, others, tuple(differing))


def _differ(row: SessionRow, record: SessionRecord | None) -> bool:
    if record is None or record.stamp is None:
        return False
    return not row.alive or record.stamp.version != row.version


def _still(rows: Mapping[str, SessionRow], records: Mapping[str, SessionRecord]) -> list[str]:
    return [sid for sid, row in rows.items() if _differ(row, records.get(sid))]
