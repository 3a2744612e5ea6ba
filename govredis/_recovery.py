"""Recovery: a server that was away is told its missed changes before anybody else in this process uses it again."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from ._fork import notice_fork
from ._uncopied import Uncopied
from .breaker import CircuitBreaker, Rejected
from .errors import BackendError, BackendUnavailable

log = logging.getLogger("govredis")

S = TypeVar("S", bound="Recoverable")


class Recoverable(Uncopied, ABC):
    """A server as this process sees it: the breaker before it, and the replays that bring it up to date.

    Attributes:
        name: the server, without password, for logs and errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.breaker: CircuitBreaker = self._make_breaker(name)
        #: In the order in which they run.
        self._replays: list[Callable[[Any], None]] = []
        self._renew_replays()

    def _make_breaker(self, name: str) -> CircuitBreaker:
        return CircuitBreaker(name, self._probe)

    def on_recovery(self: S, replay: Callable[[S], None]) -> None:
        """Have `replay(server)` called when the server is back, before anybody else in this process uses it again.

        If the server goes away meanwhile, or rejects our credentials, the breaker stays open, and `replay` is called
        again after the next probe. Any other error of `replay` is logged: one feature's mistake must not keep the
        server from all.
        """
        self._replays.append(replay)

    def replay_soon(self, why: str) -> None:
        """Something for a replay was noted: use the server no more until the replays have run."""
        notice_fork()
        self.breaker.trip(why)

    @abstractmethod
    def _probe(self) -> None:
        """Return when the server can be used again and has had its replays; raise otherwise."""

    def _puts_off(self, error: BackendError) -> bool:
        """May the server be used all the same, and the replay that has raised this come again later?"""
        return False

    def _renew_replays(self) -> None:
        """For a forked child: none runs there."""
        self._replaying = threading.RLock()
        self._of_replaying_thread = threading.local()

    @property
    def _is_replaying(self) -> bool:
        """Does this thread run the replays? They use the server while it is closed to others."""
        return getattr(self._of_replaying_thread, "replays", False)

    def _check(self) -> None:
        """Raise BackendUnavailable if the breaker is open, except in a replay."""
        if not self._is_replaying:
            self.breaker.check()

    def _replay(self) -> None:
        """Run all replays, in one thread at a time. Raises a replay's BackendUnavailable or Rejected."""
        with self._replaying:
            self._of_replaying_thread.replays = True
            try:
                for replay in list(self._replays):
                    try:
                        replay(self)
                    except (BackendUnavailable, Rejected) as error:
                        if not self._puts_off(error):
                            raise
                    except Exception:
                        log.exception("a replay on %s failed", self.name)
            finally:
                self._of_replaying_thread.replays = False
