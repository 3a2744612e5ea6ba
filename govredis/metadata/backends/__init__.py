"""Where metadata keeps its values: Redis. The in-process tier before it is local.py."""
