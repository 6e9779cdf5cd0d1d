"""The model store: immutable versions of models in folders that verify themselves.

``manifest`` says what a version is, ``catalog`` finds, labels and verifies versions (both without
torch); ``publish`` writes them.
"""
