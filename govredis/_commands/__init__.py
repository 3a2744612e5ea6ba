"""The commands of `govredis`, on the environment's GovRedis, and of `flask govredis`, on the app's."""

from ._invocation import work_on
from ._limits import limits
from ._locks import locks
from ._metadata import metadata, outbox
from ._servers import doctor, health, migrate
from ._sessions import sessions

__all__ = ["COMMANDS", "work_on"]

COMMANDS = (migrate, health, doctor, locks, limits, sessions, metadata, outbox)
