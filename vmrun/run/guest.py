"""The machine of a sandbox: its configuration, and the way to the agent in it. Owner's process.

Any image boots so, without containing anything of ours: the agent is /init of an initramfs that mounts the
first disk and stays PID 1 above it (vmrun.guestkit.guest_agent).
"""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from vmrun.agent.protocol import AgentGone
from vmrun.agent.session import AgentSession
from vmrun.control import runtime
from vmrun.control.detach import Owned
from vmrun.errors import EXIT_IMAGE, EXIT_TIMEOUT, UserError
from vmrun.guestkit.guest_agent import GuestAgent
from vmrun.guestkit.guest_agent import find as find_agent
from vmrun.guestkit.kit import GuestKit
from vmrun.guestkit.kit import find as find_kit
from vmrun.image.config import Image
from vmrun.machine.config import DiskConfig, MachineConfig, Mount
from vmrun.run.spec import SandboxSpec

BOOT_SECONDS = 120.0  # for a kernel whose instructions are interpreted, on a loaded host
ANSWER_SECONDS = 60.0  # for an agent that was running when it was saved
# A place for a directory of the host's: templates have as many as the runs that begin there.
MOUNT_TAG = "vmrun.mount.{}"
# Time that the host takes away is of no use to know.
LEAN = ("no-steal-acc",)


@dataclass(frozen=True, slots=True)
class Parts:
    """What every sandbox needs besides its image."""

    kit: GuestKit
    agent: GuestAgent


def find_parts() -> Parts:
    """UserError when the guest kit is not built."""
    kit = find_kit()
    if kit is None:
        raise UserError("no guest kit yet: run `vmrun guest build`", EXIT_IMAGE)
    agent = find_agent()
    if agent is None:
        from vmrun.guestkit.guest_agent import build

        agent = build()
    return Parts(kit, agent)


def machine_config(spec: SandboxSpec, image: Image, parts: Parts) -> MachineConfig:
    """A machine that boots into the agent, with `image` as its root and what it writes thrown away."""
    root = DiskConfig(
        image.disk,
        image.format,
        backing=tuple(dict.fromkeys(path.parent for path in image.backing)),
        throw_away=True,
        quota=spec.quota,
    )
    words = [
        parts.kit.default_cmdline,
        *LEAN,
        "root=/dev/vda",
        f"rootfstype={image.file_system or 'ext4'}",
        "rw",
        "vmrun.host=vmrun",  # of all clones alike: a name that resolves nowhere else is what tools expect
    ]
    return MachineConfig(
        memory=spec.memory,
        cpus=spec.cpus,
        kernel=spec.kernel or parts.kit.kernel,
        initrd=parts.agent.initramfs,
        cmdline=" ".join(words),
        disks=(root, *spec.disks),
        nics=spec.nics,
        mounts=tuple(
            Mount(None, MOUNT_TAG.format(index), each.read_only) for index, each in enumerate(spec.mounts)
        ),
    )


def connect(owned: Owned, seconds: float) -> AgentSession:
    """A session with the agent of the machine. AgentGone when the machine ends instead, UserError when the
    agent does not answer within `seconds`.
    """
    return open_session(runtime.base_directory() / owned.name, seconds)


def open_session(directory: Path, seconds: float) -> AgentSession:
    """The same for the machine with the runtime directory `directory`."""
    deadline = time.monotonic() + seconds
    session = AgentSession(_connect(directory / runtime.AGENT, seconds))
    try:
        session.hello(deadline - time.monotonic())
    except TimeoutError:
        session.close()
        raise _no_answer(seconds) from None
    except BaseException:
        session.close()
        raise
    return session


def connect_restored(directory: Path) -> AgentSession:
    """A session with the agent of a machine that was made of a template, by its runtime directory. Returns at
    once: the guest gets random numbers of its own and the right time before anything that it is asked for.
    AgentGone when the machine ends instead.
    """
    session = AgentSession(_connect(directory / runtime.AGENT, ANSWER_SECONDS))
    try:
        session.hello_restored()
    except BaseException:
        session.close()
        raise
    return session


def _connect(path: Path, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                # The runtime directory's path is short, or was made so (vmrun.control.runtime).
                sock.connect(str(path))
                break
            except BlockingIOError:
                # Too many wait for their turn, which a guest that holds its ports may never let them have.
                if time.monotonic() > deadline:
                    raise _no_answer(seconds) from None
                time.sleep(0.01)
        sock.setblocking(True)
    except OSError as error:
        sock.close()
        raise AgentGone(f"the machine is gone: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _no_answer(seconds: float) -> UserError:
    return UserError(f"the agent in the guest does not answer within {seconds:g} s", EXIT_TIMEOUT)
