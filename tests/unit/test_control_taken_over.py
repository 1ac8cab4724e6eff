"""What commands make of a VMM that its guest has taken over: it says anything on its control socket, and the
user's terminal and the list of the other machines stay as they are.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmrun import cli
from vmrun.control import client as clients
from vmrun.control import facts, runtime
from vmrun.control.client import MachineClient
from vmrun.control.protocol import encode
from vmrun.errors import EXIT_VMM, UserError

TITLE = "\x1b]0;pwned\x07"
GOOD: dict[str, Any] = {
    "name": "web",
    "pid": 1,
    "state": "running",
    "vcpus": 1,
    "memory": 1 << 30,
    "memory_used": 1 << 20,
    "disks": 1,
    "nics": 0,
    "started": 1.5,
    "workers": {"blk0": 1},
}

Answer = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def taken_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Answer], runtime.RuntimeDirectory]]:
    """Makes a machine "web" that answers each line as it is told."""
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))
    listener = socket.socket(socket.AF_UNIX)
    directories = []

    def serve(answer: Answer) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as lines:
                for line in lines:
                    sock.sendall(answer(json.loads(line)))

    def make(answer: Answer) -> runtime.RuntimeDirectory:
        directories.append(runtime.claim("web"))
        listener.bind(str(directories[0].socket_path))
        listener.listen()
        threading.Thread(target=serve, args=(answer,), daemon=True).start()
        return directories[0]

    yield make
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for directory in directories:
        directory.release()


def result(answer: Any) -> Answer:
    return lambda request: encode({"id": request["id"], "ok": True, "result": answer})


def test_its_words_are_printable(
    taken_over: Callable[[Answer], object], capfd: pytest.CaptureFixture[str]
) -> None:
    taken_over(result({**GOOD, "state": TITLE, "code": 3, "reason": f"it \n{TITLE} \ud800 was tíme"}))
    assert cli.run(["ps"]) == 0
    assert capfd.readouterr().out.splitlines()[1].split()[:3] == ["web", "1", "?]0;pwned?"]
    assert cli.run(["top", "--interval", "1ms"]) == 0
    assert "\x1b" not in capfd.readouterr().out
    assert cli.run(["wait", "web"]) == 3
    assert capfd.readouterr().err == "vmrun: it ??]0;pwned? ? was tíme\n"


@pytest.mark.parametrize(
    "change",
    [
        {"name": 7},
        {"state": ["running"]},
        {"state": None},
        {"vcpus": TITLE},
        {"pid": "1"},
        {"pid": 0},
        {"pid": -1},
        {"pid": 1 << 40},
        {"memory": 1 << 2000},
        {"memory_used": -1},
        {"disks": TITLE},
        {"nics": {}},
        {"started": TITLE},
        {"started": float("nan")},
        {"started": float("-inf")},
        {"started": -1e300},
        {"workers": ["blk0"]},
        {"workers": {"blk0": "1"}},
        {"workers": {"blk0": -1}},
    ],
)
def test_a_status_that_is_none(
    taken_over: Callable[[Answer], object], change: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The others are listed all the same."""
    taken_over(result(GOOD | change))
    assert [each.state for each in facts.all_machines()] == ["unresponsive"]
    assert cli.run(["ps"]) == 0
    assert cli.run(["stop", "web", "--wait", "--force"]) == EXIT_VMM
    assert "another version's, or nonsense" in capfd.readouterr().err


def test_a_status_of_a_later_version() -> None:
    status = clients._parse_status({**GOOD, "weight": 3})
    assert (status.name, status.started, status.workers) == ("web", 1.5, {"blk0": 1})
    old = {key: value for key, value in GOOD.items() if key != "workers"}
    assert clients._parse_status(old | {"started": 2}).workers == {}


@pytest.mark.parametrize(
    "ending",
    [
        {},
        {"code": "0", "reason": "done"},
        {"code": 256, "reason": "it counts as 0"},
        {"code": -1, "reason": ""},
        {"code": 0, "reason": {}},
        {"reason": "done"},
        [0, "done"],
    ],
)
def test_an_ending_that_is_none(ending: Any) -> None:
    assert clients._parse_ending(ending) == clients.Ending(EXIT_VMM, "how the machine ended is not known")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ({"message": TITLE, "exit_code": 66}, 66, "?]0;pwned?"),
        ({"message": "x" * 100_000, "exit_code": 64}, 64, "x" * clients.MAX_TEXT),
        ({"message": "no", "exit_code": 256}, EXIT_VMM, "no"),
        ({"message": "no", "exit_code": "x"}, EXIT_VMM, "no"),
        ({"message": ["no"]}, EXIT_VMM, "refused"),
        (None, EXIT_VMM, "refused"),
    ],
)
def test_a_refusal_of_any_kind(
    taken_over: Callable[[Answer], object], error: Any, code: int, text: str
) -> None:
    taken_over(lambda request: encode({"id": request["id"], "ok": False, "error": error}))
    with MachineClient("web") as client, pytest.raises(UserError) as caught:
        client.pause()
    assert (caught.value.code, str(caught.value)) == (code, text)


@pytest.mark.parametrize("line", [b"[" * 100_000 + b"\n", b"7\n", b"\xff\n", b"9" * 5000 + b"\n"])
def test_lines_of_any_kind(taken_over: Callable[[Answer], object], line: bytes) -> None:
    taken_over(lambda request: line)
    with MachineClient("web") as client, pytest.raises(UserError, match="answers nonsense"):
        client.pause()


def test_answers_to_nobody_are_not_kept(taken_over: Callable[[Answer], object]) -> None:
    def answer(request: dict[str, Any]) -> bytes:
        others = [encode({"id": number, "ok": True}) for number in range(-9, 99) if number != request["id"]]
        return b"".join(others) + result({})(request)

    taken_over(answer)
    with MachineClient("web") as client:
        client.pause()
        client.resume()
        assert set(client._answers) <= {1, 2}
