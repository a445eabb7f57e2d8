"""Bytes into memory: from a shard directory, by one of several readers, to their final places."""
