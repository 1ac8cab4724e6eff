"""virtiofsd found, called and looked after (vmrun/host/virtiofsd.py, vmrun/machine/mounts.py), with one that
is made up; and the real one behind our device, with a driver that speaks FUSE.
"""

import errno
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from devices.memory import GuestMemory
from devices.virtio.device import VIRTIO_ID_FS, ActiveDriver
from devices.virtio.fs import FS_FEATURES
from devices.virtio.transport import virtio_identity
from tests.unit.fuse_client import FUSE_INIT, FUSE_LOOKUP, ROOT_NODE, FuseClient
from tests.unit.state_mutations import through_json
from tests.unit.vhost_toy import MIB, ToyBoard, guest_memory, open_fds
from vmrun.errors import EXIT_USAGE, EXIT_VMM, UserError
from vmrun.host import check, virtiofsd
from vmrun.host.virtiofsd import Program, Virtiofsd, installed, probe
from vmrun.machine.config import MachineConfig, Mount
from vmrun.machine.config_json import describe_config, parse_config
from vmrun.machine.loop import EventLoop
from vmrun.machine.mounts import SharedDirectory

ROOT = Path(__file__).parents[2]
REAL = virtiofsd.find()
needs_virtiofsd = pytest.mark.skipif(REAL is None, reason="needs virtiofsd")

# Its --help, and a back end that echoes; how it was called goes to a file beside it.
FAKE = """#!{python}
import json, os, sys
if "--help" in sys.argv:
    print({help!r})
    sys.exit()
sys.path[0:0] = [{root!r}]
facts = dict(argv=sys.argv[1:], environment=dict(os.environ), session=os.getsid(0) == os.getpid())
facts["fds"] = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)]
with open({facts!r} + ".new", "w") as file:
    json.dump(facts, file)
os.rename({facts!r} + ".new", {facts!r})
{first}
import socket
from devices.vhost.backend import Backend
from devices.vhost.channel import Channel
from tests.unit.vhost_toy import ToyDevice
sock, _ = socket.socket(fileno=3).accept()
try:
    Backend(Channel(sock), ToyDevice()).serve()
except EOFError:
    pass
"""
RUST_HELP = "--shared-dir <DIR> --sandbox <MODE> --modcaps <LIST> --readonly"
C_HELP = "-o source=PATH shared directory tree, -o modcaps=CAPLIST"


class Fake:
    def __init__(self, directory: Path, help_text: str = RUST_HELP, first: str = "") -> None:
        self.facts_path = directory / "facts"
        self.path = directory / "virtiofsd"
        self.path.write_text(
            FAKE.format(
                python=sys.executable, help=help_text, root=str(ROOT), facts=str(self.facts_path), first=first
            )
        )
        self.path.chmod(0o755)
        probe.cache_clear()

    @property
    def program(self) -> Program:
        return probe(self.path)

    @property
    def facts(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.facts_path.read_text())
        return found


