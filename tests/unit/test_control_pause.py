"""Pausing with vCPUs of straw: who acknowledges, who does not, and who changes their mind."""

import threading
from collections.abc import Callable, Iterator

import pytest

from vmrun.machine import pause as pauses
from vmrun.machine.loop import EventLoop
from vmrun.machine.pause import Pause


class StrawVcpu:
    """Does posted work on a thread of its own each time, or never, if it is `stuck`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.vcpu = self
        self.stuck = False
        self.clocks = 0
        self.work: list[Callable[[], None]] = []
        self.threads: list[threading.Thread] = []

    def kvmclock_ctrl(self) -> None:
        self.clocks += 1

    def post(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        if not self.stuck:
            self.go()

    def go(self) -> None:
        while self.work:
            self.threads.append(threading.Thread(target=self.work.pop(0)))
            self.threads[-1].start()

    def parked(self) -> int:
        for thread in self.threads:
            thread.join(0.02)
        return sum(thread.is_alive() for thread in self.threads)


class StrawDevices:
    """Says what was asked of it, and where the vCPUs were then."""

    def __init__(self, vcpus: list[StrawVcpu]) -> None:
        self.vcpus = vcpus
        self.said: list[tuple[str, int]] = []

    def pause(self) -> None:
        self.said.append(("pause", self.alive()))

    def unpause(self) -> None:
        self.said.append(("unpause", self.alive()))

    def alive(self) -> int:
        return sum(thread.is_alive() for vcpu in self.vcpus for thread in vcpu.threads)


class Stage:
    def __init__(self) -> None:
        self.loop = EventLoop()
        self.vcpus = [StrawVcpu(0), StrawVcpu(1)]
        self.devices = StrawDevices(self.vcpus)
        self.pause = Pause(self.loop, self.vcpus, self.devices)  # type: ignore[arg-type]
        self.answers: list[str | None] = []

    def done(self, error: str | None) -> None:
        self.answers.append(error)
        self.loop.stop()

    def run(self) -> None:
        """Until an answer comes."""
        self.loop._stopping = False
        self.loop.run()

    def close(self) -> None:
        self.pause.release()
        for vcpu in self.vcpus:
            vcpu.go()
            for thread in vcpu.threads:
                thread.join()
        self.loop.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def test_pausing_and_resuming(stage: Stage) -> None:
    for cycle in range(1, 4):
        stage.pause.pause(stage.done)
        assert stage.pause.pausing and not stage.pause.paused
        stage.run()
        assert stage.answers == [None] * cycle
        assert stage.pause.paused and not stage.pause.pausing
        assert [(vcpu.parked(), vcpu.clocks) for vcpu in stage.vcpus] == [(1, cycle)] * 2
        stage.pause.resume()
        assert not stage.pause.paused
        assert [vcpu.parked() for vcpu in stage.vcpus] == [0, 0]
        # With no vCPU in the guest, both times: all of them wait in their threads.
        assert stage.devices.said == [("pause", 2), ("unpause", 2)] * cycle


def test_work_is_done_while_nothing_moves(stage: Stage) -> None:
    with pytest.raises(ValueError, match="not paused"):
        stage.pause.do(stage.devices.pause)
    stage.pause.pause(stage.done)
    stage.run()
    stage.pause.do(lambda: stage.devices.said.append(("work", stage.devices.alive())))
    stage.pause.resume()
    assert [vcpu.parked() for vcpu in stage.vcpus] == [0, 0]
    assert stage.devices.said == [("pause", 2), ("work", 2), ("unpause", 2)]


def test_the_first_does_not_come(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "PAUSE_SECONDS", 0.05)
    stage.vcpus[0].stuck = True
    stage.pause.pause(stage.done)
    stage.run()
    assert stage.answers == ["vCPU 0 does not leave the guest within 0.05 s"]
    assert stage.vcpus[1].parked() == 0
    assert stage.devices.said == []


def test_all_must_acknowledge(stage: Stage) -> None:
    stage.vcpus[1].stuck = True
    stage.pause.pause(stage.done)
    stage.loop.call_later(0.05, stage.vcpus[1].go)
    stage.pause.pause(stage.done)  # a second client wants the same
    stage.run()
    assert stage.answers == [None, None]
    stage.pause.pause(stage.done)
    assert stage.answers == [None] * 3
    assert [vcpu.clocks for vcpu in stage.vcpus] == [1, 1]


def test_one_does_not_come(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "PAUSE_SECONDS", 0.05)
    stage.vcpus[1].stuck = True
    stage.pause.pause(stage.done)
    stage.run()
    assert stage.answers == ["vCPU 1 does not leave the guest within 0.05 s"]
    assert not stage.pause.paused and not stage.pause.pausing
    assert stage.vcpus[0].parked() == 0
    # It comes at last: it must neither stay, nor count for the next pause.
    (late,) = stage.vcpus[1].work
    stage.vcpus[1].work.clear()
    stage.pause.pause(stage.done)
    late()
    stage.run()
    assert stage.answers[1:] == ["vCPU 1 does not leave the guest within 0.05 s"]


def test_resumed_before_it_was_paused(stage: Stage) -> None:
    stage.vcpus[1].stuck = True
    stage.pause.pause(stage.done)
    stage.pause.resume()
    assert stage.answers == ["it was resumed meanwhile"]
    assert stage.vcpus[0].parked() == 0
    stage.vcpus[1].go()
    assert stage.vcpus[1].parked() == 0
    stage.vcpus[1].stuck = False
    stage.pause.pause(stage.done)
    stage.run()
    assert stage.answers[1:] == [None]
    assert [vcpu.parked() for vcpu in stage.vcpus] == [1, 1]


def test_the_end_lets_everybody_go(stage: Stage) -> None:
    stage.pause.pause(stage.done)
    stage.run()
    stage.pause.release()
    assert [vcpu.parked() for vcpu in stage.vcpus] == [0, 0]


def test_resumed_by_who_was_told_first(stage: Stage) -> None:
    """A restored machine goes on as soon as it holds still, whoever else waits for that."""

    def go_on(error: str | None) -> None:
        assert error is None
        stage.pause.resume()

    stage.pause.pause(go_on)
    stage.pause.pause(stage.done)
    stage.run()
    assert stage.answers == ["it was resumed meanwhile"]
    assert [vcpu.parked() for vcpu in stage.vcpus] == [0, 0]


def test_told_when_it_goes_on_for_the_next_time(stage: Stage) -> None:
    told: list[bool] = []
    stage.pause.on_resume(lambda: told.append(stage.pause.paused))
    stage.pause.resume()  # it runs
    for _ in range(2):
        stage.pause.pause(stage.done)
        stage.run()
        stage.pause.resume()
        assert told == [False]
