"""A process that publishes: for each line of its input one `store_discovery`, or as many at once as the line says.

Answers with a line of JSON: for each, the seconds it took and the error's type, or "".
"""

from __future__ import annotations

import json
import sys
import threading
import time

import tasks


def publish(answers: list[tuple[float, str]], number: int) -> None:
    began, error = time.monotonic(), ""
    try:
        tasks.store_discovery.delay("agent", number)
    except Exception as raised:  # noqa: BLE001 - which, is the question
        error = f"{type(raised).__module__}.{type(raised).__name__}"
    answers.append((time.monotonic() - began, error))


for line in sys.stdin:
    number, threads = map(int, line.split())
    answers: list[tuple[float, str]] = []
    publishing = [threading.Thread(target=publish, args=(answers, number)) for _ in range(threads)]
    for thread in publishing:
        thread.start()
    for thread in publishing:
        thread.join()
    sys.stdout.write(json.dumps(answers) + "\n")
    sys.stdout.flush()
