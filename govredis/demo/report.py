"""The display for a person: a progress bar meanwhile, then one screen of tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .measure import Run, quantile
from .traffic import FALLBACK, LOCKS, OPERATIONS, OVER_HTTP, POSTGRES, REDIS, REFUSED


class Screen:
    """A progress bar on a terminal, plain lines where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        self.console: Console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 100
        columns = TextColumn("{task.description:<39}"), BarColumn(20), TextColumn("{task.fields[calls]:>7,} calls")
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        self._task = self._bar.add_task("", total=1.0, calls=0)

    def begins(self, what: str) -> None:
        if self.console.is_terminal:
            self._bar.update(self._task, description=what)
            self._bar.start()
        else:
            self.console.print(f"... {what}")

    def goes_on(self, done: float, calls: int) -> None:
        self._bar.update(self._task, completed=done, calls=calls)

    def ends(self) -> None:
        self._bar.stop()


def print_report(run: Run, console: Console) -> int:
    """Print it. Returns the exit code: 0 only if everything held."""
    seconds = run.phases[-1].ended - run.phases[0].began
    head = f"[bold]{len(run.calls):,} calls[/] in {seconds:.0f} s from {len(run.workers)} processes on {run.servers}"
    console.print(f"\n{head}\n")
    for table in (_latencies(run), _phases(run), _beside(run), _invariants(run), _notes(run)):
        console.print(table)
        console.print()
    broken = [f"{name}: {count}" for name, count in run.broken().items() if count]
    stalled = run.stalled()
    for line in [*run.errors.values(), *stalled]:
        console.print(line, style="red", markup=False)
    if broken or stalled:
        broken += ["work did not go on"] * bool(stalled)
        console.print(f"[bold red]It did not hold:[/] {'; '.join(broken)}")
        return 1
    console.print("[bold green]Everything held.[/]")
    return 0


def _table(title: str, columns: Iterable[str], caption: str = "") -> Table:
    table = Table(title=title, caption=caption, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.title_justify = table.caption_justify = "left"
    table.title_style, table.caption_style = "bold", "dim"
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left", header_style="dim", no_wrap=True)
    return table


def _counts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = _table(title, ("", ""))
    table.show_header = False
    table.columns[0].justify, table.columns[1].justify = "right", "left"
    table.columns[1].no_wrap = False
    for row in rows:
        table.add_row(*row)
    return table


def _latencies(run: Run) -> Table:
    caption = "Misses included. Fallbacks: locks by file, everything else in PostgreSQL."
    columns = ("", "on Redis", "on its fallback", "PostgreSQL alone")
    table = _table("Latency, median and 99th percentile", columns, caption)
    for operation in OPERATIONS:
        alone = () if operation in OVER_HTTP else (POSTGRES,)
        found = [run.latencies(operation, by) for by in (REDIS, FALLBACK, *alone)]
        table.add_row(operation, *(f"{_time(quantile(x, 0.5))} {_time(quantile(x, 0.99)):>8}" for x in found))
    return table


def _phases(run: Run) -> Table:
    caption = (
        "Locks wait 1 s before they go on without Redis, so that a stall splits nothing. Last column: from Redis's"
        " return until the last of the processes had used it."
    )
    columns = ("Redis was", "served", "slowest call", "slowest lock", "in use after")
    table = _table("With Redis taken away under load", columns, caption)
    for number, phase in enumerate(run.phases):
        calls = run.calls_in(number)
        slowest = [
            max((call.ended - call.began for call in calls if (call.operation in LOCKS) == locks), default=None)
            for locks in (False, True)
        ]
        table.add_row(
            f"{phase.name}, {phase.ended - phase.began:.1f} s",
            f"{sum(call.by != REFUSED for call in calls):,}",
            *map(_time, slowest),
            _time(max(run.in_use_after(number), default=None)) if number and not phase.outage else "",
        )
    return table


def _invariants(run: Run) -> Table:
    tally = run.tally
    details = {
        "limits exceeded": f"{len(run.admissions):,} of {tally['hits']:,} hits let through, per agent and store",
        "lock overlaps": f"{tally['increments']:,} times inside, looked at from inside",
        "increments lost": f"{tally['increments']:,} made under locks, and the files say {run.counter:,}",
        "stale reads after invalidation": f"{tally['reads']:,} values looked at",
        "sessions resolved wrongly": "another's agent, or none, though Redis lost its data",
        "limits of tasks exceeded": f"{len(run.discoveries):,} tasks run, per agent and store",
        "limits of requests exceeded": f"{len(run.admitted):,} let through, {tally['requests refused']:,} refused",
        "tasks lost": f"{run.published:,} published over HTTP",
        "tasks run twice": f"{len(run.discoveries):,} run",
        "invalidations lost": f"{len(run.updates):,} published after SQL of the site's own",
        "disagreements with the async service": "in what is counted above",
        "HTTP errors": f"{sum(call.operation in OVER_HTTP for call in run.calls):,} requests",
        "unexpected errors": f"in {len(run.calls):,} calls",
    }
    rows = [
        (f"[bold {'red' if count else 'green'}]{count:,}[/]", f"{name} [dim]({details[name]})[/]")
        for name, count in run.broken().items()
    ]
    return _counts("Must not happen", rows)


def _beside(run: Run) -> Table:
    tally = run.tally
    rows = {
        "sessions bound by it, and anew to others, resolved by govredis": tally["guests resolved"],
        "the same while Redis was away, or had lost them: from rows": tally["guests resolved without their Redis"],
        "sessions bound by govredis, resolved by it": tally["sessions resolved by them"],
        "records cached by govredis, read by it as its own class": tally["records read by them"],
        "limits filled by it, and refused by govredis": tally["refused by us, filled by them"],
        "limits filled by govredis, and refused by it": tally["refused by them, filled by us"],
        "times inside by it, under a lock of both": tally["increments of theirs"],
        "times inside by govredis, under that lock": tally["increments beside"],
        "calls of its own that failed while Redis was away: it has no fallback": tally["calls of theirs that failed"],
    }
    title = "Beside an async service on the same Redis, by redis-py's asyncio"
    return _counts(title, ((f"{count:,}", what) for what, count in rows.items()))


def _notes(run: Run) -> Table:
    tally, (reads, statements) = run.tally, run.statements()
    rows = {
        f"PostgreSQL statements saved: {reads:,} reads took {statements:,}, outages included": reads - statements,
        "health snapshots by beat, kept in PostgreSQL while Redis was away": run.snapshots,
        "reads older than an update made while Redis was away, before it was told": tally["invalidations owed"],
        "LockLost: locks gone with Redis's data, their holders told": tally["locks lost"],
    }
    known = {what: count for what, count in rows.items() if count is not None}
    return _counts("May happen, by promise", ((f"{count:,}", what) for what, count in known.items()))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 0.0009995:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:#.3g} ms".replace(". ", " ") if seconds < 0.9995 else f"{seconds:.2f} s"
