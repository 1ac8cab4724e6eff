"""How a build tells its caller how far it is, and the teller for callers that have nothing to draw with."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Protocol, TextIO


class Progress(Protocol):
    """What `kit.build` reports to. Calls come one at a time, and from one thread but within `waiting`."""

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
        self._began = 0.0
        self._next = 0.0

    def step(self, title: str, total: int | None = None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = time.monotonic()
        self._next = self._began + self._every
        print(f"{title} ...", file=self._out, flush=True)

    def advance(self, detail: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        if self._total:
            # The total is an estimate: 100 % is for the end alone.
            share = f"{min(99, 100 * self._done // self._total)} %"
        else:
            share = f"{now - self._began:.0f} s"
        print(f"{self._title}: {share} {detail}".rstrip(), file=self._out, flush=True)


@contextmanager
def waiting(progress: Progress, detail: str, every: float = 1.0) -> Iterator[Callable[[str], None]]:
    """While the context is open, `progress` hears every `every` seconds that `detail` is what goes on. What
    this returns takes the next detail, which is told at once.

    A thread of its own tells it, and has ended when the context has: afterwards the process may fork.
    """
    details: SimpleQueue[str | None] = SimpleQueue()

    def tell(now: str) -> None:
        while True:
            try:
                following = details.get(timeout=every)
            except Empty:
                pass
            else:
                if following is None:
                    return
                now = following
            progress.advance(now)

    teller = threading.Thread(target=tell, args=(detail,), name="progress", daemon=True)
    teller.start()
    try:
        yield details.put
    finally:
        details.put(None)
        teller.join()
