"""A throw-away machine that runs commands: what `vmrun run` and Python programs use. Owner's process.

    with Sandbox(image="debian.tar") as sandbox:
        result = sandbox.run(["python3", "-c", "print(6 * 7)"], timeout=60)
        assert result.exit_code == 0 and result.stdout == b"42\\n"

The machine is in a process of its own, ends with this object, at the latest with this process, and leaves
nothing. Methods may be called from any thread.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vmrun.agent.files import Limits as CopyLimits
from vmrun.agent.files import StreamError, Totals
from vmrun.agent.process import Capture, Process
from vmrun.agent.protocol import AgentError, AgentGone, AgentRefused, ExitStatus, one_line
from vmrun.agent.session import MS_RDONLY, AgentSession
from vmrun.control import runtime, vmm
from vmrun.control.client import MachineClient
from vmrun.control.detach import Owned
from vmrun.errors import EXIT_TIMEOUT, EXIT_USAGE, EXIT_VMM, UserError
from vmrun.guestkit import cache
from vmrun.guestkit.progress import Progress, Silent
from vmrun.host.cgroup import Group, Limits, find_place, machine_limits
from vmrun.image import resolve
from vmrun.image.config import ImageConfig
from vmrun.machine.config import MIB, DiskConfig, Mount, NicConfig
from vmrun.run import templates
from vmrun.run.ending import SandboxEnded, last_words, log_directories
from vmrun.run.guest import (
    ANSWER_SECONDS,
    BOOT_SECONDS,
    MOUNT_TAG,
    connect,
    connect_restored,
    find_parts,
    machine_config,
)
from vmrun.run.phases import Phases
from vmrun.run.spec import DEFAULT_MEMORY, DEFAULT_QUOTA, SandboxSpec, SharedDirectory
from vmrun.units import parse_memory

if TYPE_CHECKING:
    from vmrun.agent.process import Sink, Source

T = TypeVar("T")
Start = Callable[[vmm.VmmRequest], Owned]

OUTPUT_LIMIT = 64 * MIB  # bytes of each stream that `run` keeps
END_SECONDS = 5.0  # between the end of a guest and that of its machine
KILL_SECONDS = 15.0  # for the guest to end what it was told to kill


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended. `exit_code` is its own, or 128 and the signal's number, or 126 or 127 when it
    could not be started (then `stderr` says why). `signal` is the one that killed it. `out_of_memory`: the
    guest had too little memory for it. `cut`: it printed more than was kept. `seconds` is what it took."""

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    signal: int | None = None
    out_of_memory: bool = False
    cut: bool = False
    seconds: float = 0.0

    def check(self) -> "Result":
        """Itself. UserError when the command failed."""
        if self.exit_code:
            said = self.stderr.strip().splitlines()
            last = f": {one_line(said[-1])}" if said else ""
            raise UserError(f"exit code {self.exit_code}{last}", self.exit_code)
        return self


class CommandTimeout(UserError, TimeoutError):
    """The command did not end in time, and was killed. `result` has what it had printed."""

    def __init__(self, seconds: float, result: Result) -> None:
        super().__init__(f"timed out after {seconds:g} s", EXIT_TIMEOUT)
        self.result = result


class CopyError(UserError):
    """What was named could not be copied, which is the guest's answer; or what it sent makes no sense, or is
    too much. The machine goes on.
    """

    def __init__(self, error: AgentError) -> None:
        super().__init__(str(error), EXIT_VMM if isinstance(error, StreamError) else EXIT_USAGE)


