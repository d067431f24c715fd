"""Three regions on one machine: real Envoys, sidecars, traffic, and a check of the promise they make together."""


class DemoError(Exception):
    """The demo cannot go on; the text is for its user."""
