"""Pending writes of a process, told to its servers as it ends: within a second, and only if there are any."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from typing import Protocol
from weakref import WeakSet

from ._daemon import start_daemon
from ._fork import notice_fork

log = logging.getLogger("govredis")

#: Seconds for all servers together. A server that hangs keeps no process from ending.
PATIENCE = 1.0


class PendingWrites(Protocol):
    def has_pending(self) -> bool:
        """Whether there is something to tell, or on its way just now."""

    def write_pending(self) -> None:
        """Tell it; waits for what is on its way."""


_pending: WeakSet[PendingWrites] = WeakSet()


def write_at_exit(obj: PendingWrites) -> None:
    """Have `obj` tell its pending writes when this process ends, for as long as `obj` lives.

    This works after the last line, `sys.exit` and an uncaught exception. It works in children of `multiprocessing` and
    of Celery's prefork pool too, which leave without Python's own end. Not after a signal that kills, nor `os._exit`.
    """
    _pending.add(obj)
    _in_multiprocessing()


def write_all_pending() -> None:
    """Tell all pending writes now. Raises nothing.

    Returns within PATIENCE even if a server hangs; where threads cannot run, within the timeouts of the servers.
    """
    notice_fork()
    # Each in a thread of its own, as one of two servers may hang.
    started = [_Writing(obj) for obj in list(_pending) if obj.has_pending()]
    deadline = time.monotonic() + PATIENCE
    for writing in started:
        writing.wait(deadline)


class _Writing:
    def __init__(self, obj: PendingWrites) -> None:
        self._obj = obj
        self._begun = threading.Event()
        self._thread = start_daemon("govredis-exit", self._run)

    def wait(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._begun.is_set():  # the thread will never run (uWSGI without --enable-threads)
            self._run()

    def _run(self) -> None:
        self._begun.set()
        try:
            self._obj.write_pending()
        except Exception as error:  # noqa: BLE001 - the process ends in any case
            log.warning("a server was not told of everything at the end of this process: %s", error)


#: The process in which the finalizer was made; and whether multiprocessing will make one in its children.
_finalized_in = 0
_children_known = False


def _in_multiprocessing() -> None:
    """Children of multiprocessing run finalizers only, and only those that were made in them."""
    global _children_known
    util = sys.modules.get("multiprocessing.util")
    if util is None or _finalized_in == os.getpid():
        return
    if not _children_known:
        _children_known = True
        util.register_after_fork(_pending, _finalize)
    _finalize()


def _finalize(_: object = None) -> None:
    global _finalized_in
    _finalized_in = os.getpid()
    # The lowest priority: other finalizers may still use us.
    sys.modules["multiprocessing.util"].Finalize(None, write_all_pending, exitpriority=0)


atexit.register(write_all_pending)
# For a child of a parent that imported multiprocessing later than this.
os.register_at_fork(after_in_child=_in_multiprocessing)
