"""Which KVM this is, and what the doctor finds: on made-up hosts, and on this one."""

import errno
import os
from pathlib import Path

import pytest

from vmrun.host import check

CPUINFO = "processor\t: 0\nvendor_id\t: x\nflags\t\t: fpu {} nx\n\nprocessor\t: 1\nflags\t\t: fpu vmx svm\n"


def host(folder: Path, flags: str, *modules: str) -> check.KvmFlavour:
    (folder / "cpuinfo").write_text(CPUINFO.format(flags))
    for module in modules:
        (folder / module).mkdir(parents=True)
    (folder / "kvm").touch()
    return check.kvm_flavour(str(folder / "cpuinfo"), str(folder), str(folder / "kvm"))


@pytest.mark.parametrize(
    ("flags", "modules", "flavour"),
    [
        ("vmx", ["kvm_intel"], "vmx"),
        ("svm", ["kvm_amd"], "svm"),
        ("svm", ["kvm_amd", "kvm_intel"], "svm"),  # built in, both of them
        ("", ["kvm_pvm"], "pvm"),
        ("", ["kvm_pvm", "kvm_intel"], "pvm"),
        ("vmx", ["kvm_pvm/initstate"], "pvm"),
        ("vmx", ["kvm_pvm", "kvm_intel"], "vmx"),
        ("vmx", [], "vmx"),  # no /sys, as in some containers
        ("svm", ["kvm_pvm"], "pvm"),
        ("", [], "pvm"),
        ("", ["kvm_intel"], "pvm"),
    ],
)
def test_flavour(tmp_path: Path, flags: str, modules: list[str], flavour: str) -> None:
    assert host(tmp_path, flags, *modules) == flavour


def test_no_kvm_no_flavour(tmp_path: Path) -> None:
    assert check.kvm_flavour(device=str(tmp_path / "none")) == "none"
    found = check.check_kvm(str(tmp_path / "none"))
    assert found.level == "error" and "is missing" in found.detail and found.advice
    assert not check.can_run([found])


def test_unknown_flavour(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    assert check.kvm_flavour(str(tmp_path / "none"), str(tmp_path), str(tmp_path / "kvm")) == "unknown"


def test_what_is_not_kvm() -> None:
    found = check.check_kvm("/dev/null")
    assert found.level == "error" and "is not KVM" in found.detail


def test_kvm_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    found = check.check_kvm()
    assert found.level == "error" and "permission denied" in found.detail


@pytest.mark.kvm
def test_this_host() -> None:
    assert check.check_kvm().level == "ok"
    assert check.kvm_flavour() in ("vmx", "svm", "pvm")


def test_a_broken_check_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> check.Check:
        raise OSError("on fire")

    monkeypatch.setattr(check, "check_memory", broken)
    checks = check.all_checks()
    assert next(found for found in checks if found.name == "memory").detail == "could not be checked: on fire"
    assert len(checks) > 8
    assert len({found.name for found in checks}) == len(checks)


def test_capability(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nCapEff:\t{1 << check.CAP_NET_ADMIN:016x}\n")
    assert check.has_capability(check.CAP_NET_ADMIN, str(status))
    assert not check.has_capability(check.CAP_NET_ADMIN + 1, str(status))


def test_tool() -> None:
    assert check.check_tool("sh", "tests").level == "ok"
    missing = check.check_tool("no-such-tool", "tests")
    assert missing.level == "info" and "tests" in missing.advice
