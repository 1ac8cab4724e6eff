"""What somebody meets who has never used vmrun: help texts, hints, and what a long first run tells."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest

from vmrun import cli, errors
from vmrun.agent.files import StreamError
from vmrun.agent.protocol import AgentError
from vmrun.cli import app, fast_path, run_command, typer_app
from vmrun.cli.declare import parameters
from vmrun.control import client
from vmrun.errors import UserError
from vmrun.guestkit.progress import Lines, waiting
from vmrun.run import command as run_commands
from vmrun.run import templates
from vmrun.run.command import Outcome
from vmrun.run.ending import SandboxEnded
from vmrun.run.phases import Phases
from vmrun.run.sandbox import CopyError
from vmrun.run.spec import SandboxSpec

SECONDS = 20.0


@pytest.fixture(autouse=True)
def directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("VMRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def every_help(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The help text of each command and group, by its name."""
    names = [""]
    for group in app.GROUPS.values():
        for name, file in group.items():
            names.append(name)
            names += [f"{name} {inner}" for inner in getattr(app.load(name, file), "COMMANDS", ())]
    texts = {}
    for name in names:
        assert cli.run([*name.split(), "--help"]) == 0
        texts[name] = capsys.readouterr().out
    return texts


def test_help_shows_no_types_and_cuts_no_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in every_help(capsys).items():
        _, usage, body = text.partition("Usage: ")[2].partition("\n")
        assert usage and "list[" not in text and "<str>" not in text and "{NAME}" not in text, name
        for line in body.partition("Commands:")[2].splitlines():
            assert not line.endswith("..."), f"{name}: {line}"


def test_examples_in_help_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line.strip()
        for text in every_help(capsys).values()
        for line in text.splitlines()
        if line.startswith("    vmrun ")
    ]
    assert len(lines) > 10
    for line in lines:
        assert fast_path.parse(shlex.split(line)[1:]) is not None, line


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("run uname -a", "vmrun run -- uname -a"),
        ("exec web uname -a", "vmrun exec web -- uname -a"),
        ("exec -t web sh -c 'a b'", "vmrun exec -t web -- sh -c 'a b'"),
        ("run --mem 1G ls -la", "vmrun run --mem 1G -- ls -la"),
        ("run --mem=1G sh -e", "vmrun run --mem=1G -- sh -e"),
    ],
)
def test_a_command_without_dashes(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(line)) == errors.EXIT_USAGE
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.endswith(f": a command with options goes after --: {meant}\n")


