"""`vmrun guest`: the guest kit, a small Linux built from Debian's packages. User side of the VMM process."""

from typing import TYPE_CHECKING, Annotated

from vmrun.cli.declare import Argument
from vmrun.errors import EXIT_IMAGE, UserError

if TYPE_CHECKING:
    from vmrun.guestkit.kit import GuestKit

HELP = "The guest kit: a small Linux, which `vmrun run` needs."
FILES = ("kernel", "initramfs", "disk")


def build() -> int:
    """Build the guest kit, unless it is there.

    It takes minutes the first time, and no time at all the second.
    """
    from vmrun.guestkit import kit

    found = kit.find()
    if found is None:
        from vmrun.cli.progress import progress

        with progress() as teller:
            found = kit.build(teller)
    _print_files(found)
    return 0


def path(
    what: Annotated[
        str, Argument(metavar="kernel|initramfs|disk", help="Which file; kernel if not given.")
    ] = "kernel",
) -> int:
    """Print the path of one file of the guest kit, for scripts."""
    if what not in FILES:
        raise UserError(f"guest path {what}: there are {', '.join(FILES)}")
    print(getattr(_find(), what))
    return 0


def list_files() -> int:
    """List the files of the guest kit and their sizes."""
    _print_files(_find())
    return 0


def _print_files(kit: "GuestKit") -> None:
    for what in FILES:
        file = getattr(kit, what)
        print(f"{what:9} {file.stat().st_size / (1 << 20):6.1f} MiB  {file}")


def _find() -> "GuestKit":
    from vmrun.guestkit import kit

    found = kit.find()
    if found is None:
        raise UserError("the guest kit is not built: vmrun guest build, or make guest", EXIT_IMAGE)
    return found


COMMANDS = {"build": build, "path": path, "list": list_files}
