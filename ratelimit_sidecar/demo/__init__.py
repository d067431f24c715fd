"""Three regions on one machine: real Envoys, sidecars, traffic, and a check of the promise they make together."""


class DemoError(Exception):
    """The demo can't go on; its text is for whoever runs it."""
