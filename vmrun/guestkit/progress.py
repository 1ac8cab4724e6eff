"""How a build tells its caller how far it is, and the teller for callers that have nothing to draw with."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """What `kit.build` reports to. Calls come from the calling thread only."""

    def step(self, title: str, total: int | None = None) -> None:
        """A step begins, and the one before has ended; `total` is about how many `advance` calls follow."""

    def advance(self, detail: str = "") -> None:
        """One more part of the step is done; `detail` names it, for people."""


class Silent:
    """Says nothing."""

    def step(self, title: str, total: int | None = None) -> None:
        pass

    def advance(self, detail: str = "") -> None:
        pass


class Lines:
    """A line for each step, and within a step a line every `every` seconds: for logs and plain terminals."""

    def __init__(self, out: TextIO | None = None, every: float = 10.0) -> None:
        self._out = sys.stderr if out is None else out
        self._every = every
        self._title = ""
        self._total: int | None = None
        self._done = 0
        self._next = 0.0

    def step(self, title: str, total: int | None = None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._next = time.monotonic() + self._every
        print(f"{title} ...", file=self._out, flush=True)

    def advance(self, detail: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        # The total is an estimate: 100 % is for the end alone.
        share = f" {min(99, 100 * self._done // self._total)} %" if self._total else ""
        print(f"{self._title}:{share} {detail}".rstrip(), file=self._out, flush=True)
