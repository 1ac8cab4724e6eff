"""The manifest of a snapshot: what it says comes back, and what somebody else made of it is refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmrun.errors import EXIT_IMAGE, UserError
from vmrun.snapshot import manifest
from vmrun.snapshot.manifest import FINGERPRINT_BYTES, FORMAT, FrozenFile, Manifest

FROZEN = FrozenFile("/disks/x.qcow2", "qcow2", 1 << 40, 1_700_000_000_000_000_001, "ab" * 32)
WHOLE = Manifest(
    name="web",
    created=1_700_000_000.25,
    vmrun="0.1.0",
    config={"memory": 1 << 27, "disks": [{"path": "/disks/x.qcow2"}]},
    cpu={"vendor": "GenuineIntel"},
    memory={"size": 1 << 27},
    state_sha256="cd" * 32,
    disks=[[FROZEN, FROZEN], []],
    cdrom=FROZEN,
    macs=["52:54:00:12:34:56"],
)


def written(directory: Path) -> dict[str, Any]:
    manifest.write(WHOLE, directory)
    described = json.loads((directory / manifest.MANIFEST).read_text())
    assert isinstance(described, dict)
    return described


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        manifest.read(directory)
    assert error.value.code == EXIT_IMAGE
    return str(error.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert written(tmp_path)["format"] == FORMAT
    assert manifest.read(tmp_path) == WHOLE
    assert (tmp_path / manifest.MANIFEST).read_text().count("\n") > 20, "people read it"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    manifest.write(WHOLE, tmp_path)
    with pytest.raises(FileExistsError):
        manifest.write(WHOLE, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FILE = st.builds(
    FrozenFile,
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.sampled_from(["raw", "qcow2"]),
    st.integers(0),
    st.integers(),
    st.text(),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Manifest,
        name=st.text(),
        created=st.floats(allow_nan=False, allow_infinity=False),
        vmrun=st.text(),
        config=st.dictionaries(st.text(), JSON, max_size=3),
        cpu=st.dictionaries(st.text(), JSON, max_size=3),
        memory=st.dictionaries(st.text(), JSON, max_size=3),
        state_sha256=st.text(),
        disks=st.lists(st.lists(FILE, max_size=3), max_size=3),
        cdrom=st.none() | FILE,
        macs=st.lists(st.binary(min_size=6, max_size=6).map(lambda mac: mac.hex(":")), max_size=3),
    )
)
def test_any_manifest_comes_back(tmp_path: Path, whole: Manifest) -> None:
    (tmp_path / manifest.MANIFEST).unlink(missing_ok=True)
    manifest.write(whole, tmp_path)
    assert manifest.read(tmp_path) == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_is_refused_in_one_line_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands in the place of a value, what is read has values of their kinds or is not read."""
    (tmp_path / manifest.MANIFEST).unlink(missing_ok=True)
    described = written(tmp_path)
    place: Any = described
    key: Any = data.draw(st.sampled_from(sorted(described)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(JSON)
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(described))
    try:
        found = manifest.read(tmp_path)
    except UserError as error:
        assert error.code == EXIT_IMAGE and len(str(error).splitlines()) == 1
        return
    files: list[Any] = [*(file for files in found.disks for file in files), found.cdrom]
    kinds = {type(file.path) for file in files if file is not None} | {type(found.state_sha256)}
    assert kinds == {str} and type(found.config) is dict
    assert all(len(bytes.fromhex(mac.replace(":", ""))) == 6 for mac in found.macs)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda described: described.pop(key)


def having(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda described: described.update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("format"), "format None, by vmrun 0.1.0"),
        (having("format", 2), "knows format 1 only"),
        (having("format", "1"), "knows format 1 only"),
        (without("disks"), "disks is missing"),
        (without("state_sha256"), "state_sha256 is missing"),
        (having("surprise", 1), "surprise: unknown"),
        (having("config", []), "config is missing or not of its kind"),
        (having("disks", [1]), "a list of files for each disk"),
        (having("disks", [[{"path": "/x"}]]), "not described as one"),
        (having("cdrom", 7), "not described as one"),
        (having("macs", ["52:54"]), "not six bytes"),
        (having("macs", ["52:54:00:12:34:5g"]), "damaged"),
        (having("macs", [1]), "not six bytes"),
    ],
)
def test_refusals(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    described = written(tmp_path)
    change(described)
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(described))
    assert words in refused(tmp_path)


@pytest.mark.parametrize("key", ["path", "format", "size", "mtime_ns", "fingerprint"])
def test_facts_of_the_wrong_kind(tmp_path: Path, key: str) -> None:
    described = written(tmp_path)
    described["cdrom"][key] = True  # which passes for a number
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(described))
    assert "facts of the wrong kind" in refused(tmp_path)


