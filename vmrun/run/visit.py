"""Commands in a machine that somebody else started: `vmrun exec`. The visitor's process."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vmrun.agent.process import Process
from vmrun.agent.protocol import ExitStatus
from vmrun.agent.session import AgentSession
from vmrun.image.config import ImageConfig
from vmrun.run.guest import ANSWER_SECONDS

if TYPE_CHECKING:
    from vmrun.agent.process import Sink, Source

END_SECONDS = 3.0  # for the guest to end what it was told to kill


class Visit:
    """A `vmrun.run.command.Runner` over `session`, which stays its owner's. A context manager: what was
    started ends with it.
    """

    def __init__(self, session: AgentSession) -> None:
        self.image_config = ImageConfig()
        self._session = session
        self._started: list[Process] = []

    def exec(
        self,
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        stdin: "Source" = None,
        stdout: "Sink" = None,
        stderr: "Sink" = None,
    ) -> Process:
        process = self._session.exec(
            argv,
            env=env,
            cwd=cwd,
            user=user,
            tty=tty,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            timeout=ANSWER_SECONDS,
        )
        self._started.append(process)
        return process

    def wait(self, process: Process, timeout: float | None = None) -> ExitStatus:
        return process.wait(timeout)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            if process.poll() is None:
                process.end(END_SECONDS)
