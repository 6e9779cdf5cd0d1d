"""Publishing: certify a trained field and put it into the store as an immutable version."""

from pushforward.publish.publish import publish

__all__ = ["publish"]
