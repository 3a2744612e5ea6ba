"""DashboardView: all that the page shows, without a word of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ..report import Status
from .charts import Band, Chart


@dataclass(frozen=True, slots=True)
class Span:
    """The time that the charts show, the time of a value in them, and from one look to the next, in seconds.

    `form`: of the times on their axis.
    """

    name: str
    seconds: int
    step: int
    every: int
    form: str


#: By the name in the URL. The first is shown where none is named.
SPANS: dict[str, Span] = {
    span.name: span
    for span in (
        Span("hour", 3600, 60, 5, "minute"),
        Span("day", 86_400, 900, 15, "minute"),
        Span("week", 604_800, 7200, 60, "day"),
    )
}


#: Seconds until a reader looks again where something is unknown.
_SOON = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, in words.

    Attributes:
        since: None: unknown.
        cover: what goes on meanwhile, and how.
        remedy: what to do; "" where `what` says it.
        page: of the documentation.
    """

    name: str
    status: Status
    what: str
    since: datetime | None
    cover: str
    remedy: str
    page: str


@dataclass(frozen=True, slots=True)
class CheckRow:
    """A check of the report, with its figures as texts."""

    name: str
    status: Status
    output: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LockRow:
    """A held lock. `since`: None: unknown, as of a holder from outside. `remaining`: seconds."""

    name: str
    kind: str
    owner: str
    since: datetime | None
    remaining: float | None


@dataclass(frozen=True, slots=True)
class DeniedRow:
    identity: str
    operation: str
    times: int


@dataclass(frozen=True, slots=True)
class OutageRow:
    """`ended`: None while it goes on. `served`: by fallbacks, calls of all processes. `slowest`: seconds."""

    server: str
    kind: str
    began: datetime
    ended: datetime | None
    noticed_by: str
    served: int
    slowest: float


#: Titles of the figures of a Cluster's primary.
NODE_FIGURES = "Answered in", "Keys", "Memory", "Clients", "Commands a second", "Replicas"


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A primary of a Cluster. `figures`: those of NODE_FIGURES; None: unknown."""

    address: str
    status: Status
    figures: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    at: datetime
    status: Status


@dataclass(frozen=True, slots=True)
class DashboardView:
    """
    Attributes:
        at: the time of the report.
        prefix: of the keys.
        since: since when the status is not "pass", as far as is known.
        began, ended: of the charts.
        unknown: what could not be asked, and why.
        locks, denied, outages, snapshots: None: unknown.
        nodes: of a Cluster.
        about_outages: about slow commands; or "".
        about_locks, about_snapshots: which are shown, where these are not all; or "".
    """

    at: datetime
    prefix: str
    span: Span
    status: Status
    headline: str
    since: datetime | None
    findings: tuple[Fault, ...]
    checks: tuple[CheckRow, ...]
    began: datetime
    ended: datetime
    bands: tuple[Band, ...]
    charts: tuple[Chart, ...]
    locks: tuple[LockRow, ...] | None
    denied: tuple[DeniedRow, ...] | None
    outages: tuple[OutageRow, ...] | None
    snapshots: tuple[SnapshotRow, ...] | None
    about_outages: str
    about_locks: str
    about_snapshots: str
    unknown: tuple[tuple[str, str], ...]
    nodes: tuple[NodeRow, ...] = ()

    @property
    def every(self) -> int:
        """Seconds until a reader looks again."""
        return min(self.span.every, _SOON) if self.unknown else self.span.every

    def times(self) -> list[datetime]:
        """The beginning of each step of the charts."""
        steps = round((self.ended - self.began).total_seconds() / self.span.step)
        return [self.began + (self.ended - self.began) * n / steps for n in range(steps)]
