"""Builds the guest's kernel: Debian's linux-source, everything off but what `kernel.config` names.

The result is the uncompressed `vmlinux` (ELF, entered at its 64-bit or PVH entry) and its `System.map`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vmrun.errors import EXIT_VMM, UserError
from vmrun.guestkit import host
from vmrun.guestkit.progress import Progress

FRAGMENT = Path(__file__).with_name("kernel.config")
# The same inputs give the same kernel: nothing of the time, user or machine goes in.
_ENVIRONMENT = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "vmrun",
    "KBUILD_BUILD_HOST": "vmrun",
}
# gcc expands memset in rarely run functions to REP STOSB, a step for each byte where the kernel is
# interpreted. The kernel's own memset clears 64 bytes in eleven instructions: a million steps less for .bss.
_COMPILER_FLAGS = "-mstringop-strategy=libcall"
# Ticks a second. A tick is some 3,000 instructions, so where the kernel is interpreted the least that Kconfig
# offers, 100, is a third of a processor, also while a program computes. The kernel's code is good for 12 and
# more (include/linux/jiffies.h); timers that matter have high resolution and do not wait for ticks.
_HZ = 25
# What `make vmlinux` printed for the fragment when it was last counted; only progress depends on it.
_BUILD_LINES = 1430
# Most of the tree is for other machines. Kconfig reads every Kconfig file, and those stay.
_LEFT_OUT = [
    "Documentation/*/*",
    "arch/[!x]*/*.[chS]",
    "arch/[!x]*/*.dts*",
    "tools/testing/*",
    "sound/*.[ch]",
    "drivers/gpu/*.h",
]


def build(into: Path, source: Path, progress: Progress) -> None:
    """Unpack `source` (linux-source-X.Y.tar.xz) below `into` and leave `vmlinux` and `System.map` there."""
    work = into / "work"
    tree, objects = work / "source", work / "objects"
    tree.mkdir(parents=True)
    objects.mkdir()
    progress.step(f"unpacking {source.name}")
    exclude = [f"--exclude=linux-source-*/{pattern}" for pattern in _LEFT_OUT]
    host.run(["tar", "-xf", source, "--strip-components=1", "--wildcards", *exclude], tree)
    progress.step("configuring the kernel")
    _set_ticks(tree / "kernel" / "Kconfig.hz")
    make: list[str | Path] = ["make", f"O={objects}", f"-j{len(os.sched_getaffinity(0))}"]
    host.run([*make, f"KCONFIG_ALLCONFIG={FRAGMENT}", "allnoconfig"], tree, _ENVIRONMENT)
    _check_configuration(objects / ".config")
    progress.step("building the kernel", _BUILD_LINES)
    host.run(
        [*make, f"KCFLAGS={_COMPILER_FLAGS}", "vmlinux"],
        tree,
        _ENVIRONMENT,
        lambda line: progress.advance(line.strip()),
    )
    for name in ("vmlinux", "System.map"):
        shutil.move(objects / name, into / name)
    shutil.rmtree(work)


def _set_ticks(choices: Path) -> None:
    """Let "100 ticks a second" mean `_HZ`."""
    text = choices.read_text()
    slower = text.replace("default 100 if HZ_100", f"default {_HZ} if HZ_100")
    if slower == text:
        raise UserError(f"this kernel source's {choices.name} has no choice of 100 ticks a second", EXIT_VMM)
    choices.write_text(slower)


def inputs() -> list[str]:
    """What the kernel is made from besides its source; comments do not count."""
    lines = FRAGMENT.read_text().splitlines()
    wishes = [line for line in lines if line.startswith(("CONFIG_", "# CONFIG_"))]
    environment = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
    return [*wishes, _COMPILER_FLAGS, f"HZ={_HZ}", *environment]


def _check_configuration(configuration: Path) -> None:
    """Kconfig drops a wish whose dependencies are not met, and says nothing; the kernel would not boot."""
    got = set(configuration.read_text().splitlines())
    wanted = [line for line in FRAGMENT.read_text().splitlines() if line.startswith("CONFIG_")]
    dropped = [line for line in wanted if line not in got]
    if dropped:
        raise UserError(f"this kernel source does not take {', '.join(dropped)} of {FRAGMENT}", EXIT_VMM)
