"""From a model to a shard directory: taps, recording, crash-safe writing, labels, checksums."""
