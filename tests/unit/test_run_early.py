"""Mistakes of the user's that are told before anything boots, and the words and codes of those told later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent_guest import ENV, session
from vmrun import cli
from vmrun.agent.files import StreamError, Totals
from vmrun.agent.protocol import STAGE_CWD, STAGE_EXEC, AgentError, AgentGone, AgentRefused
from vmrun.agent.session import AgentSession
from vmrun.cli import exec as exec_commands
from vmrun.cli import run_command
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, EXIT_VMM, UserError
from vmrun.image.config import ImageConfig
from vmrun.run import sandbox as sandboxes
from vmrun.run.command import Outcome
from vmrun.run.phases import Phases
from vmrun.run.sandbox import CopyError, Sandbox


class NoSandbox:
    """Whoever makes one has gone too far."""

    def __init__(self, *_: object, **__: object) -> None:
        raise AssertionError("a machine for what cannot be")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sandboxes, "Sandbox", NoSandbox)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ("--keep there", EXIT_IMAGE, "--keep there: is there already, and is not overwritten"),
        ("--keep dangling", EXIT_IMAGE, "--keep dangling: is there already"),
        ("--keep nope/x", EXIT_IMAGE, "--keep nope/x: there is no directory nope"),
        ("--keep file/x", EXIT_IMAGE, "--keep file/x: there is no directory file"),
        ("--timeline nope/x.svg", EXIT_USAGE, "--timeline nope/x.svg: there is no directory nope"),
        ("--timeline there", EXIT_USAGE, "--timeline there: is a directory"),
        ("--copy-out /x:file/x", EXIT_USAGE, "--copy-out to file/x: there is no directory file"),
        (
            "--copy-out /x:file/one/two/",
            EXIT_USAGE,
            "--copy-out to file/one/two/: there is no directory file",
        ),
        ("--mount there:/src --keep new", EXIT_USAGE, "--keep: a machine with --mount cannot be saved"),
        ("--quota 1K", EXIT_USAGE, "--quota 1K: give at least 1M"),
        ("--quota 1023K", EXIT_USAGE, "--quota 1023K: give at least 1M"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    options: str, code: int, told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert cli.run(["run", "--json", *options.split(), "--", "true"]) == code
    line, described = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vmrun: {told}")
    assert json.loads(described)["code"] == code
    assert sorted(place.rglob("*")) == before


def test_what_can_be_is_not_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (
        "--keep new",
        "--keep there/new/",
        "--timeline new.svg",
        "--timeline file",
        "--timeline /dev/null",
        "--copy-out /x:new",
        "--copy-out /x:there",
        "--copy-out /x:there/a/b/c",
        "--copy-out /x:file",
        f"--copy-out /x:{place}/a/b/",
        "--mount there:/src",
        "--quota 1M",
    ):
        with pytest.raises(AssertionError, match="a machine"):
            run_command.run(**run_arguments(options))


def run_arguments(options: str) -> dict[str, Any]:
    from vmrun.cli import fast_path

    understood = fast_path.parse(["run", *options.split(), "--", "true"])
    assert understood is not None
    return understood[1]


@pytest.mark.parametrize(
    ("options", "code"),
    [("--keep shut/x", EXIT_IMAGE), ("--timeline shut/x", EXIT_USAGE), ("--copy-out /x:shut/x", EXIT_USAGE)],
)
def test_where_the_user_may_not_write(
    options: str,
    code: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "shut").mkdir()
    # For root no directory would be one.
    monkeypatch.setattr(os, "access", lambda path, mode: path != "shut")
    assert cli.run(["run", *options.split(), "--", "true"]) == code
    assert "you may not write to shut" in capsys.readouterr().err


class Made:
    """A sandbox whose guest does not start the command."""

    console_log = None
    cpu_seconds = peak_memory = keep_logs = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def close(self) -> None:
        pass


PROGRAM = AgentRefused("alpine", 2, STAGE_EXEC)
NO_DIRECTORY = AgentRefused("alpine", 2, STAGE_CWD)
HINT = "; images are given with --image"


@pytest.mark.parametrize(
    ("words", "outcome", "hinted"),
    [
        ("alpine", Outcome(127, str(PROGRAM), started=False), True),
        ("--image there alpine", Outcome(127, str(PROGRAM), started=False), False),
        ("/bin/alpine", Outcome(127, str(PROGRAM), started=False), False),
        ("alpine", Outcome(126, str(NO_DIRECTORY), started=False), False),
    ],
)
def test_an_image_in_the_place_of_a_command(
    words: str,
    outcome: Outcome,
    hinted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sandboxes, "Sandbox", Made)
    monkeypatch.setattr(run_command, "_use", lambda *_: outcome)
    assert cli.run(["run", *words.split()]) == outcome.code
    assert capsys.readouterr().err == f"vmrun: {outcome.reason}{HINT if hinted else ''}\n"


class Copying:
    """A session whose copies fail; a context manager, as sessions are."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __enter__(self) -> Copying:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def copy_in(self, *_: object, **__: object) -> Totals:
        raise self.error

    copy_out = copy_in

    def interrupt(self) -> None:
        raise AssertionError("nobody gave it a time limit")


