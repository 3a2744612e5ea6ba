"""Events for browsers: a response that never ends, in the form that JavaScript's EventSource reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

from flask import Response, request

from ...api import GovRedis
from ...errors import BackendUnavailable, check_ttl
from ...events import Event, EventListener

#: Milliseconds after which a browser that was cut off connects again.
_RETRY_MS = 2000
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would keep events until it has a page of them
}


def event_stream(
    gov: GovRedis, topic: str, only: Callable[[Event], bool] | None = None, heartbeat: float = 15.0
) -> Response:
    """See `FlaskGovRedis.events`."""
    check_ttl(heartbeat, "heartbeat")
    listener = _listener(gov, topic, request.headers.get("Last-Event-ID"))
    response = Response(_lines(listener, only, heartbeat), headers=_HEADERS, content_type="text/event-stream")
    response.call_on_close(listener.close)
    return response


def _listener(gov: GovRedis, topic: str, last: str | None) -> EventListener:
    if last is not None and last not in ("$", "0"):
        try:
            return gov.events.listen(topic, after=last)
        except ValueError:
            pass  # it is a stranger's text; a bad topic is refused below
    try:
        return gov.events.listen(topic)
    except BackendUnavailable:
        # An EventSource gives up at a 503. So it hears of what is published once Redis is back.
        return gov.events.listen(topic, after=datetime.now(timezone.utc))


def _lines(listener: EventListener, only: Callable[[Event], bool] | None, heartbeat: float) -> Iterator[str]:
    yield f"retry: {_RETRY_MS}\n\n"
    said = time.monotonic()
    while True:
        event = listener.get(max(0.0, said + heartbeat - time.monotonic()))
        if event is not None and (only is None or only(event)):
            yield f"id: {event.position}\ndata: {json.dumps(event.as_dict())}\n\n"
        elif time.monotonic() >= said + heartbeat:
            # A browser takes note of the place, and calls nobody. Where it has gone, this write ends the iteration.
            yield f"id: {listener.position}\n\n"
        else:
            continue
        said = time.monotonic()
