"""`python -m govredis`: the command `govredis`, for where its script is not on the PATH."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
