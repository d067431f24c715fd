"""Virtual time: a clock and queue of events, links with their faults, and whole sidecars on them, all from one seed.

Tests and benchmarks stand on it (docs/simulation.md). `loop`, `network` and `clock` are time and what lies between
nodes; `node` is a sidecar and `cluster` several; `watched` looks at all they do from outside; the rest draws what
happens to them.
"""
