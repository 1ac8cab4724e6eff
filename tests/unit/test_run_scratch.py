"""Directories that last as long as a `with`: of one that was killed nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmrun.guestkit import cache

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_gone_afterwards(cache_directory: Path) -> None:
    with cache.scratch("fork") as one, cache.scratch("fork") as other:
        assert one != other
        (one / "file").write_text("x")
    assert list(cache_directory.iterdir()) == []


def test_the_next_one_clears_up_after_kill_9(cache_directory: Path) -> None:
    program = (
        "from vmrun.guestkit import cache\n"
        "with cache.scratch('fork') as made:\n"
        "    (made / 'file').write_text('x'); print(made, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        made = Path(other.stdout.readline().strip())
        with cache.scratch("fork") as mine:
            assert set(cache_directory.iterdir()) == {made, mine}  # its maker lives
        os.kill(other.pid, signal.SIGKILL)
    with cache.scratch("fork") as mine:
        assert set(cache_directory.iterdir()) == {mine}
    assert list(cache_directory.iterdir()) == []
