"""What lies on disk: metadata, shards, checksums, and safe access to files that a stranger may have written."""
