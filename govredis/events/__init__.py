"""Events: published to streams in Redis, heard by listeners and by groups of consumers."""

from .bus import EventBus
from .changes import StatusChanges
from .consumer import EventConsumer
from .event import DeadEvent, Event
from .listener import EventListener

__all__ = ["DeadEvent", "Event", "EventBus", "EventConsumer", "EventListener", "StatusChanges"]
