"""`vmrun run`, `exec` and `cp` as a shell has them: exit codes, streams, signals, files, and nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import tty
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from vmrun.control import runtime
from vmrun.guestkit import cache
from vmrun.run.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.by_hand]

REPOSITORY = Path(__file__).parents[2]
VMRUN = [sys.executable, "-m", "vmrun"]
SECONDS = 280.0  # in which a run ends even where its template is made first, on a loaded host
MIB = 1 << 20


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One for all tests of this file, away from other people's machines."""
    path = tmp_path_factory.getbasetemp() / "run"
    monkeypatch.setenv("VMRUN_RUNTIME", str(path))
    (path.parent / "temporary").mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(path.parent / "temporary"))
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A machine for many checks, for the commands that go into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMRUN_RUNTIME", str(tmp_path_factory.getbasetemp() / "run"))
        with Sandbox() as made:
            yield made


def vmrun(
    *words: str | Path, input: bytes | None = None, seconds: float = SECONDS
) -> subprocess.CompletedProcess[bytes]:
    command = [*VMRUN, *map(str, words)]
    if input is None:
        null = subprocess.DEVNULL
        return subprocess.run(command, cwd=REPOSITORY, timeout=seconds, capture_output=True, stdin=null)
    return subprocess.run(command, cwd=REPOSITORY, timeout=seconds, capture_output=True, input=input)


@contextmanager
def started(*words: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([*VMRUN, *words], cwd=REPOSITORY, stdin=stdin, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def facts_of(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    """The JSON of --json, which is the last line on stderr."""
    facts = json.loads(done.stderr.splitlines()[-1])
    assert set(facts) == {"code", "reason", "own", "seconds", "phases", "usage", "console"}
    assert facts["code"] == done.returncode
    assert all(0 <= each["start"] <= each["end"] <= facts["seconds"] for each in facts["phases"])
    assert isinstance(facts, dict)
    return facts


@pytest.fixture
def nothing_left(runtime_directory: Path) -> Iterator[None]:
    """The test leaves nothing of its machines: no process, directory, network card, mount or cgroup."""
    before = traces(runtime_directory)
    yield
    deadline = time.monotonic() + 30
    while left := traces(runtime_directory) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def traces(base: Path) -> set[str]:
    """What there is of machines, whoever they belong to. Logs apart: those of a machine that failed stay."""
    found = {f"machine {path.name}" for path in base.glob("[!.]*")}
    found |= {f"cache {path}" for path in cache.directory().glob("*.scratch-*")}
    found |= {f"cache {path}" for path in cache.directory().glob("*.unfinished-*")}
    found |= {f"temporary {path}" for path in base.parent.glob("temporary/*")}
    found |= {f"card {name}" for name in os.listdir("/sys/class/net")}
    found |= {f"mount {line}" for line in Path("/proc/self/mounts").read_text().splitlines()}
    # Those with processes are of machines that run, of whose processes ours are counted here.
    groups = Path("/sys/fs/cgroup").glob("**/*vmrun*/cgroup.events")
    found |= {f"cgroup {path.parent}" for path in groups if "populated 0" in path.read_text()}
    for process in psutil.process_iter(["pid", "environ"]):
        environment = process.info["environ"] or {}
        if process.pid != os.getpid() and environment.get("VMRUN_RUNTIME") == str(base):
            found.add(f"process {process.pid}")
    return found


def logs(base: Path) -> set[str]:
    """Machines that have ended and of which logs were kept."""
    return {path.name for path in base.glob(f"{runtime.ENDED}/*")}


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 1", 1), ("exit 42", 42), ("kill -TERM $$", 128 + signal.SIGTERM)],
)
def test_the_exit_code_is_the_commands(
    script: str, code: int, runtime_directory: Path, nothing_left: None
) -> None:
    kept = logs(runtime_directory)
    done = vmrun("run", "--json", "--", "sh", "-c", script)
    facts = facts_of(done)
    assert (done.returncode, done.stdout) == (code, b"")
    assert not facts["own"] and facts["console"] is None
    assert facts["usage"]["cpu_seconds"] > 0 and facts["usage"]["memory"] > MIB
    assert [each["name"] for each in facts["phases"]][-2:] == ["command", "end of the machine"]
    assert logs(runtime_directory) == kept


def test_what_cannot_be_started() -> None:
    missing = vmrun("run", "--", "no-such-program")
    assert (missing.returncode, missing.stdout) == (127, b""), missing.stderr
    assert missing.stderr.splitlines()[-1].startswith(b"vmrun: no-such-program"), missing.stderr
    unfit = vmrun("run", "--json", "--", "/etc/passwd")
    assert facts_of(unfit)["code"] == 126
    assert b"ermission denied" in unfit.stderr


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("--mem", "12", "--", "true"), 64, "say the unit"),
        (("--copy-in", "/no/such:/tmp/x", "--", "true"), 64, "/no/such"),
        (("--image", "/no/such.tar", "--", "true"), 66, "/no/such.tar"),
        (("--kernel", "/etc/passwd", "--", "true"), 66, "/etc/passwd"),
        (("--kernel", "/no/such", "--", "true"), 66, "/no/such"),
    ],
)
def test_what_is_asked_for_wrongly(words: tuple[str, ...], code: int, reason: str) -> None:
    done = vmrun("run", "--json", *words)
    facts = facts_of(done)
    assert (done.returncode, facts["own"], facts["console"]) == (code, True, None), done.stderr
    assert reason in facts["reason"]


