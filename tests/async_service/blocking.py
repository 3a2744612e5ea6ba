"""The async service of the demo, for tests, which are not async: each call waits for its end."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import Any

from govredis.demo.async_service import Agent, AsyncService

__all__ = ["Agent", "BlockingService"]


class _Blocking:
    def __init__(self, wrapped: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._wrapped = wrapped
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *args, **options: self._loop.run_until_complete(found(*args, **options))


class BlockingService:
    """`sessions`, `locks`, `limits` and `metadata` as AsyncService has them, without `await`.

    Attributes:
        skew: seconds by which its clock is ahead of this machine's.
    """

    def __init__(self, url: str) -> None:
        self.skew = 0.0
        self._loop = asyncio.new_event_loop()
        self._service = AsyncService(url, clock=lambda: time.time() + self.skew)
        self.sessions: Any = _Blocking(self._service.sessions, self._loop)
        self.locks: Any = _Blocking(self._service.locks, self._loop)
        self.limits: Any = _Blocking(self._service.limits, self._loop)
        self.metadata: Any = _Blocking(self._service.metadata, self._loop)

    def close(self) -> None:
        self._loop.run_until_complete(self._service.close())
        self._loop.close()
