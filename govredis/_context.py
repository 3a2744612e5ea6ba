"""Context: what every feature of one GovRedis stands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._counters import Counters
from ._teller import Teller
from .client import RedisClient, connect
from .config import Config
from .keys import Keys

if TYPE_CHECKING:
    from .postgres import Postgres


@dataclass(frozen=True, slots=True)
class Context:
    """The settings, servers and counters that the features of one GovRedis share.

    Attributes:
        redis: None where Redis is disabled.
        postgres: None where no PostgreSQL is configured.
        teller: tells Redis of what this process counts.
    """

    config: Config
    keys: Keys
    redis: RedisClient | None
    postgres: Postgres | None
    counters: Counters
    teller: Teller

    @classmethod
    def of(cls, config: Config, redis: RedisClient | None = None) -> Context:
        """New clients of the servers in `config`, or `redis` in the place of its own; they connect on first use.

        Raises ConfigurationError where an extra that the settings need is not installed.
        """
        postgres: Postgres | None = None
        if config.database_url is not None:
            from .postgres import Postgres  # loads psycopg2, which is an extra

            postgres = Postgres(config)
        if redis is None and config.redis_enabled:
            redis = connect(config)
        counters = Counters()
        return cls(config, Keys(config.key_prefix), redis, postgres, counters, Teller(redis, counters))
