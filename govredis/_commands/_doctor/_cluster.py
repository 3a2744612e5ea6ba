"""A Cluster, and the primary of Sentinels: replicas, failovers, slots, and the addresses that the nodes announce."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..._at_once import at_once
from ...client import RedisClient, RedisNode
from ...client.slots import SLOTS
from ...errors import BackendError
from ...health.nodes import address_in
from ._diagnosis import Diagnosis, Fact
from ._servers import Measured, measured_of

#: Seconds that the clocks of two primaries may differ.
_APART = 0.1
#: Primaries that a failover needs: the majority of them decides.
_LEAST = 3
_OPEN_SLOT = re.compile(r"\[(\d+)-[<>]-")

Address = tuple[str, int]


@dataclass(slots=True)
class _Shape:
    """The Cluster by the word of a node.

    Attributes:
        primaries: the addresses of those with slots, by their ids.
        replicas: how many of them live, by the id of their primary.
        slots: those that a node has.
    """

    primaries: dict[str, str] = field(default_factory=dict)
    replicas: Counter[str] = field(default_factory=Counter)
    slots: set[int] = field(default_factory=set)


def of_cluster(redis: RedisClient, patience: float) -> Iterator[Fact | Diagnosis]:
    """The facts and faults of a Cluster. Raises BackendError.

    Args:
        patience: seconds to connect.
    """
    nodes = [node for node in redis.nodes() if node.breaker.closed]
    yield from _of_addresses([address_in(redis, node) for node in redis.nodes() if node not in nodes], "")
    if not nodes:
        return
    shape = _shape_of(nodes[0])
    yield Fact("cluster", f"{len(shape.primaries)} primaries, {shape.replicas.total()} replicas")
    yield from _of_shape(shape)
    answers = at_once([partial(_reached, address, patience) for address in _replicas_of(nodes[0])])
    yield from _of_addresses([text for text in answers if text], "a replica at ")
    half_moved = {slot for node in nodes for slot in _half_moved(node)}
    if half_moved:
        yield Diagnosis(
            "cluster",
            f"half moved: the slots {_ranges(half_moved)}",
            "until they have arrived, locks of their keys raise LockUnavailable, and all else has fallbacks",
            "let the resharding end; if none runs, `redis-cli --cluster fix` ends it",
            is_fault=False,
        )
    yield from _of_coverage([address_in(redis, node) for node in nodes if _setting(node, _COVERAGE) == "yes"])
    clocks = at_once([partial(measured_of, node) for node in nodes])
    yield from of_clocks(dict(zip([address_in(redis, node) for node in nodes], clocks, strict=True)))


def of_failovers(redis: RedisClient, nodes: Sequence[RedisNode]) -> Iterator[Diagnosis]:
    """Primaries that take writes also while they are cut off from their replicas. Raises BackendError."""
    alone = [node for node in nodes if _takes_writes_alone(node)]
    if alone:
        who = ", ".join(filter(None, (address_in(redis, node) for node in alone))) or "the primary"
        yield Diagnosis(
            "replication",
            f"min-replicas-to-write or min-replicas-max-lag is 0: {who}",
            "a primary that is cut off takes writes, locks too, which the failover loses",
            "set min-replicas-to-write 1 and min-replicas-max-lag 10 where each primary has two replicas or more",
            is_fault=False,
        )


def of_clocks(measured: Mapping[str, Measured]) -> Iterator[Diagnosis]:
    """Clocks of primaries that differ.

    Args:
        measured: by the addresses.
    """
    fast = max(measured, key=lambda address: measured[address].ahead)
    slow = min(measured, key=lambda address: measured[address].ahead)
    apart = measured[fast].ahead - measured[slow].ahead
    # Each is known within half a round trip.
    if apart - (measured[fast].round_trip + measured[slow].round_trip) / 2 > _APART:
        yield Diagnosis(
            "clocks",
            f"the clock of {fast} is {apart:.1f} s ahead of that of {slow}",
            "lock tokens and limits go back in time when a slot moves from one to the other",
            "have NTP set both, by chrony or systemd-timesyncd for one",
        )


def _of_shape(shape: _Shape) -> Iterator[Diagnosis]:
    lonely = sorted(address for name, address in shape.primaries.items() if not shape.replicas[name])
    if lonely:
        yield Diagnosis(
            "cluster",
            f"primaries without a replica that lives: {', '.join(lonely)}",
            "if such a primary fails, its keys are away until it is back, and lost with its disk",
            "add a replica to each: `redis-cli --cluster add-node ... --cluster-slave`",
            is_fault=False,
        )
    if len(shape.primaries) < _LEAST:
        yield Diagnosis(
            "cluster",
            f"primaries: {len(shape.primaries)}",
            "a failover needs the votes of more than half of them, and two cannot spare any",
            "have three primaries or more",
            is_fault=False,
        )
    missing = set(range(SLOTS)) - shape.slots
    if missing:
        yield Diagnosis(
            "cluster",
            f"no node has the slots {_ranges(missing)}",
            "their keys are away, for ever",
            "give them to nodes: `redis-cli --cluster fix`",
        )


def _of_addresses(unreached: Sequence[str], kind: str) -> Iterator[Diagnosis]:
    for each in unreached:
        yield Diagnosis(
            "addresses",
            f"the Cluster announces {kind}{each}, and this host does not reach it",
            "each client needs all nodes: those that it does not reach are away for it",
            "start that node; or set its cluster-announce-ip and cluster-announce-port to an address that clients reach"
            " (in containers and behind NAT), and open the firewall",
        )


_COVERAGE = "cluster-require-full-coverage"


def _of_coverage(addresses: Sequence[str]) -> Iterator[Diagnosis]:
    if addresses:
        yield Diagnosis(
            "cluster",
            f"{_COVERAGE} is yes: {', '.join(addresses)}",
            "while a single primary is away, all others refuse every call, until its replica has its place",
            f"CONFIG SET {_COVERAGE} no on every node, and in redis.conf",
            is_fault=False,
        )


def _takes_writes_alone(node: RedisNode) -> bool:
    return "0" in (_setting(node, "min-replicas-to-write"), _setting(node, "min-replicas-max-lag"))


def _setting(node: RedisNode, name: str) -> str | None:
    """None: a managed service does not tell."""
    try:
        _, value = node.call("CONFIG", "GET", name)
    except (BackendError, ValueError):
        return None
    return str(value.decode(errors="replace"))


def _shape_of(node: RedisNode) -> _Shape:
    # CLUSTER SLOTS has no replica that has not told its offset yet.
    shape = _Shape()
    for line in _lines(node):
        name, address, flags, primary, _, _, _, _, *slots = line.split()
        if "slave" in flags and "fail" not in flags:
            shape.replicas[primary] += 1
        ranges = [part.split("-") for part in slots if not part.startswith("[")]
        if "master" in flags and ranges:
            shape.primaries[name] = address.partition("@")[0]
            shape.slots.update(slot for part in ranges for slot in range(int(part[0]), int(part[-1]) + 1))
    return shape


def _lines(node: RedisNode) -> list[str]:
    text: bytes = node.call("CLUSTER", "NODES")
    return text.decode(errors="replace").splitlines()


def _replicas_of(node: RedisNode) -> list[Address]:
    """Their addresses as clients are told them."""
    own = node.name.partition(" at ")[2].rpartition(":")[0]  # a node that does not know its address leaves it out
    found: set[Address] = set()
    for _, _, _, *replicas in node.call("CLUSTER", "SLOTS"):
        found.update(((host or b"").decode().strip("?") or own, int(port)) for host, port, *_ in replicas)
    return sorted(found)


def _reached(address: Address, patience: float) -> str:
    """ "" where something listens there, else the address and the error."""
    try:
        socket.create_connection(address, timeout=patience).close()
    except OSError as error:
        return f"{address[0]}:{address[1]} ({error})"
    return ""


def _half_moved(node: RedisNode) -> list[int]:
    mine = next((line for line in _lines(node) if "myself" in line), "")
    return [int(slot) for slot in _OPEN_SLOT.findall(mine)]


def _ranges(slots: set[int]) -> str:
    """ "0-5460, 7000"; the first few."""
    found: list[list[int]] = []
    for slot in sorted(slots):
        if found and found[-1][1] == slot - 1:
            found[-1][1] = slot
        else:
            found.append([slot, slot])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in found[:5]]
    return ", ".join(shown) + (", ..." if len(found) > 5 else "")
