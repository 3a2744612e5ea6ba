"""Invalidator: the commands that invalidate what the outbox's entries name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..client import Command, Script
from ..keys import Keys

#: Makes the commands that invalidate a namespace's entries, pairs of (id, version).
Invalidations = Callable[[Sequence[tuple[str, int]]], Sequence[Command]]


class Values(Protocol):
    """How values of any namespace are invalidated, with or without a cache of it in this process."""

    #: Those among the commands.
    scripts: Sequence[Script]

    def invalidations(self, namespace: str, entries: Sequence[tuple[str, int]]) -> Sequence[Command]: ...


class Invalidator:
    """How the entries of each namespace are invalidated.

    Args:
        values: invalidates entries of a namespace without a `register` of its own.
    """

    def __init__(self, keys: Keys, values: Values) -> None:
        #: Those among the commands.
        self.scripts: list[Script] = [*values.scripts]
        self._keys = keys
        self._values = values
        self._registered: dict[str, Invalidations] = {}

    def register(self, namespace: str, invalidations: Invalidations, scripts: Sequence[Script]) -> None:
        self._registered[namespace] = invalidations
        self.scripts += scripts

    def commands(self, entries: Sequence[tuple[str, str | None, int]]) -> list[Command] | None:
        """The commands for entries (namespace, id, version); None where one is of a whole namespace."""
        by_namespace: dict[str, list[tuple[str, int]]] = {}
        for namespace, row, version in entries:
            if row is None:
                return None
            identity = self._keys.id_if_ours(row)
            if identity is not None:
                by_namespace.setdefault(namespace, []).append((identity, version))
        return [command for namespace, some in by_namespace.items() for command in self._of(namespace, some)]

    def _of(self, namespace: str, entries: Sequence[tuple[str, int]]) -> Sequence[Command]:
        registered = self._registered.get(namespace)
        return self._values.invalidations(namespace, entries) if registered is None else registered(entries)
