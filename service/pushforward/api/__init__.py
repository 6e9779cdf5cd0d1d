"""The HTTP door: what a request and an answer look like, and nothing about how rows are solved."""
