"""Names and runtime directories: one machine a name, and nothing of the dead stays."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmrun.control import runtime
from vmrun.errors import EXIT_USAGE, UserError


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["a", "web-1", "vm.2_b", "9", "x" * 63])
def test_good_names(name: str) -> None:
    assert runtime.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-f", ".lock", "a/b", "a b", "x" * 64, "ä", "a\n", "a\0"])
def test_bad_names(name: str, base: Path) -> None:
    with pytest.raises(UserError, match="a machine's name is") as error:
        runtime.claim(name)
    assert error.value.code == EXIT_USAGE
    assert not base.exists()


def test_where_directories_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.base_directory() == Path(os.environ["VMRUN_RUNTIME"])
    monkeypatch.delenv("VMRUN_RUNTIME")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime.base_directory() == Path("/run/vmrun")
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert runtime.base_directory() == Path("/run/user/7/vmrun")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime.base_directory() == Path("/tmp/vmrun-7")


def test_a_name_is_taken_until_it_is_released(base: Path) -> None:
    first = runtime.claim("web")
    assert runtime.running() == {"web": os.getpid()}
    assert first.path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UserError, match=rf"web: a machine of that name runs already \(process {os.getpid()}"):
        runtime.claim("web")
    first.release()
    first.release()
    assert runtime.running() == {}
    assert not first.path.exists()
    runtime.claim("web").release()


def test_names_are_made_up(base: Path) -> None:
    directories = [runtime.claim(None) for _ in range(20)]
    names = {directory.name for directory in directories}
    assert len(names) == 20
    for directory in directories:
        assert runtime.check_name(directory.name) and len(directory.name) < 16
        directory.release()


def test_made_up_names_do_not_run_out(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "FIRST_WORDS", "only")
    monkeypatch.setattr(runtime, "SECOND_WORDS", "one")
    first, second = runtime.claim(None), runtime.claim(None)
    assert first.name == "only-one" and second.name.startswith("vm-")
    first.release()
    second.release()


def test_a_killed_process_leaves_nothing(base: Path) -> None:
    program = (
        "import os, signal\nfrom vmrun.control import runtime\n"
        "runtime.claim('web')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", program], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (base / "web" / "lock").exists()
    assert runtime.running() == {}
    assert not (base / "web").exists()


def test_what_the_guest_of_a_killed_process_printed_is_kept(base: Path) -> None:
    program = (
        "import os, signal\nfrom vmrun.control import runtime\n"
        "runtime.claim('web').path.joinpath('console.log').write_text('alas')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert runtime.running() == {}
    kept = runtime.ended("web")
    assert kept is not None and (kept / "console.log").read_text() == "alas"
    assert json.loads((kept / "outcome.json").read_text())["reason"] == "the machine's process was killed"
    # Its owner knows better, or does not want it.
    runtime.settle("web", {"code": 3, "reason": "it was time"})
    assert json.loads((kept / "outcome.json").read_text())["code"] == 3
    runtime.settle("web", None)
    assert runtime.ended("web") is None


def test_what_cannot_be_kept_is_in_nobodys_way(base: Path) -> None:
    (base / "web" / "outcome.json").mkdir(parents=True)  # as ENOSPC has it: it cannot be written
    (base / "web" / "console.log").write_text("alas")
    os.chmod(base, 0o700)
    assert runtime.running() == {}
    assert not (base / "web").exists()
    runtime.claim("web").release()


def test_a_half_made_directory_is_stale(base: Path) -> None:
    (base / "web").mkdir(parents=True, mode=0o755)
    os.chmod(base, 0o700)
    runtime.claim("web").release()


def test_of_many_at_once_one_wins(base: Path) -> None:
    wins: list[runtime.RuntimeDirectory] = []
    losses: list[str] = []
    start = threading.Barrier(8)

    def one() -> None:
        start.wait()
        try:
            wins.append(runtime.claim("web"))
        except UserError as error:
            losses.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and len(losses) == 7
    wins[0].release()


def test_looking_does_not_take_the_lock(base: Path) -> None:
    """A reader that probes must not keep a claim from its lock: both hold the base's lock meanwhile."""
    directory = runtime.claim("web")
    assert runtime.running()
    with open(directory.path / "lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    directory.release()


@pytest.mark.parametrize("mode", [0o777, 0o722])
def test_a_base_that_others_may_write_to_is_refused(base: Path, mode: int) -> None:
    base.mkdir()
    base.chmod(mode)
    with pytest.raises(UserError, match="nobody else may write"):
        runtime.claim("web")


def test_a_base_that_is_a_link_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="directory of your own"):
        runtime.claim("web")


def test_no_place_for_a_directory(base: Path) -> None:
    base.write_text("a file")
    with pytest.raises(UserError, match="XDG_RUNTIME_DIR"):
        runtime.claim("web")


@pytest.mark.parametrize(
    ("name", "text"),
    [("wbe", "did you mean web?"), ("zzzz", "`vmrun ps` lists"), ("../web", "there is no machine '../web'")],
)
def test_a_wrong_name_gets_a_hint(name: str, text: str, base: Path) -> None:
    with pytest.raises(UserError, match="none runs"):
        runtime.find(name)
    directory = runtime.claim("web")
    assert runtime.find("web") == directory.path
    with pytest.raises(UserError) as error:
        runtime.find(name)
    assert text in str(error.value) and error.value.code == EXIT_USAGE
    directory.release()


def test_what_is_kept_of_the_ended(base: Path) -> None:
    for number in range(runtime.MAX_ENDED + 3):
        directory = runtime.claim(f"vm{number}")
        (directory.path / "console.log").write_text(f"{number}")
        directory.release({})
    kept = [number for number in range(runtime.MAX_ENDED + 3) if runtime.ended(f"vm{number}")]
    assert kept == list(range(3, runtime.MAX_ENDED + 3))
    path = runtime.ended("vm5")
    assert path is not None and (path / "console.log").read_text() == "5"
    assert not (path / "lock").exists()
    runtime.claim("vm5").release()
    assert runtime.ended("vm5") is None
    assert runtime.running() == {}
    assert runtime.ended("../..") is None


def test_stale_directories_go_with_all_that_is_in_them(base: Path, tmp_path: Path) -> None:
    (base / "odd" / "inner").mkdir(parents=True)
    base.chmod(0o700)
    (base / "odd" / "inner" / "file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (base / "link").symlink_to(tmp_path / "elsewhere")
    assert runtime.running() == {}
    assert not (base / "odd").exists()
    assert (tmp_path / "elsewhere" / "file").exists()
