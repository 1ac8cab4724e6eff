"""A sandbox for programs that use asyncio. Owner's process.

    async with AsyncSandbox(image="debian.tar") as sandbox:
        results = await asyncio.gather(*(sandbox.run(["make", target]) for target in ("one", "two")))

Each call waits in a thread of its own: what it waits for is one of Sandbox's, which is built on threads.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from vmrun.agent.files import Totals
from vmrun.run.sandbox import OUTPUT_LIMIT, Result, Running, Sandbox

T = TypeVar("T")

CALLS_AT_ONCE = 200  # as many as an agent's session has channels for


class AsyncSandbox:
    """What `Sandbox` is, with its arguments. An asynchronous context manager: the machine runs inside."""

    def __init__(self, image: str | Path = "kit", **options: Any) -> None:
        self._make: Callable[[], Sandbox] = lambda: Sandbox(image, **options)
        self._made: Sandbox | None = None
        self._threads = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="sandbox")

    async def __aenter__(self) -> "AsyncSandbox":
        making = self._submit(self._make)
        try:
            self._made = await asyncio.shield(making)
        except asyncio.CancelledError:
            # A boot is not stopped half-way, but nothing is left of it.
            making.add_done_callback(_close)
            self._threads.shutdown(wait=False)
            raise
        except BaseException:
            self._threads.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the machine; commands that run in it end with it. A second call does nothing."""
        if self._made is not None:
            made, self._made = self._made, None
            # Also when we are cancelled meanwhile.
            await asyncio.shield(self._submit(made.close))
        self._threads.shutdown(wait=False)

    @property
    def sandbox(self) -> Sandbox:
        """The one that this is made of: for its facts, such as `name` and `console()`."""
        if self._made is None:
            raise RuntimeError("the sandbox runs inside `async with` only")
        return self._made

    async def run(
        self,
        argv: Sequence[str | bytes],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        limit: int = OUTPUT_LIMIT,
    ) -> Result:
        """As `Sandbox.run`. When it is cancelled, the command is killed."""
        sandbox = self.sandbox
        starting = self._submit(
            lambda: sandbox.start(argv, input=input, env=env, cwd=cwd, user=user, limit=limit)
        )
        try:
            running = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._kill)
            raise
        waiting = self._submit(lambda: running.result(timeout))
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            waiting.add_done_callback(_forget)
            await asyncio.shield(self._submit(running.kill))
            raise

    async def copy_in(self, host_path: str | Path, guest_path: str) -> Totals:
        """As `Sandbox.copy_in`. Cancelled, it goes on unobserved."""
        sandbox = self.sandbox
        return await self._submit(lambda: sandbox.copy_in(host_path, guest_path))

    async def copy_out(self, guest_path: str, host_path: str | Path) -> Totals:
        """As `Sandbox.copy_out`. Cancelled, it goes on unobserved."""
        sandbox = self.sandbox
        return await self._submit(lambda: sandbox.copy_out(guest_path, host_path))

    def fork(self) -> "AsyncSandbox":
        """As `Sandbox.fork`: another one, that begins as this one is when `async with` is entered."""
        other = AsyncSandbox()
        other._make = self.sandbox.fork
        return other

    def _submit(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _kill(self, starting: "asyncio.Future[Running]") -> None:
        if not starting.cancelled() and starting.exception() is None:
            self._threads.submit(starting.result().kill)


def _close(making: "asyncio.Future[Sandbox]") -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def _forget(waiting: "asyncio.Future[Result]") -> None:
    """Nobody asks for it any more, and asyncio complains of exceptions that nobody asked for."""
    if not waiting.cancelled():
        waiting.exception()
