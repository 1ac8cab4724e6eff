"""How a guest is asked to shut down or to reboot, and what happens when it does not. VMM process, main loop.

The request goes to vmmci if the guest has a driver for it, else to the ACPI power button if the guest enabled
it, else to our agent in the guest; a guest with none of them is stopped at once. It has ACKNOWLEDGE_SECONDS
to show that it heard (a driver of vmmci writes the command back, an ACPI guest clears the button's status; an
agent answers, and has longer) and FINISH_SECONDS from then on to finish; after that it is stopped hard. The
times and the rules are vmd's (`vmmci_ctl`, `vmmci_ack`).

ACPI has no button for a reboot. There the guest is asked to shut down, and whoever started the machine is
told to start it again.
"""

from collections.abc import Callable

from devices.platform.acpi_pm import POWER_BUTTON, AcpiPm
from devices.virtio.vmmci import VMMCI_REBOOT, VMMCI_SHUTDOWN, Vmmci
from vmrun.machine.loop import EventLoop

ACKNOWLEDGE_SECONDS = 3.0
FINISH_SECONDS = 120.0


class Shutdown:
    """The requests to one guest. All on the loop's thread, but for what `vmmci` calls from vCPU threads.

    `stop` ends the machine hard, with the exit code of the request and a reason. `vmmci` is this object's.
    """

    def __init__(self, loop: EventLoop, acpi_pm: AcpiPm, stop: Callable[[int, str], None]) -> None:
        self.vmmci = Vmmci(self._driver_changed, self._acknowledged, self._announced)
        self.reboot = False  # the last request was for a reboot
        self.expected = False  # the guest was heard to shut down: whatever its CPU does next is the end
        self.on_driver: Callable[[], None] = lambda: None  # the driver of vmmci came or went; loop's thread
        # Asks the guest's agent for a reboot (True) or a shutdown, and says later whether it was heard; False
        # when there is none.
        self.ask_agent: Callable[[bool, Callable[[bool], None]], bool] = lambda reboot, done: False
        self._loop = loop
        self._acpi_pm = acpi_pm
        self._stop = stop
        self._code = 0
        self._requested: bool | None = None  # the request under way: True for a reboot
        self._timer: int | None = None

    def request(self, code: int, reason: str, *, reboot: bool = False) -> None:
        """Ask the guest. `code` and `reason` are for its end when that must be forced.

        The same request again changes nothing: the guest's time is not prolonged.
        """
        if self._requested == reboot:
            return
        self._requested = self.reboot = reboot
        self._code = code
        if self.vmmci.send(VMMCI_REBOOT if reboot else VMMCI_SHUTDOWN):
            if self.vmmci.acknowledges:
                self._wait(ACKNOWLEDGE_SECONDS, self._not_acknowledged)
            else:
                self._heard()
        elif self._acpi_pm.enable & POWER_BUTTON:
            self._acpi_pm.press_power_button()
            self._wait(ACKNOWLEDGE_SECONDS, self._look_at_button)
        elif self.ask_agent(reboot, self._agent_answered):
            pass  # it has as long as a session with it may take
        else:
            self._stop(code, f"{reason}: the guest has no driver that could be asked to shut down")

    def _agent_answered(self, done: bool) -> None:
        if done:
            self._heard()
        else:
            # A guest that goes down takes its ports away, perhaps before the agent's answer came through.
            self._wait(ACKNOWLEDGE_SECONDS, self._agent_refused)

    def _agent_refused(self) -> None:
        self._stop(self._code, "the guest's agent did not take the request to shut down")

    def _look_at_button(self) -> None:
        if self._acpi_pm.status & POWER_BUTTON:
            self._not_acknowledged()
        else:
            self._heard()

    def _heard(self) -> None:
        self.expected = True
        self._wait(FINISH_SECONDS, self._not_finished)

    def _not_acknowledged(self) -> None:
        self._stop(
            self._code,
            f"the guest did not react within {ACKNOWLEDGE_SECONDS:g} s to the request to shut down",
        )

    def _not_finished(self) -> None:
        self._stop(self._code, f"the guest did not finish within {FINISH_SECONDS:g} s of its shutdown")

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._loop.cancel(self._timer)

        def expired() -> None:
            self._timer = None
            then()

        self._timer = self._loop.call_later(seconds, expired)

    # Called by vmmci on vCPU threads: timers are the main loop's.

    def _driver_changed(self) -> None:
        self._loop.call_soon(lambda: self.on_driver())

    def _acknowledged(self, command: int) -> None:
        self._loop.call_soon(self._heard)

    def _announced(self) -> None:
        """The guest shuts down by itself. It has a moment to end the machine; then that is done for it."""

        def wait() -> None:
            # Once: it may say so again and again, and each time would be a timer more.
            if self._requested is None and not self.expected:
                self.expected = True
                self._wait(ACKNOWLEDGE_SECONDS, lambda: self._stop(0, "the guest shut down"))

        self._loop.call_soon(wait)