@pytest.mark.parametrize("path", ["/x\0y", "/\ud800"])
def test_names_that_no_file_has(tmp_path: Path, path: str) -> None:
    described = written(tmp_path)
    described["cdrom"]["path"] = path
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(described))
    assert "damaged" in refused(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"{}"])
def test_what_is_no_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / manifest.MANIFEST).write_bytes(text)
    assert refused(tmp_path)


def test_what_is_no_directory(tmp_path: Path) -> None:
    assert "is no snapshot: manifest.json: no such file" in refused(tmp_path)
    assert "is no snapshot" in refused(tmp_path / "nowhere")
    (tmp_path / manifest.MANIFEST).mkdir()
    assert "is no snapshot" in refused(tmp_path)


@pytest.mark.parametrize("name", [manifest.MANIFEST, manifest.STATE])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    manifest.write(WHOLE, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"is no snapshot: {name}: not a file"):
        manifest.read_state(tmp_path, manifest.read(tmp_path))


def test_a_kernels_file_that_has_nothing_yet(tmp_path: Path) -> None:
    """It passes for a regular file, and a read of it would wait, or give nothing at all."""
    if not os.access("/proc/kmsg", os.R_OK):
        pytest.skip("root only")
    (tmp_path / manifest.MANIFEST).symlink_to("/proc/kmsg")
    assert refused(tmp_path)


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_JSON", 1000)
    (tmp_path / manifest.MANIFEST).write_bytes(b'{"format": 1}' + b" " * 2000)
    assert "missing" in refused(tmp_path), "what was read is looked at, and no more was read"


def test_the_state_must_be_the_manifests(tmp_path: Path) -> None:
    text = b'{"kvm": {}}'
    (tmp_path / manifest.STATE).write_bytes(text)
    fields = {name: getattr(WHOLE, name) for name in WHOLE.__slots__}
    good = Manifest(**{**fields, "state_sha256": hashlib.sha256(text).hexdigest()})
    assert manifest.read_state(tmp_path, good) == {"kvm": {}}
    (tmp_path / manifest.STATE).write_bytes(text + b" ")
    with pytest.raises(UserError, match="its checksum is not"):
        manifest.read_state(tmp_path, good)


def test_the_facts_of_a_file(tmp_path: Path) -> None:
    inside, outside = tmp_path / "s" / "disk0.qcow2", tmp_path / "x.raw"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(b"x" * (FINGERPRINT_BYTES + 1))
    frozen = manifest.freeze(outside, "raw", inside.parent)
    assert (frozen.path, frozen.format, frozen.size) == (str(outside), "raw", FINGERPRINT_BYTES + 1)
    assert frozen.fingerprint == hashlib.sha256(b"x" * FINGERPRINT_BYTES).hexdigest()
    assert manifest.freeze(inside, "qcow2", inside.parent).path == "disk0.qcow2", "moves with its directory"
    manifest.check_frozen(frozen, outside)


def test_a_disk_that_changed_is_told_from_one_that_moved(tmp_path: Path) -> None:
    path, copy = tmp_path / "x.raw", tmp_path / "copy.raw"
    path.write_bytes(b"x" * 4096)
    frozen = manifest.freeze(path, "raw", tmp_path / "s")
    copy.write_bytes(b"x" * 4096)
    os.utime(copy, (1, 1))
    manifest.check_frozen(frozen, copy)

    def complaint(of: Path) -> str:
        with pytest.raises(UserError) as error:
            manifest.check_frozen(frozen, of)
        assert error.value.code == EXIT_IMAGE
        return str(error.value)

    copy.write_bytes(b"x" * 4095 + b"y")
    assert "its beginning is another" in complaint(copy)
    copy.write_bytes(b"x" * 4097)
    assert "had 4096 bytes and has 4097" in complaint(copy)
    os.utime(path, ns=(frozen.mtime_ns, frozen.mtime_ns + 1))
    assert "it was written to" in complaint(path)
    path.unlink()
    assert "give its new place with --disk" in complaint(path)
    path.mkdir()
    assert complaint(path)


def test_a_device_in_the_place_of_a_disk_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its manifest says of it: opening alone makes a watchdog run, and a FIFO waits."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda path, *_: opened.append(path))
    for path in (pipe, Path("/dev/null")):
        status = path.stat()
        for mtime_ns in (status.st_mtime_ns, 0):
            frozen = FrozenFile("relative", "raw", status.st_size, mtime_ns, "")
            with pytest.raises(UserError, match="not a file") as error:
                manifest.check_frozen(frozen, path)
            assert error.value.code == EXIT_IMAGE
    assert opened == []
