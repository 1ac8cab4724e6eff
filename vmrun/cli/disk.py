"""`vmrun disk`: making, looking at and changing disk images. User side of the VMM process.

The work is in `vmrun/disk/`, a file for each verb.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vmrun.cli.declare import Argument, Option

if TYPE_CHECKING:
    from vmrun.disk.check import Checked

HELP = "Disk images: make, look at, check, convert, commit, map, resize."
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

Image = Annotated[Path, Argument(metavar="PATH", help="The image.")]
Format = Annotated[
    str | None,
    Option(
        "--format",
        "-f",
        metavar="raw|qcow2",
        help="Its format, when the suffix does not tell.",
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON, with qemu-img's keys.")]
ClusterSize = Annotated[
    str | None,
    Option("--cluster-size", metavar="SIZE", help="Of qcow2: 512 bytes (0.5K) to 2M; 64K if not given."),
]


def create(
    path: Image,
    size: Annotated[
        str | None,
        Option(
            "--size", "-s", metavar="SIZE", help="As in 512M or 20G; an overlay has its base's if not given."
        ),
    ] = None,
    base: Annotated[
        str | None,
        Option(
            "--backing",
            "-b",
            metavar="BASE",
            help="Make an overlay over BASE; a relative name counts from the directory of PATH.",
        ),
    ] = None,
    base_format: Annotated[
        str | None, Option("--backing-format", "-F", metavar="raw|qcow2", help="The format of BASE.")
    ] = None,
    fmt: Format = None,
    cluster_size: ClusterSize = None,
) -> int:
    """Make an empty image, or an overlay over another.

    \b
      vmrun disk create --size 20G x.qcow2
      vmrun disk create --backing base.qcow2 over.qcow2
    """
    from vmrun.disk.create import create
    from vmrun.units import parse_size

    size_bytes = parse_size("--size", size) if size is not None else None
    made = create(path, size_bytes, fmt, _cluster_size(cluster_size), base, base_format)
    print(f"{path}: {human_size(made)}")
    return 0


def info(
    path: Image,
    fmt: Format = None,
    chain: Annotated[bool, Option("--chain", help="Also of all backing files below it.")] = False,
    as_json: AsJson = False,
) -> int:
    """Tell what an image is: sizes, format, features, backing file."""
    from vmrun.disk import info

    found = info.chain_info(path, fmt) if chain else [info.info(path, fmt)]
    if as_json:
        _print_json(found if chain else found[0])
        return 0
    for number, image in enumerate(found):
        if number:
            print()
        _print_info(image)
    return 0


def _print_info(image: dict[str, Any]) -> None:
    print(f"image:         {printable(image['filename'])}")
    print(f"format:        {image['format']}")
    print(f"virtual size:  {human_size(image['virtual-size'])} ({image['virtual-size']} bytes)")
    print(f"disk size:     {human_size(image['actual-size'])}")
    if "format-specific" not in image:
        return
    features = image["format-specific"]["data"]
    print(f"version:       {2 if features['compat'] == '0.10' else 3}")
    print(f"cluster size:  {human_size(image['cluster-size'])}")
    print(f"compression:   {features['compression-type']}")
    print(f"refcount bits: {features['refcount-bits']}")
    if "backing-filename" in image:
        fmt = image.get("backing-filename-format", "format not stated")
        print(f"backing file:  {printable(image['backing-filename'])} ({printable(fmt)})")
    notes = {
        "not closed (dirty): opening it for writing repairs it": image["dirty-flag"],
        "marked corrupt: run qemu-img check -r all": features.get("corrupt"),
        "lazy refcounts": features.get("lazy-refcounts"),
        f"{features.get('internal-snapshots')} internal snapshots": features.get("internal-snapshots"),
        "persistent bitmaps": features.get("has-bitmaps"),
    }
    for note, holds in notes.items():
        if holds:
            print(f"note:          {note}")


def check(
    path: Image,
    fmt: Format = None,
    repair: Annotated[
        str | None, Option("--repair", "-r", metavar="leaks", help="Give leaked clusters back.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check a qcow2 image. Exits with 0 if it is clean, 3 if clusters leaked, 66 if it is corrupt."""
    from vmrun.cli.progress import bar
    from vmrun.disk.check import check
    from vmrun.errors import UserError

    if repair not in (None, "leaks"):
        raise UserError(f"--repair {repair}: only leaks can be repaired here: run qemu-img check -r all")
    with bar("checking") as progress:
        checked = check(path, fmt, repair is not None, progress)
    if as_json:
        _print_json(checked.as_json(path))
    else:
        _print_check(path, checked)
    return checked.code


