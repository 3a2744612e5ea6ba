"""`flask govredis routes`: the limits of an app's views."""

from __future__ import annotations

from typing import Any

import click
from flask import Flask
from flask.cli import with_appcontext

from ...limits.rates import parse_rate
from ._decoration import name_of
from ._state import app_state, current_app_itself
from ._view_limits import ShownLimit, agent_or_address


@click.command()
@with_appcontext
def routes() -> None:
    """List the app's routes, and the limits that hold for each.

    A row has the methods of a route that share their limits. A limit is shown as "rate of each key: operation".
    """
    rows = [("Methods", "Route", "Limits"), *_rows(current_app_itself())]
    wide = [max(len(row[n]) for row in rows) for n in range(2)]
    for row in rows:
        click.echo(f"{row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]}")


def _rows(app: Flask) -> list[tuple[str, str, str]]:
    rows = []
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        by_limits: dict[str, list[str]] = {}
        for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"}):
            limits = app_state().defaults.of(app, rule.endpoint, method)
            by_limits.setdefault("; ".join(map(_in_words, limits)) or "none", []).append(method)
        rows += [(",".join(methods), rule.rule, limits) for limits, methods in by_limits.items()]
    return rows


def _in_words(shown: ShownLimit) -> str:
    limit = shown.limit
    rate = _by(limit.rate) if callable(limit.rate) else " and ".join(map(str, parse_rate(limit.rate)))
    if limit.key is agent_or_address:
        key = "agent or address"
    else:
        key = _by(limit.key) if callable(limit.key) else limit.key
    return f"{rate} of each {key}: {shown.operation}"


def _by(function: Any) -> str:
    return f"{name_of(function)}()"
