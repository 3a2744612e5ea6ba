"""Calls that each wait for a server, all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ._daemon import start_daemon

T = TypeVar("T")


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Their results: of the first, in this thread, and of each other in a thread of its own.

    Where no thread can be started, this one makes the call. Raises the first error, once all have ended.
    """
    results: list[Any] = [None] * len(calls)
    errors: dict[int, BaseException] = {}

    def run(n: int) -> None:
        try:
            results[n] = calls[n]()
        except BaseException as error:  # noqa: BLE001 - for the caller
            errors[n] = error

    threads = [(n, start_daemon("govredis-at-once", run, n)) for n in range(1, len(calls))]
    for n in [*range(min(1, len(calls))), *(n for n, thread in threads if thread is None)]:
        run(n)
    for _, thread in threads:
        if thread is not None:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return results
