"""`govredis events`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from ..events import Event
from ._invocation import invoked_gov, until_interrupted
from ._output import json_option, print_json, say


@click.group()
def events() -> None:
    """Look at events."""


@events.command()
@click.argument("topic")
@click.option("--after", default="$", show_default=True, help="'0', a position, or a time in ISO 8601 with its zone.")
@click.option("--timeout", type=click.FloatRange(0), help="End after so many seconds without an event.")
@json_option
def tail(topic: str, after: str, timeout: float | None, as_json: bool) -> None:
    """Print the events of TOPIC and of those below it, as they come, until Ctrl-C.

    A line each: when it was published, its topic, the entity that it is about, and its payload. With --json a JSON
    object each.
    """
    with (
        invoked_gov() as gov,
        until_interrupted(),
        gov.events.listen(topic, after=_place(after), timeout=timeout) as listener,
    ):
        for event in listener:
            if as_json:
                print_json(event.as_dict(), line=True)
                continue
            if event.missed:
                say(f"({event.missed if event.missed > 0 else 'some'} before this one were trimmed)")
            _print(event)


@events.command()
@click.argument("topic")
@json_option
def dead(topic: str, as_json: bool) -> None:
    """Print the events of TOPIC that a group of consumers gave up.

    As `tail` prints events, with the group, and how often each was delivered to it.
    """
    with invoked_gov() as gov:
        found = gov.events.dead(topic)
    for one in found:
        if as_json:
            data: dict[str, Any] = {**one.event.as_dict(), "group": one.group, "deliveries": one.event.deliveries}
            print_json(data, line=True)
        else:
            _print(one.event, f"  {one.group}, {one.event.deliveries} times")
    if not found and not as_json:
        say("no event was given up")


def _place(after: str) -> str | datetime:
    try:
        return datetime.fromisoformat(after.replace("Z", "+00:00")) if "T" in after else after
    except ValueError:
        return after  # which is refused


def _print(event: Event, more: str = "") -> None:
    at = event.at.isoformat(sep=" ", timespec="milliseconds")
    say(f"{at}  {event.topic}  {event.entity or '-'}  {json.dumps(event.payload, ensure_ascii=False)}{more}")
