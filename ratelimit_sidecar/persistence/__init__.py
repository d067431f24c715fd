"""State that survives a restart: all buckets but strict ones in a file, or all replicated buckets in Redis."""
