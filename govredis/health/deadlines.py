"""The deadlines of a health check, in seconds. Redis's own are its timeouts, which are settings."""

#: One statement in PostgreSQL.
POSTGRES: float = 0.5
#: All that is asked of one server, beyond the time in which one call finds out that the server is away.
SPARE: float = 0.5
