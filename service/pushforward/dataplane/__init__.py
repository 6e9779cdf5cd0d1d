"""What Pushforward does, apart from how it is asked: the HTTP API and the commands both call this."""

from pushforward.dataplane.admission import Admission
from pushforward.dataplane.dispatch import Dispatcher
from pushforward.dataplane.plane import Dataplane, Model, Scores
from pushforward.dataplane.request import Limits, Options, Ticket

__all__ = ["Admission", "Dataplane", "Dispatcher", "Limits", "Model", "Options", "Scores", "Ticket"]
