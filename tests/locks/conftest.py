"""Processes that hold locks, and waiting for what they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from govredis import HeldLock
from govredis.locks import lease, renewal


class Worker:
    """Another process on this host with a GovRedis: `locks` there is what `gov.locks` is here."""

    def __init__(self, **settings: Any) -> None:
        command = [sys.executable, str(Path(__file__).with_name("lock_worker.py")), json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self.answer() == "ready"
        shares = lease.RENEWED_AFTER, lease.TRIED_AGAIN_AFTER  # as here: see `renewed_soon`
        self.run(f"from govredis.locks import lease\nlease.RENEWED_AFTER, lease.TRIED_AGAIN_AFTER = {shares}")

    def begin(self, expression: str) -> None:
        """Have it evaluated; `answer` waits for the value."""
        self._send("eval", expression)

    def answer(self) -> Any:
        assert self.process.stdout
        answer = json.loads(self.process.stdout.readline() or '{"error": "it has ended"}')
        return answer["value"] if "value" in answer else answer["error"]

    def eval(self, expression: str) -> Any:
        """Its value; the class name of what it raised."""
        self._send("eval", expression)
        return self.answer()

    def run(self, statements: str) -> None:
        self._send("exec", statements)
        assert self.answer() is None

    def _send(self, how: str, code: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([how, code]) + "\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """SIGSTOP; it stands still on return."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """kill -9; it is gone on return."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in self.process.stdin, self.process.stdout:
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:
                pass


@pytest.fixture
def make_worker(tmp_path: Path, patience: dict[str, float]) -> Iterator[Callable[..., Worker]]:
    """Starts processes that share the lock folder of `make_gov`; ends them."""
    made: list[Worker] = []

    def make(**settings: Any) -> Worker:
        made.append(Worker(**{"lock_folder": str(tmp_path / "locks"), **patience, **settings}))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture(autouse=True)
def renewal_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "_IDLE", 0.2)


@pytest.fixture
def renewed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of 60 s is renewed each 0.2 s: here, and in the processes that `make_worker` starts from now on.

    So a test that waits for a renewal needs no short lock, which a machine that stalls for seconds would lose.
    """
    monkeypatch.setattr(lease, "RENEWED_AFTER", 1 / 300)
    monkeypatch.setattr(lease, "TRIED_AGAIN_AFTER", 1 / 300)


@pytest.fixture
def renew_now() -> Callable[[list[HeldLock]], None]:
    """`renew_now(held)`: these locks of this process are due at once."""

    def renew(held: list[HeldLock]) -> None:
        with renewal.renewer._lock:
            for lock in held:
                lock._lease._next = lock._lease.due = 0.0
            renewal.renewer._wakes_at = float("inf")
            renewal.renewer.add(held[0]._lease)

    return renew


@pytest.fixture
def not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock of this process comes on the list of held ones, however slow the machine is."""
    monkeypatch.setattr(lease, "FIRST_DUE", 1000)
