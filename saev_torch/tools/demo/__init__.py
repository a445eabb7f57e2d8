"""The whole way once, on a real model: `python -m saev_torch demo`."""
