"""NodeByNode: questions about many locks, which lie on several nodes of Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..client import Arg, RedisClient, RedisNode
from ..errors import BackendError, BackendUnavailable

T = TypeVar("T")
R = TypeVar("R")

#: A key may be found to have moved to another node.
_ATTEMPTS = 2


class NodeByNode:
    """Asks each node in turn. Nodes that do not answer are left out, as long as any answers.

    Attributes:
        redis: the client.
        unanswered: the names of the nodes that did not answer, or not for all.
    """

    def __init__(self, redis: RedisClient) -> None:
        self.redis = redis
        self.unanswered: set[str] = set()
        self._has_answer = False

    def ask(self, node: RedisNode, question: Callable[..., R], *args: Any) -> R | None:
        """Returns the answer, `question(node, *args)`; None if there is none.

        Raises BackendUnavailable where no node has answered yet, and none is left.
        """
        try:
            answer = question(node, *args)
        except BackendUnavailable:
            self.unanswered.add(node.name)
            if not self._has_answer and self.unanswered.issuperset(each.name for each in self.redis.nodes()):
                raise
            return None
        self._has_answer = True
        return answer

    def ask_about(
        self,
        things: Iterable[T],
        key_of: Callable[[T], Arg],
        question: Callable[[RedisNode, list[T]], list[Any]],
    ) -> list[tuple[T, Any]]:
        """Ask the nodes about things that lie there. Returns those with an answer, with it.

        Args:
            key_of: a key that lies where the thing does.
            question: asks a node about some of them, and returns an answer or a BackendError for each.

        Raises BackendUnavailable where no node has answered yet; BackendError.
        """
        answered: list[tuple[T, Any]] = []
        left, elsewhere = list(things), set[str]()
        for _ in range(_ATTEMPTS):
            by_node: dict[RedisNode, list[T]] = {}
            for thing in left:
                try:
                    by_node.setdefault(self.redis.at(key_of(thing)), []).append(thing)
                except BackendUnavailable:
                    self.unanswered.add(self.redis.name)
            left, elsewhere = [], set()
            for node, theirs in by_node.items():
                replies = self.ask(node, question, theirs)
                for thing, reply in zip(theirs, replies or (), strict=False):
                    if isinstance(reply, BackendUnavailable):
                        left.append(thing)
                        elsewhere.add(node.name)
                    elif isinstance(reply, BackendError):
                        raise reply
                    else:
                        answered.append((thing, reply))
        self.unanswered |= elsewhere
        return answered
