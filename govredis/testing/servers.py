"""Real Redis and PostgreSQL servers for tests and the demo: started, paused, killed and restarted in place.

    with RedisServer() as redis, PostgresServer() as postgres:
        gov = GovRedis(Config(redis_url=redis.url, database_url=postgres.url))
        redis.kill()
        redis.restart(data="empty")

Every server runs under a keeper (`_keeper_process.py`), a small process that ends it when this process is gone, however
it went; so nothing is left behind by kill -9 either. Servers listen on 127.0.0.1 or on a unix socket only. A server
belongs to the process that made it: a forked child can use it, by its url, but neither stop nor restart it.
"""

from __future__ import annotations

from ._binaries import ServerError, find_postgres, find_redis, redis_binaries
from ._postgres_server import PostgresServer
from ._redis_cluster import RedisCluster
from ._redis_servers import RedisSentinel, RedisServer

__all__ = [
    "PostgresServer",
    "RedisCluster",
    "RedisSentinel",
    "RedisServer",
    "ServerError",
    "find_postgres",
    "find_redis",
    "redis_binaries",
]
