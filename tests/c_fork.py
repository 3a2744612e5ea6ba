"""A fork that Python is not told of, as uWSGI makes one: no hook runs in the child."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from support import PATIENCE, Child, in_threads

#: PyDLL keeps the GIL, as uWSGI does: the child of a fork without it waits for a thread that it has not.
_fork = ctypes.PyDLL(None).fork

#: The byte that a child writes first, once its threads run.
_RUNS = b"!"


class CForkedChild(Child):
    """`work` in a child made by a fork in C."""

    def __init__(self, work: Callable[[], Any]) -> None:
        wait = 1.0
        while not self._fork(work, wait):
            wait *= 2

    def _fork(self, work: Callable[[], Any], wait: float) -> bool:
        """Returns False where the child's interpreter does not run.

        A thread that waited for the GIL in the instant of the fork is in its queue for ever (glibc's condition
        variable). That is Python's, which gets a new GIL from its hook; nothing of ours has begun by then: a child that
        was merely late, as after a stall of the machine, still waits for its parent's word.
        """
        self._answer, write_end = os.pipe()
        word, give_word = os.pipe()
        self.pid = _fork()
        if not self.pid:
            signal.alarm(int(PATIENCE))  # a child that hangs ends, even where its parent has gone
            in_threads(*[lambda: [time.sleep(0) for _ in range(50)]] * 4)
            os.close(give_word)
            os.write(write_end, _RUNS)
            if not os.read(word, 1):
                os._exit(1)  # the parent has gone
            os.close(word)
            self._work(work, write_end)
        os.close(write_end)
        os.close(word)
        try:
            if select.select([self._answer], [], [], wait)[0] and os.read(self._answer, len(_RUNS)) == _RUNS:
                os.write(give_word, _RUNS)
                return True
        finally:
            os.close(give_word)
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._answer)
        os.waitpid(self.pid, 0)
        return False


def in_c_child(work: Callable[[], Any]) -> Any:
    """Runs `work` in a child made by a fork in C, and returns its value."""
    return CForkedChild(work).result()


_MUTEXES = (type(threading.Lock()), type(threading.RLock()))


def mutexes(*roots: object) -> list[Any]:
    """All that can be reached from the attributes of objects of govredis."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = list(roots)
    while left:
        obj = left.pop()
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if isinstance(obj, _MUTEXES):
            found[id(obj)] = obj
        elif isinstance(obj, (list, tuple, set)):
            left += obj
        elif isinstance(obj, dict):
            left += obj.values()
        elif type(obj).__module__.startswith("govredis"):
            names = {
                *getattr(obj, "__dict__", ()),
                *(n for c in type(obj).__mro__ for n in getattr(c, "__slots__", ())),
            }
            left += [getattr(obj, name) for name in names if hasattr(obj, name)]
    return list(found.values())


@contextlib.contextmanager
def held_by_another_thread(locks: list[Any]) -> Iterator[None]:
    """As a thread holds them that is in the midst of a call when its process is forked."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        # Those that are not to be had are held by others, which is as good; some of them may wait for ours.
        mine = [lock for lock in locks if lock.acquire(timeout=0.1)]
        held.set()
        over.wait()
        for lock in mine:
            lock.release()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(PATIENCE)
    try:
        yield
    finally:
        over.set()
        thread.join()
