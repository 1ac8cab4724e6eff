"""scripts/setup against a made-up Debian: what it installs as root, and what it says to others."""

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup"
PACKAGES = subprocess.run([SETUP, "--list"], capture_output=True, text=True, check=True).stdout.split()


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def setup(
    folder: Path, uid: int, installed: list[str], apt: str = "true"
) -> subprocess.CompletedProcess[str]:
    (folder / "status").write_text("".join(f"{name}=installed\n" for name in installed) + "bc=config-files\n")
    program(folder / "dpkg-query", f"cat {folder}/status; exit 1")
    program(folder / "id", f"echo {uid}")
    program(folder / "apt-get", f'echo "$@" >> {folder}/apt; {apt}')
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run([SETUP], env=environment, capture_output=True, text=True)


def test_nothing_missing_nothing_done(tmp_path: Path) -> None:
    for uid in (0, 1000):
        run = setup(tmp_path, uid, PACKAGES)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not (tmp_path / "apt").exists()


def test_without_root_it_says_what_to_install(tmp_path: Path) -> None:
    missing = ["bc", "qemu-utils"]
    run = setup(tmp_path, 1000, [name for name in PACKAGES if name not in missing])
    assert run.returncode == 1
    assert run.stderr.endswith("apt-get install --no-install-recommends bc qemu-utils\n")
    assert not (tmp_path / "apt").exists()


def test_root_installs_what_is_missing_and_no_more(tmp_path: Path) -> None:
    setup(tmp_path, 0, [name for name in PACKAGES if name != "bc"])
    update, install = (tmp_path / "apt").read_text().splitlines()
    assert update.endswith(" update")
    assert install.endswith(" install --no-install-recommends bc")


@pytest.mark.parametrize("step", ["update", "install"])
def test_a_failing_apt_fails_the_setup(tmp_path: Path, step: str) -> None:
    run = setup(tmp_path, 0, [], apt=f'case "$*" in *{step}*) exit 100;; esac')
    assert run.returncode == 100
