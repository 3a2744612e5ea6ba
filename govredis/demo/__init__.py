"""The story that `govredis demo` tells."""


def run() -> int:
    raise NotImplementedError
