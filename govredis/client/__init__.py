"""The client: commands and scripts on Redis, and whether Redis is away.

No other room catches redis-py's exceptions. The files:

- `redis_client.py`: RedisClient: what the features use.
- `node.py`: RedisNode: commands, scripts, pipelines, and the probe, on one server.
- `sentinel_client.py`, `primary.py`: the same where Sentinels name the server.
- `cluster/`: ClusterClient: the same where a Cluster's nodes have the keys, each a RedisNode.
- `slots.py`, `redirects.py`: a key's slot in a Cluster, and a node's answers that a key is elsewhere.
- `round_trips.py`: exchanges over connections, and commands that are sent a second time.
- `commands.py`: commands as they are sent, and scripts.
- `pending.py`: a reply that is taken later than its command was sent.
- `options.py`, `named.py`, `greeting.py`: how a connection is made, and its first commands.
- `wire.py`: how replies come, and whether a connection is in step.
- `distance.py`: whether Redis hangs, or is too far away for our timeouts.
- `push.py`: a connection on which the server also speaks unasked.
- `mapping.py`, `rights.py`: redis-py's errors, in our words.
"""

from ..config import Config, address_of
from .cluster.cluster_client import ClusterClient
from .commands import Arg, Command, Script, pack_command
from .node import LONGEST_BLOCK, LONGEST_POP, RedisNode
from .pending import Pending
from .push import PushStream
from .redirects import NotServedHere, Redirected, TryAgain
from .redis_client import RedisClient
from .sentinel_client import SentinelClient
from .slots import slot_of

__all__ = [
    "LONGEST_BLOCK",
    "LONGEST_POP",
    "Arg",
    "ClusterClient",
    "Command",
    "NotServedHere",
    "Pending",
    "PushStream",
    "Redirected",
    "RedisClient",
    "RedisNode",
    "Script",
    "SentinelClient",
    "TryAgain",
    "connect",
    "pack_command",
    "slot_of",
]


def connect(config: Config) -> RedisClient:
    """A client of the Redis that the settings name; it connects on first use. Raises ConfigurationError."""
    address = address_of(config)
    if address.nodes:
        return ClusterClient(config, address.nodes)
    return RedisNode(config) if address.sentinels is None else SentinelClient(config, address.sentinels)
