"""From YAML and the environment to immutable typed values, or to errors that say where, what and how to fix it."""
