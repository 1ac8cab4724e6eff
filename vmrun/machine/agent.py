"""The VMM's own way to the agent in the guest (docs/agent.md): to tell a restored guest who it is, and to
ask a guest to shut down. VMM process.

The agent's answers are the guest's: they are waited for on a thread of their own, and decide nothing here but
whether it was done.
"""

import socket
import threading
from collections.abc import Callable, Sequence
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


def listens(links: Sequence[PortLink]) -> bool:
    """Whether the guest has an agent that waits at one of its ports."""
    return _waiting(links) is not None


def talk(loop: EventLoop, links: Sequence[PortLink], work: Work, done: Callable[[bool], None]) -> None:
    """Have `work` done in a session with the guest's agent, and tell `done` on the loop whether it was. Main
    loop's thread.
    """
    link = _waiting(links)
    if link is None:
        done(False)
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(theirs)

    def converse() -> None:
        worked = False
        try:
            from vmrun.agent.session import AgentSession  # most guests have no agent

            with AgentSession(ours) as session:
                session.hello(ANSWER_SECONDS)
                work(session)
                worked = True
        except (AgentError, OSError) as error:
            import logging  # here: it is rare, and every start would pay

            logging.getLogger(__name__).warning("the guest's agent: %s", error)
        finally:
            # Clients may be kept waiting for it, whatever goes wrong here.
            loop.call_soon(lambda: done(worked))

    threading.Thread(target=converse, name="agent", daemon=True).start()


def _waiting(links: Sequence[PortLink]) -> PortLink | None:
    return next((link for link in links if link.free and link.port.guest_open), None)


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
