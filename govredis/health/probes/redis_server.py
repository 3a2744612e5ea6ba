"""Redis: whether it answers, and its answers about itself. The nodes of a Cluster are asked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..._at_once import at_once
from ..._context import Context
from ...client import Command, RedisClient, RedisNode, SentinelClient
from ...errors import BackendError, BackendUnavailable
from .. import verdict
from ..nodes import address_in
from ..report import Check
from .cluster import checks_of_cluster
from .probe import Probe, checks_of
from .redis_node import NodeFindings, NodeProbe


@dataclass(slots=True)
class _Question:
    """A command of a probe: the node that is asked, or why no node can be; and its reply."""

    command: Command
    place: RedisNode | BackendUnavailable
    reply: Any = None


class RedisProbe:
    """Its checks: "redis", always; others, each where there is something to warn of, or a right is missing.

    The commands of all other probes are sent in the same round trip; in a Cluster, each to the node that has its key.

    Args:
        alone: the probe that is asked also while Redis is away.
        others: the probes that are asked where Redis answers.
        clock: seconds, monotonic.
    """

    def __init__(self, context: Context, alone: Probe, others: Sequence[Probe], clock: Callable[[], float]) -> None:
        self._redis = context.redis
        self._uncovered = verdict.uncovered_features(context.config)
        self._alone = alone
        self._others = others
        self._new_probe = partial(NodeProbe, self._uncovered, context.config.socket_timeout, clock)
        #: By the address of the node.
        self._probes: dict[str, NodeProbe] = {}
        self._unanswered: set[str] = set()
        #: The nodes of the last look.
        self._nodes: Sequence[RedisNode] = ()
        #: Since when no node of the Cluster is known.
        self._clock = clock
        self._lost_at: float | None = None

    def look(self) -> Iterator[Check]:
        if self._redis is None:
            yield Check("redis", "pass", "disabled", {"enabled": False})
            yield from checks_of(self._alone, [])
            return
        try:
            self._nodes, self._lost_at = self._redis.nodes(), None
        except BackendError as error:
            yield self._unknown(error)
            yield from checks_of(self._alone, [])
            return
        probes = [self._alone, *self._others]
        asked = [_questions(self._redis, probe) for probe in probes]
        found = self._ask(self._redis, [question for mine in asked for question in mine])
        yield from self._own_checks(found)
        if isinstance(self._redis, SentinelClient):
            yield from _check_sentinels(self._redis)
        for probe, mine in zip(probes, asked, strict=True):
            replies = [question.reply for question in mine]
            is_away = any(isinstance(reply, BackendUnavailable) for reply in replies)
            if probe is self._alone:
                yield from checks_of(probe, [] if is_away or _is_down(found) else replies)
            elif not is_away and not _is_down(found):
                yield from checks_of(probe, replies)

    def hung(self, seconds: float) -> list[Check]:
        if self._redis is None:
            return []
        times = sum(node.breaker.times_opened for node in self._nodes)
        data = {"enabled": True, "times_away": times, "away_for": round(seconds, 3)}
        who = ", ".join(sorted(filter(None, self._unanswered))) or "it"
        output = f"{who} has not answered for {seconds:.1f} s{self._fallbacks()}"
        return [Check("redis", verdict.of_error(BackendUnavailable(), self._uncovered), output, data)]

    def _ask(self, redis: RedisClient, questions: Sequence[_Question]) -> dict[str, NodeFindings]:
        """The findings at all nodes, by their addresses, and the replies to these questions."""
        nodes = {address_in(redis, node): node for node in self._nodes}
        self._probes = {address: self._probes.get(address) or self._new_probe() for address in nodes}
        self._unanswered = set(nodes)
        looks = [partial(self._look, address, node, questions) for address, node in nodes.items()]
        found = dict(zip(nodes, at_once(looks), strict=True))
        moved = []
        for question in questions:
            if isinstance(question.place, BackendUnavailable):
                question.reply = question.place
            elif isinstance(question.reply, BackendUnavailable) and not _is_down(found):
                moved.append(question)
        if moved:
            _ask_again(redis, moved)
        return found

    def _look(self, address: str, node: RedisNode, questions: Sequence[_Question]) -> NodeFindings:
        mine = [question for question in questions if question.place is node]
        found = self._probes[address].look(node, [question.command for question in mine])
        for question, reply in zip(mine, found.replies, strict=True):
            question.reply = reply
        self._unanswered.discard(address)
        return found

    def _own_checks(self, found: dict[str, NodeFindings]) -> list[Check]:
        alone = found.get("")
        checks = checks_of_cluster(found) if alone is None else alone.checks
        server = checks[0]
        if verdict.is_away(server):
            checks[0] = replace(server, output=server.output + self._fallbacks())
        return checks

    def _unknown(self, error: BackendError) -> Check:
        """No node of the Cluster is known."""
        data: dict[str, Any] = {"enabled": True, "times_away": 0}
        output = str(error).removesuffix(".")
        if isinstance(error, BackendUnavailable):
            self._lost_at = self._clock() if self._lost_at is None else self._lost_at
            data["away_for"] = round(self._clock() - self._lost_at, 3)
            output += self._fallbacks()
        return Check("redis", verdict.of_error(error, self._uncovered), output, data)

    def _fallbacks(self) -> str:
        if self._uncovered:
            return f"; no fallback for {' and '.join(self._uncovered)}"
        return "; fallbacks are in use"


def _check_sentinels(client: SentinelClient) -> Iterator[Check]:
    failing = client.failing_sentinels
    if failing:
        output = f"no answer, or a refusal, from {len(failing)} of {client.sentinels} Sentinels: {', '.join(failing)}"
        yield Check("sentinels", "warn", output, {"unanswered": failing})


def _is_down(found: dict[str, NodeFindings]) -> bool:
    """Does no node answer?"""
    return all(each.error is not None for each in found.values())


def _questions(redis: RedisClient, probe: Probe) -> list[_Question]:
    """Each for the node that has its key; without a key, for the node of the question before."""
    found: list[_Question] = []
    for command in probe.commands:
        place = found[-1].place if found and len(command) == 1 else _place(redis, str(command[1]))
        found.append(_Question(command, place))
    return found


def _place(redis: RedisClient, key: str) -> RedisNode | BackendUnavailable:
    try:
        return redis.at(key)
    except BackendUnavailable as error:
        return error


def _ask_again(redis: RedisClient, moved: Sequence[_Question]) -> None:
    """The node of these has answered, and does not have their keys: the client has learned of another by now."""
    try:
        replies = redis.pipeline([question.command for question in moved], each=True)
    except BackendError:
        return  # as it was
    for question, reply in zip(moved, replies, strict=True):
        question.reply = reply
