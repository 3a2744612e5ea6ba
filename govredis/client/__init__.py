"""The client: commands and scripts on Redis, and whether Redis is away.

No other room catches redis-py's exceptions. The files:

- `redis_client.py`: RedisClient: commands, scripts, pipelines, and the probe.
- `round_trips.py`: exchanges over connections, and commands that are sent a second time.
- `commands.py`: commands as they are sent, and scripts.
- `pending.py`: a reply that is taken later than its command was sent.
- `options.py`, `named.py`, `greeting.py`: how a connection is made, and its first commands.
- `wire.py`: how replies come, and whether a connection is in step.
- `distance.py`: whether Redis hangs, or is too far away for our timeouts.
- `push.py`: a connection on which the server also speaks unasked.
- `mapping.py`, `rights.py`: redis-py's errors, in our words.
"""

from .commands import Arg, Command, Script, pack_command
from .pending import Pending
from .push import PushStream
from .redis_client import LONGEST_POP, RedisClient

__all__ = ["LONGEST_POP", "Arg", "Command", "Pending", "PushStream", "RedisClient", "Script", "pack_command"]
