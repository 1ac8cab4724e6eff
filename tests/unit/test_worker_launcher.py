"""Workers launched for real: what they inherit and import, how they end, and what is said about it."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.vhost.channel import Channel
from devices.vhost.messages import U64, Request
from devices.worker.launcher import Worker, launch
from devices.worker.main import EXIT_FAILURE, EXIT_IMAGE
from devices.worker.sandbox import package_root

# What a worker may have loaded besides `devices`. `dataclasses`, `enum`, `typing`, `re` or `logging` would
# each cost milliseconds of every start, and code that a hostile guest could try to make use of.
STANDARD_LIBRARY = {
    *("__future__", "_thread", "abc", "array", "codecs", "collections", "collections.abc", "ctypes"),
    *("ctypes._endian", "encodings", "encodings.aliases", "encodings.utf_8", "errno", "genericpath", "io"),
    *(
        "fcntl",
        "itertools",
        "keyword",
        "mmap",
        "operator",
        "os",
        "os.path",
        "posixpath",
        "reprlib",
        "resource",
    ),
    *(
        "select",
        "stat",
        "struct",
        "sys",
        "time",
        "types",
        "zipimport",
        "zlib",
        "builtins",
        "marshal",
        "posix",
    ),
    "__main__",
}


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "disk.img", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def ask_features(worker: Worker) -> int:
    """The first exchange of a session: when it is answered the sandbox is closed and the worker serves."""
    channel = Channel(worker.channel)
    channel.send(Request.GET_FEATURES)
    (features,) = U64.unpack(channel.receive(30).payload)
    return int(features)


def test_imports_are_a_known_set() -> None:
    program = (
        f"import sys; sys.path[0:0] = [{package_root()!r}]; import devices.worker.main; print(*sys.modules)"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    modules = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    # Names with an underscore are the C halves of the others.
    ours = {name for name in modules if not name.startswith(("devices", "_"))}
    assert ours - STANDARD_LIBRARY == set()
    assert not {"_socket", "_ctypes", "devices.worker.seccomp"} - set(modules)
    assert "devices.virtio.device" not in modules


def test_a_worker_starts_serves_and_ends(image: int) -> None:
    with launch("blk", "blk0", {"format": "raw"}, {"image": image}) as worker:
        assert ask_features(worker) & 1 << 32
        assert set(os.listdir(f"/proc/{worker.pid}/fd")) == {"0", "1", "2", "3", "4"}
        with open(f"/proc/{worker.pid}/status") as file:
            status = file.read()
        assert "Seccomp:\t2\n" in status
        assert "NoNewPrivs:\t1\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        assert not worker.poll()
        assert worker.describe_exit() == "worker blk0 is running"
        worker.stop()
        assert worker.exit_code == 0
        assert worker.describe_exit() == "worker blk0 exited with status 0"


@pytest.mark.root
def test_a_worker_has_no_environment_and_no_terminal(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    with launch("blk", "blk0", {}, {"image": image}) as worker:
        ask_features(worker)
        with open(f"/proc/{worker.pid}/environ") as file:
            assert "swordfish" not in file.read()
        assert os.getsid(worker.pid) == worker.pid
        assert os.readlink(f"/proc/{worker.pid}/fd/0").endswith("null")
        assert os.readlink(f"/proc/{worker.pid}/fd/1").endswith("null")


def test_descriptors_do_not_get_mixed_up(image: int, tmp_path: Path) -> None:
    """Numbers as they come, also those that others get in the worker."""
    other = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    saved: dict[int, int] = {}
    try:
        for number in (3, 4):
            try:
                saved[number] = os.dup(number)
            except OSError:
                continue
        os.dup2(image, 3, inheritable=False)
        os.dup2(other, 4, inheritable=False)
        with launch("blk", "blk0", {}, {"image": 3}) as worker:
            ask_features(worker)
            assert os.stat(f"/proc/{worker.pid}/fd/4").st_ino == os.fstat(image).st_ino
    finally:
        for number in (3, 4):
            if number in saved:
                os.dup2(saved[number], number, inheritable=False)
                os.close(saved[number])
        os.close(other)


def test_a_killed_worker_is_named(image: int) -> None:
    with launch("blk", "blk7", {}, {"image": image}) as worker:
        ask_features(worker)
        os.kill(worker.pid, signal.SIGKILL)
        assert worker.wait(30)
        assert worker.describe_exit() == "worker blk7 was killed by signal 9"
        assert worker.exit_code == -9


def test_pidfd_tells_of_the_end(image: int) -> None:
    with launch("blk", "blk0", {}, {"image": image}) as worker:
        ask_features(worker)
        poll = select.poll()
        poll.register(worker.pidfd, select.POLLIN)
        assert not poll.poll(0)
        worker.channel.shutdown(socket.SHUT_RDWR)
        assert poll.poll(30_000)
        assert worker.poll()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(image: int, number: int) -> None:
    with launch("blk", "blk0", {}, {"image": image}) as worker:
        ask_features(worker)
        # It is about to wait for the next message; until it does the signal may be noticed late.
        while not worker.wait(0.05):
            os.kill(worker.pid, number)
        assert worker.exit_code == 0


def test_a_bad_image_is_told_apart(image: int) -> None:
    with launch("blk", "blk0", {"format": "qcow2"}, {"image": image}) as worker:
        assert worker.wait(30)
        assert worker.exit_code == EXIT_IMAGE
        assert worker.describe_exit().startswith(f"worker blk0 exited with status {EXIT_IMAGE}: ")
        assert "qcow2" in worker.describe_exit()
        assert "Traceback" not in worker.describe_exit()


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        ("blk", {"format": "vmdk"}, "vmdk"),
        ("net", {"mac": "01:00:00:00:00:00"}, "a MAC is six bytes and not a multicast address"),
        ("net", {"mac": "nonsense"}, "hex"),
        ("net", {"mac": "52:54:00:12:34:56", "mtu": "67"}, "MTU 67"),
        ("scsi", {}, "start it as: KIND NAME key=value..."),
    ],
)
def test_bad_arguments(image: int, kind: str, arguments: dict[str, str], text: str) -> None:
    with launch(kind, "dev0", arguments, {"tap" if kind == "net" else "image": image}) as worker:
        assert worker.wait(30)
        assert worker.exit_code in (EXIT_FAILURE, EXIT_IMAGE)
        assert text in worker.describe_exit()


def test_a_missing_descriptor() -> None:
    with launch("blk", "blk0", {}, {}) as worker:
        assert worker.wait(30)
        assert worker.describe_exit() == "worker blk0 exited with status 1: image= is not a number"


def test_a_front_end_that_breaks_the_protocol(image: int) -> None:
    with launch("blk", "blk0", {}, {"image": image}) as worker:
        worker.channel.sendall(b"nonsense, and more than enough of it")
        assert worker.wait(30)
        assert worker.exit_code == EXIT_FAILURE
        assert "4096 is the most" in worker.describe_exit()


def test_debugging_shows_tracebacks(
    image: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMRUN_DEBUG", "1")
    with launch("blk", "blk0", {"format": "qcow2"}, {"image": image}) as worker:
        assert worker.wait(30)
        assert worker.exit_code == EXIT_IMAGE
    errors = capfd.readouterr().err
    assert errors.startswith("vmrun worker blk0: ")
    assert "Traceback (most recent call last)" in errors


def test_what_a_worker_says_is_made_harmless() -> None:
    from devices.worker.launcher import _last_line

    reader, writer = os.pipe2(os.O_NONBLOCK)
    try:
        os.write(writer, b"first\nvmrun worker x: \x1b[2J\xff bad\r\n\n")
        assert _last_line(reader) == "vmrun worker x: ?[2J\ufffd bad?"
    finally:
        os.close(reader)
        os.close(writer)


def test_launching_leaves_nothing_behind(image: int) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with launch("blk", "blk0", {}, {"image": image}) as worker:
        pid = worker.pid
    worker.stop()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(OSError, match="Bad file descriptor"):
        launch("blk", "blk0", {}, {"image": 1 << 20})
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_stuck_worker_is_killed(image: int) -> None:
    with launch("blk", "blk0", {}, {"image": image}) as worker:
        ask_features(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        worker.stop(0.05)
        assert worker.exit_code == -signal.SIGKILL


def test_one_that_may_not_be_signalled_is_told_of(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a VMM that has confined itself meets, of programs that have another user id."""

    def refuse(pidfd: int, number: int) -> None:
        raise PermissionError

    with launch("blk", "blk0", {}, {"image": image}) as worker:
        ask_features(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(signal, "pidfd_send_signal", refuse)
            with pytest.raises(TimeoutError, match="does not end"):
                worker.stop(0.05)


def test_a_listening_channel_accepts_one_front_end(image: int, tmp_path: Path) -> None:
    """How a worker is started by hand, for another VMM."""
    path = str(tmp_path / "blk.sock")
    program = (
        f"import sys; sys.path[0:0] = [{package_root()!r}]; from devices.worker.main import main; main()"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        words = [f"channel={listener.fileno()}", f"image={image}", "format=raw"]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, "blk", "byhand", *words],
            pass_fds=(listener.fileno(), image),
        )
    with process:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(path)
        session = Channel(channel)
        session.send(Request.GET_FEATURES)
        assert session.receive(30).request == Request.GET_FEATURES
        fds = set(os.listdir(f"/proc/{process.pid}/fd"))
        assert len(fds) == 5
        session.close()
        assert process.wait(30) == 0
