"""Sessions: SessionCache, which says which agent a session belongs to."""

from .cache import SessionBinding, SessionCache, SessionParity

__all__ = ["SessionBinding", "SessionCache", "SessionParity"]
