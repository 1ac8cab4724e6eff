"""What becomes of disks while a snapshot is made and when that fails, and what a restore takes for them."""

import fcntl
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devices.block.open import open_image
from devices.block.qcow2_create import create_qcow2
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.disks import MachineDisk
from vmrun.host.new_file import open_unnamed
from vmrun.machine.agent import GuestAgent
from vmrun.machine.config import DiskConfig, MachineConfig, Mount
from vmrun.machine.config_json import describe_config
from vmrun.machine.control import MachineControl
from vmrun.machine.machine import GREET_AGAIN, Machine
from vmrun.machine.saving import Saving
from vmrun.snapshot import manifest, restore, save
from vmrun.snapshot.manifest import Manifest

MIB = 1 << 20


def qcow2(path: Path, below: Path | None = None) -> DiskConfig:
    with open(path, "w+b") as file:
        if below is None:
            create_qcow2(file.fileno(), 16 * MIB)
        else:
            create_qcow2(file.fileno(), 16 * MIB, backing_file=os.fspath(below), backing_format="qcow2")
    return DiskConfig(path, "qcow2")


def test_an_overlay_is_as_large_as_the_disk_has_become(tmp_path: Path) -> None:
    with closing(MachineDisk(qcow2(tmp_path / "x.qcow2"))) as disk:
        image = open_image("qcow2", os.dup(disk.fd), False)
        image.grow(48 * MIB)
        image.close()
        disk.read_again()
        assert disk.size == 48 * MIB


def test_a_worker_that_was_taken_over_names_another_file(tmp_path: Path) -> None:
    qcow2(tmp_path / "base1.qcow2")
    qcow2(tmp_path / "base2.qcow2")
    with closing(MachineDisk(qcow2(tmp_path / "x.qcow2", tmp_path / "base1.qcow2"))) as disk:
        disk.read_again()
        head = os.pread(disk.fd, 4096, 0)
        os.pwrite(disk.fd, head.replace(b"base1", b"base2"), 0)
        with pytest.raises(UserError, match="names another backing file") as caught:
            disk.read_again()
        assert caught.value.code == EXIT_IMAGE
        os.pwrite(disk.fd, b"nonsense", 0)
        with pytest.raises(UserError, match=r"x\.qcow2"):
            disk.read_again()


class StrawMachine:
    """Two disks: notes what is done with them. `broken` workers do not end well."""

    def __init__(self) -> None:
        self.did: list[object] = []
        self.broken = False
        self.workers = {f"blk{index}": SimpleNamespace(release=self._release) for index in range(3)}

    def _release(self) -> None:
        self.did.append("release")
        if self.broken:
            raise OSError("worker blk0 was killed by signal 9")

    def exchange_disk(self, index: int, config: DiskConfig | None = None) -> None:
        self.did.append((index, config))


def disks_to_save(count: int, path: Path = Path("/x.qcow2")) -> list[save._Disk]:
    return [save._Disk(index, DiskConfig(path, "qcow2")) for index in range(count)]


def test_going_back_keeps_what_workers_have_not_written_yet() -> None:
    machine: Any = StrawMachine()
    served, released, exchanged = disks = disks_to_save(3)
    released.released = exchanged.released = exchanged.exchanged = True
    machine.broken = True
    save._go_back(machine, disks)
    # The first one's worker serves it. The second's gets a successor with the very files and journal. What
    # the third's has served holds nothing, so its end does not matter.
    assert machine.did == [(1, None), "release", (2, exchanged.config)]
    assert served.config == exchanged.config


def test_an_overlay_that_cannot_have_a_name(tmp_path: Path) -> None:
    machine: Any = StrawMachine()
    directory, partial = tmp_path / "s", tmp_path / ".s.partial"
    directory.mkdir()
    first, second = disks = disks_to_save(2, tmp_path / "x.qcow2")
    first.overlay = open_unnamed(tmp_path)
    second.overlay = os.memfd_create("of another file system")
    with pytest.raises(OSError, match="cross-device"):
        save._name_overlays(disks, directory, partial)
    # The snapshot is none, and what has a name already is not to stay.
    assert partial.is_dir() and not directory.exists()
    assert (tmp_path / "x.1.qcow2").exists()
    save._go_back(machine, disks)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".s.partial"]
    assert first.overlay == second.overlay == -1


@pytest.mark.parametrize("again", [False, True])
def test_the_lock_of_a_name_is_the_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        """Between the open and the lock its owner finished, and removed it; perhaps there is a next one."""
        (tmp_path / ".s.lock").unlink()
        if again:
            (tmp_path / ".s.lock").touch()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another snapshot"), save._partial(tmp_path / "s"):
        pass


def snapshot_of(config: MachineConfig, files: list[list[manifest.FrozenFile]]) -> Any:
    made: Any = restore.Snapshot.__new__(restore.Snapshot)
    made.directory = Path("/nowhere")
    made.saved_config = config
    made.manifest = SimpleNamespace(disks=files)
    return made


def test_what_is_below_a_disk_is_what_the_manifest_says(tmp_path: Path) -> None:
    base, other = tmp_path / "base1.qcow2", tmp_path / "base2.qcow2"
    qcow2(base)
    qcow2(other)
    config = qcow2(tmp_path / "x.qcow2", base)
    made = MachineConfig(disks=(config,))
    files = [manifest.freeze(path, "qcow2", Path("/nowhere")) for path in (config.path, base)]
    assert snapshot_of(made, [files])._disk(0, None, True).throw_away
    wrong = [manifest.freeze(path, "qcow2", Path("/nowhere")) for path in (config.path, other)]
    for listed in (wrong, files[:1], [files[1], files[0]]):
        with pytest.raises(UserError, match=r"was (nothing|/.*) when the snapshot was made") as caught:
            snapshot_of(made, [listed])._disk(0, None, True)
        assert caught.value.code == EXIT_IMAGE


