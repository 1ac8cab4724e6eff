"""`vmrun worker`: one of our device processes for another VMM, QEMU for one, over vhost-user. User side; this
process then becomes the worker.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from vmrun.cli.declare import Option
from vmrun.errors import UserError

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

HELP = "Serve a disk or a tap to QEMU by vhost-user."

Socket = Annotated[Path, Option(metavar="PATH", help="The UNIX socket to listen on.")]


def blk(
    socket: Socket,
    disk: Annotated[
        str,
        Option(
            metavar="PATH[,ro][,format=raw|qcow2][,serial=TEXT][,backing=DIRECTORY]",
            help="The disk, as for `vmrun boot`.",
        ),
    ],
) -> int:
    """Serve one disk to one VMM, until it closes the connection."""
    from vmrun.cli.options import parse_disk
    from vmrun.host.disks import Disks

    with Disks([parse_disk(disk)]) as disks:
        (image,) = disks
        _become("blk", socket, image.words, image.fds)


def net(
    socket: Socket,
    nic: Annotated[
        str,
        Option(
            metavar="TAP[,mac=MAC][,ip=ADDRESS/PREFIX][,bridge=NAME][,mtu=N][,locked][,local]",
            help="The card, as for `vmrun boot`.",
        ),
    ],
) -> int:
    """Serve one tap to one VMM, until it closes the connection."""
    from vmrun.cli.options import parse_nic
    from vmrun.host.nics import Nics

    config = parse_nic(nic)
    if config.user:
        raise UserError("--nic user: passt would outlive the worker: give a tap")
    with Nics([config], "worker") as nics:
        (card,) = nics
        _become("net", socket, card.words, card.fds)


def _become(kind: str, path: Path, words: "Mapping[str, str]", fds: "Mapping[str, int]") -> NoReturn:
    import os

    from devices.worker.launcher import worker_command

    with _listen(path) as listener:
        arguments = [f"{key}={value}" for key, value in words.items()]
        for key, fd in {"channel": listener.fileno(), **fds}.items():
            os.set_inheritable(fd, True)
            arguments.append(f"{key}={fd}")
        command, environment = worker_command(kind, path.name, arguments)
        os.execve(command[0], command, environment)


def _listen(path: Path) -> "socket.socket":
    """A listening socket at `path`; one that nobody listens on any more is replaced."""
    import os
    import socket
    import stat

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if not stat.S_ISSOCK(path.stat().st_mode) or probe.connect_ex(os.fspath(path)) == 0:
                    raise UserError(f"--socket {path}: is there already, and in use")
            path.unlink()
        listener.bind(os.fspath(path))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise UserError(f"--socket {path}: {(error.strerror or str(error)).lower()}") from None
    except BaseException:
        listener.close()
        raise
    return listener


COMMANDS = {"blk": blk, "net": net}
