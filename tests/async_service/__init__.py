"""govredis beside an async service on one Redis."""
