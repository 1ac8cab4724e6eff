"""The VMM's own way to the agent in the guest (docs/agent.md): to tell a restored guest who it is, and to
ask a guest to shut down. VMM process.

The agent's answers are the guest's: they are waited for on a thread of their own, and decide nothing here but
whether it was done.
"""

import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vmrun.agent.protocol import AgentError, AgentRefused
from vmrun.machine.loop import EventLoop
from vmrun.machine.ports import PortLink

if TYPE_CHECKING:
    from vmrun.agent.session import AgentSession

ANSWER_SECONDS = 30.0
# The card is known by the address it had; busybox and iproute2 both have this `ip`.
NEW_ADDRESS = (
    'for card in /sys/class/net/*; do [ "$(cat "$card/address")" = "$1" ] || continue; '
    'ip link set dev "${card##*/}" address "$2" || exit 1; done'
)

Work = Callable[["AgentSession"], None]
Done = Callable[[bool], None]


class GuestAgent:
    """What the VMM itself has the agent behind `links` do, one thing after another. Its methods are the main
    loop's.
    """

    def __init__(self, loop: EventLoop, links: Sequence[PortLink]) -> None:
        self._loop = loop
        self._links = links
        self._tasks: deque[tuple[Work, Done]] = deque()
        self._talking = False

    @property
    def listens(self) -> bool:
        """Whether there is an agent that waits at a port, or is being talked to."""
        return self._talking or self._free is not None

    @property
    def _free(self) -> PortLink | None:
        return next((link for link in self._links if link.free and link.port.guest_open), None)

    def talk(self, work: Work, done: Done) -> None:
        """Have `work` done in a session, after what was asked for before, and tell `done` whether it was."""
        self._tasks.append((work, done))
        if not self._talking:
            self._begin()

    def _begin(self) -> None:
        link = self._free
        if link is None:
            tasks, self._tasks = self._tasks, deque()
            for _, done in tasks:
                done(False)
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(theirs)
        self._talking = True
        threading.Thread(target=self._converse, args=(ours,), name="agent", daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        """On a thread. A task is taken before anything can go wrong, or it would be tried for ever."""
        taken, worked = [self._tasks.popleft()], 0
        try:
            from vmrun.agent.session import AgentSession  # most guests have no agent

            with AgentSession(connection) as session:
                session.hello(ANSWER_SECONDS)
                while worked < len(taken):
                    work, _ = taken[worked]
                    work(session)
                    worked += 1
                    if self._tasks:
                        taken.append(self._tasks.popleft())
        except (AgentError, OSError) as error:
            import logging  # here: it is rare, and every start would pay

            logging.getLogger(__name__).warning("the guest's agent: %s", error)
        finally:
            # Clients may be kept waiting for it, whatever goes wrong here; and the port is theirs now.
            self._loop.call_soon(partial(self._over, [done for _, done in taken], worked))

    def _over(self, told: list[Done], worked: int) -> None:
        self._talking = False
        for number, done in enumerate(told):
            done(number < worked)
        if self._tasks and not self._talking:
            self._begin()


def greet(macs: Sequence[tuple[str, str]]) -> Work:
    """Random numbers of its own, the time, and the addresses of its cards: pairs of the one that the guest
    knows a card by, and the one it has now.
    """

    def work(session: "AgentSession") -> None:
        session.after_restore(ANSWER_SECONDS)
        for before, now in macs:
            if before == now:
                continue
            process = session.exec(["/bin/sh", "-c", NEW_ADDRESS, "sh", before, now], timeout=ANSWER_SECONDS)
            if process.wait(ANSWER_SECONDS).exit_code:
                import logging  # here: it is rare, and every start would pay

                logging.getLogger(__name__).warning(
                    "the guest keeps the address %s: it could not set %s", before, now
                )

    return work


def shut_down(*, reboot: bool) -> Work:
    """By systemd, which has services to stop; where it is not init, the agent does it."""

    def work(session: "AgentSession") -> None:
        try:
            how = "reboot" if reboot else "poweroff"
            session.exec(["systemctl", how], keep=True, timeout=ANSWER_SECONDS)
        except AgentRefused:
            session.poweroff(reset=reboot, timeout=ANSWER_SECONDS)

    return work
