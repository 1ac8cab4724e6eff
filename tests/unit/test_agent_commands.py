"""Commands through the agent: ends, streams, terminals, signals, families. The agent runs on the host."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.agent_guest import ENV, agent, session
from vmrun.agent import protocol
from vmrun.agent.process import Capture
from vmrun.agent.protocol import AgentError, AgentGone, AgentRefused
from vmrun.agent.session import MERGED, PULL, AgentSession

MIB = 1 << 20


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False
    return stat.rpartition(b")")[2].split()[0] != b"Z"


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in 20 seconds"
        time.sleep(0.01)


def output_of(session: AgentSession, *argv: str, **options: object) -> bytes:
    capture = Capture()
    status = session.exec(argv, env=ENV, stdout=capture, **options).wait(60)  # type: ignore[arg-type]
    assert status.exit_code == 0
    return bytes(capture.data)


@pytest.mark.parametrize("code", [0, 1, 42, 126, 127, 255])
def test_exit_codes(code: int) -> None:
    with session() as guest:
        status = guest.exec(["sh", "-c", f"exit {code}"], env=ENV).wait(20)
        assert (status.code, status.signal, status.exit_code) == (code, None, code)


def test_a_command_line_is_no_list_of_words() -> None:
    with session() as guest, pytest.raises(TypeError, match=r"\['sh', '-c', 'echo hi'\]"):
        guest.exec("echo hi")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE])
def test_death_by_signal(number: int) -> None:
    with session() as guest:
        status = guest.exec(["sh", "-c", f"kill -{int(number)} $$"], env=ENV).wait(20)
        assert (status.code, status.signal, status.exit_code) == (None, number, 128 + number)


def test_programs_that_cannot_start(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    cases = [
        (["/no/such/program"], {}, protocol.STAGE_EXEC, errno.ENOENT, 127),
        (["no-such-program"], {}, protocol.STAGE_EXEC, errno.ENOENT, 127),
        ([str(plain)], {}, protocol.STAGE_EXEC, errno.EACCES, 126),
        ([str(tmp_path)], {}, protocol.STAGE_EXEC, errno.EACCES, 126),
        ([str(broken)], {}, protocol.STAGE_EXEC, errno.ENOENT, 127),
        (["true"], {"cwd": "/no/such/place"}, protocol.STAGE_CWD, errno.ENOENT, 126),
        (["true"], {"user": "no-such-user"}, protocol.STAGE_USER, errno.ENOENT, 126),
    ]
    with session() as guest:
        for argv, options, stage, number, code in cases:
            with pytest.raises(AgentRefused) as refused:
                guest.exec(argv, **options)  # type: ignore[arg-type]
            assert (refused.value.stage, refused.value.errno, refused.value.exit_code) == (
                stage,
                number,
                code,
            )
        with pytest.raises(AgentRefused):
            guest.exec([])
        with pytest.raises(ValueError, match="NUL"):
            guest.exec(["a\0b"])
        with pytest.raises(ValueError, match="4 MiB"):
            guest.exec(["x" * (5 * MIB)])
        assert output_of(guest, "echo", "fine") == b"fine\n"


def test_environment_and_directory() -> None:
    with session() as guest:
        env = {"A": "b=c d", "EMPTY": "", "PATH": ENV["PATH"], "HOME": "/h", "USER": "u"}
        capture = Capture()
        guest.exec(["env"], env=env, stdout=capture).wait(20)
        assert dict(line.split("=", 1) for line in capture.data.decode().splitlines()) == env
        capture = Capture()
        guest.exec(["/usr/bin/env"], stdout=capture).wait(20)
        assert {"PATH", "HOME", "USER"} == {line.split("=")[0] for line in capture.data.decode().splitlines()}
        assert output_of(guest, "pwd", cwd="/usr/bin") == b"/usr/bin\n"
        assert output_of(guest, "pwd") == b"/\n"


def test_long_command_lines_come_in_parts() -> None:
    words = ["x" * 100_000, protocol.MAGIC * 3, "y" * 66_000]
    with session() as guest:
        out = output_of(guest, "printf", "%s\\n", *[os.fsdecode(word) for word in words])
    assert out == b"".join(os.fsencode(word) + b"\n" for word in words)


@pytest.mark.root
def test_users() -> None:
    with session() as guest:
        assert output_of(guest, "id", "-u", user="65534") == b"65534\n"
        assert output_of(guest, "sh", "-c", "id -u; id -g; id -G", user="4242:77") == b"4242\n77\n77\n"
        assert (
            output_of(guest, "sh", "-c", "id -un; id -gn; echo $USER", user="nobody")
            == b"nobody\nnogroup\nnobody\n"
        )
        assert output_of(guest, "id", "-gn", user="nobody:daemon") == b"daemon\n"
        with pytest.raises(AgentRefused):
            guest.exec(["true"], user="nobody:no-such-group")


def test_input_from_bytes_descriptor_and_generator(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB) + protocol.MAGIC + os.urandom(10)
    (tmp_path / "data").write_bytes(data)
    with session() as guest, (tmp_path / "data").open("rb") as file:
        for source in (data, file.fileno(), iter([data[:100], data[100:]])):
            capture = Capture()
            assert guest.exec(["cat"], env=ENV, stdin=source, stdout=capture).wait(60).exit_code == 0
            assert bytes(capture.data) == data
        assert output_of(guest, "cat") == b""


@pytest.mark.parametrize("size", [64 * MIB, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_gigabytes_out_and_in_at_once(tmp_path: Path, size: int) -> None:
    source = tmp_path / "random"
    block = os.urandom(MIB)
    digest = hashlib.sha256()
    with source.open("wb") as file:
        for number in range(size // MIB):
            part = number.to_bytes(4, "little") + block[4:]
            digest.update(part)
            file.write(part)
    read, write = os.pipe()
    got = hashlib.sha256()

    def consume() -> None:
        with open(read, "rb", buffering=0) as pipe:
            while data := pipe.read(MIB):
                got.update(data)

    consumer = threading.Thread(target=consume)
    consumer.start()
    with session() as guest:
        capture = Capture()
        with source.open("rb") as file:
            out = guest.exec(["cat", str(source)], env=ENV, stdout=write)
            into = guest.exec(["sha256sum"], env=ENV, stdin=file.fileno(), stdout=capture)
            assert out.wait(200).exit_code == into.wait(200).exit_code == 0
        os.close(write)
    consumer.join()
    assert got.hexdigest() == digest.hexdigest() == capture.data.decode().split()[0]


def test_streams_stay_apart_under_load() -> None:
    both = "head -c 1000000 /dev/zero; head -c 900000 /dev/zero | tr '\\0' e >&2"
    script = f"for i in 1 2 3 4 5 6 7 8; do {both}; done"
    with session() as guest:
        out, err = Capture(), Capture()
        assert guest.exec(["sh", "-c", script], env=ENV, stdout=out, stderr=err).wait(60).exit_code == 0
        assert bytes(out.data) == bytes(8_000_000)
        assert bytes(err.data) == b"e" * 7_200_000
        merged = Capture()
        script = "for i in 1 2 3; do echo out; echo err >&2; done"
        guest.exec(["sh", "-c", script], env=ENV, stdout=merged, stderr=MERGED).wait(20)
        assert bytes(merged.data) == b"out\nerr\n" * 3


def test_unread_stream_holds_up_nothing_else() -> None:
    with session() as guest:
        stuck = guest.exec(["cat", "/dev/zero"], env=ENV, stdout=PULL)
        full = guest.exec(["sleep", "1000"], env=ENV, stdin=iter(lambda: bytes(MIB), b""))
        assert stuck.outputs[1].take()
        assert len(output_of(guest, "head", "-c", "5000000", "/dev/zero")) == 5_000_000
        guest.ping()
        stuck.kill()
        full.kill()
        while stuck.outputs[1].take():
            pass
        assert stuck.wait(20).signal == full.wait(20).signal == signal.SIGKILL


def test_reader_that_goes_away_ends_the_command() -> None:
    read, write = os.pipe()
    os.close(read)
    with session() as guest:
        process = guest.exec(["cat", "/dev/zero"], env=ENV, stdout=write)
        assert process.wait(20).signal == signal.SIGPIPE
        assert process.output_error is None
        full = os.open("/dev/full", os.O_WRONLY)
        process = guest.exec(["cat", "/dev/zero"], env=ENV, stdout=full)
        process.wait(20)
        assert process.output_error is not None
        assert process.output_error.errno == errno.ENOSPC
        os.close(full)
    os.close(write)


def test_command_that_closes_its_input() -> None:
    with session() as guest:
        endless = iter(lambda: bytes(65536), b"")
        assert output_of(guest, "head", "-c", "10", stdin=endless) == bytes(10)
        endless = iter(lambda: bytes(65536), b"")
        assert output_of(guest, "sh", "-c", "exec <&-; sleep 0.1; echo done", stdin=endless) == b"done\n"


def test_idle_input_does_not_delay_the_end() -> None:
    read, write = os.pipe()
    with session() as guest:
        assert output_of(guest, "echo", "done", stdin=read) == b"done\n"
    os.close(read)
    os.close(write)


def test_signals_reach_the_group() -> None:
    with session() as guest:
        process = guest.exec(
            ["sh", "-c", "trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 1000 & wait; done"],
            env=ENV, stdout=PULL,
        )  # fmt: skip
        assert process.outputs[1].take() == b"ready\n"
        process.signal(signal.SIGTERM)
        assert process.outputs[1].read(4) == b"got\n"
        assert not process.outputs[1].take()
        assert process.wait(20).code == 3
        process.signal(signal.SIGTERM)


class Terminal:
    """A command's terminal, read until something shows."""

    def __init__(self, guest: AgentSession, script: str) -> None:
        self.typed, self.keyboard = os.pipe()
        self.process = guest.exec(
            ["sh", "-c", script], env={**ENV, "TERM": "dumb"}, tty=(24, 80), stdin=self.typed, stdout=PULL
        )
        self.seen = b""

    def until(self, text: bytes) -> None:
        while text not in self.seen:
            data = self.process.outputs[1].take()
            assert data, self.seen
            self.seen += data

    def close(self) -> None:
        os.close(self.typed)
        os.close(self.keyboard)


