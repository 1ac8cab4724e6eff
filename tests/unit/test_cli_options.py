"""Option values: what they mean, and that every mistake is one line that names it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrun.cli.options import (
    MountOption,
    parse_disk,
    parse_mount,
    parse_net,
    parse_nic,
    split_commas,
)
from vmrun.errors import EXIT_IMAGE, EXIT_USAGE, UserError
from vmrun.machine.config import DiskConfig, Mount, NicConfig
from vmrun.units import parse_duration, parse_size


@given(st.lists(st.text(st.sampled_from("ab,="), min_size=1).filter(lambda part: part[0] != ","), min_size=1))
def test_doubled_commas_bring_any_value_through(parts: list[str]) -> None:
    assert split_commas(",".join(part.replace(",", ",,") for part in parts)) == parts


def test_disks() -> None:
    assert parse_disk("x.qcow2") == DiskConfig(Path("x.qcow2"), "qcow2")
    assert parse_disk("/a/b.img,ro,serial=S 1") == DiskConfig(Path("/a/b.img"), "raw", True, "S 1")
    assert parse_disk("/dev/sdb,format=raw") == DiskConfig(Path("/dev/sdb"), "raw")
    assert parse_disk("a,,b.raw,ro") == DiskConfig(Path("a,b.raw"), "raw", True)


def test_nics() -> None:
    assert parse_nic("tap0") == NicConfig("tap0")
    mac = bytes.fromhex("525400123456")
    assert parse_nic("t,mac=52:54:00:12:34:56,ip=10.0.0.1/24") == NicConfig("t", mac, "10.0.0.1/24")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give the path"),
        (",ro", "give the path"),
        ("x.foo", "add ,format=raw"),
        ("x.raw,", "an empty key"),
        ("x.raw,rw", "unknown key 'rw'"),
        ("x.raw,fromat=raw", "did you mean format"),
        ("x.raw,ro,ro", "ro is given twice"),
        ("x.raw,ro=yes", "ro takes no value"),
        ("x.raw,format", "format takes a value"),
        ("x.raw,format=", "format takes a value"),
        ("x.raw,format=vmdk", "one of raw, qcow2"),
        ("x.raw,serial=" + "s" * 21, "at most 20"),
        ("x.raw,serial=ä", "printable ASCII"),
        ("file=x.qcow2", "leave out file="),
        ("my,disk.raw", "a comma inside a value is written twice"),
    ],
)
def test_bad_disks(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_disk(text)
    assert caught.value.code == EXIT_USAGE
    assert "--disk" in str(caught.value)


def test_a_directory_is_no_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--disk {tmp_path}: is a directory, not a disk$") as caught:
        parse_disk(str(tmp_path))
    assert caught.value.code == EXIT_IMAGE


def test_a_name_may_begin_as_a_key_of_qemus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file=x.raw").touch()
    assert parse_disk("file=x.raw").path == Path("file=x.raw")


@pytest.mark.parametrize("text", ["host", "bridge", "default", "container:x", "bridge,mtu=1400"])
def test_networks_of_docker(text: str) -> None:
    with pytest.raises(
        UserError, match=f"^--net {text}: there is no such network: give none, user, or a tap"
    ):
        parse_net(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name of a tap"),
        ("a234567890123456", "at most 15"),
        ("tap0,mac=1", "^mac=1: "),
        ("tap0,ip=10.0.0.1", "^ip=10.0.0.1: "),
        ("tap0,addr=1", "unknown key 'addr'"),
    ],
)
def test_bad_nics(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_nic(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("128M", 128 << 20),
        ("1G", 1 << 30),
        ("1.5G", 3 << 29),
        ("64MiB", 64 << 20),
        ("8192k", 8 << 20),
        ("2mb", 2 << 20),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--mem", text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "128", "128X", "-1M", "1e3M", "1.2.3M", "0.3K", "128 M B", "1IB", "1B", "٣M", "nanM", "infM"],
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match=r"^--mem "):
        parse_size("--mem", text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("500ms", 0.5), ("1.5m", 90), ("2h", 7200), ("3min", 180)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--timeout", text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0", "0s", "-1s", "1d", "1e99h", "9" * 400 + "s", "nan", "1 s s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"^--timeout "):
        parse_duration("--timeout", text)


def test_mounts(tmp_path: Path) -> None:
    source = tmp_path / "a:b"
    source.mkdir()
    assert parse_mount(f"{source}:/src") == MountOption(source, "/src")
    assert parse_mount(f"{source}:/src:rw") == MountOption(source, "/src")
    fixed = parse_mount(f"{source}:/srv/src:ro")
    assert fixed == MountOption(source, "/srv/src", read_only=True)
    assert fixed.config("tag") == Mount(source, "tag", read_only=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a directory and where"),
        ("{}", "give a directory and where"),
        (":/src", "give a directory and where"),
        ("{}:", "give a directory and where"),
        ("{}:ro", "give a directory and where"),
        ("{}:src", "give a directory and where"),
        ("{}:/src:rx", "give a directory and where"),
        ("{}:/", "is no path in the guest"),
        ("{}://", "is no path in the guest"),
        ("{}:/a/../b", "is no path in the guest"),
        ("{}:/" + "a" * 4095, "is no path in the guest"),
        ("{}/none:/src", "none is not there"),
        ("{}/file:/src:ro", "file is not a directory: .*--copy-in"),
    ],
)
def test_bad_mounts(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--mount .*{message}") as caught:
        parse_mount(text.format(tmp_path))
    assert caught.value.code == EXIT_USAGE
