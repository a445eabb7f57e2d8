"""From activations that others have written to shards: one module for each kind of file, one interface for all."""