def _print_check(path: Path, checked: "Checked") -> None:
    report = checked.report
    for problem in report.problems:
        print(f"  {problem}")
    if report.corruptions > len(report.problems):
        print(f"  and {report.corruptions - len(report.problems)} more")
    if checked.repaired:
        print(f"{path}: {checked.repaired} leaked clusters were given back")
    if checked.dirty:
        wrong = report.corruptions + report.leaks
        print(
            f"{path}: was not closed; {wrong} refcounts are wrong: --repair leaks puts them right, "
            "and so does opening it for writing"
        )
    elif report.corruptions:
        print(f"{path}: corrupt in {report.corruptions} places; qemu-img check -r all may repair it")
    elif checked.corrupt:
        print(f"{path}: marked corrupt, though the tables agree: run qemu-img check -r all")
    elif report.leaks:
        print(f"{path}: {report.leaks} leaked clusters; they cost space and nothing else (--repair leaks)")
    else:
        print(f"{path}: no errors")
    share = 100 * report.allocated_clusters / max(1, report.total_clusters)
    print(
        f"{report.allocated_clusters} of {report.total_clusters} clusters ({share:.1f} %) are in the file, "
        f"{report.compressed_clusters} of them compressed"
    )


def convert(
    source: Annotated[Path, Argument(metavar="SOURCE", help="The image to copy.")],
    path: Annotated[Path, Argument(metavar="PATH", help="The new image.")],
    fmt: Format = None,
    to: Annotated[
        str | None,
        Option("--to", "-O", metavar="raw|qcow2", help="The new format, when the suffix does not tell."),
    ] = None,
    compress: Annotated[bool, Option("--compress", "-c", help="Compress (qcow2), with zlib.")] = False,
    compression: Annotated[str | None, Option(metavar="zlib|zstd", help="Compress, with this.")] = None,
    cluster_size: ClusterSize = None,
) -> int:
    """Copy a disk, backing files included, into one sparse image."""
    from vmrun.cli.progress import bar
    from vmrun.disk.convert import convert
    from vmrun.disk.files import image_format
    from vmrun.machine.config import DiskConfig

    config = DiskConfig(source, image_format(source, fmt), read_only=True, backing=(Path("/"),))
    if compress and compression is None:
        compression = "zlib"
    with bar(f"converting {source.name}") as progress:
        size = convert(config, path, to, _cluster_size(cluster_size), compression, progress)
    taken = path.stat().st_blocks * 512
    print(f"{path}: {human_size(size)}, of which {human_size(taken)} in the file")
    return 0


def commit(path: Image, fmt: Format = None) -> int:
    """Write an overlay into its base, and empty the overlay.

    Other overlays over the same backing file are worth nothing afterwards. Killed in the middle, the overlay
    still has everything: commit again.
    """
    from vmrun.cli.progress import bar
    from vmrun.disk.commit import commit

    with bar(f"committing {path.name}") as progress:
        base = commit(path, fmt, progress)
    print(f"{path}: committed to {printable(str(base))}")
    return 0


def map_(path: Image, fmt: Format = None, as_json: AsJson = False) -> int:
    """List where the bytes of a disk are: file and offset."""
    from vmrun.disk.map import disk_map

    runs = disk_map(path, fmt)
    if as_json:
        _print_json(list(runs))
        return 0
    for number, run in enumerate(runs):
        if not number:
            print(f"{'start':>16} {'length':>16} depth kind       {'offset':>16} file")
        kind = "data" if run["data"] else "zero" if run["present"] else "absent"
        if run["data"] and "offset" not in run:
            kind = "compressed"
        offset = f"{run['offset']:#x}" if "offset" in run else ""
        line = f"{run['start']:#16x} {run['length']:#16x} {run['depth']:5} {kind:10} {offset:>16} "
        print((line + printable(run.get("filename", ""))).rstrip())
    return 0


def resize(
    path: Image,
    size: Annotated[str, Argument(metavar="SIZE", help="20G, or +1G for so much more.")],
    fmt: Format = None,
) -> int:
    """Make a disk larger. What is new reads as zeroes."""
    from vmrun.disk.resize import resize
    from vmrun.units import parse_size

    made = resize(path, parse_size("SIZE", size.removeprefix("+")), size.startswith("+"), fmt)
    print(f"{path}: {human_size(made)}")
    return 0


def human_size(size: int) -> str:
    """ "1.5 GiB"; exact where that is short."""
    value = float(size)
    unit = 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.4g} {UNITS[unit]}" if value < 1000 else f"{value:.0f} {UNITS[unit]}"


def printable(text: str) -> str:
    """A name out of an image: whoever made it must not get to write to the terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _cluster_size(text: str | None) -> int | None:
    if text is None:
        return None
    from vmrun.units import parse_size

    return int(text) if text.isdecimal() and len(text) < 10 else parse_size("--cluster-size", text)


def _print_json(found: object) -> None:
    import json

    json.dump(found, sys.stdout, indent=2)
    print()


COMMANDS = {
    "create": create,
    "info": info,
    "check": check,
    "convert": convert,
    "commit": commit,
    "resize": resize,
    "map": map_,
}
