"""Updates: other data for a living session, by compare-and-set."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import BackendUnavailable
from .backends.chain import SessionBackends
from .binding import SessionBinding, encode_data, same_binding

#: How often `update` tries, and the seconds of its pauses: up to so many at first, and at most.
_TRIES = 100
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02


class Updates:
    """The work of `SessionCache.update`, by the names that sessions are kept under."""

    def __init__(self, backends: SessionBackends) -> None:
        self._backends = backends

    def update(self, name: str, data: Any) -> tuple[SessionBinding | None, SessionBinding | None]:
        """Returns the binding as found, and as changed: None for the latter where nothing was changed."""
        if not callable(data):
            encode_data(data)

        def changed(binding: SessionBinding) -> str | None:
            return encode_data(data(_copy(binding.data)) if callable(data) else data)

        first: SessionBinding | None = None
        found: SessionBinding | None = None
        for pause in _pauses():
            time.sleep(pause)
            found, updated = self._try(name, changed, first)
            if updated is not None:
                return found, updated
            if found is None or (first is not None and not same_binding(first, found)):
                break
            first = found
        return found, None

    def _try(
        self, name: str, changed: Callable[[SessionBinding], str | None], first: SessionBinding | None
    ) -> tuple[SessionBinding | None, SessionBinding | None]:
        """A single try: the binding as found, and as changed; the latter is None where another caller was faster.

        Args:
            first: the binding that the first try found: no other is changed.
        """
        primary, memory = self._backends.primary, self._backends.memory
        is_away = False
        if primary is not None and memory.bound_here(name) is None:
            ends = memory.ends
            try:
                base = primary.read_for_update(name)
                if base is None or memory.is_revoked(base.binding):
                    return None, None
                if first is not None and not same_binding(first, base.binding):
                    return base.binding, None
                memory.remember(base.binding, since=ends)
                updated = primary.compare_and_set(base, changed(base.binding))
            except BackendUnavailable as error:
                self._backends.without_primary("update", error, unless_unknown=name)
                is_away = True
            else:
                if updated is not None:
                    memory.remember(updated, since=ends)
                return base.binding, updated
        elif primary is not None:  # a pending write answers without the primary, too
            self._backends.count_degraded("update")
        known = memory.read_for_update(name)
        if known is None or (first is not None and not same_binding(first, known.binding)):
            return None if known is None else known.binding, None
        updated = memory.compare_and_set(known, changed(known.binding))
        if updated is not None and is_away:
            self._backends.tell_soon((name,))
        return known.binding, updated


def _pauses() -> Iterator[float]:
    """The seconds to wait before each try: nothing, then by chance, so that callers at one time come apart."""
    yield 0
    for n in range(_TRIES - 1):
        yield random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**n))


def _copy(data: Any) -> Any:
    text = encode_data(data)
    return None if text is None else json.loads(text)