def test_a_panic_is_told_at_once(nothing_left: None) -> None:
    done = vmrun("run", "--json", "--", "sh", "-c", "echo before; sleep 2; echo c > /proc/sysrq-trigger")
    facts = facts_of(done)
    assert done.returncode == 67, done.stderr
    assert done.stdout == b"before\n"
    assert b"Kernel panic - not syncing: sysrq triggered crash" in done.stderr
    assert "Kernel panic" in Path(facts["console"]).read_text(errors="replace")


def test_a_machine_that_ends_itself() -> None:
    done = vmrun("run", "--", "sh", "-c", "echo o > /proc/sysrq-trigger; sleep 1000")
    assert done.returncode == 70, done.stderr


def test_time_is_up(nothing_left: None) -> None:
    done = vmrun("run", "--json", "--timeout", "30s", "--", "sh", "-c", "echo began; while :; do :; done")
    facts = facts_of(done)
    assert (done.returncode, done.stdout, facts["own"]) == (68, b"began\n", True), done.stderr
    assert facts["reason"] == "timed out after 30 s"


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A kernel that never does anything."""
    kernel = tmp_path / "hang"
    (tmp_path / "hang.s").write_text(".global _start\n_start:\nsti\nhlt\njmp _start\n")
    subprocess.run(["as", "-o", "hang.o", "hang.s"], cwd=tmp_path, check=True)
    subprocess.run(["ld", "-N", "-Ttext=0x100000", "-o", kernel, "hang.o"], cwd=tmp_path, check=True)
    return kernel


def test_a_kernel_that_never_answers(hanging: Path) -> None:
    done = vmrun("run", "--json", "--fresh", "--timeout", "3s", "--kernel", hanging, "--", "true")
    assert facts_of(done)["reason"] == "timed out after 3 s"
    assert done.returncode == 68


def test_out_of_memory() -> None:
    # A page takes an interpreted kernel some milliseconds, so it gets few.
    hog = "dd if=/dev/zero of=/dev/null bs=45M count=1"
    done = vmrun("run", "--json", "--mem", "64M", "--", "sh", "-c", f"echo began; {hog}; exit $?")
    facts = facts_of(done)
    assert (done.returncode, done.stdout, facts["own"]) == (69, b"began\n", True), done.stderr
    assert "out of memory" in facts["reason"]


def test_streams_are_apart_and_exact(sandbox: Sandbox) -> None:
    data = os.urandom(MIB) + b"no newline at the end"
    # The command's own copies, one of each, at the same time and with nothing added.
    script = "cat > /tmp/data; cat /tmp/data & cat /tmp/data >&2; wait; printf end"
    done = vmrun("exec", sandbox.name, "--", "sh", "-c", script, input=data)
    assert done.returncode == 0
    assert done.stdout == data + b"end"
    assert done.stderr == data


def test_input_that_never_ends_holds_nothing_up(sandbox: Sandbox) -> None:
    read_end, write_end = os.pipe()
    try:
        with started("exec", sandbox.name, "--", "sh", "-c", "read x; echo $x", stdin=read_end) as process:
            os.write(write_end, b"line\nmore")
            assert process.wait(SECONDS) == 0
            assert pipe(process).read() == b"line\n"
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_reader_that_goes_away(sandbox: Sandbox) -> None:
    with started("exec", sandbox.name, "--", "yes") as process:
        assert pipe(process).readline() == b"y\n"
        pipe(process).close()
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1", "HUP"])
def test_signals_reach_the_command(sandbox: Sandbox, name: str) -> None:
    script = f"trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.2; done"
    with started("exec", sandbox.name, "--", "sh", "-c", script) as process:
        assert pipe(process).readline() == b"ready\n"
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert pipe(process).read() == f"got {name}\n".encode()
        assert process.wait(SECONDS) == 7


def test_a_command_that_is_killed_by_what_vmrun_gets(nothing_left: None) -> None:
    with started("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
        assert pipe(process).readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM


class Terminal:
    """A pseudo-terminal that a command of vmrun's runs on."""

    def __init__(self, *words: str) -> None:
        self.fd, theirs = pty.openpty()
        self._theirs = theirs
        tty.setraw(theirs, termios.TCSANOW)
        self.resize(33, 99)
        command = [*VMRUN, *words]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.fd, (rows, columns))

    def expect(self, text: bytes) -> None:
        while text not in self.seen:
            self.seen += os.read(self.fd, 65536)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self._theirs)


