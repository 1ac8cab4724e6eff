"""The rule that nothing skips where KVM and root exist, shown on a tiny test suite of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SUITE = """
import pytest
@pytest.mark.root
def test_in_body(): pytest.skip("because")
@pytest.mark.kvm
@pytest.mark.skip(reason="because")
def test_by_marker(): pass
@pytest.mark.kvm
@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail(): assert False
def test_of_no_host_part(): pytest.skip("fine")
"""


def run_suite(folder: Path, kvm_and_root: bool) -> str:
    conftest = CONFTEST.read_text()
    for old, new in [
        ("NO_EXCUSE = HAS_KVM and IS_ROOT", f"NO_EXCUSE = {kvm_and_root}"),
        ("HAS_KVM = _kvm_opens()", "HAS_KVM = True"),
        ("IS_ROOT = os.geteuid() == 0", "IS_ROOT = True"),
    ]:
        assert old in conftest
        conftest = conftest.replace(old, new)
    (folder / "kvm").mkdir()
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_suite.py").write_text(SUITE)
    skipping_file = "import pytest\npytest.skip('because', allow_module_level=True)\n"
    (folder / "kvm" / "test_whole_file.py").write_text(skipping_file)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    kvm: x\n    root: x\n    guest: x\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, "--continue-on-collection-errors"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
    )
    return run.stdout


def test_skips_fail_where_kvm_and_root_exist(tmp_path: Path) -> None:
    output = run_suite(tmp_path, kvm_and_root=True)
    assert "1 failed, 1 skipped, 1 xfailed, 2 errors" in output
    assert "skipped (Skipped: because), but /dev/kvm and root exist here" in output


def test_skips_stay_skips_elsewhere(tmp_path: Path) -> None:
    assert "4 skipped, 1 xfailed" in run_suite(tmp_path, kvm_and_root=False)


@pytest.mark.root
def test_network_namespace_is_empty(network_namespace: None) -> None:
    assert [name for _, name in socket.if_nameindex() if name == "eth0"] == []
