"""How long each part of a run took. Owner's process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """`start` and `end` are seconds since the run began."""

    name: str
    start: float
    end: float


class Phases:
    """Collects phases from `began` on, a time of time.monotonic()."""

    def __init__(self, began: float | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self.list: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done meanwhile is `name`. It counts when it fails, too."""
        start = time.monotonic() - self.began
        try:
            yield
        finally:
            self.list.append(Phase(name, start, time.monotonic() - self.began))

    @property
    def total(self) -> float:
        return time.monotonic() - self.began
