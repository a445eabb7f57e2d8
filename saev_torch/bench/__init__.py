"""How fast the loaders are on a machine, and what to do about it: `python -m saev_torch bench`."""
