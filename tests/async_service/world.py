"""Two processes of govredis, as it were on two hosts, and an async service: what they share, and the operations' frame.

Every example of a machine has ids of its own, so nothing of one is left for the next.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2
import redis as redis_py

from govredis import Config, GovRedis

from .blocking import BlockingService

#: Which of the two processes.
WHO = (0, 1)
#: How many seconds the async service's clock is ahead.
SKEWS = (0.0, -2.0, -100.0, -4000.0, 30.0)

_EXAMPLES = itertools.count(1)


class World:
    """The servers' users.

    Args:
        redis_url: of an empty Redis.
        database_url: of a PostgreSQL with our tables; None: without.
    """

    def __init__(self, redis_url: str, database_url: str | None) -> None:
        self._folders = [tempfile.TemporaryDirectory(prefix="govredis-beside-") for _ in range(2)]
        patient: dict[str, Any] = {"socket_timeout": 10, "connect_timeout": 10, "postgres_timeout": 20}
        self.govs = [
            GovRedis(
                Config(
                    redis_url=redis_url,
                    database_url=database_url,
                    lock_folder=f"{folder.name}/locks",  # of another host
                    metadata_staleness=3600,  # the relay comes when the machine says so
                    limit_deny_cache=False,  # in which a removal of theirs is seen a second late
                    **patient,
                )
            )
            for folder in self._folders
        ]
        self.service = BlockingService(redis_url)
        self.redis: Any = redis_py.Redis.from_url(redis_url, decode_responses=True)
        self._sql = None if database_url is None else psycopg2.connect(database_url)
        if self._sql is not None:
            self._sql.autocommit = True
        for gov in self.govs:
            if gov.internal.freshness is not None:
                assert gov.internal.freshness.drain() is not None  # else the first look would

    @property
    def durable(self) -> bool:
        """With PostgreSQL."""
        return self._sql is not None

    def next_example(self) -> str:
        return f"e{next(_EXAMPLES)}"

    def sql(self, text: str, *values: Any) -> list[Any]:
        """A statement of somebody else's on the same database, committed."""
        assert self._sql is not None
        with self._sql.cursor() as cursor:
            cursor.execute(text, values)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        for gov in self.govs:
            gov.close()
        self.service.close()
        self.redis.close()
        if self._sql is not None:
            self._sql.close()
        for folder in self._folders:
            folder.cleanup()


def operation(*, cut_off: bool = False, **draws: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a method as an operation, with what each of its arguments may be.

    Args:
        cut_off: it is done also if its process, `who`, is cut off from Redis.
    """

    def mark(method: Callable[..., None]) -> Callable[..., None]:
        method.draws, method.cut_off = draws, cut_off  # type: ignore[attr-defined]
        return method

    return mark


class Beside:
    """The base of the machines. An operation asserts what both sides may see of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.example = world.next_example()
        self.service = world.service
        self.service.skew = 0.0
        self.govs = world.govs
        self.redis = world.redis
        #: Which of our processes is cut off from Redis.
        self.away = [False, False]

    def do(self, name: str, drawn: dict[str, Any]) -> None:
        method: Any = getattr(self, name)
        if method.cut_off or not self.away[drawn.get("who", 0)] or "who" not in drawn:
            method(**drawn)

    @property
    def present(self) -> list[GovRedis]:
        """Our processes that are not cut off."""
        return [gov for gov, away in zip(self.govs, self.away, strict=True) if not away]

    @classmethod
    def operations(cls) -> dict[str, dict[str, Sequence[Any]]]:
        """The possible arguments of each operation, by its name."""
        methods = {name: getattr(cls, name) for name in dir(cls)}
        return {name: method.draws for name, method in methods.items() if hasattr(method, "draws")}

    def end(self) -> None:
        """A last look, and nothing is left."""

    def name(self, short: str) -> str:
        """An id of this example's own."""
        return f"{short}-{self.example}"

    @operation(skew=SKEWS)
    def clock_of_theirs(self, skew: float) -> None:
        self.service.skew = skew

    @operation(who=WHO)
    def relay(self, who: int) -> None:
        """The outbox's relay tells Redis what is committed."""
        freshness = self.govs[who].internal.freshness
        if freshness is not None:
            assert freshness.drain() is not None
            self.relayed()

    def relayed(self) -> None:
        """For the features whose model the relay changes."""
