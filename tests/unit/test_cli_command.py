"""The `vmrun` command as a user meets it: exit codes, one line for what is wrong, and a quick answer."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vmrun import cli, errors

ROOT = Path(__file__).parents[2]


def vmrun(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"capture_output": True, "stdin": subprocess.DEVNULL, **how}
    return subprocess.run([sys.executable, "-m", "vmrun", *arguments], text=True, cwd=ROOT, **how)


def expect_usage_error(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == errors.EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vmrun: ") and err.count("\n") == 1 and text in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bot"], "Did you mean 'boot'?"),
        (["--versoin"], "--version"),
        (["boot", "--dsk", "x"], "--disk"),
        (["boot", "--nic"], "requires an argument (see vmrun boot --help)"),
        (["boot", "--cdrom", "a.iso", "--cdrom=b.iso"], "--cdrom may be given once (see vmrun boot --help)"),
        (["boot", "--mem", "100T"], "--mem 100T: more memory than this host has: give at most"),
        (["boot", "--nic", "tap0,ip=1.2.3"], "as in ip=172.16.0.1/24"),
        (["boot", "x.qcow2"], "unexpected extra argument"),
        (["boot", "--cpus", "many"], "--cpus many: give a whole number"),
        (["boot", "--cpus", "0"], "--cpus 0: give 1 to 64"),
        (["boot", "--mem", "12"], "--mem 12: say the unit"),
        (["boot", "--mem", "1M"], "--mem 1M: give at least 2M"),
        (["boot", "--mem", "1K"], "--mem 1K: give at least 2M"),
        (["run", "--mem", "0", "--", "ls"], "--mem 0: give at least 2M"),
        (["boot", "--timeout", "soon"], "--timeout soon: not a time"),
        (["boot", "--disk", "x.raw,rw"], "unknown key 'rw'"),
        (["boot", "--nic", "tap0,mac=x"], "mac=x"),
        (["guest", "path", "floppy"], "kernel, initramfs, disk"),
        (["guest"], "Missing command"),
    ],
)
def test_usage_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    expect_usage_error(arguments, text, capsys)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vmrun 0.")
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.run(arguments) == 0
        assert "boot" in capsys.readouterr().out
    for command in ("boot", "doctor", "guest"):
        assert cli.run([command, "--help"]) == 0
        assert "Usage: vmrun " + command in capsys.readouterr().out


def test_little_asks_import_little() -> None:
    program = (
        "import sys; from vmrun import cli\n"
        "assert cli.run([argument]) == 0\n"
        "heavy = {'typer', 'rich', 'pyroute2', 'psutil', 'ctypes', 'asyncio', 'pydantic', 'vmrun.machine'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    for argument, modules in [("--version", []), ("--help", ["typer"])]:
        command = [sys.executable, "-c", f"argument = {argument!r}\n{program}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stderr == f"{modules}\n"


class Outcome:
    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        self.restart = False


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Put `run` where the machine's would be."""
    machine = types.ModuleType("vmrun.machine.machine")
    machine.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vmrun.machine.machine", machine)


