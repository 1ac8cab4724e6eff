"""The directories that a machine shares with its guest: a virtio-fs device for each, and the virtiofsd behind
it. VMM process.

A device of a place for a mount has nothing behind it: the guest's driver sets its rings up all the same, and
a machine made of a snapshot of that one puts a directory there. What is shared already cannot be saved: which
files the guest has open is known to a virtiofsd alone. For the same reason its end is the machine's, as with
any back end of somebody else's.
"""

import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from devices.board import Board
from devices.memory import GuestMemory
from devices.vhost.frontend import VhostUserDevice
from devices.vhost.messages import ProtocolError
from devices.virtio.device import VIRTIO_ID_FS
from devices.virtio.fs import FS_FEATURES, FS_PROTOCOL_FEATURES, FS_QUEUE_SIZES, fs_config
from vmrun.errors import EXIT_VMM, UserError
from vmrun.host.virtiofsd import INSTEAD, Program, Virtiofsd
from vmrun.machine.config import Mount
from vmrun.machine.loop import EventLoop

if TYPE_CHECKING:
    from vmrun.snapshot.pager import LazyRam

DEAD_SECONDS = 2.0  # how long a broken connection may precede the news of virtiofsd's end

End = Callable[[int, str], None]


class SharedDirectory:
    """One mount, or the place for one: a context manager, at whose end its virtiofsd is gone.

    `lazy` is who fills the guest's memory, if that is done while it runs: a virtiofsd uses it only once it is
    all there. `program` is for who has another virtiofsd than the one installed.
    """

    def __init__(
        self, mount: Mount, name: str, lazy: "LazyRam | None" = None, program: Program | None = None
    ) -> None:
        """Starts virtiofsd, which takes a while. UserError when there is none, or no such directory."""
        self.mount = mount
        self.name = name
        self.virtiofsd: Virtiofsd | None = None
        self._lazy = lazy
        self._quitting = False
        self._lock = threading.Lock()
        if mount.host is not None:
            self.virtiofsd = Virtiofsd(mount.host, read_only=mount.read_only, program=program)

    def connect(self, memory: GuestMemory, board: Board, loop: EventLoop, end: End) -> VhostUserDevice:
        """The device. `end(exit code, reason)` is called when virtiofsd ends before the machine does.
        UserError when it cannot serve.
        """
        self._loop, self._end = loop, end
        self.device = VhostUserDevice(
            None,
            name=self.name,
            device_id=VIRTIO_ID_FS,
            queue_sizes=FS_QUEUE_SIZES,
            memory=memory,
            board=board,
            on_failure=self._connection_failed,
            features_mask=FS_FEATURES,
            lazy=self._lazy,
            config=fs_config(self.mount.tag),
            protocol_features=FS_PROTOCOL_FEATURES,
        )
        if self.virtiofsd is None:
            return self.device
        try:
            self.device.restart(self.virtiofsd.channel)
        except ProtocolError as error:
            self.device.close()
            ended = self.virtiofsd.wait(DEAD_SECONDS)
            reason = self.virtiofsd.describe_exit() if ended else f"virtiofsd does not answer: {error}"
            raise UserError(f"--mount {self.mount.host}: {reason}: {INSTEAD}", EXIT_VMM) from None
        loop.watch(self.virtiofsd.pidfd, self._ended)
        return self.device

    def _ended(self) -> None:
        if self.virtiofsd is not None:
            self._loop.unwatch(self.virtiofsd.pidfd)
            self.virtiofsd.poll()
            self._end(EXIT_VMM, self.virtiofsd.describe_exit())

    def _connection_failed(self, text: str) -> None:
        """Any thread. The process says more, if it ends now; one that does not is of no use."""
        with self._lock:
            if not self._quitting:
                self._loop.call_soon(lambda: self._kill_later(text))

    def _kill_later(self, text: str) -> None:
        self._loop.call_later(DEAD_SECONDS, lambda: self._kill(text))

    def _kill(self, text: str) -> None:
        if self.virtiofsd is not None and not self.virtiofsd.poll():
            try:
                signal.pidfd_send_signal(self.virtiofsd.pidfd, signal.SIGKILL)
            except PermissionError:
                pass  # the VMM has confined itself: it ends with its channel, which is closed next
            self._end(EXIT_VMM, f"{self.virtiofsd.title} is of no use any more: {text}")

    def quit(self) -> None:
        """Report nothing any more. Before the loop is closed; the vCPUs have stopped."""
        with self._lock:
            self._quitting = True
        self.device.close()

    def __enter__(self) -> "SharedDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self.virtiofsd is not None:
            self.virtiofsd.stop()
