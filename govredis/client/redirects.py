"""A Cluster's answers that a key is, or may be, elsewhere. Nothing was carried out."""

from __future__ import annotations

from .._redis_urls import Host
from ..errors import BackendUnavailable


class NotServedHere(BackendUnavailable):
    """The node is there, and does not serve this key, or not now. Or no node has the key's slot."""


class Redirected(NotServedHere):
    """Another node has the key's slot; with `ask`, it gets the slot, and has this key already."""

    def __init__(self, text: str, ask: bool, slot: int, address: Host) -> None:
        super().__init__(text)
        self.ask = ask
        self.slot = slot
        self.address = address

    def __reduce__(self) -> tuple[type[Redirected], tuple[str, bool, int, Host]]:
        return Redirected, (str(self), self.ask, self.slot, self.address)


class TryAgain(NotServedHere):
    """The slot is on its way to another node, and the command's keys are not together."""
