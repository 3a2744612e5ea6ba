"""Part: the commands of a pipeline that go to one node of a Cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._redis_urls import Host
from ...errors import BackendError
from ..commands import Command, Script, pack_command
from ..mapping import NoScript
from .cluster_node import ClusterNode


class Part:
    """Sent first, and read once the parts of the other nodes are sent: so the nodes work side by side.

    A part that is too large for one exchange is not sent before its replies are asked for.

    Args:
        node: where to.
        commands, scripts: as of RedisClient.pipeline.
    """

    def __init__(self, node: ClusterNode, commands: Sequence[Command], scripts: Sequence[Script]) -> None:
        self._node = node
        self.address: Host = node.address
        self._commands = commands
        self._scripts = scripts
        self._packed = list(map(pack_command, commands))
        self._begun: Any = None
        self._refused: BackendError | None = None

    def send(self) -> None:
        """Raises nothing: `replies` does."""
        if self._node.fits(self._packed):
            try:
                self._begun = self._node.begin(b"".join(self._packed), len(self._packed))
            except BackendError as error:
                self._refused = error.with_traceback(None)

    def replies(self) -> list[Any]:
        """As of `RedisNode.pipeline(each=True)`. Where all of it failed, the BackendError is each command's."""
        try:
            return self._found()
        except BackendError as error:
            return [error.with_traceback(None)] * len(self._commands)

    def _found(self) -> list[Any]:
        if self._refused is not None:
            raise self._refused
        if self._begun is None:
            return self._node.pipeline(self._commands, self._scripts, each=True)
        begun, self._begun = self._begun, None
        try:
            found: list[Any] = self._node.finish(begun)
            return found
        except NoScript:
            return self._node._with_sources(self._packed, self._scripts, each=True)


def side_by_side(parts: Sequence[Part]) -> list[list[Any]]:
    """The replies of each part. All nodes are asked before any reply is waited for."""
    if len(parts) > 1:
        # In the same order everywhere: callers with a connection to one node wait for that of another.
        for part in sorted(parts, key=lambda part: part.address):
            part.send()
    return [part.replies() for part in parts]
