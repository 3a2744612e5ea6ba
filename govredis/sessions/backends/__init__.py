"""Where sessions are kept: Redis, or rows in PostgreSQL with Redis as their cache."""
