"""Pending: a reply that is taken later than its command was sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis

from .._fork import notice_fork
from ..errors import BackendUnavailable

if TYPE_CHECKING:
    from .node import RedisNode


class Pending:
    """A command that was sent, and its reply, which is taken later. A reply that nobody takes costs its connection.

    For one thread at a time.
    """

    __slots__ = ("_client", "_connection", "_period")

    def __init__(self, client: RedisNode, connection: Any, period: int) -> None:
        self._client = client
        self._connection = connection
        self._period = period

    def reply(self) -> Any:
        """Wait for the reply, and return it; once only.

        Raises BackendUnavailable. Raises BackendError, also where the server did not know a script: it is not sent
        again.
        """
        notice_fork()
        client = self._client
        connection, self._connection = self._connection, None
        if connection is None:
            raise BackendUnavailable("the reply was taken before")
        try:
            return client._exchange(client._waiting, connection, b"", 0)
        except redis.RedisError as error:
            raise client._errors.of_connection(error, self._period) from error
