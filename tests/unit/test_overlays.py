"""Overlays: they take the writes, they end with the machine or get a name, and no descriptor is left."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.block.qcow2_create import create_qcow2
from devices.block.qcow2_header import Header
from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.host.disks import MachineDisk
from vmrun.host.overlays import (
    Overlays,
    close_overlays,
    create_overlay,
    free_name,
    images_above,
    named,
)
from vmrun.machine.config import DiskConfig, VhostUserDisk

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def base(tmp_path: Path) -> DiskConfig:
    path = tmp_path / "disk.qcow2"
    with open(path, "w+b") as file:
        create_qcow2(file.fileno(), 64 * MIB)
    return DiskConfig(path, "qcow2")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_an_overlay_has_its_base_below_it_and_no_name(base: DiskConfig, tmp_path: Path) -> None:
    before = os.listdir(tmp_path)
    fd = create_overlay(base, tmp_path)
    try:
        header = Header(fd)
        assert (header.size, header.backing_file) == (64 * MIB, os.fspath(base.path))
        assert os.fstat(fd).st_nlink == 0 and os.listdir(tmp_path) == before
    finally:
        os.close(fd)


def test_a_raw_base_is_as_long_as_its_sectors(tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(bytes(MIB + 1))
    fd = create_overlay(DiskConfig(path, "raw"), tmp_path)
    assert Header(fd).size == MIB + 512
    os.close(fd)


def test_the_machine_may_have_the_base_locked(base: DiskConfig, tmp_path: Path) -> None:
    disk = MachineDisk(base)
    try:
        with pytest.raises(UserError, match="in use"):
            create_overlay(base, tmp_path)
        os.close(create_overlay(base, tmp_path, disk.size))
    finally:
        disk.close()


@pytest.mark.parametrize(
    ("path", "words"), [("nowhere.qcow2", "no such file"), ("long/" * 220 + "x.qcow2", "too long")]
)
def test_bases_that_cannot_be(base: DiskConfig, tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        create_overlay(replace(base, path=tmp_path / path), tmp_path, None if "nowhere" in path else MIB)
    assert refused.value.code == EXIT_IMAGE
    with pytest.raises(UserError, match="no such file"):
        create_overlay(base, tmp_path / "nowhere")


def test_who_gives_overlays_a_name_gets_a_chain(base: DiskConfig, tmp_path: Path) -> None:
    disks = (replace(base, overlay=create_overlay(base, tmp_path), serial="x"),)
    with Overlays(disks) as overlays:
        assert overlays.disks == disks
        (given,) = named(overlays.disks, "web")
        assert isinstance(given, DiskConfig)
        overlays.take((given,))
    assert given == DiskConfig(tmp_path / "disk.web.qcow2", "qcow2", serial="x", backing=(tmp_path,))
    assert given.overlay is None
    found = subprocess.run(
        ["qemu-img", "info", "--backing-chain", given.path], capture_output=True, text=True, check=True
    ).stdout
    assert f"backing file: {base.path}" in found
    disk = MachineDisk(given)
    assert len(disk.backing) == 1
    disk.close()


def test_what_lies_on_an_image_is_found(base: DiskConfig, tmp_path: Path) -> None:
    def above(name: str, below: Path) -> Path:
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, tmp_path / name]
        subprocess.run(overlay, check=True)
        return tmp_path / name

    stem = base.path.stem
    assert images_above(base.path) == []
    one = above(f"{stem}.1.qcow2", base.path)
    two, web = above(f"{stem}.2.qcow2", one), above(f"{stem}.web.qcow2", base.path)
    (tmp_path / f"{stem}.3.qcow2").write_bytes(b"no image")
    os.mkfifo(tmp_path / f"{stem}.4.qcow2")
    assert images_above(base.path) == [one, web]
    assert images_above(one) == [two]
    assert images_above(two) == []


def test_a_taken_name_is_never_overwritten(
    base: DiskConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.qcow2"
    taken.write_text("somebody's")
    monkeypatch.setattr("vmrun.host.overlays.free_name", lambda base, label: taken)
    disk = replace(base, overlay=create_overlay(base, tmp_path))
    with Overlays([disk]) as overlays, pytest.raises(UserError, match="is there already"):
        named(overlays.disks, "web")
    assert taken.read_text() == "somebody's"


def test_throw_away_disks_get_overlays_that_go(base: DiskConfig, tmp_path: Path) -> None:
    foreign = VhostUserDisk(tmp_path / "socket")
    before = os.listdir(tmp_path)
    with Overlays([replace(base, throw_away=True), base, foreign]) as overlays:
        first, second, third = overlays.disks
        assert isinstance(first, DiskConfig) and first.overlay is not None and is_open(first.overlay)
        assert (second, third) == (base, foreign)
        assert named(overlays.disks, "web") == overlays.disks, "what is thrown away gets no name"
        os.pwrite(first.overlay, b"x" * MIB, MIB)
    assert not is_open(first.overlay)
    assert os.listdir(tmp_path) == before


def test_overlays_that_a_machine_has_no_more_are_closed(base: DiskConfig, tmp_path: Path) -> None:
    old, new = (replace(base, overlay=create_overlay(base, tmp_path)) for _ in range(2))
    assert old.overlay is not None and new.overlay is not None
    with Overlays([old]) as overlays:
        overlays.take([new])
        assert is_open(new.overlay) and not is_open(old.overlay)
    assert not is_open(new.overlay)


def test_one_that_fails_closes_those_before_it(base: DiskConfig, tmp_path: Path) -> None:
    bad = DiskConfig(tmp_path / "nowhere.raw", "raw", throw_away=True)
    with pytest.raises(UserError, match="no such file"):
        Overlays([replace(base, throw_away=True), bad])


def test_who_gave_them_away_closes_its_own(base: DiskConfig, tmp_path: Path) -> None:
    disk = replace(base, overlay=create_overlay(base, tmp_path))
    close_overlays([base, disk, VhostUserDisk(tmp_path)])
    assert disk.overlay is not None and not is_open(disk.overlay)


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    assert free_name(path) == tmp_path / "disk.1.qcow2"
    (tmp_path / "disk.1.qcow2").touch()
    (tmp_path / "disk.2.qcow2").symlink_to("nowhere")
    assert free_name(path) == free_name(tmp_path / "disk.1.qcow2") == tmp_path / "disk.3.qcow2"
    assert free_name(tmp_path / "a.b.raw") == tmp_path / "a.b.1.qcow2"
    assert free_name(path, "web") == tmp_path / "disk.web.qcow2"
    (tmp_path / "disk.web.qcow2").touch()
    assert free_name(tmp_path / "disk.1.qcow2", "web") == tmp_path / "disk.web-2.qcow2"


NAMES = st.text(st.sampled_from("ab1."), min_size=1, max_size=8).filter(lambda name: name.strip("."))


@given(NAMES, st.sampled_from(["", "web", "1"]))
def test_names_are_new_and_do_not_grow_with_each_snapshot(stem: str, label: str) -> None:
    path = Path("/nowhere") / f"{stem}.qcow2"
    name = free_name(path, label)
    assert name.parent == path.parent and name.suffix == ".qcow2" and not name.exists()
    assert len(free_name(free_name(path)).name) == len(free_name(path).name)


def test_a_base_that_nobody_may_write_to_is_only_read(base: DiskConfig, tmp_path: Path) -> None:
    base.path.chmod(0o444)
    os.close(create_overlay(base, tmp_path))