@pytest.mark.parametrize(
    "line", ["run --imge x", "exec web --usr root", "run --nope -- uname -a", "exec web", "run --mem"]
)
def test_other_mistakes_are_not_about_dashes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(line)) == errors.EXIT_USAGE
    text = capsys.readouterr().err
    assert "goes after --" not in text and text.endswith(f"(see vmrun {line.split()[0]} --help)\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("run -v a:b -- ls", "-v: give --mount HOST:GUEST"),
        ("run -v/a:/b -- ls", "-v: give --mount HOST:GUEST"),
        ("run --volume=a:b -- ls", "--volume: give --mount HOST:GUEST"),
        ("run --rm debian ls -l", "--rm: always so: leave it out"),
        ("run -it -- sh", "-it: give -t alone: stdin is always passed on"),
        ("exec -it web sh", "-it: give -t alone: stdin is always passed on"),
        ("exec web -i -- sh", "-i: stdin is always passed on: leave it out"),
        ("run -m1G -- ls", "-m: give --mem SIZE"),
        ("run -d -- ls", "-d: give vmrun boot -d --name NAME, or run --keep DIRECTORY"),
        ("run --imge x --name y -- ls", "--imge (Possible options: --image"),
        ("run -p 80:80 -- ls", "-p: nothing comes in from outside, but on a tap: give --net TAP"),
        ("boot -smp 2", "-smp: give --cpus N"),
        ("boot -hda x.qcow2", "-hda: give a disk as --disk FILE"),
        ("boot --nographic", "--nographic: always so: leave it out"),
    ],
)
def test_options_of_docker_and_qemu(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == errors.EXIT_USAGE
    text = capsys.readouterr().err
    assert text.startswith(f"vmrun: No such option: {told}") and text.count("\n") == 1
    assert text.endswith(f"(see vmrun {line.split()[0]} --help)\n")


def test_the_commands_own_options_are_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", "ls", "-i"]) == errors.EXIT_USAGE
    assert capsys.readouterr().err.endswith(": a command with options goes after --: vmrun run -- ls -i\n")


def test_a_disk_without_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["boot", "x.qcow2"]) == errors.EXIT_USAGE
    assert capsys.readouterr().err.endswith("(x.qcow2): give a disk as --disk FILE (see vmrun boot --help)\n")
    assert cli.run(["boot", "x.qcow2", "--help"]) == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("kill web", "give vmrun stop -f NAME"),
        ("create web", "give vmrun boot"),
        ("help run", "give vmrun --help or vmrun COMMAND --help"),
        ("logs -f web", "give vmrun log NAME"),
    ],
)
def test_commands_of_docker(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == errors.EXIT_USAGE
    name = line.split()[0]
    assert capsys.readouterr().err == f"vmrun: No such command '{name}': {told} (see vmrun --help)\n"


def test_hints_name_what_there_is() -> None:
    files = {name: file for group in app.GROUPS.values() for name, file in group.items()}
    options = {
        command: {name for each in parameters(app.load(command, files[command])) for name in each.names}
        for command in files
        if not hasattr(app.load(command, files[command]), "COMMANDS")
    }
    for command, hints in typer_app.HINTS.items():
        # What there is needs no hint, and would never get this one.
        assert not hints.keys() & (options[command] if command else files.keys())
        for hint in hints.values():
            words = hint.replace(":", "").replace(",", "").split()
            known = options.get(command, {"--help", "--version"}) | {"--"}
            for before, word in zip(["", *words], words, strict=False):
                if before in ("vmrun", "or") and word in files:
                    known = known | options.get(word, set())
                assert before != "vmrun" or word in {*files, "--help", "--version", "COMMAND"}, hint
                assert not word.startswith("-") or word in known, hint


def test_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["image", "list"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("no images: ")
    assert cli.run(["image", "list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [] and err == ""


class Unending:
    """The client of a machine that does not end."""

    def __init__(self, name: str) -> None:
        pass

    def __enter__(self) -> Unending:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, timeout: float | None) -> None:
        raise TimeoutError


@pytest.mark.parametrize(
    ("given", "told"), [("3", "3 s"), ("3s", "3 s"), ("2m", "120 s"), ("500ms", "0.5 s")]
)
def test_waiting_in_vain_names_the_unit(
    given: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "MachineClient", Unending)
    assert cli.run(["wait", "--timeout", given, "web"]) == errors.EXIT_TIMEOUT
    assert capsys.readouterr().err == f"vmrun: machine web has not ended within {told}\n"


class FakeSandbox:
    """A sandbox out of which nothing can be copied."""

    name = "fake"

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.phases = Phases()
        self.exec = self.wait = self.image_config = None

    def copy_out(self, guest: str, host: str) -> Any:
        raise self.error


MISSING = CopyError(AgentError("copying from /nothing: /nothing: No such file or directory"))


@pytest.mark.parametrize(
    ("error", "command", "code", "own"),
    [
        (MISSING, 0, errors.EXIT_USAGE, True),
        (MISSING, 5, 5, False),
        (CopyError(StreamError("the guest sent two trees for one")), 0, errors.EXIT_VMM, True),
        (CopyError(StreamError("the guest sent two trees for one")), 5, 5, False),
        (OSError(28, "No space left on device"), 0, errors.EXIT_VMM, True),
        (UserError("the agent in the guest is gone", errors.EXIT_VMM), 0, errors.EXIT_VMM, True),
    ],
)
def test_what_cannot_be_copied_out(
    error: Exception,
    command: int,
    code: int,
    own: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = Outcome(command, f"exit code {command}")
    monkeypatch.setattr(run_commands, "run", lambda *how: ended)
    sandbox: Any = FakeSandbox(error)
    outs = [("/nothing", "x")]

    def whole() -> Outcome:
        return run_command._use(sandbox, run_commands.Command(("true",)), [], outs, None, float("inf"), None)

    outcome = run_command._attempt(whole)
    assert (outcome.code, outcome.own) == (code, own)
    told = outcome.reason if own else capsys.readouterr().err
    assert str(error).removeprefix("[Errno 28] ") in told


def test_the_guests_words_do_nothing_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    title = "\x1b]0;pwned\x07"
    reasons = [AgentError(f"no {title}\nat all"), SandboxEnded(67, "panic", f"one\r\n\ttwo{title}\n")]
    attempt = run_command._attempt

    def fail(whole: object) -> Outcome:
        def again() -> Outcome:
            raise reasons.pop(0)

        return attempt(again)

    monkeypatch.setattr(run_command, "_attempt", fail)
    assert run_command.run(["true"]) == errors.EXIT_VMM
    assert capsys.readouterr().err == "vmrun: no \\x1b]0;pwned\\x07 at all\n"
    assert run_command.run(["true"]) == errors.EXIT_PANIC
    assert capsys.readouterr().err == "one\n\ttwo?]0;pwned?\nvmrun: panic\n"
    run_command._tell_left_out([f"{title}\n\udcff: neither file, directory nor link"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


class Told:
    """Remembers what it is told, and by which thread."""

    def __init__(self) -> None:
        self.heard = threading.Condition()
        self.steps: list[str] = []
        self.details: list[str] = []

    def step(self, title: str, total: int | None = None) -> None:
        self.steps.append(title)

    def advance(self, detail: str = "") -> None:
        with self.heard:
            self.details.append(detail)
            self.heard.notify_all()

    def await_detail(self, detail: str, times: int = 1) -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: self.details.count(detail) >= times, SECONDS), self.details


def test_what_is_waited_for_is_told_again_and_again() -> None:
    told = Told()
    before = threading.active_count()
    with waiting(told, "one", every=0.01) as tell:
        told.await_detail("one", 3)
        tell("two")
        told.await_detail("two", 2)
    # Whoever forks next must have no other thread.
    assert threading.active_count() == before
    assert told.details == sorted(told.details)


def test_no_thread_is_left_of_what_failed() -> None:
    before = threading.active_count()
    with pytest.raises(UserError), waiting(Told(), "one"):
        raise UserError("it failed")
    assert threading.active_count() == before


def test_lines_without_a_total_tell_the_seconds() -> None:
    out = io.StringIO()
    lines = Lines(out, every=0.0)
    lines.step("making a template")
    lines.advance("booting")
    assert out.getvalue() == "making a template ...\nmaking a template: 0 s booting\n"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[SandboxSpec, Any, Any]:
    return SandboxSpec("kit", None, 1 << 20, 1), None, None


def test_making_a_template_says_what_it_does(
    parts: tuple[SandboxSpec, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()

    def make(into: Path, spec: Any, image: Any, parts: Any, tell: Any) -> None:
        for what in ("booting", "saving"):
            tell(what)
            told.await_detail(what)

    monkeypatch.setattr(templates, "_make", make)
    before = threading.active_count()
    assert templates.find_or_make("one", *parts, told).key == "one"
    assert threading.active_count() == before
    assert told.steps == ["making a template for later runs"]
    assert list(dict.fromkeys(told.details))[-2:] == ["booting", "saving"]  # a slow host hears some twice
    # It is there: nothing to tell.
    templates.find_or_make("one", *parts, told)
    assert len(told.steps) == 1


def test_whoever_waits_for_another_run_says_so(
    parts: tuple[SandboxSpec, Any, Any], directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(templates, "_make", lambda *how: None)
    cache = directories / "cache"
    cache.mkdir()
    lock = os.open(cache / "template-one.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    waiter = threading.Thread(target=templates.find_or_make, args=("one", *parts, told))
    waiter.start()
    try:
        told.await_detail("another run makes it")
    finally:
        os.close(lock)
        waiter.join()
    assert templates.find("one") is not None
