"""Probe: the one shape of all probes; and the rule for errors, which is the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ...client import Command
from ...errors import BackendError, BackendUnavailable, ConfigurationError, NoRight, NotTaken
from ..report import Check


class Probe(Protocol):
    """Looks at one thing.

    Attributes:
        name: of its check; it may make others too.
        commands: of Redis, sent in one round trip with those of the other probes; in a Cluster, each to the node that
            has its key. A command of a single word has none, and goes to the node of the command before it.
    """

    name: str
    commands: tuple[Command, ...]

    def check(self, replies: Sequence[Any]) -> list[Check]:
        """The findings.

        Args:
            replies: to `commands`; an error in the place of a reply that was refused alone.

        May raise what its servers raise.
        """
        ...


def checks_of(probe: Probe, replies: Sequence[Any]) -> list[Check]:
    """The checks of a probe; [] where its server is away, for the server's own check says so.

    A right that an ACL refuses is no fault, nor a command that a proxy does not take: perhaps this deployment does not
    use the feature.
    """
    try:
        return probe.check(replies)
    except (BackendUnavailable, ConfigurationError):
        return []
    except (NoRight, NotTaken) as error:
        return [Check(probe.name, "pass", f"unknown: {error}", {})]
    except BackendError as error:
        return [Check(probe.name, "warn", str(error), {})]


def answered(replies: Sequence[Any]) -> Sequence[Any]:
    """The replies. Raises the first error among them."""
    for reply in replies:
        if isinstance(reply, BackendError):
            raise reply
    return replies