def test_a_pipe_in_the_place_of_a_disk_is_not_waited_for(tmp_path: Path) -> None:
    """Though the manifest says that it was one: whoever made the snapshot wrote it."""
    pipe = tmp_path / "x.qcow2"
    os.mkfifo(pipe)
    frozen = manifest.FrozenFile(str(pipe), "qcow2", 0, pipe.stat().st_mtime_ns, "")
    made = MachineConfig(disks=(DiskConfig(pipe, "qcow2"),))
    with pytest.raises(UserError, match="not a file"):
        snapshot_of(made, [[frozen]])._disk(0, None, True)
    with pytest.raises(OSError, match="Not a file"):  # put there since
        restore._check_below(frozen, pipe, None, ())


def test_no_snapshot_mounts_a_directory(tmp_path: Path) -> None:
    config = MachineConfig(mounts=(Mount(Path("/"), "all"),))
    manifest.write_file(tmp_path / manifest.STATE, b"{}")
    manifest.write(
        Manifest(
            name="web",
            created=0.0,
            vmrun="0",
            config=describe_config(config),
            cpu={},
            memory={"size": config.memory, "chunk_size": 65536, "data_chunks": 0, "sha256": ""},
            state_sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
            disks=[],
        ),
        tmp_path,
    )
    with pytest.raises(UserError, match="mounts a directory of the host's"):
        restore.Snapshot(tmp_path)


class StrawPause:
    def __init__(self) -> None:
        self.paused = self.pausing = False
        self.did: list[str] = []

    def pause(self, done: Callable[[str | None], None]) -> None:
        self.paused, self.pausing = True, False
        done(None)

    def do(self, work: Callable[[], None]) -> None:
        work()

    def resume(self) -> None:
        self.did.append("resume")


class StrawLoop:
    """`ended`: nothing that is asked of it is done any more."""

    def __init__(self) -> None:
        self.ended = False
        self.soon: list[Callable[[], None]] = []

    def ask(self, work: Callable[[], None]) -> None:
        if self.ended:
            raise OSError("the machine ended meanwhile")
        work()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)


class Saved:
    """A machine of straw whose snapshots are there at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = MachineConfig(name="web")
        self.pause, self.loop = StrawPause(), StrawLoop()
        self.adopted: list[MachineConfig] = []
        self.ends: list[object] = []
        self.told: list[object] = []
        self.now = MachineConfig(name="web", cpus=2)
        result = save.Saved(Path("/s"), self.now, {}, 0, 0.0)
        monkeypatch.setattr(save, "save", lambda *args, **words: result)

    def adopt(self, config: MachineConfig) -> None:
        self.adopted.append(config)

    def end(self, code: int, reason: str, restart: bool = False) -> None:
        self.ends.append((code, reason, restart))


@pytest.mark.parametrize("ended", [False, True])
def test_the_machine_has_its_new_disks_before_anything_can_happen(
    monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    machine: Any = Saved(monkeypatch)
    machine.loop.ended = ended
    Saving(machine).begin(Path("/s"), end=False, done=machine.told.append)
    # The loop has not come to it, and perhaps never will: a reset finds the new disks.
    assert machine.adopted == [machine.now] and machine.told == []
    for callback in machine.loop.soon:
        callback()
    assert machine.pause.did == ["resume"] and len(machine.told) == 1


def test_who_asked_for_a_pause_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Saved(monkeypatch)
    machine.pause.pausing = True
    Saving(machine).begin(Path("/s"), end=False, done=machine.told.append)
    for callback in machine.loop.soon:
        callback()
    assert machine.pause.did == [] and len(machine.told) == 1


def test_while_a_snapshot_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Saved(monkeypatch)
    control = MachineControl(machine)
    control.snapshot(Path("/s"), False, machine.told.append)
    for ask in (control.reset, control.resume, lambda: control.pause(machine.told.append)):
        with pytest.raises(UserError, match="goes on by itself"):
            ask()
    assert machine.ends == [] and machine.told == []
    for callback in machine.loop.soon:
        callback()
    control.reset()
    assert machine.ends == [(0, "reset", True)]


@pytest.mark.parametrize("succeeds", [0, 2, None])
def test_a_restored_guest_is_greeted_when_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, succeeds: int | None
) -> None:
    talks: list[tuple[Any, ...]] = []
    monkeypatch.setattr(GuestAgent, "talk", lambda *arguments: talks.append(arguments))
    doors: list[str] = []
    listener: Any = SimpleNamespace(
        links=[], hold=lambda: doors.append("closed"), admit=lambda: doors.append("open")
    )
    soon: list[Callable[[], None]] = []
    resumed: list[Callable[[], None]] = []
    machine: Any = SimpleNamespace(
        _saved=SimpleNamespace(greet=True, macs=[]),
        macs=list,
        loop=SimpleNamespace(call_soon=soon.append, call_later=lambda _, callback: soon.append(callback)),
        pause=SimpleNamespace(on_resume=resumed.append),
        shutdown=SimpleNamespace(),
    )
    Machine.use_agent(machine, listener)
    assert talks == [] and soon == []
    (begin,) = resumed
    begin()
    # Nobody finds a guest that still takes itself for another; but one that will not hear is let be.
    for attempt in range(GREET_AGAIN + 1):
        ((_, _, done),) = talks
        talks.clear()
        assert doors == ["closed"]
        done(attempt == succeeds)
        if attempt == succeeds:
            break
        for callback in soon:
            callback()
        soon.clear()
    assert doors == ["closed", "open"] and not talks and not soon
