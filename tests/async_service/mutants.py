"""The library with a fault, which the mixed run must find.

Most are what it was before it agreed with the async service.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import pytest

from govredis.client import Script
from govredis.locks.holders import LockScan
from govredis.metadata.values import Codec
from govredis.sessions.backends.rows import SessionRow
from govredis.sessions.pending import Revocation


class Mutant(NamedTuple):
    machine: str
    durable: bool
    make: Callable[[pytest.MonkeyPatch], None]


MUTANTS: dict[str, Mutant] = {}


def faulty(
    machine: str, *, durable: bool = False
) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
    """A mutant that operations of this machine find.

    Args:
        durable: with PostgreSQL.
    """

    def add(make: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        MUTANTS[make.__name__] = Mutant(machine, durable, make)
        return make

    return add


def in_lua(patch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Change this text in all scripts that have it, wherever they are kept."""
    scripts = [thing for thing in gc.get_objects() if isinstance(thing, Script) and old in thing.source]
    assert scripts, f"no script has {old!r} any more"
    for script in scripts:
        source = script.source.replace(old, new)
        patch.setattr(script, "source", source)
        patch.setattr(script, "sha", hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@faulty("limits")
def limits_prune_by_their_own_windows_only(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "longest = math.max(longest, math.min(theirs, LONGEST_WINDOW))", "")


@faulty("limits")
def limits_shorten_ttls(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "kept_for(math.max(0, newest - now) + longest)", "kept_for(window)")
    in_lua(patch, "if kept_ms <= others_ms then", "if false then")


@faulty("locks")
def locks_are_restored_that_were_taken_by_force(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "if last == token and redis.call('PTTL', KEYS[2]) > tonumber(ARGV[4]) then return 0 end", "")


@faulty("locks")
def locks_are_taken_from_others_by_a_renewal(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "if holder and holder ~= ARGV[1] then return 0 end", "")


@faulty("locks")
def locks_of_theirs_are_not_listed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LockScan, "read", lambda *_: {})


@faulty("metadata")
def values_with_members_of_our_own(patch: pytest.MonkeyPatch) -> None:
    encode = Codec.encode
    patch.setattr(Codec, "encode", lambda self, value: encode(self, {**value, "epoch": 1}))


@faulty("metadata")
def values_of_theirs_are_never_used(patch: pytest.MonkeyPatch) -> None:
    read = Codec.read
    patch.setattr(Codec, "read", lambda self, raw, about, foreign: read(self, raw, about, False))


@faulty("metadata")
def values_that_may_be_older_than_an_invalidation_are_used(patch: pytest.MonkeyPatch) -> None:
    read = Codec.read
    patch.setattr(Codec, "read", lambda self, raw, about, foreign: read(self, raw, about, True))


@faulty("metadata", durable=True)
def values_are_used_that_no_relay_vouches_for(patch: pytest.MonkeyPatch) -> None:
    read = Codec.read
    patch.setattr(Codec, "read", lambda self, raw, about, foreign: read(self, raw, about, True))


@faulty("metadata")
def loads_overwrite_what_they_have_set_or_deleted(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "if stands ~= ARGV[6] then", "if false then")


@faulty("metadata", durable=True)
def relays_leave_what_they_have_set(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "keeps = type(value) == 'string' and redis.sha1hex(value) == digest", "")


@faulty("sessions", durable=True)
def relays_delete_what_they_have_bound(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "is_over = ARGV[3] ~= 'copy'", "")


@faulty("sessions")
def late_revocations_end_what_was_bound_since(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Revocation, "ends", lambda *_: True)


@faulty("sessions")
def revocations_of_an_agent_end_sessions_of_others(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "if agent and agent ~= ARGV[1] then return 0 end", "")


@faulty("sessions")
def binds_shorten_ttls(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "keeps = left == -1 or left > ttl", "")


@faulty("sessions", durable=True)
def rows_overwrite_what_they_have_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SessionRow, "is_older", lambda *_, **__: False)


@faulty("sessions", durable=True)
def binds_overwrite_what_they_have_bound_meanwhile(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "if ARGV[6] == 'bound' and not is_copy and not is_same then", "if false then")


@faulty("sessions", durable=True)
def binds_leave_it_to_the_clocks_what_they_have_bound_meanwhile(patch: pytest.MonkeyPatch) -> None:
    in_lua(patch, "redis.call('SET', KEYS[3], ARGV[4] .. ' ' .. ARGV[4], 'PX', ARGV[5])\n  return -1", "return -1")
