"""What the suite has tried: a table by failure class."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    """One class of failures, or one situation."""

    tried: int = 0
    survived: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, survived: bool, seconds: float | None) -> None:
        """Count a case."""
        self.tried += 1
        self.survived += survived
        if seconds is not None:
            self.seconds.append(seconds)

    def text(self, name: str) -> str:
        """The row, to be read."""
        times = f"{statistics.median(self.seconds):8.2f} s {max(self.seconds):8.2f} s" if self.seconds else ""
        return f"{name:<44} {self.tried:>6} {self.survived:>9} {times}".rstrip()


@dataclass
class Summary:
    """Counts of a whole test session."""

    by_class: dict[str, Row] = field(default_factory=dict)
    by_situation: dict[str, Row] = field(default_factory=dict)

    def add(self, failure: str, situation: str, survived: bool, recovery_seconds: float | None = None) -> None:
        """Count a case. `recovery_seconds`: from the start of the next run's processes until it trains."""
        for rows, name in ((self.by_class, failure), (self.by_situation, situation)):
            rows.setdefault(name, Row()).add(survived, recovery_seconds)

    def to_plain(self) -> list[dict[str, tuple[int, int, list[float]]]]:
        """What `take` understands, of types that every process can be told."""
        return [
            {name: (row.tried, row.survived, row.seconds) for name, row in rows.items()}
            for rows in (self.by_class, self.by_situation)
        ]

    def take(self, counted: list[dict[str, tuple[int, int, list[float]]]]) -> None:
        """Add what another process has counted."""
        for rows, others in zip((self.by_class, self.by_situation), counted, strict=True):
            for name, (tried, survived, seconds) in others.items():
                row = rows.setdefault(name, Row())
                row.tried += tried
                row.survived += survived
                row.seconds += seconds

    def lines(self) -> list[str]:
        """The tables; nothing where nothing was tried."""
        if not self.by_class:
            return []
        heading = f"{'tried':>6} {'survived':>9} {'recovery':>10} {'longest':>10}"
        total = Row()
        for row in self.by_class.values():
            total.tried += row.tried
            total.survived += row.survived
            total.seconds += row.seconds
        return [
            f"{'failure':<44} {heading}",
            *(row.text(name) for name, row in sorted(self.by_class.items())),
            total.text("all"),
            "",
            f"{'while the run was in':<44} {heading}",
            *(row.text(name) for name, row in sorted(self.by_situation.items())),
        ]
