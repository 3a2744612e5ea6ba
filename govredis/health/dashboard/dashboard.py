"""Dashboard: asks all servers for the page, within a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from ..._context import Context
from ..._daemon import start_daemon
from ..._fork import notice_fork, renew_in_child
from ..._secrets import Secrets
from ..._uncopied import Uncopied
from ...errors import BackendError, ConfigurationError
from .compose import began_of, compose
from .page import PageResource, asset, check, page_of
from .told import Told
from .view import SPANS, DashboardView, Span

if TYPE_CHECKING:
    from ...limits.denied_counts import Denied
    from ...locks import LockHolder
    from ..account import Account
    from ..monitor import HealthMonitor
    from ..report import HealthReport

#: Seconds that a reader waits. Whatever is not told by then is shown as unknown.
_DEADLINE = 2.0
#: Seconds for which a look serves all readers.
_CACHED_FOR = 1.0
#: Seconds after which a look is given up: its thread is gone, or hangs.
_LOST_AFTER = 60.0
_DENIED = 10
_LATE = "no answer within the page's deadline"
#: For people: the parts of what is told, in the order in which they are asked for.
_NAMES = {
    "report": "Health",
    "outages": "Outages",
    "locks": "Held locks",
    "denied": "Most denied",
    "minutes": "Counts",
    "points": "History",
}


class Dashboard(Uncopied):
    """The page for people on call. Readers share what was told in the last second.

    Each look runs in a thread of its own, so that a page takes no longer than its deadline of two seconds, however
    slow a server is. The next page shows what came later.

    Args:
        locks: says which locks are held; raises BackendError.
        denied: says who was denied most; raises BackendError.
        clock: seconds, monotonic.
        deadline: seconds.
    """

    def __init__(
        self,
        context: Context,
        health: HealthMonitor,
        account: Account,
        *,
        locks: Callable[[], list[LockHolder]],
        denied: Callable[[int], list[Denied]],
        clock: Callable[[], float] = time.monotonic,
        deadline: float = _DEADLINE,
    ) -> None:
        self._config = context.config
        self._health = health
        self._account = account
        self._locks = locks
        self._denied = denied
        self._clock = clock
        self._deadline = deadline
        self._hide = Secrets.of(context.config).hide_in
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()
        self._looks: dict[str, _Look] = {}
        #: By span: what the charts show, and when it is asked for anew.
        self._past: dict[str, Told] = {}
        self._again: dict[str, float] = {}
        #: The spans whose points were read with both servers there.
        self._whole: set[str] = set()

    def page(self, span: str | None = None) -> PageResource:
        """The page of a time by its name; the first of SPANS for any other name.

        Raises ConfigurationError where Jinja2 is not installed.
        """
        return page_of(self.view(SPANS.get(span or "", next(iter(SPANS.values())))))

    def asset(self, name: str) -> PageResource | None:
        """The style, script or icon that the page names so; None for any other name."""
        return asset(name)

    def check(self) -> None:
        """Raises ConfigurationError where Jinja2 is not installed."""
        check()

    def view(self, span: Span) -> DashboardView:
        """Raises nothing because a server is away."""
        notice_fork()
        with self._lock:
            look = self._looks.get(span.name)
            if look is None or look.is_over():
                look = self._looks[span.name] = _Look(self, span, self._clock)
                look.start()
        look.done.wait(self._deadline)
        if look.error is not None:
            raise look.error
        return compose(self._config, span, datetime.now(timezone.utc), self._so_far(span, look))

    def _so_far(self, span: Span, look: _Look) -> Told:
        """The answers so far. The charts may be those of the look before."""
        told = replace(look.told, unknown=dict(look.told.unknown))
        if (past := self._past.get(span.name)) is not None:
            told.minutes, told.points = past.minutes, past.points
            told.unknown |= past.unknown
        for attribute, name in _NAMES.items():
            if getattr(told, attribute) is None and not look.done.is_set():
                told.unknown.setdefault(name, _LATE)
        return told

    # -- in the thread of a look ---------------------------------------------------------------------------------

    def _look(self, span: Span, told: Told) -> None:
        """Ask everything, the most important first."""
        now = datetime.now(timezone.utc)
        began, soon = began_of(span, now), now + timedelta(seconds=1)
        self._ask(told, "report", self._health.check)
        self._ask(told, "outages", lambda: self._account.outages(began, soon))
        self._ask(told, "locks", self._locks)
        self._ask(told, "denied", lambda: self._denied(_DENIED))
        if self._clock() >= self._again.get(span.name, 0.0):
            past = Told()
            self._ask(past, "minutes", lambda: self._account.minutes(began, soon))
            self._read_points(span, began, past, whole=_both_answer(told.report))
            self._past[span.name] = past
            self._again[span.name] = self._clock() + span.every - 1

    def _read_points(self, span: Span, began: datetime, past: Told, *, whole: bool) -> None:
        """Read the history anew. If all of it could be read before, only its last step can have changed.

        Args:
            whole: both servers answer. If not, what was seen before is kept: it may be on the one that is away.
        """
        before = self._past.get(span.name)
        seen = [point for point in (before and before.points) or () if point.at >= began]
        since, ended = began, began + timedelta(seconds=span.seconds)
        if seen and span.name in self._whole:
            since += timedelta(seconds=(seen[-1].at - began).total_seconds() // span.step * span.step)
        steps = round((ended - since).total_seconds() / span.step)
        self._ask(past, "points", lambda: self._health.history(since=since, until=ended, points=steps))
        if past.points is not None and whole:
            past.points = [point for point in seen if point.at < since] + past.points
            self._whole.add(span.name)
            return
        self._whole.discard(span.name)
        if seen:
            seen_until = seen[-1].at + timedelta(seconds=1)
            past.points = seen + [point for point in past.points or () if point.at > seen_until]

    def _ask(self, told: Told, attribute: str, ask: Callable[[], Any]) -> None:
        try:
            setattr(told, attribute, ask())
        except (BackendError, ConfigurationError) as error:
            told.unknown[_NAMES[attribute]] = self._hide(str(error))


def _both_answer(report: HealthReport | None) -> bool:
    return report is not None and all(check.status == "pass" for check in report.checks[:2])


class _Look:
    """One round of questions, for all who ask while it runs and for a second after it."""

    def __init__(self, dashboard: Dashboard, span: Span, clock: Callable[[], float]) -> None:
        self._dashboard, self._span, self._clock = dashboard, span, clock
        self.told = Told()
        self._began = clock()
        self._ended: float | None = None
        self.done = threading.Event()
        self.error: BaseException | None = None

    def start(self) -> None:
        if start_daemon("govredis-dashboard", self._run) is None:
            self._run()

    def _run(self) -> None:
        try:
            self._dashboard._look(self._span, self.told)
        except BaseException as error:  # noqa: BLE001 - for the readers
            self.error = error
        finally:
            self._ended = self._clock()
            self.done.set()

    def is_over(self) -> bool:
        if self._ended is not None:
            return self._clock() - self._ended >= _CACHED_FOR
        return self._clock() - self._began >= _LOST_AFTER
