"""Slots of functions that have fewer of them than there are workers: they are lent one by one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

Loan: TypeAlias = tuple[int, int]
"""The worker, and its number for the loan."""


@dataclass(slots=True)
class _Function:
    """`held` are never more than the limit, but after it was lowered; `line` in the order of asking."""

    limit: int = 0
    held: set[Loan] = field(default_factory=set)
    line: dict[Loan, None] = field(default_factory=dict)


class Pool:
    """First come, first served."""

    def __init__(self, grant: Callable[[Loan], None]) -> None:
        """`grant` is called when a slot is there."""
        self._grant = grant
        self._functions: dict[str, _Function] = {}
        self._of: dict[Loan, str] = {}

    def take(self, loan: Loan, name: str, limit: int) -> None:
        """A worker wants a slot of a function; the newest limit holds."""
        function = self._functions.setdefault(name, _Function())
        function.limit = limit
        function.line[loan] = None
        self._of[loan] = name
        self._admit(function)

    def back(self, loan: Loan) -> None:
        """It is not needed any more, had or not."""
        name = self._of.pop(loan, None)
        if name is None:
            return
        function = self._functions[name]
        function.line.pop(loan, None)
        function.held.discard(loan)
        self._admit(function)
        if not function.held and not function.line:
            del self._functions[name]

    def gone(self, worker: int) -> None:
        """The worker is dead: what it had and what it wanted is not needed any more."""
        mine = [loan for loan in self._of if loan[0] == worker]
        for loan in mine:  # first out of the lines: a dead one must not be granted what another of its loans frees
            self._functions[self._of[loan]].line.pop(loan, None)
        for loan in mine:
            self.back(loan)

    def _admit(self, function: _Function) -> None:
        while function.line and len(function.held) < function.limit:
            loan = next(iter(function.line))
            del function.line[loan]
            function.held.add(loan)
            self._grant(loan)
