"""What Pushforward is measured against: the solvers, and services around them."""
