"""What the sidecar promises, measured. Each package is run by one command and writes its numbers into docs/."""