class Room:
    """A loop, memory and a board for devices, and what the machine's end was said to be."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.board = ToyBoard()
        self.loop = EventLoop()
        self.ends: list[tuple[int, str]] = []

    def end(self, code: int, reason: str) -> None:
        self.ends.append((code, reason))
        self.loop.stop()

    @contextmanager
    def share(self, mount: Mount, program: Program | None = None) -> Iterator[SharedDirectory]:
        with SharedDirectory(mount, "mount0", program=program) as shared:
            shared.connect(self.memory, self.board, self.loop, self.end)
            try:
                yield shared
            finally:
                shared.quit()

    def driver(self, shared: SharedDirectory, stack: ExitStack, base: int = 0x4000) -> FuseClient:
        client = FuseClient(self.memory, base)
        stack.callback(client.close)
        client.activate(shared.device)
        return client


@pytest.fixture
def room() -> Iterator[Room]:
    before = open_fds()
    with guest_memory() as memory:
        room = Room(memory)
        yield room
        room.loop.close()
    assert room.board.watched == {}
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    (directory / "hello").write_bytes(b"the host's\n")
    return directory


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process that is no child of ours ends."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(seconds * 1000))
    os.close(pidfd)
    return ended


def test_the_device_is_virtio_fs() -> None:
    identity = virtio_identity(VIRTIO_ID_FS)
    assert (identity.device_id, identity.class_code) == (0x105A, 0x018000)


def test_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = tmp_path / "backends"
    backends.mkdir()
    monkeypatch.setattr(virtiofsd, "BACKENDS", (tmp_path / "none", backends))
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "place"),))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert virtiofsd.find() is None
    with pytest.raises(UserError, match=r"not installed here .*--copy-in") as caught:
        installed()
    assert caught.value.code == EXIT_USAGE
    assert check.check_virtiofsd().detail == "not installed"

    def put(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch(0o755)

    put(tmp_path / "place")
    assert virtiofsd.find() == tmp_path / "place"
    (backends / "10-broken.json").write_text("{")
    (backends / "20-other.json").write_text(json.dumps({"type": "gpu", "binary": "/bin/true"}))
    (backends / "30-list.json").write_text("[]")
    (backends / "50-fs.json").write_text(json.dumps({"type": "fs", "binary": str(tmp_path / "named")}))
    assert virtiofsd.find() == tmp_path / "place"
    put(tmp_path / "named")
    assert virtiofsd.find() == tmp_path / "named"
    put(tmp_path / "path" / "virtiofsd")
    assert virtiofsd.find() == tmp_path / "path" / "virtiofsd"


def test_which_one_it_is_and_how_it_is_called(tmp_path: Path) -> None:
    rust = Fake(tmp_path).program
    assert rust.command(Path("/a,b"), read_only=True)[3:] == [
        *(
            "--shared-dir=/a,b",
            "--sandbox={sandbox}",
            "--announce-submounts",
            "--modcaps=-mknod",
            "--readonly",
        )
    ]
    older = Fake(tmp_path, "--shared-dir <DIR>").program
    assert older.command(Path("/a"), read_only=True)[3:] == [
        *("--shared-dir=/a", "--sandbox={sandbox}", "--announce-submounts")
    ]
    in_c = Fake(tmp_path, C_HELP).program
    assert in_c.command(Path("/a,b\\c"), read_only=True) == [
        *(str(in_c.path), "--fd=3", "--rlimit-nofile=0", "-o", "source=/a\\,b\\\\c"),
        *("-o", "sandbox={sandbox},announce_submounts,log_level=warn", "-o", "modcaps=-mknod"),
    ]
    with pytest.raises(UserError, match="no virtiofsd that vmrun knows: --copy-in"):
        _ = Fake(tmp_path, "usage: something").program
    with pytest.raises(UserError, match=r"works for root, or .*--copy-in"):
        _ = Fake(tmp_path, "setgroups() failed with error=1:Operation not permitted").program
    (tmp_path / "text").touch()
    with pytest.raises(UserError, match=r"cannot be run: .*--copy-in"):
        probe(tmp_path / "text")


def test_it_is_started_with_nothing_but_its_socket(tmp_path: Path, shared: Path, room: Room) -> None:
    fake = Fake(tmp_path)
    given = os.open(os.devnull, os.O_RDONLY)  # to us, and meant for nobody else
    os.set_inheritable(given, True)
    with room.share(Mount(shared, "here"), fake.program) as mount:
        os.close(given)
        facts = fake.facts
        assert mount.device.features == FS_FEATURES
        assert mount.device.read_config(0, 44) == b"here".ljust(36, b"\0") + b"\1\0\0\0" + bytes(4)
        mount.device.write_config(8, b"there")  # where the fake one could be written to
        assert mount.device.read_config(8, 5) == bytes(5)
        mount.device.pause()
        assert mount.device.save()["written"] == {}
        assert mount.device.read_config(0, 5) == b"here\0"
    assert "--sandbox=namespace" in facts["argv"] or "--sandbox=chroot" in facts["argv"]  # type: ignore[operator]
    assert f"--shared-dir={shared}" in facts["argv"]  # type: ignore[operator]
    assert facts["fds"] == [0, 1, 2, 3]
    assert facts["session"] is True
    assert not set(facts["environment"]) - {"LC_CTYPE", "LD_LIBRARY_PATH"}  # type: ignore[call-overload]
    assert room.ends == []


def test_its_end_is_reported_once_and_in_one_line(tmp_path: Path, shared: Path, room: Room) -> None:
    with room.share(Mount(shared, "here"), Fake(tmp_path).program) as mount, ExitStack() as stack:
        room.driver(mount, stack)
        assert mount.virtiofsd is not None
        os.kill(mount.virtiofsd.pid, signal.SIGKILL)
        room.loop.run()
        while not mount.device.failed:
            assert room.board.turn()
        mount.device.reset()
    assert room.ends == [(EXIT_VMM, f"the virtiofsd of {shared} was killed by signal 9")]


def test_a_confined_vmm_lets_it_end(
    tmp_path: Path, shared: Path, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not send it signals, and reaps it all the same."""

    def refuse(*_: int) -> None:
        raise PermissionError

    with room.share(Mount(shared, "here"), Fake(tmp_path).program) as mount:
        assert mount.virtiofsd is not None
        pid = mount.virtiofsd.pid
        monkeypatch.setattr(os, "killpg", refuse)
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    assert not os.path.exists(f"/proc/{pid}")


