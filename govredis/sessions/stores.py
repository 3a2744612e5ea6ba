"""What a store of sessions is: the port that Redis alone, and PostgreSQL with Redis as its cache, implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .binding import Order, SessionBinding
from .local import Debt


class Sessions(Protocol):
    """Sessions bound to agents. Every method raises BackendUnavailable where it cannot answer.

    The `tell_` methods carry out what was done while it could not be asked: what others did meanwhile stands.
    """

    def bind(self, order: Order) -> tuple[SessionBinding, bool]:
        """The binding; and False if a revocation overtook it. With if_absent: that of whoever has it, if anybody."""

    def get(self, session_id: str, touch: bool) -> SessionBinding | None: ...

    def unbind(self, session_id: str) -> bool:
        """Was it bound?"""

    def for_agent(self, agent_id: str) -> list[str]: ...

    def unbind_agent(self, agent_id: str) -> int:
        """How many ended?"""

    def tell_unbound(self, debts: Sequence[Debt]) -> None: ...

    def tell_agent_unbound(self, debt: Debt) -> None: ...

    def tell_bound(self, debts: Sequence[tuple[Debt, Order]]) -> list[SessionBinding | None]:
        """For each what stands instead of it: another's binding; None if it was bound now, or revoked since."""
