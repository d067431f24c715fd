"""A simulator of admission: one limit over several regions, on virtual time, enforced in six ways.

Regions get requests and admit or deny them; what they say to each other takes the time that real links take. The two
modes of this project run as they are in production, on the nodes and network of `simulation`; beside them a central
store, a static split and the max-merge sketch. Everything random comes from one seed: the same seed gives the same
table, byte for byte.

Run by `make simulate`; what it says and why is in docs/simulation.md. Times are integer microseconds.
"""
