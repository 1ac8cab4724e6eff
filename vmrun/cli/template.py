"""`vmrun template`: the machines that `vmrun run` makes its machines of. User side."""

import sys
import time
from pathlib import Path
from typing import Annotated

from vmrun.cli.declare import Argument, Option
from vmrun.errors import UserError

HELP = "The saved machines that `vmrun run` begins with."


def list_() -> int:
    """List the templates there are."""
    from vmrun.run.templates import templates

    found = templates()
    if not found:
        print("no templates: the first `vmrun run` makes one", file=sys.stderr)
        return 0
    print(f"{'TEMPLATE':<18}{'MEMORY':>8}{'VCPUS':>7}{'ON DISK':>9}  {'MADE':<17} IMAGE, KERNEL")
    for template in found:
        facts = template.facts
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(facts.get("created", 0))))
        size = f"{template.memory_bytes / (1 << 20):.0f}M"
        memory = f"{int(facts.get('memory', 0)) >> 20}M"
        what = f"{facts.get('image')}, {facts.get('kernel')}"
        print(f"{template.key:<18}{memory:>8}{facts.get('cpus', 0):>7}{size:>9}  {made:<17} {what}")
    return 0


def rm(
    template: Annotated[
        list[str] | None, Argument(metavar="TEMPLATE...", help="As `vmrun template list` names it.")
    ] = None,
    all: Annotated[bool, Option("--all", help="All of them.")] = False,
) -> int:
    """Remove templates. Machines made of them go on."""
    from vmrun.run.templates import remove, templates

    names = [each.key for each in templates()] if all else template or []
    if not names and not all:
        raise UserError("which template? `vmrun template list` names them; or --all")
    for name in names:
        if not remove(name):
            raise UserError(f"there is no template {name!r}: `vmrun template list` names them")
    return 0


def build(
    image: Annotated[str, Option(metavar="IMAGE", help="As for `vmrun run`.")] = "kit",
    kernel: Annotated[Path | None, Option(metavar="FILE", help="As for `vmrun run`.")] = None,
    mem: Annotated[str, Option("--mem", metavar="SIZE", help="As for `vmrun run`.")] = "512M",
    cpus: Annotated[int, Option("--cpus", metavar="N", help="As for `vmrun run`.")] = 1,
) -> int:
    """Make a template ahead of the first run. Give the options of the runs to come. Prints its name."""
    from vmrun import units
    from vmrun.cli.progress import progress
    from vmrun.image import resolve
    from vmrun.run import templates
    from vmrun.run.guest import find_parts
    from vmrun.run.spec import SandboxSpec

    spec = SandboxSpec(image, kernel, units.parse_memory("--mem", mem), cpus)
    with progress() as teller:
        found, parts = resolve(image, teller), find_parts()
        key = templates.key(spec, found, parts)
        template = templates.find_or_make(key, spec, found, parts, teller)
    print(template.key)
    return 0


COMMANDS = {"list": list_, "rm": rm, "build": build}
