"""``python -m pushforward.cli``."""

from pushforward.cli import main

main()
