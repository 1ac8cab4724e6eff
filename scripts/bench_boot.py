"""How long a Linux guest takes to its first line of init, and where the time goes.

    .venv/bin/python scripts/bench_boot.py                 five boots: median, best, worst
    .venv/bin/python scripts/bench_boot.py --profile       one boot, sampled: the kernel functions that cost
    most

Boots the guest kit with one vCPU and 128 MiB, by `vmrun boot` itself, and takes the time from starting that
process to the line "vmrun guest: init" on its console. The profile stops the vCPU two hundred times a second
and looks up RIP in the kit's System.map: on a KVM that interprets the kernel, that is where the instructions
are.
"""

import argparse
import bisect
import collections
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmrun.guestkit import kit

FIRST_LINE = b"vmrun guest: init"
SAMPLE_SECONDS = 0.005


def find_kit() -> kit.GuestKit:
    found = kit.find()
    if found is None:
        sys.exit("bench_boot: no guest kit yet: run `make guest`")
    return found


def boot_once(arguments: list[str]) -> float:
    """Seconds from starting `vmrun boot` to the guest's first line."""
    command = [sys.executable, "-m", "vmrun", "boot", "--mem", "128M", "--timeout", "180s", *arguments]
    begin = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as machine:
        for line in machine.stdout or ():
            if FIRST_LINE in line:
                took = time.monotonic() - begin
                machine.terminate()
                machine.communicate()
                return took
        _, said = machine.communicate()
    sys.exit(f"bench_boot: the guest did not reach init: {said.decode(errors='replace')}")


def measure(runs: int, arguments: list[str], what: str) -> None:
    times = sorted(boot_once(arguments) for _ in range(runs))
    print(f"{what}: median {statistics.median(times):.2f} s, best {times[0]:.2f} s, worst {times[-1]:.2f} s")


class Sampler:
    """Looks at a vCPU thread's instruction pointer from time to time."""

    def __init__(self, symbols: Path) -> None:
        rows = sorted((int(line.split()[0], 16), line.split()[2]) for line in symbols.open())
        self._addresses = [row[0] for row in rows]
        self._names = [row[1] for row in rows]
        self.counts: collections.Counter[str] = collections.Counter()

    def take(self, rip: int) -> None:
        if rip < 1 << 47:
            self.counts["(user mode)"] += 1
        else:
            self.counts[self._names[bisect.bisect_right(self._addresses, rip) - 1]] += 1


def profile(found: kit.GuestKit) -> None:
    """One boot in this process, sampled until the first line of init."""
    from vmrun.host.console import Console
    from vmrun.kvm import abi
    from vmrun.machine.config import MachineConfig
    from vmrun.machine.machine import Machine

    sampler = Sampler(found.system_map)
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Console())
        machine = Machine(MachineConfig(), console, stack)
        thread = machine.vcpus[0]
        seen = bytearray()
        write = machine.uart.output

        def output(data: bytes) -> None:
            write(data)
            seen.extend(data)
            if FIRST_LINE in seen:
                machine.end(0, "")

        machine.uart.output = output
        vcpu = thread.vcpu
        vcpu.valid_regs.value |= abi.KVM_SYNC_X86_REGS
        inner = vcpu.run

        def run_and_sample() -> int:
            reason = inner()
            if reason == abi.KVM_EXIT_INTR:
                sampler.take(vcpu.sync.regs.rip)
            return reason

        vcpu.run = run_and_sample  # type: ignore[method-assign]

        def kick() -> None:
            thread.kick()
            machine.loop.call_later(SAMPLE_SECONDS, kick)

        kick()
        begin = time.monotonic()
        machine.run(timeout=180)
        took = time.monotonic() - begin
    total = sum(sampler.counts.values())
    print(f"{took:.2f} s, {total} samples, {thread.exits} exits")
    for name, count in sampler.counts.most_common(40):
        print(f"{count / total * 100:5.1f}%  {took * count / total:6.2f} s  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    found = find_kit()
    if options.profile:
        profile(found)
        return
    measure(options.runs, [], "initramfs, 1 vCPU, 128 MiB")
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk.qcow2"
        shutil.copyfile(found.disk, disk)
        measure(options.runs, ["--disk", str(disk)], "qcow2 root on virtio-blk, 1 vCPU, 128 MiB")


if __name__ == "__main__":
    main()