def test_a_terminal(sandbox: Sandbox) -> None:
    script = "trap 'stty size' WINCH; trap 'echo interrupted; exit 9' INT; stty size; tty; echo ready; "
    with Terminal("exec", "-t", sandbox.name, "--", "sh", "-c", script + "while :; do sleep 0.2; done") as it:
        it.expect(b"33 99\r\n/dev/pts/")
        it.expect(b"ready")
        it.resize(40, 120)
        it.process.send_signal(signal.SIGWINCH)
        it.expect(b"40 120\r\n")
        it.type(b"\x03")
        it.expect(b"interrupted")
        assert it.process.wait(SECONDS) == 9


def test_a_shell(sandbox: Sandbox) -> None:
    with Terminal("shell", sandbox.name) as it:
        it.type(b"echo $((6 * 7))$((6 * 7))\n")
        it.expect(b"4242")
        it.type(b"exit 3\n")
        assert it.process.wait(SECONDS) == 3


def test_a_terminal_must_be_one(sandbox: Sandbox) -> None:
    done = vmrun("exec", "-t", sandbox.name, "--", "true")
    assert (done.returncode, done.stdout) == (64, b"")
    assert b"not a terminal" in done.stderr


def test_several_at_once_in_one_machine(sandbox: Sandbox) -> None:
    commands = [
        subprocess.Popen(
            [*VMRUN, "exec", sandbox.name, "--", "sh", "-c", f"sleep 1; echo {index}; exit {index}"],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        for index in range(4)
    ]
    for index, command in enumerate(commands):
        output, _ = command.communicate(timeout=SECONDS)
        assert (command.returncode, output) == (index, f"{index}\n".encode())


HOSTILE_NAMES = ("a file", "-rf", "line\nbreak", "colon:s", "quote'\"$(x)", "ünïcode", ".hidden")


def make_tree(root: Path) -> None:
    (root / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(HOSTILE_NAMES):
        (root / "deep" / name).write_bytes(name.encode() * number)
    (root / "script").write_text("#!/bin/sh\necho it runs\n")
    (root / "script").chmod(0o755)
    (root / "secret").write_text("s")
    (root / "secret").chmod(0o600)
    (root / "link").symlink_to("deep/a file")
    (root / "deep" / "up").symlink_to("../script")
    (root / "empty").mkdir()


def listing(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
            path.lstat().st_mode,
        )
        for path in root.rglob("*")
    }


def test_trees_go_in_and_out(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    script = "/work/script && cp -a /work/. /out && echo new > /out/new"
    done = vmrun(
        *("run", "--copy-in", f"{tmp_path}/tree:/work", "--copy-out", f"/out:{tmp_path}/out"),
        *("--env", "A=b c", "--workdir", "/work", "--", "sh", "-c", f'{script} && pwd && echo "$A"'),
    )
    assert (done.returncode, done.stdout) == (0, b"it runs\n/work\nb c\n"), done.stderr
    expected = listing(tmp_path / "tree")
    found = listing(tmp_path / "out")
    assert found.pop("new")[0] == b"new\n"
    assert found == expected


def test_links_do_not_lead_out(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.run(["sh", "-c", "mkdir -p /evil && ln -s /etc/passwd /evil/x && ln -s ../../y /evil/z"]).check()
    done = vmrun("cp", f"{sandbox.name}:/evil", tmp_path / "evil")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "evil").iterdir()) == []
    assert done.stderr.count(b"left out") == 2


def test_cp_both_ways(sandbox: Sandbox, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "in").write_bytes(data)
    assert vmrun("cp", tmp_path / "in", f"{sandbox.name}:/tmp/there").returncode == 0
    assert vmrun("cp", f"{sandbox.name}:/tmp/there", tmp_path / "out").returncode == 0
    assert (tmp_path / "out").read_bytes() == data
    missing = vmrun("cp", f"{sandbox.name}:/tmp/nothing", tmp_path / "x")
    assert missing.returncode == 64
    assert b"No such file" in missing.stderr and not (tmp_path / "x").exists()


def test_a_failed_command_keeps_its_code_without_its_files(tmp_path: Path) -> None:
    done = vmrun("run", "--copy-out", f"/nothing:{tmp_path}/x", "--", "sh", "-c", "exit 5")
    assert done.returncode == 5
    assert b"No such file" in done.stderr


TWICE = "tee /tmp/big | sha256sum >&2; cat /tmp/big"


def megabytes_through(sandbox: Sandbox, count: int) -> None:
    data = os.urandom(count * MIB)
    began = time.monotonic()
    done = vmrun("exec", sandbox.name, "--", "sh", "-c", TWICE, input=data, seconds=1900)
    print(f"{2 * count / (time.monotonic() - began):.2f} MiB/s, in and out together")
    digest = hashlib.sha256(data).hexdigest().encode()
    assert done.stderr.split()[0] == digest
    assert hashlib.sha256(done.stdout).hexdigest().encode() == digest


def test_random_bytes_in_and_out(sandbox: Sandbox) -> None:
    megabytes_through(sandbox, 4)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_more_random_bytes_in_and_out(sandbox: Sandbox) -> None:
    megabytes_through(sandbox, 64)


def test_a_picture_and_a_kept_machine(tmp_path: Path) -> None:
    kept, picture = tmp_path / "kept", tmp_path / "out.svg"
    script = "echo 6 > /tmp/file; (while [ ! -e /tmp/go ]; do sleep 0.2; done) & exit 0"
    done = vmrun("run", "--keep", kept, "--timeline", picture, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    texts = [each.text or "" for each in ET.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"image", "template", "agent", "command"} <= set(texts)
    assert b"end of the machine" in done.stderr
    with started("restore", "--name", "kept-machine", str(kept)) as process:
        until(lambda: "kept-machine" in runtime.running(), process)
        seen = vmrun("exec", "kept-machine", "--", "cat", "/tmp/file")
        assert (seen.returncode, seen.stdout) == (0, b"6\n"), seen.stderr
        assert vmrun("stop", "--force", "kept-machine").returncode == 0
        process.wait(SECONDS)


def until(done: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for `done`, which tells of another process that has no way to tell us."""
    deadline = time.monotonic() + SECONDS
    while not done():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_owner_leaves_nothing(runtime_directory: Path, nothing_left: None) -> None:
    before, kept = set(runtime.running()), logs(runtime_directory)
    with started("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
        assert pipe(process).readline() == b"ready\n"
        (name,) = set(runtime.running()) - before
        process.kill()
        process.wait()
    until(lambda: name not in runtime.running())
    # Nobody is left who could say that its last words are not wanted.
    assert logs(runtime_directory) <= kept | {name}


def test_a_killed_vmm_is_told(nothing_left: None) -> None:
    before = set(runtime.running())
    with started("run", "--json", "--", "sh", "-c", "echo ready; sleep 1000") as process:
        assert pipe(process).readline() == b"ready\n"
        machines = runtime.running()
        (name,) = set(machines) - before
        os.kill(machines[name], signal.SIGKILL)
        assert process.wait(SECONDS) == 70
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert b"vmrun: the machine's process died" in lines
    assert name not in runtime.running()


def test_a_machine_without_an_agent(nothing_left: None, hanging: Path) -> None:
    name = f"plain-{os.getpid()}"
    assert vmrun("boot", "--kernel", hanging, "--detach", "--name", name).returncode == 0
    try:
        for words in (("exec", name, "--", "true"), ("cp", "/etc/passwd", f"{name}:/tmp/x")):
            done = vmrun(*words)
            assert done.returncode == 70
            assert b"is there one (docs/agent.md)?" in done.stderr
    finally:
        vmrun("stop", "--force", "--wait", name)
    assert b"there is no machine" in vmrun("exec", name, "--", "true").stderr


def test_two_kernels_side_by_side(guest_kit: Any, tmp_path: Path) -> None:
    other = tmp_path / "not-a-kernel"
    other.write_bytes(b"nothing of the kind")
    words: Sequence[str | Path] = ("--kernel", guest_kit.kernel, "--kernel", other)
    done = vmrun("run", *words, "--", "sh", "-c", "echo in a guest; exit 3")
    assert done.returncode == 66
    assert done.stdout == f"== {guest_kit.kernel}\nin a guest\n".encode()
    rows = [line.split()[:2] for line in done.stderr.decode().splitlines()[-2:]]
    assert rows == [[str(guest_kit.kernel), "3"], [str(other), "66"]]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_runs_in_a_row(runtime_directory: Path, nothing_left: None) -> None:
    kept = logs(runtime_directory)
    for number in range(200):
        done = vmrun("run", "--", "sh", "-c", f"echo {number}; exit {number % 100}")
        assert (done.returncode, done.stdout) == (number % 100, f"{number}\n".encode()), done.stderr
    assert logs(runtime_directory) <= kept


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_runs_at_once(runtime_directory: Path, nothing_left: None) -> None:
    kept = logs(runtime_directory)
    runs = [
        subprocess.Popen(
            [*VMRUN, "run", "--mem", "128M", "--", "sh", "-c", f"echo {number}; exit {number}"],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        for number in range(20)
    ]
    for number, process in enumerate(runs):
        output, _ = process.communicate(timeout=3000)
        assert (process.returncode, output) == (number, f"{number}\n".encode())
    assert logs(runtime_directory) <= kept
