"""The mesh: sidecars stream what they admitted to their siblings. Sans-I/O below `mesh`, which moves the bytes."""
