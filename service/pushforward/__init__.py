"""Pushforward: a model server for continuous normalizing flows.

Importing the package loads nothing; each room is imported by its own name, as in
``from pushforward.store.catalog import Catalog``.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
