"""`vmrun image`: what `--image` makes of directories and archives, ahead of a run and afterwards.

User side of the VMM process.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vmrun.cli.declare import Argument, Option
from vmrun.errors import EXIT_IMAGE, UserError

if TYPE_CHECKING:
    from vmrun.image import Image

HELP = "Images for --image: convert ahead of a run, list, remove."

Spec = Annotated[
    str, Argument(metavar="IMAGE", help="A directory, disk, OCI layout, `docker save` or root tar, or kit.")
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]


def convert(
    image: Spec,
    disk_size: Annotated[
        str | None,
        Option(
            "--disk-size",
            metavar="SIZE",
            help="Of the disk. Default: the files, and half as much, or 512M, for writes.",
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        Option("--max-size", metavar="SIZE", help="Refuse more bytes in all; 32G if not given."),
    ] = None,
    max_entries: Annotated[
        int | None, Option("--max-entries", metavar="NUMBER", help="Refuse more files; 1000000 if not given.")
    ] = None,
    max_ratio: Annotated[
        int | None,
        Option("--max-ratio", metavar="NUMBER", help="Refuse denser compression; 300 if not given."),
    ] = None,
    max_metadata: Annotated[
        str | None,
        Option("--max-metadata", metavar="SIZE", help="Refuse more names and attributes; 512M if not given."),
    ] = None,
) -> int:
    """Convert an image to a disk in the cache, and print its path.

    One that is there already is not made again.
    """
    from vmrun.cli.progress import progress
    from vmrun.image import Limits, resolve
    from vmrun.units import parse_size

    chosen: dict[str, int] = {}
    for name, size in (("size", max_size), ("metadata", max_metadata)):
        if size is not None:
            chosen[name] = parse_size(f"--max-{name}", size)
    for name, number in (("entries", max_entries), ("ratio", max_ratio)):
        if number is not None:
            if number < 1:
                raise UserError(f"--max-{name} {number}: give a number from 1 on")
            chosen[name] = number
    disk_bytes = parse_size("--disk-size", disk_size) if disk_size is not None else None
    with progress() as teller:
        found = resolve(image, teller, limits=Limits(**chosen), disk_size=disk_bytes)
    print(found.disk)
    return 0


def inspect(image: Spec, as_json: AsJson = False) -> int:
    """Tell what an image is, and what it says of how to run it. Converts it first."""
    from vmrun.cli.progress import progress
    from vmrun.image import resolve

    with progress() as teller:
        found = resolve(image, teller)
    facts = _facts(found)
    if as_json:
        _print_json(facts)
        return 0
    config = facts.pop("config")
    for name, value in (facts | config).items():
        if value:
            print(f"{name:12} {_text(value)}")
    return 0


def list_images(as_json: AsJson = False) -> int:
    """List the converted images, the last used first."""
    import time

    from vmrun.cli.disk import human_size
    from vmrun.image import cache

    images = cache.images()
    if as_json:
        rows = [
            {
                **_facts(cached.image),
                "spec": cached.spec,
                "used": cached.used,
                "last-used": int(cached.last_used),
                "in-use": cached.in_use,
            }
            for cached in images
        ]
        _print_json(rows)
        return 0
    if not images:
        print("no images: `vmrun image convert` or the first `vmrun run --image` makes one", file=sys.stderr)
    for cached in images:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(cached.last_used))
        mark = "in use" if cached.in_use else ""
        print(f"{cached.digest[:12]}  {human_size(cached.used):>10}  {when}  {mark:6}  {_text(cached.spec)}")
    return 0


def rm(
    digests: Annotated[
        list[str] | None, Argument(metavar="DIGEST", help="As `vmrun image list` has it, or its beginning.")
    ] = None,
    everything: Annotated[bool, Option("--all", help="All that no machine uses.")] = False,
) -> int:
    """Remove converted images. A machine that runs from one keeps it until it ends."""
    from vmrun.image import cache

    images = cache.images()
    if everything == bool(digests):
        raise UserError("image rm: give digests, as vmrun image list has them, or --all")
    chosen = {cached.digest for cached in images if everything and not cached.in_use}
    for digest in digests or ():
        matches = {cached.digest for cached in images if digest and cached.digest.startswith(digest)}
        if len(matches) != 1:
            what = "there is no such image" if not matches else "more than one image begins with it"
            raise UserError(f"image rm {digest}: {what}: see vmrun image list", EXIT_IMAGE)
        chosen |= matches
    for digest in sorted(chosen):
        cache.remove(digest)
    return 0


def _facts(image: "Image") -> dict[str, Any]:
    return {
        "digest": image.digest,
        "source": image.source,
        "disk": str(image.disk),
        "format": image.format,
        "size": Path(image.disk).stat().st_size,
        "file-system": image.file_system,
        "config": image.config.as_json(),
    }


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


def _text(value: object) -> str:
    """On one line, and nothing of a hostile image's that steers a terminal."""
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    if isinstance(value, list | tuple):
        import shlex

        value = shlex.join(value)
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value))


COMMANDS = {"list": list_images, "rm": rm, "convert": convert, "inspect": inspect}
