"""The two ends of a stream on the host, with its flow control: no more is held than one window.

A stream's sender may have WINDOW bytes under way. The receiver gives credit back for what has left its
hands, so that who does not read stops only its own stream.
"""

from __future__ import annotations

import threading
from collections import deque

from vmrun.agent.protocol import WINDOW, AgentGone, AgentProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class OutputStream:
    """What comes from the guest: the session's reader puts, one consumer takes."""

    __slots__ = ("_changed", "_chunks", "_ended", "_failure", "_give", "_held", "_rest", "_taken")

    def __init__(self, give_credit: Callable[[int], None]) -> None:
        self._changed = threading.Condition()
        self._chunks: deque[bytes] = deque()
        self._give = give_credit
        self._held = 0
        """Bytes that came and for which no credit was given: waiting, or taken just now."""
        self._taken = 0
        self._ended = False
        self._failure: AgentGone | None = None
        self._rest = b""

    def put(self, data: bytes) -> None:
        """Raises AgentProtocolError when the guest sent more than it had credit for, or after the end."""
        with self._changed:
            if self._ended:
                raise AgentProtocolError("the guest sent output after its end")
            self._held += len(data)
            if self._held > WINDOW:
                raise AgentProtocolError("the guest sent more output than it had credit for")
            if data:
                self._chunks.append(data)
                self._changed.notify()

    def end(self, failure: AgentGone | None = None) -> None:
        """No more comes. With `failure`, `take` raises it after the last byte."""
        with self._changed:
            if not self._ended:
                self._ended = True
                self._failure = failure
                self._changed.notify()

    def take(self) -> bytes:
        """The next bytes, at most 64 KiB; empty at the end. Waits."""
        with self._changed:
            # What was taken before has been dealt with by now; small amounts are given back together.
            credit, self._taken = (self._taken, 0) if self._taken >= WINDOW // 4 else (0, self._taken)
            self._held -= credit
            ended = self._ended
        if credit and not ended:
            self._give(credit)
        with self._changed:
            while not self._chunks:
                if self._ended:
                    if self._failure is not None:
                        raise self._failure
                    return b""
                self._changed.wait()
            data = self._chunks.popleft()
            self._taken += len(data)
            return data

    def at_end(self, timeout: float) -> bool:
        """Whether all that came was taken, once the end or something more has come. Gives no credit. Raises
        TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or self._chunks or self._rest, timeout):
                raise TimeoutError("the guest does not end what it sends")
            return not self._chunks and not self._rest

    def read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end; for parsers."""
        parts = [self._rest[:size]]
        have = len(parts[0])
        self._rest = self._rest[have:]
        while have < size:
            data = self.take()
            if not data:
                break
            parts.append(data[: size - have])
            self._rest = data[size - have :]
            have += len(parts[-1])
        return b"".join(parts)


class InputStream:
    """The credit for what goes to the guest."""

    __slots__ = ("_changed", "_credit", "_over")

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._credit = WINDOW
        self._over = False

    def add_credit(self, size: int) -> None:
        with self._changed:
            if size > WINDOW - self._credit:
                raise AgentProtocolError("the guest gave more credit than there was")
            self._credit += size
            self._changed.notify_all()

    def claim(self, most: int) -> int:
        """How many bytes may be sent now, up to `most`; waits for the first. 0: nobody wants any more."""
        with self._changed:
            while not self._credit and not self._over:
                self._changed.wait()
            if self._over:
                return 0
            size = min(most, self._credit)
            self._credit -= size
            return size

    def stop(self) -> None:
        """The command has closed its input, has ended, or the session is over."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        return self._over
