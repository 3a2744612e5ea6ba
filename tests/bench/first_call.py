"""The milliseconds that a new process pays once: the import, beside the peers', and the first call of each feature."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .operations import LIMITS, OURS, PACKAGES, PYRATE, THROTTLED, missing
from .samples import figure

IMPORTED = {OURS: "govredis", "redis-py": "redis", "flask": "flask"}

_TIMED = """
import json, sys, time
began = time.process_time()
import {module}
print(json.dumps({{"import": (time.process_time() - began) * 1000}}))
"""
_FIRST = """
import json, sys, time
from govredis import Config, GovRedis
url, folder = sys.argv[1:]
took = {}
def timed(name, call):
    began = time.perf_counter()
    call()
    took[name] = (time.perf_counter() - began) * 1000
gov = GovRedis(Config(redis_url=url, lock_folder=folder, socket_timeout=10, connect_timeout=10))
for again in ("first", "second"):
    timed(again + " limits.hit", lambda: gov.limits.hit("first", "1000000/hour"))
    timed(again + " locks.acquire + release", lambda: gov.locks.acquire("first").release())
    timed(again + " sessions.get", lambda: gov.sessions.get("first"))
    timed(again + " metadata.get", lambda: gov.metadata.get("first"))
print(json.dumps(took))
"""


def _run(code: str, *arguments: str) -> dict[str, float]:
    ran = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def measure(url: str, folder: str, rounds: int, alone: bool = False) -> dict[str, Any]:
    """`alone`: without the imports of peers."""
    peers = {name: PACKAGES[name] for name in (LIMITS, THROTTLED, PYRATE) if name not in missing()}
    imported = {OURS: "govredis"} if alone else {**IMPORTED, **peers}
    imports: dict[str, list[float]] = {}
    calls: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, module in imported.items():
            imports.setdefault(name, []).append(_run(_TIMED.format(module=module))["import"])
        for name, took in _run(_FIRST, url, folder).items():
            calls.setdefault(name, []).append(took)
    return {
        "import_cpu_ms": {name: figure(of) for name, of in imports.items()},
        "call_ms": {name: figure(of) for name, of in calls.items()},
    }
