"""A process that publishes: for each line of its input one `store_discovery`, or as many at once as the line says.

Answers with a line of JSON. It has, for each, the error's type, or "", and the connections that it tried. Then come
timeouts, in seconds: those of its sockets that ran out, and those of its waits for Celery's pools, ended or not.
"""

from __future__ import annotations

import json
import queue
import socket
import sys
import threading
from typing import Any

import kombu.resource
from support import WatchedSocket


class PoolWaits(threading.local):
    """The timeouts of this thread's waits."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []


class WatchedQueue(queue.LifoQueue[Any]):
    """The queue in a pool: notes the timeout of each wait for an element."""

    waits = PoolWaits()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return super().get(block=False)
        except queue.Empty:
            if block:
                self.waits.timeouts.append(timeout)
            return super().get(block, timeout)


socket.socket = WatchedSocket  # type: ignore[misc]
kombu.resource.LifoQueue = WatchedQueue

import tasks  # noqa: E402 - what it connects with is watched


def publish(answers: list[Any], number: int) -> None:
    error = ""
    try:
        tasks.store_discovery.delay("agent", number)
    except Exception as raised:  # noqa: BLE001 - which, is the question
        error = f"{type(raised).__module__}.{type(raised).__name__}"
    waits = WatchedSocket.waits  # the thread is new, and so are they
    answers.append((error, waits.connects, waits.timeouts, WatchedQueue.waits.timeouts))


for line in sys.stdin:
    number, threads = map(int, line.split())
    answers: list[Any] = []
    publishing = [threading.Thread(target=publish, args=(answers, number)) for _ in range(threads)]
    for thread in publishing:
        thread.start()
    for thread in publishing:
        thread.join()
    sys.stdout.write(json.dumps(answers) + "\n")
    sys.stdout.flush()
