"""The commands that work on a GovRedis: of `govredis`, on the environment's, and of `flask govredis`, on the app's."""

from ._invocation import work_on
from ._limits import limits
from ._locks import locks
from ._metadata import metadata, outbox
from ._servers import health, migrate
from ._sessions import sessions

__all__ = ["COMMANDS", "work_on"]

COMMANDS = (migrate, health, locks, limits, sessions, metadata, outbox)
