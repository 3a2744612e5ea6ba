"""Tracking: the connections over which Redis's nodes tell of changes, and the thread that listens to all of them."""

from __future__ import annotations

import selectors
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

from .._boottime import clock
from .._latch import Latch
from ..client import RedisNode
from ..errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from ..client import PushStream
    from .local import LocalTier, LocalValues

#: Seconds for which the answer to the question before the last one is good.
GOOD_FOR = 1.0
#: Seconds between two questions to a node.
_ASKED_EVERY = 0.3
#: Seconds before the next try: of a node that is away, at most; and of a node that forbids it.
_AWAY = 0.05, 0.4
_REFUSED = 30.0

# Not epoll: a forked child would share its descriptor, and could not close it.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Tracking:
    """The tracking connection to one node, where there is one now, and what was asked over it.

    It keeps neither its node nor the tier alive.
    """

    def __init__(self, node: weakref.ref[RedisNode], selector: selectors.BaseSelector) -> None:
        self._node = node
        self._selector = selector
        self._stream: PushStream | None = None
        self._again_at = 0.0
        self._pause = _AWAY[0]
        #: Until the first answer comes: the values that are tracked from then on, and the node's connects before.
        self._begun: tuple[frozenset[LocalValues], int] | None = None
        self._sent: float | None = None
        self._replies: list[Any] = []
        self._wanted = 0
        self._ask_at = 0.0

    def attend(self, tier: LocalTier, node: RedisNode) -> float:
        """Connect or ask, if it is time to. Returns for how many seconds to listen."""
        try:
            now = clock()
            if self._stream is None:
                if now < self._again_at:
                    return self._again_at - now
                self._begin(tier, node)
            elif self._sent is None and now >= self._ask_at:
                self._ask(self._stream, tier.questions(node))
            elif self._sent is not None and now >= self._sent + GOOD_FOR:
                raise BackendUnavailable("the tracking connection is not answered")
            return _ASKED_EVERY if self._sent is not None else max(0.001, self._ask_at - now)
        except BackendError as error:
            return self._failed(tier, error)

    def hear(self, tier: LocalTier) -> None:
        """Take what has come."""
        node = self._node()
        if self._stream is None or node is None:
            return
        try:
            replies, pushes = self._stream.read(0.0)
            for push in pushes:
                tier.told(push)
            self._replies += replies
            if len(self._replies) > self._wanted:
                raise BackendUnavailable("the tracking connection has answered more than it was asked")
            if self._sent is not None and len(self._replies) == self._wanted:
                self._answered(tier, node, self._sent)
        except BackendError as error:
            self._failed(tier, error)
        else:
            if self._begun is None and not tier.is_current(node):
                self.end(tier)

    def end(self, tier: LocalTier | None, error: BackendError | None = None) -> None:
        """Close the connection: there is no news of the node any more."""
        node = self._node()
        if tier is not None and node is not None:
            tier.end(node, error)
        if self._stream is not None:
            self._selector.unregister(self._stream)
            if tier is not None:
                tier.streams.discard(self._stream)
            self._stream.close()
        self._stream = self._sent = self._begun = None
        self._wanted, self._replies = 0, []

    def _begin(self, tier: LocalTier, node: RedisNode) -> None:
        values, command = tier.tracked()
        connects = node.connects
        self._stream = stream = node.push_stream()
        tier.streams.add(stream)
        self._selector.register(stream, selectors.EVENT_READ, self)
        self._begun = values, connects
        self._ask(stream, [command])

    def _ask(self, stream: PushStream, questions: list[tuple[str, ...]]) -> None:
        self._sent, self._wanted, self._replies = clock(), len(questions), []
        stream.send(questions)

    def _answered(self, tier: LocalTier, node: RedisNode, sent: float) -> None:
        if self._begun is not None:
            tier.begin(node, *self._begun)
            self._begun, self._pause = None, _AWAY[0]
            self._ask_at = sent
        else:
            self._ask_at = sent + _ASKED_EVERY if tier.answered(node, sent, self._replies) else sent
        self._sent, self._wanted, self._replies = None, 0, []

    def _failed(self, tier: LocalTier, error: BackendError) -> float:
        """Returns for how many seconds it is not tried again."""
        if isinstance(error, BackendUnavailable):
            wait, self._pause = self._pause, min(_AWAY[1], 2 * self._pause)
            self.end(tier)
        else:
            wait = _REFUSED
            self.end(tier, error)
        self._again_at = clock() + wait
        return wait


#: The tracking connections of a thread, by weak references to their nodes.
_Trackings: TypeAlias = dict["weakref.ref[RedisNode]", Tracking]


def track(ref: weakref.ref[LocalTier], stopped: Latch) -> None:
    """The thread. While it waits it keeps no tier alive."""
    selector = _Selector()
    trackings: _Trackings = {}
    try:
        while not stopped.is_set():
            tier = ref()
            if tier is None or not tier.is_run_by_this_thread():
                return  # an exception struck `start` just when it had started this one: there is another
            seconds = _attend(tier, trackings, selector)
            tier = None
            ready: list[Tracking] = []
            if selector.get_map():
                ready = [key.data for key, _ in selector.select(seconds)]
            else:
                stopped.wait(seconds)
            tier = ref()
            if tier is None:
                return
            for tracking in ready:
                tracking.hear(tier)
            tier = None
    finally:
        for tracking in trackings.values():
            tracking.end(ref())
        selector.close()


def _attend(tier: LocalTier, trackings: _Trackings, selector: selectors.BaseSelector) -> float:
    """See to all nodes that there are now. Returns for how many seconds to listen."""
    nodes = {weakref.ref(node): node for node in tier.nodes()}
    for gone in set(trackings).difference(nodes):
        trackings.pop(gone).end(tier)
    for ref in nodes:
        if ref not in trackings:
            trackings[ref] = Tracking(ref, selector)
    return min((trackings[ref].attend(tier, node) for ref, node in nodes.items()), default=_ASKED_EVERY)
