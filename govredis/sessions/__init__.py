"""Sessions: SessionCache, which says which agent a session belongs to."""

from .cache import SessionBinding, SessionCache

__all__ = ["SessionBinding", "SessionCache"]
