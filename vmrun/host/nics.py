"""The host's side of a machine's network cards: taps, bridges and local addresses, or passt, before the
workers start. VMM process.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from vmrun.errors import EXIT_VMM
from vmrun.host import local
from vmrun.host.bridge import BridgePort
from vmrun.host.tap import Tap, random_mac
from vmrun.machine.config import NicConfig

if TYPE_CHECKING:
    from vmrun.host.passt import Passt
    from vmrun.machine.loop import EventLoop


class OpenNic:
    """One card: its tap or its passt, and `words`, what its worker is told (see `devices.worker.main`)."""

    __slots__ = ("_tap", "config", "passt", "words")

    def __init__(self, config: NicConfig, mac: bytes, tap: Tap | None, passt: "Passt | None" = None) -> None:
        self.config = config
        self._tap = tap
        self.passt = passt
        self.words = {"mac": mac.hex(":")}
        if config.mtu is not None:
            self.words["mtu"] = str(config.mtu)
        if config.locked:
            self.words["locked"] = "1"
        if passt is not None:
            self._describe_user(passt)

    def _describe_user(self, passt: "Passt") -> None:
        from vmrun.host.outbound import own_addresses, resolve

        self.words |= {"local": passt.gateway, "hostmac": passt.gateway_mac.hex(":")}
        own = own_addresses()
        allowed = resolve(self.config.allow, own, private=self.config.allow_private)
        self.words["allow"] = "+".join(allowed)
        self.words["own"] = "+".join(own)
        if self.config.allow_private:
            self.words["private"] = "1"

    @property
    def tap(self) -> Tap:
        """Of a card that has one."""
        if self._tap is None:
            raise ValueError(f"--nic {self.config.tap} has no tap")
        return self._tap

    @property
    def fds(self) -> dict[str, int]:
        """What its worker gets, by the words for it. They stay ours."""
        return {"stream": self.passt.fd} if self.passt is not None else {"tap": self.tap.fd}


class Nics:
    """The open cards of one machine, in order: a context manager that owns their taps and passts, and undoes
    what was done.

    `name` is the machine's: a guest that boots from the network is told it. Raises UserError and OSError.
    """

    def __init__(self, configs: Iterable[NicConfig], name: str = "") -> None:
        self._nics: list[OpenNic] = []
        with ExitStack() as stack:
            for number, config in enumerate(configs):
                mac = config.mac or random_mac()
                if config.user:
                    from vmrun.host.passt import Passt

                    passt = stack.enter_context(Passt(number, mac))
                    self._nics.append(OpenNic(config, mac, None, passt))
                    continue
                # On a bridge the host's end is the bridge.
                address = config.address if config.bridge is None else None
                tap = stack.enter_context(Tap(config.tap, address, config.mtu))
                if config.bridge is not None:
                    stack.enter_context(BridgePort(config.bridge, config.tap, config.address))
                self._nics.append(OpenNic(config, mac, tap))
            for nic in self._nics:
                if nic.passt is not None:
                    nic.passt.wait_ready()
            hosts = local.assign({k: nic.tap for k, nic in enumerate(self._nics) if nic.config.local})
            for number, host in hosts.items():
                nic = self._nics[number]
                nic.words["local"] = host
                nic.words["hostmac"] = nic.tap.mac().hex(":")
                if nic.config.boot_file:
                    nic.words["boot"] = nic.config.boot_file
                    nic.words["hostname"] = name
            self._stack = stack.pop_all()

    def watch(self, loop: "EventLoop", end: Callable[[int, str], None]) -> None:
        """From now on the end of a passt is the machine's: `end(exit code, reason)` is called for it."""
        for nic in self._nics:
            if nic.passt is not None:
                self._watch(nic.passt, loop, end)

    @staticmethod
    def _watch(passt: "Passt", loop: "EventLoop", end: Callable[[int, str], None]) -> None:
        def ended() -> None:
            loop.unwatch(passt.pidfd)
            passt.poll()
            end(EXIT_VMM, passt.describe_exit())

        loop.watch(passt.pidfd, ended)

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
