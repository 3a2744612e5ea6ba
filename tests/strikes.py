"""strike_anywhere: an exception at every place where a signal handler's could be raised, one place after the other.

CPython looks for signals where a function begins and after each call of a C function, `with` on a lock of C excepted:
there is no place between its taking and the block. In a library's own functions it strikes as far as three calls below
govredis. It does not strike in destructors and callbacks of the garbage collector, which swallow it, nor in `logging`:
before Python 3.13 an exception can leave the locks of log handlers taken, and those are not ours.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import govredis

PACKAGE = str(Path(govredis.__file__).parent)
_BELOW = 3
_LOGGING = str(Path(logging.__file__).parent)
_RLOCK = type(threading.RLock())


class Struck(BaseException):
    pass


def strike_anywhere(
    operation: Callable[[Any], object], works: Callable[[], object], before: Callable[[], Any] = lambda: None
) -> int:
    """Run `operation` until it has been struck everywhere. Returns how often it was.

    Args:
        operation: what is struck; it is given what `before` returned.
        works: called after each strike.
    """
    known: set[object] = set()
    struck: list[object] = []
    of_collector = {getattr(callback, "__code__", None) for callback in gc.callbacks}

    def strike(frame: FrameType, event: str, _: Any) -> None:
        if struck or event not in ("call", "c_return"):
            return
        place = _place(frame, event, of_collector)
        if place is not None and place not in known:
            known.add(place)
            struck.append(place)
            raise Struck(f"{event} in {frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code}")

    while True:
        struck.clear()
        prepared = before()
        try:
            sys.setprofile(strike)
            try:
                operation(prepared)
            finally:
                sys.setprofile(None)
        except Struck:
            pass
        if not struck:
            return len(known)
        works()


def _place(frame: FrameType, event: str, of_collector: set[object]) -> object:
    above: FrameType | None = frame
    for _ in range(_BELOW + 1):
        if above is None or above.f_code.co_name in ("__del__", "_remove"):
            return None
        if above.f_code in of_collector:
            return None
        if above.f_code.co_filename.startswith(_LOGGING):
            return None
        if above.f_code.co_filename.startswith(PACKAGE):
            return frame.f_code, frame.f_lasti, event, above.f_code, above.f_lasti
        above = above.f_back
    return None


def lost_mutexes(owners: Iterable[object] | None = None, within: float = 10.0) -> list[str]:
    """Those mutexes of these objects, or of all of govredis, that nobody can take any more. For when nothing is under
    way."""
    found: list[str] = []

    def look() -> None:
        for owner in gc.get_objects() if owners is None else owners:
            if not str(type(owner).__module__).startswith("govredis"):
                continue
            names = [*getattr(owner, "__dict__", ()), *(n for c in type(owner).__mro__ for n in _slots(c))]
            for name in names:
                mutex = getattr(owner, name, None)
                if isinstance(mutex, _RLOCK):
                    if mutex.acquire(timeout=within):
                        mutex.release()
                    else:
                        found.append(f"{type(owner).__name__}.{name}")

    looking = threading.Thread(target=look)  # another one: they are reentrant
    looking.start()
    looking.join()
    return found


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
