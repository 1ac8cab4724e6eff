"""How far a long command is: a bar on a terminal, lines elsewhere. User side of the VMM process."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from vmrun.guestkit.progress import Lines, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


@contextmanager
def progress() -> Iterator[Progress]:
    """What a build reports to while the context is open. All of it goes to stderr."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        told = _Bars(bars)
        yield told
        told.finish()


class Lazy:
    """The same for what seldom has anything to tell: costs nothing before it does. A context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._teller: Progress | None = None

    def step(self, title: str, total: int | None = None) -> None:
        if self._teller is None:
            self._teller = self._stack.enter_context(progress())
        self._teller.step(title, total)

    def advance(self, detail: str = "") -> None:
        if self._teller is not None:
            self._teller.advance(detail)

    def close(self) -> None:
        """What was told stays to be seen; more begins anew."""
        self._stack.close()
        self._teller = None

    def __enter__(self) -> "Lazy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """What to call with how much of how much is done while the context is open: a bar that goes when it is
    over. None when stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(escape(title), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class _Bars:
    """One bar for each step. The total of a step is an estimate: only its end fills the bar."""

    def __init__(self, bars: "RichProgress") -> None:
        self._bars = bars
        self._task = bars.add_task("starting", total=None, visible=False, detail="")

    def step(self, title: str, total: int | None = None) -> None:
        self.finish()
        self._task = self._bars.add_task(title, total=total, detail="")

    def advance(self, detail: str = "") -> None:
        from rich.markup import escape

        task = self._bars.tasks[self._task]
        done = task.completed + 1
        if task.total is not None:
            done = min(done, task.total * 0.99)
        self._bars.update(self._task, completed=done, detail=escape(detail[-40:]))

    def finish(self) -> None:
        total = self._bars.tasks[self._task].total or 1
        self._bars.update(self._task, total=total, completed=total, detail="")
