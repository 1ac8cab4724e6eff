"""The agent's program and initramfs: built once for its inputs, static, and with the agent as /init."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vmrun.guestkit import guest_agent, host


def test_built_once_and_again_for_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMRUN_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "agent"
    shutil.copytree(guest_agent.SOURCES, sources)
    monkeypatch.setattr(guest_agent, "SOURCES", sources)
    monkeypatch.setattr(host, "check", lambda: None)
    assert guest_agent.find() is None
    first = guest_agent.build()
    assert guest_agent.build() == first == guest_agent.find()
    assert host._is_static_program(first.program)
    archive = first.initramfs.read_bytes()
    assert first.program.read_bytes() in archive
    assert b"init\0" in archive
    (sources / "port.c").write_text((sources / "port.c").read_text() + "/* another */\n")
    assert guest_agent.find() is None


def test_unknown_option_is_refused(tmp_path: Path) -> None:
    guest_agent.compile_program(tmp_path / "agent")
    ended = subprocess.run([tmp_path / "agent", "--what"], capture_output=True, timeout=20)
    assert ended.returncode == 64
    assert ended.stderr == b"vmrun agent: what is --what?\n"
