"""Daemon threads. Where none can be started, the caller does without: there are too many, or the interpreter ends."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("govredis")

#: An option of uWSGI that is not set, or set to false.
_OFF = None, False, b"false", b"0"


def make_daemon(name: str, run: Callable[..., Any], *args: Any) -> threading.Thread:
    """A daemon thread that its owner keeps before it runs."""
    return threading.Thread(target=run, args=args, name=name, daemon=True)


def start(thread: threading.Thread) -> bool:
    """Start it. Returns whether it could be started."""
    if sys.is_finalizing():
        return False  # a destructor at the interpreter's end: the thread would never run, and `start` wait for it
    _warn_of_fork()
    try:
        thread.start()
    except (RuntimeError, KeyError) as error:  # KeyError: threading looks for it among those that have not begun
        if error.__context__ is not None:
            raise error.__context__ from None  # a signal handler's exception, struck in there
        return False
    return True


def start_daemon(name: str, run: Callable[..., Any], *args: Any) -> threading.Thread | None:
    """Make and start a daemon thread; None where it cannot be started."""
    thread = make_daemon(name, run, *args)
    return thread if start(thread) else None


def forks_beside_threads() -> bool:
    """Is this a uWSGI master that forks beside its threads? A worker hangs for ever where one had the GIL."""
    uwsgi: Any = sys.modules.get("uwsgi")  # uWSGI makes this module, in its own processes only
    options = getattr(uwsgi, "opt", None)
    if not isinstance(options, dict) or options.get("master") in _OFF:
        return False
    return options.get("py-call-uwsgi-fork-hooks") in _OFF and getattr(uwsgi, "worker_id", lambda: None)() == 0


@functools.cache
def _warn_of_fork() -> None:
    """Warn once where `forks_beside_threads`."""
    if forks_beside_threads():
        logger.warning(
            "govredis runs a thread in uWSGI's master, so workers may hang from their start: "
            "set py-call-uwsgi-fork-hooks = true, or lazy-apps = true"
        )
