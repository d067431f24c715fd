"""What clients may take of a front end: connections, and memory for calls that are not complete.

Each bound is a part of what is free, so that those who take much leave room for others, however many they are (dynamic
thresholds, Choudhury and Hahne 1998): a connection may hold an eighth of the free memory, and all connections of one IP
address half of it. An address may have as many connections as are free. So one address gets a third of the memory and
half of the connections at most. All unix sockets are one address.
"""

from __future__ import annotations

from typing import Final

CONNECTION_PART: Final = 8
ADDRESS_PART: Final = 2
"""Of what is free."""


class Budget:
    """Memory that unfinished calls of all connections may hold.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0

    def allows(self, connection_bytes: int, more: int) -> bool:
        """Whether a connection may hold `connection_bytes` in all, `more` of them in addition to what is counted."""
        return connection_bytes <= (self.size - self.held) // CONNECTION_PART

    def count(self, more: int) -> None:
        """Note that so much more is held, or less."""
        self.held += more


class AddressBudget(Budget):
    """What one IP address takes of the whole.

    Args:
        address: its name in `Room`.
    """

    def __init__(self, whole: Budget, address: str) -> None:
        super().__init__(whole.size)
        self.whole = whole
        self.address = address
        self.connections = 0

    def allows(self, connection_bytes: int, more: int) -> bool:
        whole = self.whole
        if not whole.allows(connection_bytes, more):
            return False
        return self.held + more <= (whole.size - whole.held) // ADDRESS_PART

    def count(self, more: int) -> None:
        self.held += more
        self.whole.count(more)


class Room:
    """Who is connected.

    Args:
        connections: in all.
        held_bytes: what their unfinished calls may hold in all.
    """

    def __init__(self, connections: int, held_bytes: int) -> None:
        self.budget = Budget(held_bytes)
        self._limit = connections
        self._taken = 0
        self._addresses: dict[str, AddressBudget] = {}

    def enter(self, address: str) -> AddressBudget | None:
        """A connection of this address has come: its budget until it `leave`s, or None when it must be closed."""
        budget = self._addresses.get(address)
        if budget is None:
            budget = AddressBudget(self.budget, address)
        free = self._limit - self._taken
        # Who has none may have the last one.
        if free <= 0 or budget.connections > free:
            return None
        self._addresses[address] = budget
        self._taken += 1
        budget.connections += 1
        return budget

    def leave(self, budget: AddressBudget) -> None:
        """One of its connections is gone."""
        self._taken -= 1
        budget.connections -= 1
        if not budget.connections:
            del self._addresses[budget.address]
