"""Visitors of the demo that is left running: a few calls of each feature, so that there is something to see."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

from ..api import GovRedis
from ..errors import GovRedisError
from ..limits import Limit
from .board import AGENTS

_PAUSE = 0.03
_SESSIONS = 300
_RATE = Limit(5, 10.0)


@contextlib.contextmanager
def visited(gov: GovRedis) -> Iterator[None]:
    """In the body visitors come."""
    gone = threading.Event()
    thread = threading.Thread(target=_visit, args=(gov, gone), name="govredis-demo-visitors", daemon=True)
    thread.start()
    try:
        yield
    finally:
        gone.set()
        thread.join(10)


def _visit(gov: GovRedis, gone: threading.Event) -> None:
    while not gone.is_set():
        # The dashboard shows it: a call that no server could serve, and a lock that was lost.
        with contextlib.suppress(GovRedisError), gov.locks.acquire("nightly-report", timeout=1) as held:
            while not gone.wait(_PAUSE):
                held.raise_if_lost()
                with contextlib.suppress(GovRedisError):
                    _call(gov)


def _call(gov: GovRedis) -> None:
    agent, session = f"agent-{int(random.triangular(0, AGENTS, 0))}", f"visitor-{random.randrange(_SESSIONS)}"
    if gov.sessions.get(session, touch=True) is None:
        gov.sessions.bind(session, agent)
    if gov.limits.hit(agent, _RATE, operation="visits"):
        gov.metadata.get_or_load(agent, gov.agents.get)
    with gov.locks.acquire(f"job-{random.randrange(3)}", timeout=1):
        pass