class Sandbox:
    """A running machine made of `image`, by default the guest kit's root; docs/images.md tells what it may
    be. A context manager.

    `mounts` are directories of the host's that it shares, live, through virtiofsd. It may write `quota` bytes
    over the image. `confined`: its VMM gives up all it can, and the sandbox cannot be forked. `memory` is in
    bytes, or as `--mem` takes it. `timeout` ends the machine after so many seconds. `fresh` boots it
    instead of using a template. The constructor returns when commands can be run; the first one for an image
    takes as long as the guest boots. Raises UserError and OSError.
    """

    def __init__(
        self,
        image: str | Path = "kit",
        *,
        kernel: Path | None = None,
        memory: int | str = DEFAULT_MEMORY,
        cpus: int = 1,
        disks: Sequence[DiskConfig] = (),
        nics: Sequence[NicConfig] = (),
        mounts: Sequence[SharedDirectory] = (),
        quota: int | None = DEFAULT_QUOTA,
        confined: bool = False,
        timeout: float | None = None,
        name: str | None = None,
        fresh: bool = False,
        progress: Progress | None = None,
        phases: Phases | None = None,
        start: Start = vmm.spawn,
    ) -> None:
        size = parse_memory("memory", memory) if isinstance(memory, str) else memory
        spec = SandboxSpec(
            os.fspath(image), kernel, size, cpus, tuple(disks), tuple(nics), tuple(mounts), quota, fresh
        )
        directories = tuple(
            Mount(each.host.absolute(), MOUNT_TAG.format(index), each.read_only)
            for index, each in enumerate(spec.mounts)
        )
        teller = progress or Silent()
        self.phases = phases or Phases()
        with self.phases.phase("image"):
            found = resolve(spec.image, teller)
            parts = find_parts()
        if fresh or spec.disks:
            # A template holds the disks it was made with. A boot takes its time, and `start` may end the
            # teller: it forks, and a teller may have a thread.
            teller.step("booting: --disk and --fresh use no template")
            config = replace(machine_config(spec, found, parts), mounts=directories)
            request = vmm.VmmRequest(config=config, confined=confined, name=name, timeout=timeout)
        else:
            with self.phases.phase("template"):
                key = templates.key(spec, found, parts)
                template = templates.find_or_make(key, spec, found, parts, teller)
            request = vmm.VmmRequest(
                snapshot=template.snapshot,
                nics=spec.nics,
                mounts=directories,
                quota=quota,
                greet=False,
                confined=confined,
                name=name,
                timeout=timeout,
            )
        self._confined = confined
        workers = 1 + len(spec.disks) + len(spec.nics)
        limits = machine_limits(spec.memory, spec.cpus, workers)
        self._begin(
            request, start, found.config, ANSWER_SECONDS if request.snapshot else BOOT_SECONDS, limits
        )
        try:
            self._prepare(spec)
        except BaseException:
            self.close()
            raise

    def _prepare(self, spec: SandboxSpec) -> None:
        """What a guest of a template cannot have yet: its addresses, and the directories of the host."""
        for index, nic in enumerate(spec.nics):
            if nic.user:
                with self.phases.phase("network"):
                    self._set_network(index)
        for index, each in enumerate(spec.mounts):
            with self.phases.phase("mount"):
                flags = MS_RDONLY if each.read_only else 0
                mount = partial(self._session.mount, "virtiofs", MOUNT_TAG.format(index), each.guest, flags)
                self._in_guest(partial(mount, timeout=ANSWER_SECONDS))

    def _set_network(self, index: int) -> None:
        """What DHCP would tell of a card that goes through passt, which is always the same."""
        from vmrun.host.passt import guest_address

        address, gateway = guest_address(index)
        self._in_guest(
            lambda: self._session.set_network(f"eth{index}", address, 31, gateway, timeout=ANSWER_SECONDS)
        )
        script = "echo nameserver $1 >/etc/resolv.conf"
        # An image without a shell has no use for names either, or brings its own.
        try:
            self.run(["/bin/sh", "-c", script, "sh", gateway], user="0", cwd="/", timeout=ANSWER_SECONDS)
        except CommandTimeout as error:
            raise UserError(f"the image's /bin/sh, for the name server: {error}", EXIT_VMM) from None

    def _begin(
        self,
        request: vmm.VmmRequest,
        start: Start,
        image_config: ImageConfig,
        seconds: float,
        limits: Limits,
    ) -> None:
        self._limits = limits
        self.image_config = image_config
        self._start = start
        self.keep_logs = False
        self._kept: list[_Kept] = []
        self._closed = False
        self._closing, self._asking, self._forking = threading.Lock(), threading.Lock(), threading.Lock()
        with ExitStack() as stack:
            # Its logs come to their last place when the machine ends, so they are looked for after that.
            stack.callback(self._forget_logs)
            with self.phases.phase("machine"):
                self.name = ""
                group = stack.enter_context(Group("run", limits, find_place()))
                self._owned = stack.enter_context(start(replace(request, cgroup=group.path)))
                self.name = self._owned.wait_until_running()
            with self.phases.phase("agent"):
                # All machines of one template have the same random numbers until the agent is told.
                self._session = self._in_guest(lambda: self._connect(request.snapshot is not None, seconds))
            stack.callback(self._session.close)
            self._stack = stack.pop_all()

    def _connect(self, restored: bool, seconds: float) -> AgentSession:
        if restored:
            return connect_restored(runtime.base_directory() / self.name)
        session = connect(self._owned, seconds)
        try:
            session.after_restore(ANSWER_SECONDS)
        except BaseException:
            session.close()
            raise
        return session

    def _in_guest(self, do: Callable[[], T]) -> T:
        """What `do` does with the agent. The machine's end, if that is why it fails, is a SandboxEnded."""
        try:
            return do()
        except (AgentGone, UserError) as error:
            if self._closed:
                raise UserError("the sandbox is closed") from None
            ended = self._ending()
            if ended is not None:
                raise ended from None
            if isinstance(error, UserError):
                raise
            raise UserError(f"the agent in the guest is gone: {error}", EXIT_VMM) from None

    def _ending(self) -> SandboxEnded | None:
        deadline = time.monotonic() + END_SECONDS
        with self._asking:
            while self._owned.alive():
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.01)
            code, reason = self._owned.wait()
        return SandboxEnded(code or EXIT_VMM, reason, self.console())

    def _copy(self, do: Callable[[], Totals]) -> Totals:
        try:
            return self._in_guest(do)
        except AgentError as error:
            raise CopyError(error) from None

    def console(self) -> str:
        """What the guest printed on its console last."""
        return last_words(self.name)

    @property
    def console_log(self) -> Path:
        """All of that, up to some MiB: a file, kept after the end when `keep_logs` is set before it."""
        now, kept = log_directories(self.name)
        directory = kept if kept.is_dir() else now
        return directory / runtime.CONSOLE_LOG

    def _forget_logs(self) -> None:
        if not self.name:
            return
        # A confined machine cannot remove its own.
        runtime.settle(self.name, {} if self.keep_logs else None)

    def run(
        self,
        argv: Sequence[str | bytes],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        limit: int = OUTPUT_LIMIT,
    ) -> Result:
        """Run a command to its end. It gets `input`, text as UTF-8. `limit` bytes of each of its streams are
        kept. CommandTimeout after `timeout` seconds; SandboxEnded when the machine ends.
        """
        with self.start(argv, input=input, env=env, cwd=cwd, user=user, limit=limit) as running:
            return running.result(timeout)

    def start(
        self,
        argv: Sequence[str | bytes],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        limit: int = OUTPUT_LIMIT,
    ) -> "Running":
        """Begin what `run` does, and return when the command has started, or could not be."""
        return Running(self, argv, input, env, cwd, user, limit)

    def exec(
        self,
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        stdin: "Source | str" = None,
        stdout: "Sink" = None,
        stderr: "Sink" = None,
    ) -> Process:
        """Start a command, and return when it has started: see `vmrun.agent.session.AgentSession.exec`. What
        the image says of environment, directory and user counts where nothing else is said. AgentRefused when
        the guest cannot start it. `stdin` may be text, too."""
        if not argv:
            raise UserError("no command: give a list of words")
        source = stdin.encode() if isinstance(stdin, str) else stdin
        wanted = self.image_config
        return self._in_guest(
            lambda: self._session.exec(
                argv,
                env={**wanted.env, **(env or {})},
                cwd=cwd or wanted.workdir or None,
                user=user or wanted.user or None,
                tty=tty,
                stdin=source,
                stdout=stdout,
                stderr=stderr,
                timeout=ANSWER_SECONDS,
            )
        )

    def wait(self, process: Process, timeout: float | None = None) -> ExitStatus:
        """How what `exec` started ended, with all that it printed delivered. TimeoutError after `timeout`
        seconds, SandboxEnded when the machine ends first.
        """
        return self._in_guest(lambda: process.wait(timeout))

    def copy_in(self, host_path: str | Path, guest_path: str) -> Totals:
        """Copy a file or directory tree into the guest, as `cp -r` does. Raises UserError and OSError."""
        return self._copy(lambda: self._session.copy_in(os.fspath(host_path), guest_path))

    def copy_out(self, guest_path: str, host_path: str | Path, *, limit: int = DEFAULT_QUOTA) -> Totals:
        """Copy a file or directory tree out of the guest, `limit` bytes at most: no link of the guest's leads
        out of `host_path`. Raises UserError and OSError.
        """
        limits = CopyLimits(bytes=limit)
        return self._copy(lambda: self._session.copy_out(guest_path, os.fspath(host_path), limits=limits))

    def fork(self) -> "Sandbox":
        """Another sandbox in the state of this one, memory, disk and all, but for what `exec` runs: the
        other's agent ends that. Its writes are its own."""
        if self._confined:
            raise UserError("a confined sandbox cannot be forked: its machine can open nothing any more")
        other = Sandbox.__new__(Sandbox)
        other.phases = Phases()
        other._confined = False
        with ExitStack() as stack:
            # Its disk lies there, below that of both.
            scratch = stack.enter_context(cache.scratch("fork"))
            directory = scratch / "snapshot"
            with self._forking, MachineClient(self.name) as machine:
                machine.snapshot(directory)
            request = vmm.VmmRequest(snapshot=directory, greet=False)
            other._begin(request, self._start, self.image_config, ANSWER_SECONDS, self._limits)
            kept = _Kept(stack.pop_all())
            for sandbox in (self, other):
                sandbox._keep(kept)
            for below in self._kept[:-1]:
                other._keep(below)
        return other

    def _keep(self, kept: "_Kept") -> None:
        """What the machine's disk is above stays until this is closed."""
        kept.take()
        self._kept.append(kept)
        self._stack.callback(kept.drop)

    def close(self) -> None:
        """End the machine, and leave nothing of it. A second call does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._stack.close()

    @property
    def cpu_seconds(self) -> float:
        """What the machine took of the host's processors, once it is closed."""
        return self._owned.cpu_seconds

    @property
    def peak_memory(self) -> int:
        """The most bytes of the host's memory that the VMM had, the guest's included, once it is closed."""
        return self._owned.peak_memory

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Kept:
    """What goes when the last of those who use it is closed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._users = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._stack.close()


class Running:
    """A command of `Sandbox.start`. A context manager: what still runs then is killed."""

    def __init__(
        self,
        sandbox: Sandbox,
        argv: Sequence[str | bytes],
        input: bytes | str | None,
        env: Mapping[str, str] | None,
        cwd: str | None,
        user: str | None,
        limit: int,
    ) -> None:
        self._sandbox = sandbox
        self._began = time.monotonic()
        self._stdout, self._stderr = Capture(limit), Capture(limit)
        self._refused: AgentRefused | None = None
        self._process: Process | None = None
        self._killed = False
        try:
            self._process = sandbox.exec(
                argv, env=env, cwd=cwd, user=user, stdin=input, stdout=self._stdout, stderr=self._stderr
            )
        except AgentRefused as error:
            self._refused = error

    def result(self, timeout: float | None = None) -> Result:
        """Wait for its end. CommandTimeout, and it is killed, after `timeout` seconds; SandboxEnded when the
        machine ends.
        """
        if self._process is None:
            refused = self._refused
            return self._result(126 if refused is None else refused.exit_code, f"{refused}\n".encode())
        try:
            status = self._sandbox.wait(self._process, timeout)
        except TimeoutError:
            self.kill()
            raise CommandTimeout(timeout or 0.0, self._result(EXIT_TIMEOUT)) from None
        return replace(
            self._result(status.exit_code), signal=status.signal, out_of_memory=status.out_of_memory
        )

    def kill(self) -> None:
        """SIGKILL to all that the command has started. Returns when it has ended, or a hostile guest has had
        15 seconds for it. Nothing happens when it was killed before.
        """
        if self._process is not None and not self._killed:
            self._killed = True
            self._process.end(KILL_SECONDS)

    def _result(self, code: int, said: bytes = b"") -> Result:
        stdout, stderr = self._stdout, self._stderr
        return Result(
            code,
            bytes(stdout.data),
            bytes(stderr.data) + said,
            cut=stdout.cut or stderr.cut,
            seconds=time.monotonic() - self._began,
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
