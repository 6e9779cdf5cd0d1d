"""What Pushforward does, apart from how it is asked: the HTTP API and the commands both call this."""

from pushforward.dataplane.dispatch import Dispatcher, Limits, Options
from pushforward.dataplane.plane import Dataplane, Model, Scores

__all__ = ["Dataplane", "Dispatcher", "Limits", "Model", "Options", "Scores"]
