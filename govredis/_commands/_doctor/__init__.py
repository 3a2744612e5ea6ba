"""`govredis doctor`: each fault of a deployment, its consequence and the remedy."""

from ._command import doctor

__all__ = ["doctor"]
