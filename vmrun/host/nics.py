"""The host's side of a machine's network cards: taps, bridges and local addresses, before the workers start.
VMM process.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType

from vmrun.host import local
from vmrun.host.bridge import BridgePort
from vmrun.host.tap import Tap, random_mac
from vmrun.machine.config import NicConfig


class OpenNic:
    """One card: its tap, and `words`, what its worker is told (see `devices.worker.main`)."""

    __slots__ = ("config", "tap", "words")

    def __init__(self, config: NicConfig, tap: Tap) -> None:
        self.config = config
        self.tap = tap
        self.words = {"mac": (config.mac or random_mac()).hex(":")}
        if config.mtu is not None:
            self.words["mtu"] = str(config.mtu)
        if config.locked:
            self.words["locked"] = "1"


class Nics:
    """The open cards of one machine, in order: a context manager that owns their taps and undoes what was
    done.

    `name` is the machine's: a guest that boots from the network is told it. Raises UserError and OSError.
    """

    def __init__(self, configs: Iterable[NicConfig], name: str = "") -> None:
        self._nics: list[OpenNic] = []
        with ExitStack() as stack:
            for config in configs:
                # On a bridge the host's end is the bridge.
                address = config.address if config.bridge is None else None
                tap = stack.enter_context(Tap(config.tap, address, config.mtu))
                if config.bridge is not None:
                    stack.enter_context(BridgePort(config.bridge, config.tap, config.address))
                self._nics.append(OpenNic(config, tap))
            hosts = local.assign({k: nic.tap for k, nic in enumerate(self._nics) if nic.config.local})
            for number, host in hosts.items():
                nic = self._nics[number]
                nic.words["local"] = host
                nic.words["hostmac"] = nic.tap.mac().hex(":")
                if nic.config.boot_file:
                    nic.words["boot"] = nic.config.boot_file
                    nic.words["hostname"] = name
            self._stack = stack.pop_all()

    def __iter__(self) -> Iterator[OpenNic]:
        return iter(self._nics)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "Nics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
