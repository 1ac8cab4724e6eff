"""Runs in a guest, as root, beside vmrun/host/cgroup.py: what the kernel does to those who want more than
their group may have. Prints "ok NAME" for each.
"""

import os
import signal
import time

from cgroup import Group, Limits, find_place

MIB = 1 << 20
WANTED = 64 * MIB
LIMITS = Limits(memory=32 * MIB, pids=8, cpu=0.25)

place = find_place()
assert place is not None and place.controllers == {"memory", "pids", "cpu"}, place
print("ok place", flush=True)


def child(group: Group, do: object) -> int:
    """How a child ended that did it in the group."""
    pid = os.fork()
    if pid == 0:
        group.enter()
        do()  # type: ignore[operator]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hog() -> None:
    held = bytearray(WANTED)
    for at in range(0, WANTED, 4096):
        held[at] = 1


def breed() -> None:
    for count in range(100):
        try:
            if os.fork() == 0:
                signal.pause()
        except BlockingIOError:
            os._exit(count)
    os._exit(100)


with Group("check", LIMITS, place) as group:
    assert group.path is not None and group.missing == []
    assert not group.out_of_memory
    assert child(group, hog) == -signal.SIGKILL
    assert group.out_of_memory
    print("ok memory", flush=True)
    # Those it made are still there, and the group ends them.
    assert child(group, breed) == 7
    assert len((group.path / "cgroup.procs").read_text().split()) == 7
    print("ok pids", flush=True)
    path = group.path
assert not path.exists()
print("ok end", flush=True)

with Group("slow", Limits(cpu=0.25), place) as group:
    assert group.path is not None

    def spin() -> None:
        throttled = group.path / "cpu.stat"  # type: ignore[operator]
        deadline = time.monotonic() + 60
        while "nr_throttled 0\n" in throttled.read_text() and time.monotonic() < deadline:
            pass
        os._exit("nr_throttled 0\n" in throttled.read_text())

    assert child(group, spin) == 0
    print("ok cpu", flush=True)