def test_terminal_size_and_interrupt() -> None:
    with session() as guest:
        terminal = Terminal(
            guest,
            "tty; stty size; trap 'stty size' WINCH; trap 'echo int; exit 5' INT; echo go;"
            " while :; do read x; done",
        )
        terminal.until(b"/dev/pts/")
        terminal.until(b"24 80")
        terminal.until(b"go")
        terminal.process.resize(50, 132)
        os.write(terminal.keyboard, b"\n")
        terminal.until(b"50 132")
        os.write(terminal.keyboard, b"\x03")
        terminal.until(b"int")
        while terminal.process.outputs[1].take():
            pass
        assert terminal.process.wait(20).code == 5
        terminal.close()


def test_end_of_input_at_a_terminal() -> None:
    with session() as guest:
        capture = Capture()
        process = guest.exec(["cat"], env=ENV, tty=(24, 80), stdin=b"line\n", stdout=capture)
        assert process.wait(20).code == 0
        assert capture.data.count(b"line") == 2


def test_output_is_whole_though_a_daemon_holds_it_open() -> None:
    with session() as guest:
        capture = Capture()
        script = "sleep 1000 & echo $!; head -c 300000 /dev/zero; exit 7"
        status = guest.exec(["sh", "-c", script], env=ENV, stdout=capture, linger=0.2).wait(20)
        assert status.code == 7
        pid, _, rest = bytes(capture.data).partition(b"\n")
        assert rest == bytes(300_000)
        assert alive(int(pid))
    eventually(lambda: not alive(int(pid)))


