"""The tables of the docs, each made of the report: a page can have no figure that the report does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import operations
from .samples import Figure

Report = dict[str, Any]
MILLION = 1_000_000


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(of: Figure) -> str:
    return f"{number(of['median'])} ({number(of['low'])} to {number(of['high'])})"


def conditions(report: Report) -> str:
    of, versions = report["conditions"], report["conditions"]["versions"]
    beside = ", ".join(f"{name} {versions[name]}" for name in versions if name not in ("govredis", "psycopg2-binary"))
    loads = [load for pair in report["load"].values() for load in pair]
    return (
        f"The report is of {of['date']}: {of['machine']}, Python {of['python']}, Redis {of['redis']}.\n"
        f"The load average was {min(loads):.0f} to {max(loads):.0f}, some 3 of it the bench's own. Versions: {beside}."
    )


def costs(report: Report) -> str:
    rows = []
    for operation, by in report["costs"].items():
        for who, of in by.items():
            shown = [spread(of[name]) for name in ("wall_us", "client_us", "server_us")]
            if who == operations.JSON:
                shown[2] = ""
            rows.append([operation if who == next(iter(by)) else "", who, *shown, number(of["commands_us"]["median"])])
    return table(["operation", "by", "µs in all", "CPU of the client", "CPU of Redis", "in commands"], rows)


def targets(report: Report) -> str:
    rows = []
    for of in report["targets"]:
        bound, found = float(of["asked"].split()[-1]), of["found"]
        clear = not found["low"] < bound < found["high"]
        held = ("yes" if of["held"] else "no") if clear else "unclear: the quartiles lie on both sides"
        rows.append([of["name"], of["asked"], spread(found), held])
    return table(["ratio", "asked", "found", "holds"], rows)


def _company(kind: str) -> Callable[[Report], str]:
    def rendered(report: Report) -> str:
        rows = []
        for operation, by_size in report["throughput"][kind].items():
            sizes = list(by_size)
            for who in by_size[sizes[0]]:
                shown = [spread(by_size[size][who]["per_second"]) for size in sizes]
                rows.append([operation if who == next(iter(by_size[sizes[0]])) else "", who, *shown])
        return table(["operation", "by", *(f"{kind}: {size}" for size in sizes)], rows)

    return rendered


def curve(report: Report) -> str:
    rows = []
    for who, by in report["curve"].items():
        for n, of in by.items():
            first = who if n == next(iter(by)) else ""
            used = f"{of['bytes']:,}" if "bytes" in of else ""
            rows.append([first, f"{int(n):,}", *(spread(of[name]) for name in ("client_us", "server_us")), used])
    return table(["a hit of", "N", "CPU of the client, µs", "CPU of Redis, µs", "bytes"], rows)


def many(report: Report) -> str:
    rows = []
    for operation, ways in report["many"].items():
        for way, of in ways.items():
            shown = [spread(of[name]) for name in ("wall_us", "client_us", "server_us")]
            rows.append([operation if way == next(iter(ways)) else "", way, *shown])
    return table(["operation", "", "µs in all, an id", "CPU of the client", "CPU of Redis"], rows)


def cluster(report: Report) -> str:
    rows = []
    for operation, by in report["cluster"].items():
        for who, of in by.items():
            shown = [spread(of["wall_us"]), spread(of["client_us"]), spread(of["to_one"]) if "to_one" in of else ""]
            rows.append([operation if who == next(iter(by)) else "", who, *shown])
    return table(["operation", "by", "µs in all", "CPU of the client", "to the node alone"], rows)


def in_process(report: Report) -> str:
    rows = [[who, *(spread(of) for of in by.values())] for who, by in report["in_process"].items()]
    return table(["by", "1 thread, µs", "8 threads, µs"], rows)


def hand_over(report: Report) -> str:
    places = report["hand_over"]
    whos = list(next(iter(places.values())))
    rows = [[where, *(spread(by[who]) for who in whos)] for where, by in places.items()]
    return table(["Redis", *(f"{who}, µs" for who in whos)], rows)


def imports(report: Report) -> str:
    return table(
        ["import", "ms of CPU"], [[who, spread(of)] for who, of in report["first_call"]["import_cpu_ms"].items()]
    )


def first_calls(report: Report) -> str:
    of = report["first_call"]["call_ms"]
    names = [name.removeprefix("first ") for name in of if name.startswith("first ")]
    rows = [[name, spread(of[f"first {name}"]), spread(of[f"second {name}"])] for name in names]
    return table(["call", "first, ms", "second, ms"], rows)


def cold(report: Report) -> str:
    of = report["cold"]
    return table(
        ["agents", "`get_many`, s", "`get_or_load` of each, s"],
        [[f"{of['agents']:,}", spread(of["at once"]), spread(of["one by one"])]],
    )


def limit_memory(report: Report) -> str:
    by_algorithm = report["memory"]["limits"]
    counts = list(next(iter(by_algorithm.values())))
    rows = [[f"`{name}`", *(f"{used[n]:,}" for n in counts)] for name, used in by_algorithm.items()]
    return table(["", *(f"N = {int(n):,}" for n in counts)], rows)


def outage(report: Report) -> str:
    rows = []
    for who, outages in report["outage"].items():
        for state, by in outages.items():
            for operation, of in by.items() if who == operations.OURS else (("GET", by),):
                later = spread(of["later_us"]) if "later_us" in of else "as the first"
                slowest = number(of["slowest_ms"]) if "slowest_ms" in of else ""
                rows.append([state, who, operation, number(of["first_ms"]), slowest, later])
    rows.sort(key=lambda row: row[0], reverse=True)
    return table(["Redis", "by", "operation", "first, ms", "slowest, ms", "later ones, µs"], rows)


# -- scaling -----------------------------------------------------------------------------------------------------------

#: Operation of the report, and the name that a planner has for it.
_PLANNED = {
    "limits.hit": "`hit`, many identities",
    "limits.hit, one busy identity": "`hit`, one busy identity",
    "limits.hit, a counter": "`hit`, a counter",
    "limits.hit, denied again": "`hit`, denied again within a second",
    "locks.acquire + release": "lock and release",
    "sessions.get": "`sessions.get`",
    "metadata.get": "`metadata.get`",
}


def core(report: Report) -> str:
    rows = []
    for operation, name in _PLANNED.items():
        of = report["costs"][operation][operations.OURS]["server_us"]
        own = report["costs"][operation][operations.OURS]["client_us"]
        rows.append([name, spread(of), _rate(of), spread(own), _rate(own)])
    head = ["", "µs of Redis", "a second, one Redis core", "µs of the client", "a second, one client core"]
    return table(head, rows)


def example(report: Report) -> str:
    """How many servers carry the hits of so many agents, at half of what a core does."""
    hits, rows = _two(10 * MILLION * 20 / 3600), []
    for operation in "limits.hit", "limits.hit, a counter":
        carried = _two(MILLION / report["costs"][operation][operations.OURS]["server_us"]["median"]) // 2
        servers = -(-hits // carried)
        sum_of = f"10,000,000 x 20 / 3,600 = {hits:,}"
        rows.append([_PLANNED[operation], sum_of, f"{carried:,}", f"{hits:,} / {carried:,}: {servers}"])
    return table(["", "hits a second", "half of what a core carries", "Redis servers"], rows)


def _rate(of: Figure) -> str:
    return "bounded by the client" if of["median"] < 1 else f"{_two(MILLION / of['median']):,}"


def _two(value: float) -> int:
    """To two digits: a plan needs no more."""
    return int(float(f"{value:.2g}"))


def agents(report: Report) -> str:
    rows = []
    for where, part in ("Redis", "keys"), ("PostgreSQL", "rows"):
        for kind, used in report["memory"][part].items():
            rows.append([f"{where}: {kind}", f"{used:,.0f}", f"{used / 100:.3g} GB"])
    return table(["", "bytes each", "10 million"], rows)


def workers(report: Report) -> str:
    idle, used = (report["memory"]["connection"][state] for state in ("idle", "just used"))
    rows = []
    for threads, name in (1, "1"), (8, "8"), (128, "128, the pool's bound"):
        number_of = 1000 * threads
        sums = [f"x {each:,} B = {_memory(number_of * each)}" for each in (idle, used)]
        rows.append([name, f"1,000 x {threads} = {number_of:,}", *sums])
    return table(["threads of a process", "connections", "of Redis's memory, idle", "all just used"], rows)


def _memory(used: float) -> str:
    return f"{used / 1e9:.1f} GB" if used > 1e9 else f"{used / 1e6:.0f} MB"


def messages(report: Report) -> str:
    rows = []
    for name, minute in report["background"]["commands_a_minute"].items():
        rows.append([name, f"{minute:g}", f"x 1,000 / 60 = {_two(minute * 1000 / 60):,}"])
    return table(["a process", "commands a minute", "1,000 such, a second"], rows)


TABLES: dict[str, Callable[[Report], str]] = {
    "conditions": conditions,
    "costs": costs,
    "targets": targets,
    "processes": _company("processes"),
    "threads": _company("threads"),
    "curve": curve,
    "many": many,
    "cluster": cluster,
    "in_process": in_process,
    "hand_over": hand_over,
    "imports": imports,
    "first_calls": first_calls,
    "cold": cold,
    "limit_memory": limit_memory,
    "outage": outage,
    "core": core,
    "example": example,
    "agents": agents,
    "workers": workers,
    "messages": messages,
}
