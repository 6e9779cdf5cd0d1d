"""Pushforward: a model server for continuous normalizing flows.

Importing the package loads nothing; each room is imported by its own name, as in
``from pushforward.store.catalog import Catalog``.
"""

import os

# Read when ONNX Runtime is imported, which would otherwise send what it does to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = ["__version__"]
