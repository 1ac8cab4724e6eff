"""Warm templates: snapshots of machines that have booted and wait for their first command. Owner's process.

A template is for one kernel, image, size and processor, and is made when it is first asked for, under a lock.
It is named after a hash of all that it depends on: a new version, image or processor asks for another name,
and the old one is only a directory that `vmrun template rm` removes. Nothing of a user's has run in one.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vmrun
from vmrun.agent.process import Capture
from vmrun.agent.protocol import AgentError
from vmrun.agent.session import AgentSession
from vmrun.control import runtime, vmm
from vmrun.control.client import MachineClient
from vmrun.errors import EXIT_VMM, UserError
from vmrun.guestkit import cache
from vmrun.guestkit.progress import Progress, waiting
from vmrun.host.cgroup import Group, find_place, machine_limits
from vmrun.host.check import cpu_flags, kvm_flavour
from vmrun.image.config import Image
from vmrun.machine.config_json import describe_config
from vmrun.run.ending import SandboxEnded, last_words
from vmrun.run.guest import BOOT_SECONDS, Parts, connect, machine_config
from vmrun.run.spec import SandboxSpec
from vmrun.snapshot.manifest import FORMAT

if TYPE_CHECKING:
    from vmrun.control.detach import Owned

PREFIX = "template-"
SNAPSHOT = "snapshot"
FACTS = "template.json"
# Facts that two templates share of which one is out of date.
SAME = ("image", "kernel", "memory", "cpus", "nics", "mounts")
# What is tried so that later commands find it in memory. The machine of a template must be able to save
# itself, so it is not confined as those of runs are: of an image nothing may run in it, but only be read.
KIT_COMMANDS = (["true"], ["sh", "-c", ":"])
IMAGE_COMMANDS = (
    [
        *("/proc/1/exe", "--warm", "/bin/sh", "/bin/true", "/lib64/ld-linux-x86-64.so.2"),
        *("/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/lib/ld-musl-x86_64.so.1"),
    ],
)
MAKE_SECONDS = 900.0  # for all of it
SETTLE_PAUSE = 0.1
SETTLE_LOOKS = 5
SETTLE_SECONDS = 10.0
_HOME = Path(vmrun.__file__).parent.parent  # where this vmrun is installed
STATE_MODULES = ("devices", "vmrun/machine", "vmrun/kvm", "vmrun/snapshot")


@dataclass(frozen=True, slots=True)
class Template:
    """A finished template: its key, what it is of, and when it was made (seconds since the epoch)."""

    key: str
    path: Path
    facts: dict[str, Any]

    @property
    def snapshot(self) -> Path:
        return self.path / SNAPSHOT

    @property
    def memory_bytes(self) -> int:
        """What it takes on the disk."""
        files = [file for file in self.snapshot.glob("*") if file.is_file()]
        return sum(file.stat().st_blocks * 512 for file in files)


def key(spec: SandboxSpec, image: Image, parts: Parts) -> str:
    """The name of the template for these."""
    config = describe_config(machine_config(spec, image, parts))
    for nic in config["nics"]:
        nic.update(tap="", mac=None, allow=[], allow_private=False)  # a clone has its own
    # The image counts by its digest, and how much may be written to it is each clone's.
    config.update(name="", disks=[{**config["disks"][0], "path": "", "quota": None}])
    depends = [
        vmrun.__version__,
        FORMAT,
        _code(),
        config,
        image.digest,
        _identity(image.disk),  # converted again it has the same digest, and is another file
        _identity(parts.agent.initramfs),
        _identity(spec.kernel or parts.kit.kernel),
        _processor(),
    ]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _identity(path: Path) -> list[Any]:
    """Of a file: its content would be hashed at every start."""
    status = path.stat()
    return [os.fspath(path.resolve()), status.st_size, status.st_mtime_ns]


def _processor() -> list[Any]:
    """What a snapshot asks of the processor, nearly; the rest is checked when it is restored."""
    model: list[str] = []
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if not line.strip():
                break
            if line.startswith(("vendor_id", "cpu family", "model", "stepping")):
                model.append(" ".join(line.split()))
    flavour = kvm_flavour()
    boot = ""
    if flavour == "pvm":
        # Its guests' time-stamp counter is the host's, which begins anew when the host does.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [flavour, model, sorted(cpu_flags()), boot]


def _code() -> list[Any]:
    """What vmrun itself is: of a checkout the version says too little."""
    newest = 0
    for folder in STATE_MODULES:
        for directory, _, files in os.walk(_HOME / folder):
            for name in files:
                if name.endswith(".py"):
                    newest = max(newest, os.stat(os.path.join(directory, name)).st_mtime_ns)
    return [newest]


def find(name: str) -> Template | None:
    path = cache.find(PREFIX + name)
    return None if path is None else _open(path)


def _open(path: Path) -> Template | None:
    try:
        facts = json.loads((path / FACTS).read_text())
    except (OSError, ValueError):
        return None
    return Template(path.name.removeprefix(PREFIX), path, facts) if isinstance(facts, dict) else None


def templates() -> list[Template]:
    """All there are, the newest first."""
    found = [_open(path) for path in cache.directory().glob(f"{PREFIX}*") if path.is_dir()]
    there = [template for template in found if template is not None]
    return sorted(there, key=lambda template: float(template.facts.get("created", 0)), reverse=True)


def remove(name: str) -> bool:
    """False when there is none of that name. Machines that were made of it go on."""
    return cache.remove(PREFIX + name)


def find_or_make(name: str, spec: SandboxSpec, image: Image, parts: Parts, progress: Progress) -> Template:
    """The template `name`, made first if need be: that boots a machine. Raises UserError and OSError."""
    found = find(name)
    if found is not None:
        return found

    def make(into: Path) -> None:
        began = time.monotonic()
        _make(into, spec, image, parts, tell)
        facts = {
            "image": spec.image if spec.image == "kit" else os.path.abspath(spec.image),
            "kernel": os.fspath(spec.kernel) if spec.kernel is not None else "kit",
            "memory": spec.memory,
            "cpus": spec.cpus,
            "nics": len(spec.nics),
            "mounts": [each.read_only for each in spec.mounts],
            "home": os.fspath(_HOME),
            "created": time.time(),
            "seconds": time.monotonic() - began,
        }
        (into / FACTS).write_text(json.dumps(facts))

    progress.step("making a template for later runs")
    with waiting(progress, "another run makes it") as tell:
        path = cache.find_or_make(PREFIX + name, make)
    made = _open(path)
    if made is None:
        raise UserError(f"{path}: damaged: remove it", EXIT_VMM)
    for other in templates():
        if other.key != name and _replaces(made, other):
            remove(other.key)
    return made


def _replaces(made: Template, other: Template) -> bool:
    """Whether `other` is what the same options meant before vmrun, the image or the processor changed. One of
    another installation that is still there is that one's.
    """
    home = str(other.facts.get("home", ""))
    theirs = home != made.facts.get("home") and os.path.isdir(home)
    return not theirs and all(other.facts.get(each) == made.facts.get(each) for each in SAME)


def _make(into: Path, spec: SandboxSpec, image: Image, parts: Parts, tell: Callable[[str], None]) -> None:
    """Calls `tell` with what is being done, for people."""
    tell("starting a machine")
    with ExitStack() as stack:
        # Not by a fork: whoever makes templates may have threads, if only for a progress bar.
        config = machine_config(spec, image, parts)
        limits = machine_limits(spec.memory, spec.cpus, workers=1)
        group = stack.enter_context(Group("template", limits, find_place()))
        owned = vmm.spawn(vmm.VmmRequest(config=config, cgroup=group.path, timeout=MAKE_SECONDS))
        stack.callback(_forget_logs, owned)
        stack.enter_context(owned)
        owned.wait_until_running()
        tell("booting")
        with _ended_instead(owned):
            session = stack.enter_context(connect(owned, BOOT_SECONDS))
            tell("trying commands")
            session.sync()
            # So that the first command finds in memory what every command needs.
            _warm_up(session, KIT_COMMANDS if spec.image == "kit" else IMAGE_COMMANDS)
            # A slow boot loses time, which each clone would have to be given.
            session.set_time()
            session.close()
            with MachineClient(owned.name) as machine:
                _settle(machine)
                tell("saving")
                machine.snapshot(into / SNAPSHOT, end=True)


def _warm_up(session: AgentSession, commands: Sequence[list[str]]) -> None:
    """Twice: the second time the guest has made what the first needed."""
    for argv in (*commands, *commands):
        session.exec(argv, stdout=Capture(0), stderr=Capture(0)).wait(BOOT_SECONDS)


def _settle(machine: MachineClient) -> None:
    """Let the guest finish what it has begun, or each of its clones does that first: until none of its
    processors has asked for anything for a while.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    before, still = None, 0
    while still < SETTLE_LOOKS and time.monotonic() < deadline:
        time.sleep(SETTLE_PAUSE)
        exits = machine.inspect()["exits"]
        still = still + 1 if exits == before else 0
        before = exits


def _forget_logs(owned: "Owned") -> None:
    if owned.name:
        runtime.settle(owned.name, None)


@contextmanager
def _ended_instead(owned: "Owned") -> Iterator[None]:
    """Why the machine ended is a better reason than that it did not answer; what it printed is the best."""
    try:
        yield
    except (AgentError, UserError) as error:
        code, reason = EXIT_VMM, str(error)
        if isinstance(error, UserError):
            code = error.code
        if not owned.alive():
            code, reason = owned.wait()
        raise SandboxEnded(code or EXIT_VMM, f"no template: {reason}", last_words(owned.name)) from None
