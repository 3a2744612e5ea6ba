"""BrokerProducer: a connection to an app's broker for a thread that publishes by itself."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
from typing import Any

from celery import Celery

from ...errors import BackendError, printable
from ._broker import broker_secrets

#: AMQP confirms a message before we forget it. The thread logs that a broker is away, and tries again; kombu would try
#: up to every 30 s, and log nothing.
TRANSPORT_OPTIONS = {"confirm_publish": True, "max_retries": 0}


class BrokerProducer:
    """A producer over a connection of its own. For one thread."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None
        self._producer: Any = None

    def connected(self) -> Any:
        """The producer, over one connection, made when the first message is due."""
        if self._producer is None:
            self._connection = self._app.connection_for_write(transport_options=TRANSPORT_OPTIONS)
            self._producer = self._app.amqp.Producer(self._connection, auto_declare=False)
        return self._producer

    @property
    def connection_errors(self) -> tuple[type[Exception], ...]:
        """The transport's errors of a connection that is over."""
        errors: tuple[type[Exception], ...] = self._connection.connection_errors
        return errors

    def disconnect(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):  # it may be broken
                connection.release()

    def said(self, error: Exception) -> str:
        """The text of an error, without the broker's secrets."""
        if isinstance(error, BackendError):
            return str(error)  # has no secrets
        return printable(broker_secrets(self._app).hide(str(error)))
