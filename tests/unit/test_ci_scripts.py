"""The scripts of docs/ci/gitlab, with a stand-in for vmrun that writes down what it is asked: exit codes,
names, and what a hostile job says in its variables.
"""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "docs" / "ci" / "gitlab"
BUILD_FAILURE, SYSTEM_FAILURE = 17, 18  # what the runner gives are its own choice

# Each call is a line in $CALLS. The exit codes of `exec`, of `inspect` and of all others are the test's.
STAND_IN = """#!/bin/sh
echo "$*" >>"$CALLS"
case $1 in
    --version) echo vmrun 1.2.3 ;;
    exec) cat; exit "${EXEC:-0}" ;;
    inspect) exit "${INSPECT:-0}" ;;
    log) printf 'a line\\033[31m\\n' ;;
    *) exit "${OTHER:-0}" ;;
esac
"""


class Runner:
    """What GitLab Runner does with the scripts."""

    def __init__(self, directory: Path) -> None:
        self.calls_file = directory / "calls"
        self.code_file = directory / "code"
        self.snapshots = directory / "snapshots"
        for name in ("default", "debian-12"):
            (self.snapshots / name).mkdir(parents=True)
            (self.snapshots / name / "manifest.json").touch()
        stand_in = directory / "bin" / "vmrun"
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        self.environment = {
            "PATH": f"{stand_in.parent}:{os.environ.get('PATH', os.defpath)}",
            "CALLS": str(self.calls_file),
            "BUILD_FAILURE_EXIT_CODE": str(BUILD_FAILURE),
            "SYSTEM_FAILURE_EXIT_CODE": str(SYSTEM_FAILURE),
            "BUILD_EXIT_CODE_FILE": str(self.code_file),
            "VMRUN_MACHINE": "gitlab-0123",
        }

    def call(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            env={**self.environment, **environment},
            input="never for the job\n",
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def prepare(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.call("prepare.sh", str(self.snapshots), "2h", **environment)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.call("run.sh", "bash", "/runner/script", "step_script", **environment)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_each_job_gets_a_name_of_its_own(runner: Runner) -> None:
    names = set()
    for _ in range(3):
        # What the job says of itself is not asked.
        done = runner.call("config.sh", CUSTOM_ENV_CI_JOB_ID="7", CUSTOM_ENV_VMRUN_MACHINE="gitlab-other")
        assert done.returncode == 0
        config = json.loads(done.stdout)
        assert config["driver"] == {"name": "vmrun", "version": "1.2.3"}
        assert config["builds_dir_is_shared"] is False
        names.add(config["job_env"]["VMRUN_MACHINE"])
    assert len(names) == 3
    assert all(name.startswith("gitlab-") and len(name) == len("gitlab-") + 16 for name in names)


def test_the_machine_is_made_of_the_snapshot_that_the_job_names(runner: Runner) -> None:
    assert runner.prepare(CUSTOM_ENV_CI_JOB_IMAGE="debian-12").returncode == 0
    assert runner.calls == [
        f"restore --detach --throw-away --name gitlab-0123 --timeout 2h {runner.snapshots}/debian-12"
    ]


def test_a_job_without_an_image_gets_the_default(runner: Runner) -> None:
    done = runner.call("prepare.sh", str(runner.snapshots), "90m", "--nic", "user")
    assert done.returncode == 0
    options = "--detach --throw-away --name gitlab-0123 --timeout 90m --nic user"
    assert runner.calls == [f"restore {options} {runner.snapshots}/default"]


@pytest.mark.parametrize(
    "image", ["../default", "..", ".", "/etc", "default/../default", "-h", "a b", "a\nb", "$(id)", "unknown"]
)
def test_an_image_names_nothing_but_a_snapshot(runner: Runner, image: str) -> None:
    assert runner.prepare(CUSTOM_ENV_CI_JOB_IMAGE=image).returncode == SYSTEM_FAILURE
    assert runner.calls == []


def test_a_machine_that_does_not_start_is_not_the_jobs_fault(runner: Runner) -> None:
    assert runner.prepare(OTHER="65").returncode == SYSTEM_FAILURE


def test_a_stage_runs_in_the_machine(runner: Runner) -> None:
    done = runner.run()
    assert done.returncode == 0
    assert done.stdout == ""  # the runner's own stdin is not the job's
    assert runner.calls == [
        "cp /runner/script gitlab-0123:/tmp/gitlab-stage",
        "exec gitlab-0123 -- bash /tmp/gitlab-stage",
    ]
    assert not runner.code_file.exists()


@pytest.mark.parametrize("code", ["1", "42", "68", "137"])
def test_a_failing_job_is_a_build_failure_with_its_code(runner: Runner, code: str) -> None:
    assert runner.run(EXEC=code).returncode == BUILD_FAILURE
    assert runner.code_file.read_text() == f"{code}\n"


def test_an_older_runner_takes_no_code(runner: Runner) -> None:
    assert runner.run(EXEC="42", BUILD_EXIT_CODE_FILE="").returncode == BUILD_FAILURE


def test_a_machine_that_ends_is_a_system_failure(runner: Runner) -> None:
    done = runner.run(EXEC="70", INSPECT="64")
    assert done.returncode == SYSTEM_FAILURE
    assert "a line[31m" in done.stderr  # without what steers a terminal
    assert not runner.code_file.exists()


def test_a_script_that_cannot_be_copied_is_a_system_failure(runner: Runner) -> None:
    assert runner.run(OTHER="70").returncode == SYSTEM_FAILURE
    assert len(runner.calls) == 1


def test_cleaning_up_ends_the_machine(runner: Runner) -> None:
    assert runner.call("cleanup.sh").returncode == 0
    assert runner.calls[-1] == "stop --force --wait gitlab-0123"


def test_cleaning_up_when_there_is_no_machine(runner: Runner) -> None:
    assert runner.call("cleanup.sh", VMRUN_MACHINE="").returncode == 0
    assert runner.calls == []
    assert runner.call("cleanup.sh", INSPECT="64").returncode == 0
    assert not any(call.startswith("stop") for call in runner.calls)


def test_the_scripts_can_be_executed() -> None:
    for script in SCRIPTS.glob("*.sh"):
        assert script.stat().st_mode & stat.S_IXOTH, script


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_please_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", *sorted(SCRIPTS.glob("*.sh"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
