"""What the markers mean: a test skips where its host part is missing, and must not skip where KVM and root
exist.

Also the network namespace that tests with taps live in.
"""

import ctypes
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
HOST_MARKERS = ("kvm", "root", "guest")


def _kvm_opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


HAS_KVM = _kvm_opens()
IS_ROOT = os.geteuid() == 0
NO_EXCUSE = HAS_KVM and IS_ROOT


def pytest_report_header() -> str:
    rule = "no test may skip for want of them" if NO_EXCUSE else "tests that need what is missing skip"
    return f"vmrun: KVM {'opens' if HAS_KVM else 'does not open'}, root: {'yes' if IS_ROOT else 'no'}: {rule}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not HAS_KVM and (item.get_closest_marker("kvm") or item.get_closest_marker("guest")):
        pytest.skip("needs /dev/kvm")
    if not IS_ROOT and item.get_closest_marker("root"):
        pytest.skip("needs root")
    if item.get_closest_marker("guest"):
        from vmrun.guestkit import kit

        if kit.find() is None:
            pytest.skip("needs the guest kit: make guest")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where KVM and root exist, a skipped test of theirs would be a test that nobody ran: it fails."""
    report = yield
    marked = any(item.get_closest_marker(marker) for marker in HOST_MARKERS)
    if NO_EXCUSE and marked and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped ({reason}), but /dev/kvm and root exist here: it must run"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files that skip while they are imported: those of tests/kvm and tests/guest."""
    report = yield
    folder = os.path.basename(os.path.dirname(collector.path)) if isinstance(collector, pytest.File) else ""
    if NO_EXCUSE and report.skipped and folder in HOST_MARKERS:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skipped, but /dev/kvm and root exist here: it must run"
    return report


@pytest.fixture
def network_namespace() -> Iterator[None]:
    """The test runs in a network namespace of its own (needs root); child processes inherit it.

    Only the calling thread moves, so a thread started before the test stays outside.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET) < 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        try:
            yield
        finally:
            if libc.setns(home, CLONE_NEWNET) < 0:
                pytest.exit("cannot leave the test's network namespace", returncode=3)
    finally:
        os.close(home)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the test's machines have their runtime directories, and nobody else's; none outlives it."""
    path = tmp_path / "run"
    monkeypatch.setenv("VMRUN_RUNTIME", str(path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield path
    from vmrun.control import runtime

    for pid in runtime.running().values():
        os.kill(pid, signal.SIGKILL)