def test_one_that_lives_on_without_its_connection_is_killed(
    tmp_path: Path, shared: Path, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmrun.machine.mounts.DEAD_SECONDS", 0.05)
    # It hangs up, and does not end.
    first = "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()"
    with room.share(Mount(shared, "here"), Fake(tmp_path, first=first).program) as mount:
        mount.device._connection.hang_up()
        while not mount.device.failed:
            assert room.board.turn()
        room.loop.run()
    ((code, reason),) = room.ends
    assert code == EXIT_VMM and reason.startswith(f"the virtiofsd of {shared} is of no use any more: mount0:")


def test_one_that_cannot_start_says_why(tmp_path: Path, shared: Path, room: Room) -> None:
    fake = Fake(tmp_path, first="sys.exit('not today')")
    with pytest.raises(UserError) as caught, room.share(Mount(shared, "here"), fake.program):
        pass
    assert str(caught.value) == (
        f"--mount {shared}: the virtiofsd of {shared} exited with status 1: not today: "
        "--copy-in HOST:GUEST copies instead"
    )
    assert caught.value.code == EXIT_VMM


def test_what_is_no_directory(tmp_path: Path) -> None:
    program = Fake(tmp_path).program
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nothing", "virtiofsd", "loop"):
        with pytest.raises(UserError, match=f"--mount .*{name}: .*: give a directory"):
            Virtiofsd(tmp_path / name, program=program)


ORPHAN = """
import sys, os, signal
from pathlib import Path
sys.path[0:0] = [{root!r}]
from vmrun.host.virtiofsd import Virtiofsd, probe
daemon = Virtiofsd(Path({directory!r}), program=probe(Path({program!r})))
while not os.path.exists({facts!r}):
    assert not daemon.wait(0.02)
print(daemon.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_does_not_outlive_who_started_it(tmp_path: Path, shared: Path) -> None:
    """Even one that ignores its socket."""
    fake = Fake(tmp_path, first="import time; time.sleep(1000)")
    script = ORPHAN.format(
        root=str(ROOT), directory=str(shared), program=str(fake.path), facts=str(fake.facts_path)
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


def test_mounts_in_a_configuration(shared: Path) -> None:
    config = MachineConfig(mounts=(Mount(shared, "a", True), Mount(None, "b")))
    assert parse_config(json.loads(json.dumps(describe_config(config)))) == config
    broken: object
    for broken in ({"host": 3, "tag": "a"}, {"host": "/"}, {"host": "/", "tag": "a", "read_only": 1}, []):
        with pytest.raises(ValueError):
            parse_config({"mounts": [broken]})
    for tag in ("", "x" * 37, "ü" * 19, "a\0b", "a\n"):
        with pytest.raises(UserError, match="tag"):
            Mount(shared, tag)
    with pytest.raises(UserError, match="each mount needs a tag"):
        MachineConfig(mounts=(Mount(shared, "a"), Mount(None, "a")))
    with pytest.raises(UserError, match="legacy-virtio"):
        MachineConfig(mounts=(Mount(shared, "a"),), legacy_virtio=True)


def test_a_place_for_a_mount_waits_for_its_back_end(tmp_path: Path, shared: Path, room: Room) -> None:
    """What a template is: its driver is there, the device is saved and loaded, and then a back end comes. The
    fake one echoes requests backwards.
    """
    with room.share(Mount(None, "here")) as place, ExitStack() as stack:
        client = room.driver(place, stack)
        client.send(FUSE_INIT, 0, b"too early")
        place.device.pause()
        state = through_json(place.device.save())
        assert state["rings"] == {"0": 0, "1": 0}
        with room.share(Mount(shared, "here"), Fake(tmp_path).program) as mount:
            driver = ActiveDriver(place.device.features, tuple(client.queues), client.events)
            mount.device.load(state, driver)
            assert client.driver.used_idx() == 0
            mount.device.unpause()
            with pytest.raises(AssertionError):  # an echo is no answer
                client.receive()
            assert client.driver.used_idx() == 1
            mount.device.reset()
        place.device.unpause()
        place.device.reset()
        client.activate(place.device)
        place.device.reset()
    assert room.ends == []


def test_its_child_does_not_outlive_it(tmp_path: Path, shared: Path, room: Room) -> None:
    first = "if os.fork() == 0:\n    import time; time.sleep(1000)"
    with room.share(Mount(shared, "here"), Fake(tmp_path, first=first).program) as mount:
        assert mount.virtiofsd is not None
        pid = mount.virtiofsd.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert gone(int(child))


# The real one.


@needs_virtiofsd
def test_files_are_read_and_written(shared: Path, room: Room) -> None:
    (shared.parent / "secret").write_text("not for guests")
    with room.share(Mount(shared, "here")) as mount, ExitStack() as stack:
        client = room.driver(mount, stack)
        client.init()
        assert client.read("hello") == b"the host's\n"
        client.write("new", b"the guest's\n")
        assert (shared / "new").read_bytes() == b"the guest's\n"
        client.symlink("out", "../secret")
        assert os.readlink(shared / "out") == "../secret"
        root = client.lookup(".")
        assert client.lookup("..") in (root, ROOT_NODE)
        for name in ("../secret", "/etc/passwd"):
            with pytest.raises(OSError) as caught:
                client.lookup(name)
            assert caught.value.errno in (errno.EINVAL, errno.ENOENT)
        with pytest.raises(OSError):  # O_NOFOLLOW, in a root of its own
            client.read("out")
        with pytest.raises(PermissionError):
            client.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        # It holds still and goes on, in the middle of everything.
        mount.device.pause()
        client.send(FUSE_LOOKUP, ROOT_NODE, b"nothing\0")
        assert client.driver.used_idx() < client.driver.avail_idx
        mount.device.unpause()
        with pytest.raises(FileNotFoundError):
            client.receive()
        assert client.read("hello") == b"the host's\n"
        # Another driver.
        mount.device.reset()
        client = room.driver(mount, stack, MIB)
        client.init()
        assert client.read("new") == b"the guest's\n"
    assert room.ends == []


@needs_virtiofsd
def test_read_only_is_the_hosts_word(shared: Path, room: Room) -> None:
    with room.share(Mount(shared, "here", read_only=True)) as mount, ExitStack() as stack:
        client = room.driver(mount, stack)
        client.init()
        assert client.read("hello") == b"the host's\n"
        attempts: list[Callable[[], None]] = [
            lambda: client.write("new", b"x"),
            lambda: print(client.open("hello", os.O_WRONLY)),
            lambda: client.symlink("link", "x"),
        ]
        for attempt in attempts:
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.EROFS
    assert sorted(os.listdir(shared)) == ["hello"]
    (shared / "new").touch()  # here nothing has changed


@needs_virtiofsd
@pytest.mark.parametrize("which", ["outer", "inner"])
def test_the_real_one_dies(shared: Path, room: Room, which: str) -> None:
    with room.share(Mount(shared, "here")) as mount, ExitStack() as stack:
        client = room.driver(mount, stack)
        client.init()
        assert mount.virtiofsd is not None
        pid = mount.virtiofsd.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if which == "inner" and not children:
            pytest.skip("this one has no child")
        os.kill(pid if which == "outer" else int(children[0]), signal.SIGKILL)
        room.loop.run()
        while not mount.device.failed:
            assert room.board.turn()
    ((code, reason),) = room.ends
    assert code == EXIT_VMM and reason.startswith(f"the virtiofsd of {shared} ")
    assert all(gone(int(each)) for each in children)


@needs_virtiofsd
def test_all_its_processes_end_with_the_mount(shared: Path, room: Room) -> None:
    with room.share(Mount(shared, "here")) as mount:
        assert mount.virtiofsd is not None
        pid = mount.virtiofsd.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert all(gone(each) for each in (pid, *map(int, children)))


@needs_virtiofsd
def test_memory_that_is_not_there_yet_is_brought_in_first(shared: Path, room: Room) -> None:
    class Lazy:
        def __init__(self) -> None:
            self.pending = True

        def complete(self) -> None:
            assert threading.current_thread() is threading.main_thread()
            self.pending = False

    lazy = Lazy()
    with SharedDirectory(Mount(shared, "here"), "mount0", lazy) as mount, ExitStack() as stack:  # type: ignore[arg-type]
        stack.callback(mount.quit)
        mount.connect(room.memory, room.board, room.loop, room.end)
        before = lazy.pending
        client = room.driver(mount, stack)
        assert (before, lazy.pending) == (True, False)
        client.init()
        assert client.read("hello") == b"the host's\n"


NOBODY = """
import os, sys
from pathlib import Path
sys.path[0:0] = [{root!r}]
# All that there is to import, first: the interpreter may lie where only root can read it.
from contextlib import ExitStack
from tests.unit.test_virtiofsd import Room, guest_memory, Mount
import vmrun.host.virtiofsd, vmrun.host.virtiofsd_child, vmrun.machine.mounts
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for read_only in (False, True):
    with guest_memory() as memory, ExitStack() as stack:
        room = Room(memory)
        stack.callback(room.loop.close)
        mount = stack.enter_context(room.share(Mount(Path({directory!r}), "here", read_only)))
        client = room.driver(mount, stack)
        client.init()
        print(client.read("hello"))
        try:
            client.write("new%d" % read_only, b"by the user")
        except OSError as error:
            print(error.strerror)
"""


@needs_virtiofsd
def test_without_root() -> None:
    prefix = Path(sys.base_prefix)
    if os.geteuid() or not all(each.stat().st_mode & 1 for each in (prefix, *prefix.parents)):
        pytest.skip("needs root, and an interpreter that others may run")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        (directory / "hello").write_text("hello")
        os.chown(directory, 65534, 65534)
        script = NOBODY.format(root=str(ROOT), directory=name)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd="/", env={}, capture_output=True, text=True, check=False
        )
        if done.returncode and "user namespace" in done.stderr:
            pytest.skip("only root has namespaces here")
        assert done.stdout.splitlines() == ["b'hello'", "b'hello'", "EROFS"], done.stderr
        assert (directory / "new0").stat().st_uid == 65534
