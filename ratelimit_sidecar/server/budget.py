"""Bounds on what clients may use of a front end: connections, memory for calls that are not complete, and the open
calls of methods that allow only a few.

Each bound is a part of what is free, so that clients who use much leave room for others, however many they are (dynamic
thresholds, Choudhury and Hahne 1998). A connection may hold an eighth of the free memory or places, and all connections
of one IP address half of them. An address may have as many connections as are free. So one address gets at most a third
of the memory and of the places, and half of the connections. All unix sockets together are one address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Final

from ratelimit_sidecar.server.turns import StepQueue

CONNECTION_DIVISOR: Final = 8
ADDRESS_DIVISOR: Final = 2
"""The connections of one address may hold half of the free memory, and one connection an eighth
(`CONNECTION_DIVISOR`)."""


class Budget:
    """Counts the memory that unfinished calls of all connections hold.

    Args:
        size: the most bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0

    def allows(self, connection_bytes: int, more: int) -> bool:
        """Whether a connection may hold `connection_bytes` in all, of which `more` are not counted yet."""
        return connection_bytes <= (self.size - self.held) // CONNECTION_DIVISOR

    def count(self, more: int) -> None:
        """Add `more` bytes to the count, or subtract if it is negative."""
        self.held += more


class AddressBudget(Budget):
    """The memory and connections of one IP address, as a part of the whole, and its turns of the loop.

    Args:
        address: its name in `ConnectionLimiter`.
    """

    def __init__(self, whole: Budget, address: str) -> None:
        super().__init__(whole.size)
        self.whole = whole
        self.address = address
        self.connections = 0
        # Its turns of the loop (`turns.py`).
        self.call_queue = StepQueue()
        """Of its connections whose calls wait to be read."""
        self.handshake_queue = StepQueue()
        """Of its connections whose TLS handshake is not over."""
        self.stream_queue = StepQueue()
        """Of its streaming calls."""

    def allows(self, connection_bytes: int, more: int) -> bool:
        whole = self.whole
        if not whole.allows(connection_bytes, more):
            return False
        return self.held + more <= (whole.size - whole.held) // ADDRESS_DIVISOR

    def count(self, more: int) -> None:
        self.held += more
        self.whole.count(more)


class ConnectionLimiter:
    """Admits connections and hands out per-address memory budgets.

    Args:
        connections: the most connections.
        held_bytes: the most memory for unfinished calls of all of them.
    """

    def __init__(self, connections: int, held_bytes: int) -> None:
        self.budget = Budget(held_bytes)
        self._limit = connections
        self._taken = 0
        self._addresses: dict[str, AddressBudget] = {}

    def enter(self, address: str) -> AddressBudget | None:
        """Admit a new connection of this address. Returns its budget, to be given to `leave` later, or None:
        close it.
        """
        budget = self._addresses.get(address)
        if budget is None:
            budget = AddressBudget(self.budget, address)
        free = self._limit - self._taken
        # An address without connections may get the last one.
        if free <= 0 or budget.connections > free:
            return None
        self._addresses[address] = budget
        self._taken += 1
        budget.connections += 1
        return budget

    def is_crowded(self, budget: AddressBudget) -> bool:
        """Whether this address has more than half as many connections as there are free ones; it may have as many."""
        return 2 * budget.connections > self._limit - self._taken

    def leave(self, budget: AddressBudget) -> None:
        """Note that a connection of this budget is closed."""
        self._taken -= 1
        budget.connections -= 1
        if not budget.connections:
            del self._addresses[budget.address]


class Places:
    """Counts the open calls of a method that can have only so many.

    Args:
        size: the most calls.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self.refused = 0
        """Calls that got no place, since the start."""
        self._held: Counter[Hashable] = Counter()
        """The places that each connection, and each address, holds."""

    def enter(self, connection: Hashable, address: Hashable) -> bool:
        """Take a place, to be given back to `leave`. Returns False if there is none for this client.

        Args:
            connection: differs from all other connections and addresses.
        """
        free, held = self.free, self._held
        # A client without a place may get the last one.
        if free <= 0 or held[connection] * CONNECTION_DIVISOR > free or held[address] * ADDRESS_DIVISOR > free:
            self.refused += 1
            return False
        self.free -= 1
        held.update((connection, address))
        return True

    def leave(self, connection: Hashable, address: Hashable) -> None:
        """Note that a call with a place is over."""
        self.free += 1
        for holder in (connection, address):
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]
