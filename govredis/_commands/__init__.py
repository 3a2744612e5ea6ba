"""The commands of `govredis`, on the environment's GovRedis, and of `flask govredis`, on the app's."""

from ._dashboard import dashboard
from ._doctor import doctor
from ._events import events
from ._health import health
from ._history import history, outages
from ._invocation import CommandFailed, work_on
from ._limits import limits
from ._locks import locks
from ._metadata import metadata, outbox
from ._migrate import migrate
from ._sessions import sessions

__all__ = ["COMMANDS", "CommandFailed", "work_on"]

COMMANDS = (migrate, health, history, outages, doctor, dashboard, locks, limits, sessions, metadata, outbox, events)
