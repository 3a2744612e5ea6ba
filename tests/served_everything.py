"""The app that each server of test_servers_matrix.py serves: every feature in one request, and what it answered."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

from flask import Flask

from govredis.contrib.flask import FlaskGovRedis

app = Flask("matrix")
ext = FlaskGovRedis(app)
COUNT = Path(os.environ["APP_COUNT"])


@app.get("/work/<int:n>")
def answered(n: int) -> dict[str, Any]:
    try:
        return work(n)
    except Exception:
        traceback.print_exc()  # the answer, a 503, names no call
        raise


def work(n: int) -> dict[str, Any]:
    gov = ext.gov
    binding = gov.sessions.get(f"s{n}")
    agent = gov.metadata.get_or_load(f"agent-{n}", gov.agents.get)
    limited = gov.limits.hit(f"agent-{n}", "1000000/hour")
    with gov.locks.acquire("count", timeout=60) as held:
        count = int(COUNT.read_text())
        time.sleep(0.001)  # others run meanwhile
        COUNT.write_text(str(count + 1))
    return {
        "agent": binding and binding.agent_id,
        "metadata": agent and agent["metadata"]["n"],
        "cached": gov.metadata.get(f"agent-{n}") is not None,
        "admitted": bool(limited),
        "degraded": [binding and binding.backend != "redis", limited.degraded, held.degraded],
        "postgres": gov.postgres.breaker.closed,
        "worker": os.getpid(),
    }
