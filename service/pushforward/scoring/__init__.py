"""From log-densities to decisions: p-values, flags and attributions. NumPy only."""