MISSING = AgentError("copying from /nope: /nope: No such file or directory")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MISSING, EXIT_USAGE),
        (StreamError("the guest sent two trees for one"), EXIT_VMM),
        (AgentGone("the session was closed"), EXIT_VMM),
    ],
)
def test_cp_tells_mistakes_from_failures(
    error: Exception,
    code: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exec_commands, "_session", lambda *_: Copying(error))
    for words in (["job:/nope", "."], ["file", "job:/"]):
        assert cli.run(["cp", *words]) == code
        assert capsys.readouterr().err == f"vmrun: {error}\n"


def test_cp_of_what_is_not_here_asks_no_machine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["cp", "nope", "job:/"]) == EXIT_USAGE
    assert capsys.readouterr().err == "vmrun: nope: there is no such file or directory\n"


def sandbox_of(session: Any) -> Sandbox:
    """As much of one as commands and copies need, in a guest that goes on."""
    sandbox = Sandbox.__new__(Sandbox)
    sandbox.image_config = ImageConfig(env=ENV)
    sandbox._session = session
    return sandbox


@pytest.mark.parametrize(
    ("error", "code"), [(MISSING, EXIT_USAGE), (StreamError("the guest sent two trees for one"), EXIT_VMM)]
)
def test_a_copy_that_fails_is_an_error_of_the_users_kind(error: Exception, code: int, place: Path) -> None:
    sandbox = sandbox_of(Copying(error))
    copies: list[Callable[[], Totals]] = [
        lambda: sandbox.copy_in("file", "/"),
        lambda: sandbox.copy_out("/nope", "x"),
    ]
    for copy in copies:
        with pytest.raises(UserError) as failed:
            copy()
        assert isinstance(failed.value, CopyError) and failed.value.code == code
        assert str(failed.value) == str(error)


def on_the_host(use: Callable[[Sandbox], None]) -> None:
    made: AgentSession
    with session() as made:
        use(sandbox_of(made))


@pytest.mark.parametrize("given", ["größer\n", "größer\n".encode()])
def test_input_may_be_text(given: bytes | str) -> None:
    def use(sandbox: Sandbox) -> None:
        result = sandbox.run(["cat"], input=given, timeout=60)
        assert (result.exit_code, result.stdout) == (0, "größer\n".encode())

    on_the_host(use)


def test_no_command_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no command"):
        sandbox_of(None).run([])


def test_a_boot_is_told_before_the_machine_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` forks, and nobody may be told anything then: the teller may have a thread."""
    heard: list[str] = []

    class Teller:
        def step(self, title: str, total: int | None = None) -> None:
            heard.append(title)

        def advance(self, detail: str = "") -> None:
            raise AssertionError

    class Image:
        config = ImageConfig()

    def begin(sandbox: Sandbox, *_: object) -> None:
        heard.append("machine")

    monkeypatch.setattr(sandboxes, "resolve", lambda *_: Image)
    monkeypatch.setattr(sandboxes, "find_parts", lambda: None)
    monkeypatch.setattr(sandboxes, "machine_config", lambda *_: sandboxes.vmm.MachineConfig())
    monkeypatch.setattr(Sandbox, "_begin", begin)
    Sandbox(fresh=True, progress=Teller(), phases=Phases())
    assert heard == ["booting: --disk and --fresh use no template", "machine"]


def test_totals_say_what_they_are() -> None:
    totals = Totals()
    totals.entries, totals.bytes = 3, 120
    for _ in range(101):
        totals.leave_out("x: a link")
    assert repr(totals) == "<Totals 3 entries, 120 bytes, 101 left out>"
