"""Where the windows of rate limits are kept: Redis, PostgreSQL, the process's memory."""
