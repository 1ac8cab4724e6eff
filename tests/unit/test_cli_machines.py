"""What the commands for running machines print, and how they fail. No machine runs here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmrun import cli
from vmrun.cli import app, machines
from vmrun.cli.top import render
from vmrun.control import detach, facts, runtime
from vmrun.control.client import Status
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, EXIT_VMM, UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))
    return tmp_path / "run"


def some_facts() -> list[facts.Facts]:
    status = Status("web", 7, "running", 2, 1 << 30, 100 << 20, 1, 2, 0.0, {"blk0": 8})
    return [
        facts.Facts("quiet", 9, None, {"vmm": 1.0}),
        facts.Facts("web", 7, status, {"vmm": 61.0, "blk0": 2.0}),
    ]


def test_ps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(facts, "all_machines", some_facts)
    monkeypatch.setattr("time.time", lambda: 3700.0)
    assert cli.run(["ps"]) == 0
    heading, quiet, web = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["NAME", "PID", "STATE"]
    assert quiet.split() == ["quiet", "9", "unresponsive", "1.0s"]
    assert web.split() == ["web", "7", "running", "2", "1G", "100M", "1:03", "1", "2", "1:01:40"]
    assert cli.run(["ps", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0] == {"name": "quiet", "pid": 9, "state": "unresponsive", "cpu_seconds": {"vmm": 1.0}}
    assert found[1]["uptime"] == 3700 and found[1]["workers"] == {"blk0": 8}


def test_top_shows_the_busiest_first(capsys: pytest.CaptureFixture[str]) -> None:
    before = {("web", 7): 62.0, ("quiet", 9): 1.0}
    lines = render(some_facts(), before, 0.5).splitlines()
    assert lines[1].split()[:7] == ["web", "7", "running", "2", "200", "1:01", "2.0s"]
    assert lines[2].split()[:4] == ["quiet", "9", "unresponsive", "0"]
    assert cli.run(["top", "--interval", "1ms"]) == 0
    assert capsys.readouterr().out.split()[0] == "NAME"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1d 01:01:01")],
)
def test_durations(value: float, text: str) -> None:
    assert machines.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0M"), (1 << 20, "1M"), (3 << 19, "1.5M"), (1 << 30, "1G"), (3 << 29, "1.5G")]
)
def test_sizes(value: int, text: str) -> None:
    assert machines.size(value) == text


def test_nothing_runs(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    assert cli.run(["ps", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert cli.run(["stop", "--all"]) == 0
    for command in ("inspect", "wait", "stop", "reset", "pause", "resume", "console", "log"):
        assert cli.run([command, "web"]) == EXIT_USAGE
        assert capsys.readouterr().err == "vmrun: there is no machine 'web': none runs\n"
    assert not base.exists()


def test_a_machine_that_cannot_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    """Its VMM holds the name and has no socket yet: it is starting, or hangs before it got that far."""
    directory = runtime.claim("web")
    try:
        facts.STATUS_SECONDS = 0.05
        (found,) = facts.all_machines()
        assert (found.name, found.pid, found.state) == ("web", os.getpid(), "unresponsive")
        assert found.cpu_seconds["vmm"] > 0
    finally:
        facts.STATUS_SECONDS = 2.0
        directory.release()


def test_what_the_ended_left(capfd: pytest.CaptureFixture[str]) -> None:
    directory = runtime.claim("web")
    (directory.path / "console.log").write_text("printed")
    (directory.path / "vmm.log").write_text("said")
    directory.release({"code": 9, "reason": "it was time"})
    assert cli.run(["wait", "web"]) == 9
    assert capfd.readouterr().err == "vmrun: it was time\n"
    assert cli.run(["log", "web"]) == cli.run(["log", "web", "--vmm"]) == 0
    assert capfd.readouterr().out == "printedsaid"


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    commands = text.partition("Run commands:")[2]
    assert [line[:-1] for line in text.splitlines() if line.endswith(":")] == ["Options", *app.GROUPS]
    for group in app.GROUPS.values():
        for name in group:
            assert cli.run([name, "--help"]) == 0
            assert commands.count(f"  {name} ") == 1
    assert "..." not in commands  # each command says what it does in one short line


DETACH = """
import os, sys
from vmrun.control import detach
from vmrun.errors import UserError

def vmm(starter):
    {body}

try:
    print("started", detach.start(vmm, str))
except UserError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("starter.running('web'); return 0, 'off'", "started web"),
        ("raise UserError('no such disk', 66)", f"{EXIT_IMAGE} no such disk"),
        ("raise OSError('the host failed')", f"{EXIT_VMM} the host failed"),
        ("return 3, 'it ended first'", "3 it ended first"),
        ("os._exit(1)", f"{EXIT_VMM} the machine's process died before the machine ran"),
        ("os.abort()", f"{EXIT_VMM} the machine's process died before the machine ran"),
        (
            "starter.running(f'{os.getsid(0) != os.getpid()} {os.isatty(0)}'); return 0, ''",
            "started True False",
        ),
    ],
)
def test_detaching(body: str, said: str) -> None:
    command = [sys.executable, "-c", DETACH.format(body=body)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert (run.stdout, run.stderr) == (f"{said}\n", "")


def test_whoever_waited_is_gone() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    starter = detach.Detached(write_end)
    assert not starter.running("web")
    assert starter.running("web")  # told once
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(write_end)


def test_all_or_names() -> None:
    with pytest.raises(UserError, match="NAME or --all"):
        machines._choose(None, False)
    with pytest.raises(UserError, match="not both"):
        machines._choose(["a"], True)
