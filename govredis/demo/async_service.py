"""An async service beside govredis: the same features on the same Redis, in its own formats, by redis-py's asyncio.

It is written from the description of those formats, and shares no code with govredis. Like the services that it stands
for, it is strict: a metadata record with a member that its dataclass has not is a TypeError.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio

#: Seconds.
SESSION_TTL, METADATA_TTL = 86_400, 300
#: Seconds that an operation's entries are kept beyond their window.
_MARGIN = 60

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"


@dataclass
class Agent:
    """The value at `agent_meta:{id}`: a record of `gov.agents`, as the service's own class."""

    agent_id: str
    metadata: dict[str, Any] = field(default_factory=dict)
    status: str = "active"
    version: int = 0


class AsyncService:
    """All four features.

    Args:
        url: of Redis: redis://, redis+sentinel:// without a password, redis+cluster:// or rediss+cluster://.
        clock: seconds since 1970, by this service's own clock.
        timeout: seconds that it waits for Redis.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, timeout: float = 5.0) -> None:
        self.redis: Any = _client(url, timeout)
        self.sessions: Sessions = Sessions(self.redis, clock)
        self.locks: Locks = Locks(self.redis)
        self.limits: Limits = Limits(self.redis, clock)
        self.metadata: Metadata = Metadata(self.redis)

    async def close(self) -> None:
        await self.redis.aclose()


def _client(url: str, timeout: float) -> Any:
    """By redis-py: of a server, of the primary that Sentinels name, or of a Cluster."""
    options: Any = {"decode_responses": True, "socket_timeout": timeout, "socket_connect_timeout": timeout}
    parts = urlsplit(url)
    scheme, _, topology = parts.scheme.partition("+")
    if not topology:
        return redis.asyncio.Redis.from_url(url, **options)
    user, at, addresses = parts.netloc.rpartition("@")
    hosts = [(host, int(port)) for host, _, port in (each.partition(":") for each in addresses.split(","))]
    if topology == "sentinel":
        sentinel: Any = redis.asyncio.sentinel.Sentinel
        return sentinel(hosts, **options).master_for(parts.path.strip("/"), **options)
    nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in hosts]
    one = f"{scheme}://{user}{at}{addresses.partition(',')[0]}?{parts.query}"
    return redis.asyncio.RedisCluster.from_url(one, startup_nodes=nodes, **options)


class Sessions:
    """`session:{id}`: a JSON object with members of its own, TTL a day or none, extended by a plain EXPIRE."""

    def __init__(self, client: Any, clock: Callable[[], float]) -> None:
        self._redis = client
        self._clock = clock

    async def bind(
        self, session_id: str, agent_id: str, *, ttl: int | None = SESSION_TTL, counted: bool = True, **members: Any
    ) -> dict[str, Any]:
        """Bind it, whatever stood there. Returns the record.

        Args:
            ttl: seconds; None: without end.
            counted: with a bind_count, which some of its versions leave out.
            members: `api_key_hash`, `label`, `bind_ip_ua`, ...
        """
        record = {
            "agent_id": agent_id,
            "bound_at": datetime.fromtimestamp(self._clock(), timezone.utc).isoformat(),
            **members,
        }
        if counted:
            before = await self.get(session_id)
            record["bind_count"] = 1 + (before.get("bind_count", 0) if before else 0)
        await self._redis.set(f"session:{session_id}", json.dumps(record), ex=ttl)
        return record

    async def get(self, session_id: str) -> dict[str, Any] | None:
        raw = await self._redis.get(f"session:{session_id}")
        if raw is None:
            return None
        record: dict[str, Any] = json.loads(raw)
        assert isinstance(record["agent_id"], str)
        return record

    async def extend(self, session_id: str, ttl: int = SESSION_TTL) -> bool:
        """True if it was there."""
        return bool(await self._redis.expire(f"session:{session_id}", ttl))

    async def delete(self, session_id: str) -> bool:
        """True if it was there."""
        return bool(await self._redis.delete(f"session:{session_id}"))


class Locks:
    """`lock:{resource}`: an owner's text, set if nothing is there, deleted by its owner, or by force."""

    def __init__(self, client: Any) -> None:
        self._redis = client
        self._release = client.register_script(_RELEASE)

    async def acquire(self, resource: str, owner: str, ttl: float = 30.0) -> bool:
        """One try."""
        return bool(await self._redis.set(f"lock:{resource}", owner, nx=True, px=int(ttl * 1000)))

    async def release(self, resource: str, owner: str) -> bool:
        """True if the owner held it."""
        return bool(await self._release(keys=[f"lock:{resource}"], args=[owner]))

    async def force_release(self, resource: str) -> bool:
        """True if anybody held it."""
        return bool(await self._redis.delete(f"lock:{resource}"))

    async def holder(self, resource: str) -> str | None:
        owner = await self._redis.get(f"lock:{resource}")
        return None if owner is None else str(owner)


class Limits:
    """`rate_limit:{op}:{id}`: a sorted set scored in seconds, pruned by the caller's window at each check."""

    def __init__(self, client: Any, clock: Callable[[], float]) -> None:
        self._redis = client
        self._clock = clock
        self._numbers = itertools.count()

    async def check(self, operation: str, identity: str, limit: int, window: int) -> bool:
        """Would one more be within the limit?"""
        return await self.count(operation, identity, window) < limit

    async def count(self, operation: str, identity: str, window: int) -> int:
        key = f"rate_limit:{operation}:{identity}"
        async with self._redis.pipeline() as pipeline:
            pipeline.zremrangebyscore(key, "-inf", self._clock() - window)
            pipeline.zcard(key)
            _, count = await pipeline.execute()
        return int(count)

    async def record(self, operation: str, identity: str, window: int) -> None:
        key, now = f"rate_limit:{operation}:{identity}", self._clock()
        async with self._redis.pipeline() as pipeline:
            pipeline.zadd(key, {f"{now}:{id(self):x}:{next(self._numbers)}": now})
            pipeline.expire(key, window + _MARGIN)
            await pipeline.execute()


class Metadata:
    """`agent_meta:{id}`: the plain JSON of a dataclass, read back as `Agent(**json)`."""

    def __init__(self, client: Any) -> None:
        self._redis = client

    async def get(self, agent_id: str) -> Agent | None:
        """Raises TypeError for a record with a member that Agent has not."""
        raw = await self._redis.get(f"agent_meta:{agent_id}")
        return None if raw is None else Agent(**json.loads(raw))

    async def set(self, agent: Agent, ttl: int = METADATA_TTL) -> None:
        await self._redis.set(f"agent_meta:{agent.agent_id}", json.dumps(asdict(agent)), ex=ttl)

    async def invalidate(self, agent_id: str) -> bool:
        """True if there was one."""
        return bool(await self._redis.delete(f"agent_meta:{agent_id}"))
