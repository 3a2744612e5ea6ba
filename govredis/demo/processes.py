"""The processes of the demo: each started with an order on its stdin, and gone when that ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATIENCE = 60.0  # seconds for processes to start, and to finish what they are at


class ProcessError(RuntimeError):
    """A process of the demo ended early, or did not start or finish in time."""


class Processes:
    """Those that one demo has started; a context manager that ends them, however it ends itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, module: str, **order: Any) -> None:
        """Run `main` of a module of this package, with an order for `take_order`."""
        with self._stderr(name).open("w") as stderr:
            process = subprocess.Popen(
                # In a session of its own: Ctrl-C is for this process, which then ends them all.
                [sys.executable, "-c", f"from govredis.demo.{module} import main; main()"],
                stdin=subprocess.PIPE, stderr=stderr, cwd=self._folder, text=True, start_new_session=True,
                env=self._environment(),
            )  # fmt: skip
        self._started[name] = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which `check` will say
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()

    def _environment(self) -> dict[str, str]:
        # Celery prefers the environment to its configuration: the user's broker is not for the demo.
        mine = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
        # Files that a killed process leaves behind go with the folder.
        return {**mine, "TMPDIR": str(self._folder)}

    def check(self) -> None:
        """Raises ProcessError if one has ended with an error."""
        for name, process in self._started.items():
            if process.poll():
                tail = self._stderr(name).read_text().strip()[-500:]
                raise ProcessError(f"the {name} ended with {process.returncode}: {tail}")

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for it. Raises ProcessError if one ends with an error, or it does not come in time."""
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessError(f"{what}: not within {_PATIENCE:g} s")
            time.sleep(0.02)

    def ended(self, name: str) -> bool:
        return self._started[name].poll() == 0

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: Any) -> None:
        for process in self._started.values():
            # The group: a worker has children of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._started.values():
            process.communicate()

    def _stderr(self, name: str) -> Path:
        return self._folder / f"stderr of {name}"


def take_order() -> dict[str, Any]:
    """In a started process: its order. When its stdin ends, its parent is gone, and its own group ends too."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    return order


def _die_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