def test_boot_hands_over_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(config: Any, *, console: Any, timeout: float | None, **how: Any) -> Outcome:
        seen.append((config, console.wake_fd >= 0, timeout))
        return Outcome(errors.EXIT_PANIC, "the guest kernel panicked")

    stand_in(monkeypatch, run)
    arguments = "boot --disk a.qcow2 --disk b.img,ro --nic tap0 --mem 1G --cpus 2 --append quiet --timeout 2m"
    assert (
        cli.run([*arguments.split(), "--kernel", "k", "--initrd", "i", "--name", "n", "-v"])
        == errors.EXIT_PANIC
    )
    assert capsys.readouterr().err == "vmrun: the guest kernel panicked\n"
    ((config, console_was_open, timeout),) = seen
    assert [disk.path.name for disk in config.disks] == ["a.qcow2", "b.img"]
    assert (config.memory, config.cpus, config.cmdline, config.name) == (1 << 30, 2, "quiet", "n")
    assert (str(config.kernel), str(config.initrd), config.verbose) == ("k", "i", True)
    assert config.nics[0].tap == "tap0" and console_was_open and timeout == 120


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.UserError("no such disk", errors.EXIT_IMAGE), errors.EXIT_IMAGE, "vmrun: no such disk\n"),
        (FileNotFoundError(2, "No such file", "/a"), errors.EXIT_VMM, "vmrun: /a: No such file\n"),
        (OSError("plain"), errors.EXIT_VMM, "vmrun: plain\n"),
        (BrokenPipeError(32, "Broken pipe"), errors.EXIT_VMM, "vmrun: Broken pipe\n"),
        (
            KeyError("x"),
            errors.EXIT_VMM,
            "vmrun: internal error: KeyError: 'x' (VMRUN_DEBUG=1 shows where)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (EOFError(), errors.EXIT_VMM, "vmrun: internal error: EOFError: (VMRUN_DEBUG=1 shows where)\n"),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: Any, **how: Any) -> Outcome:
        raise error

    stand_in(monkeypatch, run)
    monkeypatch.delenv("VMRUN_DEBUG", raising=False)
    assert cli.run(["boot"]) == code
    assert capsys.readouterr().err == line
    if line:
        monkeypatch.setenv("VMRUN_DEBUG", "1")
        assert cli.run(["boot"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vmrun.host import check

    for level, code in [("warning", 0), ("error", errors.EXIT_NO_KVM)]:
        found = [check.Check("KVM", level, "[detail]", "advice")]  # type: ignore[arg-type]
        monkeypatch.setattr(check, "all_checks", lambda found=found: found)
        assert cli.run(["doctor"]) == code
        assert "[detail]: advice" in capsys.readouterr().out
        assert cli.run(["doctor", "--json"]) == code
        facts = json.loads(capsys.readouterr().out)
        assert facts["can_run"] == (code == 0)
        assert facts["checks"] == [{"name": "KVM", "level": level, "detail": "[detail]", "advice": "advice"}]


def test_guest_kit_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vmrun.guestkit import kit

    monkeypatch.setattr(kit, "find", lambda: None)
    for arguments in (["guest", "path"], ["guest", "list"]):
        assert cli.run(arguments) == errors.EXIT_IMAGE
        assert "vmrun guest build" in capsys.readouterr().err


def test_guest_kit_present(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from vmrun.guestkit import kit

    for name in ("kernel", "initramfs", "disk"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    found = types.SimpleNamespace(**{name: tmp_path / name for name in ("kernel", "initramfs", "disk")})
    monkeypatch.setattr(kit, "find", lambda: found)
    assert cli.run(["guest", "path", "disk"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'disk'}\n"
    for arguments in (["guest", "list"], ["guest", "build"]):
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out.count("1.0 MiB") == 3


def test_closed_standard_files_are_no_trap() -> None:
    program = (
        "import os, sys; from vmrun import cli\n"
        "link = '/proc/self/fd/{}'.format\n"
        "cli.print_version = lambda: [os.readlink(link(fd)) for fd in range(3)].count('/dev/null')\n"
        "sys.argv = ['vmrun', '--version']; cli.main()"
    )
    shell = f'exec "{sys.executable}" -c "$0" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, program], cwd=ROOT).returncode == 3


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("debug", ["0", "1"])
def test_the_end_loses_nothing(threads: int, debug: str) -> None:
    """Though the interpreter is not taken apart: what was registered is done, threads are waited for."""
    program = (
        "import atexit, sys, threading; from vmrun import cli\n"
        "atexit.register(sys.stderr.write, 'atexit ')\n"
        "begin = threading.Event()\n"
        f"for _ in range({threads}):\n"
        "    threading.Thread(target=lambda: (begin.wait(), sys.stderr.write('thread '))).start()\n"
        "print('printed'); cli.run = lambda words: begin.set() or 259; cli.main()"
    )
    environment = {**os.environ, "VMRUN_DEBUG": debug}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout) == (3, "printed\n")
    assert sorted(run.stderr.split()) == ["atexit", "thread"][: 1 + threads]


def test_a_reader_that_has_gone_makes_no_noise() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "vmrun", "--version"], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE
        )
    finally:
        os.close(write_end)
    assert run.stderr == b""


def test_the_guide_lists_every_exit_code() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")} | {130}
    for code in codes:
        assert f"| {code} |" in guide
