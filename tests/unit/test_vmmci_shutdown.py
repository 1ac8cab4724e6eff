"""The policy of shutdowns: who is asked, how long it may take, and what happens then. Time is the test's."""

import heapq
from collections.abc import Callable
from typing import Any

import pytest

from devices.platform.acpi_pm import ENABLE, POWER_BUTTON, STATUS, AcpiPm
from devices.virtio.vmmci import VMMCI_F_ACK, VMMCI_F_SYNCRTC, VMMCI_REBOOT, VMMCI_SHUTDOWN, VMMCI_SYNCRTC
from vmrun.machine.clock_jump import ClockJump
from vmrun.machine.shutdown import Shutdown


class FakeLoop:
    """Timers and handed-over calls; both run in `advance`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.soon: list[Callable[[], None]] = []
        self.count = 0

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> int:
        self.count += 1
        heapq.heappush(self.timers, (self.now + seconds, self.count, callback))
        return self.count

    def cancel(self, timer: int) -> None:
        assert timer in [number for _, number, _ in self.timers], "cancelled what had run"
        self.timers = [entry for entry in self.timers if entry[1] != timer]
        heapq.heapify(self.timers)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.soon or (self.timers and self.timers[0][0] <= end):
            if self.soon:
                self.soon.pop(0)()
            else:
                self.now, _, callback = heapq.heappop(self.timers)
                callback()
        self.now = end


class FakeLine:
    level = False

    def set_level(self, asserted: bool) -> None:
        self.level = asserted


class FakeEvents:
    """What the transport lends the device."""

    def __init__(self) -> None:
        self.changes = 0

    def config_changed(self) -> None:
        self.changes += 1


class World:
    def __init__(self) -> None:
        self.loop: Any = FakeLoop()
        self.line = FakeLine()
        self.pm = AcpiPm(self.line, lambda: None, lambda: None)
        self.stopped: list[tuple[int, str]] = []
        self.shutdown = Shutdown(self.loop, self.pm, lambda code, reason: self.stopped.append((code, reason)))
        self.vmmci = self.shutdown.vmmci
        self.events: Any = FakeEvents()

    def driver(self, features: int = VMMCI_F_ACK) -> None:
        self.vmmci.activate(features, [], self.events)

    def acknowledge(self, command: int) -> None:
        self.vmmci.write_config(0, command.to_bytes(4, "little"))

    @property
    def codes(self) -> list[int]:
        return [code for code, _ in self.stopped]


@pytest.fixture
def world() -> World:
    return World()


def test_without_a_driver_the_machine_stops_at_once(world: World) -> None:
    world.shutdown.request(143, "stopped by SIGTERM")
    assert world.codes == [143]
    assert "stopped by SIGTERM" in world.stopped[0][1]


@pytest.mark.parametrize(("reboot", "command"), [(False, VMMCI_SHUTDOWN), (True, VMMCI_REBOOT)])
def test_vmmci_is_asked_first(world: World, reboot: bool, command: int) -> None:
    world.pm.write(ENABLE, 2, POWER_BUTTON)
    world.driver()
    world.shutdown.request(143, "stopped", reboot=reboot)
    assert world.vmmci.read_config(0, 4)[0] == command
    assert world.events.changes == 1
    assert not world.line.level, "one request is enough"
    assert world.shutdown.reboot is reboot
    world.loop.advance(2.9)
    assert world.stopped == []
    world.loop.advance(0.2)
    assert world.codes == [143]


def test_an_acknowledgement_gives_two_minutes(world: World) -> None:
    world.driver()
    world.shutdown.request(143, "stopped")
    world.loop.advance(2)
    assert not world.shutdown.expected
    world.acknowledge(VMMCI_SHUTDOWN)
    assert world.loop.timers[0][0] == 3, "a vCPU's thread touches no timer"
    world.loop.advance(119)
    assert world.stopped == []
    assert world.shutdown.expected
    world.acknowledge(VMMCI_SHUTDOWN)
    world.shutdown.request(99, "again")
    world.loop.advance(1.5)
    assert world.codes == [143], "neither a second acknowledgement nor a second request prolongs it"
    assert world.loop.timers == []


def test_a_driver_that_never_acknowledges_gets_two_minutes(world: World) -> None:
    world.driver(0)
    world.shutdown.request(143, "stopped")
    world.loop.advance(119)
    assert world.stopped == []
    world.loop.advance(2)
    assert world.codes == [143]


def test_a_reboot_takes_the_place_of_a_shutdown(world: World) -> None:
    world.driver()
    world.shutdown.request(143, "stopped")
    world.acknowledge(VMMCI_SHUTDOWN)
    world.loop.advance(60)
    world.shutdown.request(143, "rebooted", reboot=True)
    assert world.shutdown.reboot
    world.loop.advance(2)
    world.acknowledge(VMMCI_REBOOT)
    world.loop.advance(119)
    assert world.stopped == []


def test_the_power_button_of_a_guest_that_enabled_it(world: World) -> None:
    world.pm.write(ENABLE, 2, POWER_BUTTON)
    world.shutdown.request(143, "stopped")
    assert world.line.level
    world.loop.advance(1)
    world.pm.write(STATUS, 2, POWER_BUTTON)
    assert not world.line.level
    world.loop.advance(100)
    assert world.stopped == []
    assert world.shutdown.expected
    world.loop.advance(30)
    assert world.codes == [143]


def test_a_button_that_nobody_looks_at(world: World) -> None:
    world.pm.write(ENABLE, 2, POWER_BUTTON)
    world.shutdown.request(143, "stopped")
    world.loop.advance(3)
    assert world.codes == [143]


def test_a_button_that_was_not_enabled_is_no_driver(world: World) -> None:
    world.pm.write(ENABLE, 2, 1)
    world.shutdown.request(143, "stopped")
    assert world.codes == [143]
    assert not world.line.level


def ask_agent(world: World) -> Callable[[bool], None]:
    """Have the machine's agent asked for a shutdown; returns what takes its answer."""
    asked: list[tuple[bool, Callable[[bool], None]]] = []

    def ask(reboot: bool, done: Callable[[bool], None]) -> bool:
        asked.append((reboot, done))
        return True

    world.shutdown.ask_agent = ask
    world.shutdown.request(143, "stopped")
    ((reboot, done),) = asked
    assert not reboot and world.loop.timers == []
    return done


