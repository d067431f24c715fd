"""What survives a restart: snapshots of all buckets in a file."""
