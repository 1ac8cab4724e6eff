"""What `Machine.exchange_disk` says when the worker of the new image does not come to serve it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devices.vhost.messages import ProtocolError
from vmrun.machine.config import DiskConfig
from vmrun.machine.machine import Machine


class Process:
    """A worker's, which is known to have ended when it was looked at `looks` times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def poll(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def describe_exit(self) -> str:
        return "worker blk0 exited with status 66: its image is no image"


class Worker:
    def __init__(self, looks: int) -> None:
        self.worker = Process(0)
        self._looks = looks

    def launch_another(self, words: dict[str, str], fds: dict[str, int]) -> str:
        self.worker = Process(self._looks)
        return "channel"


class Device:
    def restart(self, channel: str) -> None:
        raise ProtocolError("blk0: the back end hung up")


def a_machine(looks: int) -> Any:
    def ask(work: Callable[[], Any]) -> Any:
        return work()

    machine: Any = object.__new__(Machine)
    machine.config = SimpleNamespace(disks=[DiskConfig(Path("x.qcow2"), "qcow2")], memory=1 << 20)
    machine.loop = SimpleNamespace(ask=ask)
    machine.workers = {"blk0": Worker(looks)}
    machine.devices = {"blk0": Device()}
    machine._disks = [SimpleNamespace(words={}, fds={})]
    return machine


def test_it_says_how_the_worker_ended() -> None:
    with pytest.raises(OSError, match=r"^worker blk0 exited with status 66: its image is no image$"):
        a_machine(looks=3).exchange_disk(0)


def test_a_worker_that_lives_has_only_been_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmrun.machine.workers.DEAD_WORKER_SECONDS", 0.05)
    with pytest.raises(OSError, match=r"^blk0: the back end hung up$"):
        a_machine(looks=1_000_000).exchange_disk(0)
