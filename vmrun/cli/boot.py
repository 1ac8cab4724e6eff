"""`vmrun boot`: one machine, its serial console on the terminal or detached. User side of the VMM process."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Option
from vmrun.errors import EXIT_IMAGE, UserError

if TYPE_CHECKING:
    from vmrun.machine.config import MachineConfig


def boot(
    disk: Annotated[
        list[str] | None,
        Option(
            "--disk",
            metavar="PATH[,ro][,throwaway][,format=raw|qcow2][,serial=TEXT][,backing=DIRECTORY]",
            help="A disk: the guest's /dev/vda, then vdb and so on; or vhost-user:SOCKET. Repeatable.",
        ),
    ] = None,
    nic: Annotated[
        list[str] | None,
        Option(
            "--nic",
            metavar="TAP|user[,mac=MAC][,ip=ADDRESS/PREFIX][,bridge=NAME][,mtu=N][,locked][,local][,boot=FILE][,rom=FILE]",
            help="A network card on TAP, made if it is not there; ip= is for the host's end. "
            "Or user: through passt, without root. Repeatable.",
        ),
    ] = None,
    cdrom: Annotated[
        Path | None,
        Option(metavar="ISO", help="A CD or DVD image: the guest's /dev/sr0."),
    ] = None,
    kernel: Annotated[
        Path | None,
        Option(metavar="FILE", help="bzImage or ELF vmlinux. Default: the guest kit's."),
    ] = None,
    initrd: Annotated[Path | None, Option(metavar="FILE", help="An initramfs.")] = None,
    append: Annotated[
        str | None,
        Option(metavar="TEXT", help="The kernel's command line; added to the kit's when that is used."),
    ] = None,
    firmware: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Start firmware (SeaBIOS), not a kernel. Experimental.",
        ),
    ] = None,
    legacy_virtio: Annotated[
        bool, Option("--legacy-virtio", help="Virtio devices as before virtio 1.0, for old guests.")
    ] = False,
    mem: Annotated[str, Option("--mem", metavar="SIZE", help="Memory, as in 128M or 1.5G.")] = "128M",
    cpus: Annotated[int, Option("--cpus", metavar="N", help="How many vCPUs.")] = 1,
    timeout: Annotated[
        str | None,
        Option(metavar="TIME", help="Stop the machine after this long, as in 90s."),
    ] = None,
    name: Annotated[
        str | None,
        Option(metavar="NAME", help="What other commands call it; made up if not given."),
    ] = None,
    detach: Annotated[
        bool, Option("--detach", "-d", help="Return once it runs, print its name, and let it run on.")
    ] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Tell what is being done.")] = False,
) -> int:
    """Start a machine, on this terminal or in the background (-d).

    \b
      vmrun boot --disk x.qcow2 --nic tap0
      vmrun boot -d --name web --disk x.qcow2 --nic user --mem 1G

    On a terminal, Ctrl-A x stops the machine, Ctrl-A Ctrl-A sends a Ctrl-A, Ctrl-A h is help. A comma inside
    a path is written twice. Exit codes: see docs/guide.md.
    """
    from vmrun import units
    from vmrun.cli import options
    from vmrun.host.console import Console
    from vmrun.machine.config import DiskConfig, MachineConfig

    config = MachineConfig(
        memory=units.parse_memory("--mem", mem),
        cpus=cpus,
        kernel=kernel,
        initrd=initrd,
        cmdline=append,
        disks=tuple(options.parse_any_disk(text) for text in disk or ()),
        nics=tuple(options.parse_nic(text) for text in nic or ()),
        cdrom=cdrom,
        firmware=firmware,
        legacy_virtio=legacy_virtio,
        verbose=verbose,
    )
    if cdrom is not None and not cdrom.exists():
        raise UserError(f"--cdrom {cdrom}: no such file", EXIT_IMAGE)
    seconds = units.parse_duration("--timeout", timeout) if timeout is not None else None
    for each in config.disks:
        if isinstance(each, DiskConfig) and not (each.read_only or each.throw_away):
            _refuse_below_others(each.path)

    if detach:
        return _boot_detached(config, name, seconds)

    from vmrun.control import session  # only now: a mistake in the options needs no KVM

    with Console() as console:
        outcome = session.run(config, name=name, timeout=seconds, console=console)
    if outcome.code:
        print(f"vmrun: {outcome.reason}", file=sys.stderr)
    return outcome.code


def _refuse_below_others(disk: Path) -> None:
    """An image below others must not change: they, and perhaps a snapshot, would be lost for good."""
    from vmrun.host.overlays import images_above

    if found := images_above(disk):
        above = found[-1].name
        raise UserError(
            f"disk {disk}: {above} lies on it, and perhaps a snapshot: writing to it would destroy them. "
            f"Boot {above}, add ,throwaway or ,ro, or remove {above} first",
            EXIT_IMAGE,
        )


def _boot_detached(config: "MachineConfig", name: str | None, timeout: float | None) -> int:
    from vmrun.cli import one_line
    from vmrun.control import detach

    def vmm(starter: detach.Detached) -> tuple[int, str]:
        from vmrun.control import session  # only now: what is imported makes a fork slow

        outcome = session.run(config, name=name, timeout=timeout, starter=starter)
        return outcome.code, outcome.reason

    print(detach.start(vmm, one_line))
    return 0