def test_late_output_of_a_helper_is_awaited() -> None:
    with session() as guest:
        assert output_of(guest, "sh", "-c", "(sleep 0.3; echo late) & exit 0", linger=None) == b"late\n"


def test_kill_takes_the_family() -> None:
    with session() as guest:
        script = "setsid sleep 1000 & echo $!; sleep 1000 & echo $!; wait"
        process = guest.exec(["sh", "-c", script], env=ENV, stdout=PULL)
        text = b""
        while text.count(b"\n") < 2:
            text += process.outputs[1].take()
        pids = [int(line) for line in text.split()]
        process.kill()
        while process.outputs[1].take():
            pass
        assert process.wait(20).signal == signal.SIGKILL
        for pid in pids:
            eventually(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def test_end_of_the_session_kills_orphans_but_what_is_kept(tmp_path: Path) -> None:
    script = "while ! test -e go; do sleep 0.05; done; echo words && touch said; exec sleep 1000"
    with session() as guest:
        orphan = int(output_of(guest, "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"))
        kept = guest.exec(["sh", "-c", script], env=ENV, cwd=str(tmp_path), keep=True).pid
        lost = guest.exec(["sleep", "1000"], env=ENV).pid
        assert alive(orphan)
    eventually(lambda: not alive(orphan) and not alive(lost))
    (tmp_path / "go").touch()
    # What it prints is not what it dies of, though nobody has its output.
    eventually((tmp_path / "said").exists)
    assert alive(kept)
    os.kill(kept, signal.SIGKILL)


def test_many_at_once_and_one_after_another() -> None:
    with session() as guest:
        captures = [Capture() for _ in range(60)]
        processes = [
            guest.exec(["sh", "-c", f"head -c 20000 /dev/zero; exit {number}"], env=ENV, stdout=capture)
            for number, capture in enumerate(captures)
        ]
        assert [process.wait(60).code for process in processes] == list(range(60))
        assert all(len(capture.data) == 20000 for capture in captures)
        for number in range(150):
            assert output_of(guest, "echo", str(number)) == f"{number}\n".encode()


def test_threads_share_a_session() -> None:
    failures: list[BaseException] = []

    def work(guest: AgentSession, number: int) -> None:
        try:
            for _ in range(10):
                data = os.urandom(100_000)
                assert output_of(guest, "cat", stdin=data) == data
        except BaseException as error:
            failures.append(error)

    with session() as guest:
        threads = [threading.Thread(target=work, args=(guest, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_facts_ping_and_sync() -> None:
    with session() as guest:
        facts = guest.info()
        assert facts["kernel"] == os.uname().release
        assert int(facts["memory"]) > MIB
        assert guest.ping() >= 0
        guest.sync()
        with pytest.raises(AgentRefused):
            guest.add_entropy(b"too short")
        with pytest.raises(AgentRefused):
            guest.poweroff()
        with pytest.raises(AgentError, match="cannot mount"):
            guest.mount("no-such-type", "none", "/tmp")


def raw_hello(sock: socket.socket, nonce: bytes) -> None:
    """A session begun by hand; whatever it leaves behind is in the stream for the next one."""
    sock.sendall(protocol.hello(nonce, protocol.NOBODY))
    answer = b""
    while len(answer) < protocol.HELLO.size:
        answer += sock.recv(protocol.HELLO.size - len(answer))
    sock.sendall(protocol.hello(nonce, answer[24:40]))


def raw_exec(channel: int, script: str) -> bytes:
    fields = struct.pack("<IIHH", 0, 500, 0, 0) + protocol.text("") + protocol.text("")
    fields += protocol.texts(["sh", "-c", script]) + protocol.texts([f"PATH={ENV['PATH']}"])
    return b"".join(protocol.request_frames(channel, protocol.OP_EXEC, fields))


@pytest.mark.parametrize("torn", [0, 1, 7, 8, 5000])
def test_new_host_in_the_middle_of_everything(tmp_path: Path, torn: int) -> None:
    """As after a restore: the old session's bytes are in the stream, and a frame of it is torn."""
    pid_file = tmp_path / "pid"
    with agent() as (sock, _):
        raw_hello(sock, b"old" + bytes(13))
        sock.sendall(raw_exec(1, f"echo $$ >{pid_file}; exec cat /dev/zero"))
        eventually(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
        sock.recv(100_000)
        # The first bytes of a frame that never ends.
        sock.sendall(protocol.frame(protocol.DATA, 0, 1, bytes(60_000))[:torn])
        with AgentSession(sock) as guest:
            guest.hello(20)
            eventually(lambda: not alive(int(pid_file.read_text())))
            data = os.urandom(500_000)
            assert output_of(guest, "cat", stdin=data) == data
            # The same hello once more changes nothing.
            sock.sendall(protocol.hello(guest._nonce, protocol.NOBODY))
            assert output_of(guest, "echo", "still") == b"still\n"


def test_agent_that_is_killed() -> None:
    with agent() as (sock, process), AgentSession(sock) as guest:
        guest.hello(20)
        command = guest.exec(["sleep", "1000"], env=ENV)
        waiter = guest.exec(["cat"], env=ENV, stdin=iter(lambda: bytes(65536), b""), stdout=PULL)
        process.kill()
        with pytest.raises(AgentGone):
            command.wait(20)
        with pytest.raises(AgentGone):
            waiter.wait(20)
        with pytest.raises(AgentGone):
            guest.ping()
        os.kill(command.pid, signal.SIGKILL)
        process.returncode = 0


def test_no_answer_is_a_timeout() -> None:
    ours, theirs = socket.socketpair()
    with theirs, AgentSession(ours) as guest, pytest.raises(TimeoutError):
        guest.hello(0.3)
    ours, theirs = socket.socketpair()
    with AgentSession(ours) as guest:
        theirs.close()
        with pytest.raises(AgentGone):
            guest.hello(20)