def test_an_agent_that_took_the_request_gets_two_minutes(world: World) -> None:
    ask_agent(world)(True)
    world.loop.advance(119)
    assert world.stopped == []
    assert world.shutdown.expected
    world.loop.advance(2)
    assert world.codes == [143]


def test_an_agent_that_goes_away_may_do_so_because_the_guest_ends(world: World) -> None:
    ask_agent(world)(False)
    world.loop.advance(2.9)
    assert world.stopped == []
    world.loop.advance(0.2)
    assert world.codes == [143]


def test_a_guest_that_shuts_down_by_itself_gets_three_seconds(world: World) -> None:
    world.driver()
    world.acknowledge(VMMCI_SHUTDOWN)
    assert world.loop.timers == []
    world.loop.advance(2.9)
    assert world.stopped == []
    assert world.shutdown.expected
    world.loop.advance(0.2)
    assert world.codes == [0], "it wanted to end"


def test_a_request_after_the_guest_s_own_shutdown_is_one(world: World) -> None:
    world.driver()
    world.acknowledge(VMMCI_SHUTDOWN)
    world.loop.advance(1)
    world.shutdown.request(143, "stopped")
    world.acknowledge(VMMCI_SHUTDOWN)
    world.loop.advance(100)
    assert world.stopped == []


class Clock:
    def __init__(self, world: World) -> None:
        self.world = world
        self.jumped = 0.0

    def __call__(self) -> float:
        return float(1_700_000_000 + self.world.loop.now + self.jumped)


@pytest.mark.parametrize("jump", [3600.0, 5.5, -3600.0])
def test_a_jump_of_the_clock_is_told_to_the_guest(world: World, jump: float) -> None:
    clock = Clock(world)
    world.shutdown.on_driver = ClockJump(world.loop, world.vmmci, clock).update
    world.driver(VMMCI_F_SYNCRTC)
    world.loop.advance(100)
    assert world.events.changes == 0
    clock.jumped = jump
    world.loop.advance(1.5)
    assert world.vmmci.read_config(0, 4)[0] == VMMCI_SYNCRTC
    world.acknowledge(VMMCI_SYNCRTC)
    world.loop.advance(100)
    assert world.events.changes == 1
    clock.jumped += 4
    world.loop.advance(10)
    assert world.events.changes == 1, "a few seconds are no jump"


def test_nobody_looks_at_the_clock_without_a_driver_that_cares(world: World) -> None:
    clock = Clock(world)
    world.shutdown.on_driver = ClockJump(world.loop, world.vmmci, clock).update
    world.driver(VMMCI_F_ACK)
    world.loop.advance(1)
    assert world.loop.timers == []
    world.vmmci.reset()
    world.driver(VMMCI_F_SYNCRTC)
    world.loop.advance(1.5)
    assert len(world.loop.timers) == 1
    world.vmmci.reset()
    world.driver(VMMCI_F_SYNCRTC)
    world.loop.advance(10)
    assert len(world.loop.timers) == 1, "a driver that comes back starts no second look"
    world.vmmci.reset()
    clock.jumped = 3600
    world.loop.advance(2)
    assert world.loop.timers == []
    world.driver(VMMCI_F_SYNCRTC)
    world.loop.advance(10)
    assert world.events.changes == 0, "what happened while nobody looked is no jump"
