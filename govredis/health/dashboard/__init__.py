"""The dashboard: one page of what a person on call looks at, and the resources that it names."""

from .dashboard import Dashboard
from .page import PageResource

__all__ = ["Dashboard", "PageResource"]
