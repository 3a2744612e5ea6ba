"""Where locks are held: on Redis, and in the lock files of this host. A holder has both while Redis is there."""
