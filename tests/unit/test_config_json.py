"""Configurations as JSON: each comes back as it was, and what is none is refused as what it is."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrun.errors import UserError
from vmrun.machine.config import MIB, DiskConfig, MachineConfig, Mount, NicConfig, VhostUserDisk
from vmrun.machine.config_json import NOT_TOLD, PATHS, TYPES, describe_config, parse_config

WHOLE = MachineConfig(
    memory=256 * MIB,
    cpus=2,
    kernel=Path("/k"),
    initrd=Path("/i"),
    cmdline="quiet",
    disks=(
        DiskConfig(Path("/a.qcow2"), "qcow2", serial="s", backing=(Path("/b"), Path("/c")), throw_away=True),
        DiskConfig(Path("/d.raw"), "raw", read_only=True),
        VhostUserDisk(Path("/socket")),
    ),
    nics=(NicConfig("tap0", mac=bytes(range(6)), mtu=1400), NicConfig("tap1", local=True, locked=True)),
    cdrom=Path("/disc.iso"),
    mounts=(Mount(Path("/shared"), "shared", read_only=True), Mount(None, "later")),
    agent=False,
    name="web",
    verbose=True,
)

TEXT = st.text(max_size=10)
PATH = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=10
).map(Path)
DISK = st.builds(
    DiskConfig,
    path=PATH,
    format=st.sampled_from(["raw", "qcow2"]),
    read_only=st.booleans(),
    serial=TEXT,
    backing=st.lists(PATH, max_size=3).map(tuple),
    throw_away=st.booleans(),
)
NIC = st.builds(
    NicConfig,
    tap=TEXT,
    mac=st.none() | st.binary(min_size=6, max_size=6),
    address=st.none() | TEXT,
    mtu=st.none() | st.integers(68, 65521),
    locked=st.booleans(),
    bridge=st.none() | TEXT,
)
CONFIG = st.builds(
    MachineConfig,
    memory=st.integers(512, 1 << 30).map(lambda pages: pages * 4096),
    cpus=st.integers(1, 64),
    kernel=st.none() | PATH,
    initrd=st.none() | PATH,
    cmdline=st.none() | TEXT,
    disks=st.lists(DISK | st.builds(VhostUserDisk, PATH), max_size=3).map(tuple),
    nics=st.lists(NIC, max_size=3).map(tuple),
    cdrom=st.none() | PATH,
    legacy_virtio=st.booleans(),
    agent=st.booleans(),
    name=TEXT,
    verbose=st.booleans(),
)


def through_json(config: MachineConfig) -> MachineConfig:
    return parse_config(json.loads(json.dumps(describe_config(config))))


def test_everything_comes_back() -> None:
    assert through_json(WHOLE) == WHOLE
    assert through_json(MachineConfig()) == MachineConfig()
    firmware = MachineConfig(
        firmware=Path("/f"), nics=(NicConfig("tap0", local=True, boot_file="b", rom=Path("/r")),)
    )
    assert through_json(firmware) == firmware
    assert through_json(MachineConfig(legacy_virtio=True)) == MachineConfig(legacy_virtio=True)


@given(CONFIG)
def test_any_configuration_comes_back(config: MachineConfig) -> None:
    assert through_json(config) == config


def test_each_setting_has_a_type_that_is_known() -> None:
    """A field of another type would be written, and then refused when it is read."""
    for kind in (MachineConfig, DiskConfig, VhostUserDisk, NicConfig, Mount):
        for each in fields(kind):
            if each.name in NOT_TOLD or each.name in ("disks", "nics", "mounts"):
                continue
            name = each.type.__name__ if isinstance(each.type, type) else str(each.type)
            name = name.replace("pathlib.", "")
            assert name in TYPES, f"{kind.__name__}.{each.name}"
            assert ("Path" in name) == (each.name in PATHS), f"{kind.__name__}.{each.name}"


def test_descriptors_are_nobody_elses() -> None:
    config = MachineConfig(disks=(DiskConfig(Path("/x"), "raw", overlay=7),))
    described = describe_config(config)
    assert "overlay" not in described["disks"][0]
    (disk,) = through_json(config).disks
    assert isinstance(disk, DiskConfig) and disk.overlay is None


def change(*place: str | int, to: Any) -> dict[str, Any]:
    described = describe_config(WHOLE)
    at: Any = described
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = to
    return described


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (None, "not an object"),
        ([], "not an object"),
        (change("surprise", to=1), "surprise: no such setting"),
        (change("disks", 0, "overlay", to=3), "overlay: no such setting"),
        (change("disks", 2, "read_only", to=True), "read_only: no such setting"),
        (change("disks", to={}), "are lists"),
        (change("disks", to=None), "are lists"),
        (change("disks", 0, to="x"), "a disk is not an object"),
        (change("nics", 0, to=None), "a nic is not an object"),
        (change("cpus", to=True), "cpus: True is not of its kind"),
        (change("cpus", to=1.0), "cpus: 1.0 is not"),
        (change("memory", to=None), "memory: None is not"),
        (change("agent", to=1), "agent: 1 is not"),
        (change("kernel", to=7), "kernel: 7 is not"),
        (change("disks", 0, "path", to=None), "path: None is not"),
        (change("disks", 0, "backing", to="/b"), "backing: '/b' is not"),
        (change("disks", 0, "backing", to=["/b", 1]), "backing: not a list of"),
        (change("nics", 0, "mac", to="0g:00:00:00:00:00"), "hex"),
        ({"disks": [{"format": "raw"}]}, "path is missing"),
        ({"disks": [{}]}, "path is missing"),
        ({"nics": [{}]}, "tap is missing"),
        ({"mounts": [{"host": None}]}, "tag is missing"),
    ],
)
def test_what_is_no_configuration(described: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_config(described)


@pytest.mark.parametrize(
    "described",
    [
        change("cpus", to=65),
        change("memory", to=4096),
        change("nics", 0, "mtu", to=1),
        change("mounts", 0, "tag", to=""),
    ],
)
def test_what_cannot_be_is_told_to_the_user(described: object) -> None:
    with pytest.raises(UserError, match=r"give|not a whole number|1 to 36 bytes"):
        parse_config(described)


@given(st.data())
def test_a_file_says_anything(data: st.DataObject) -> None:
    """Nothing but the two kinds of refusal comes out, and nothing but a configuration."""
    described: Any = describe_config(WHOLE)
    place, key = described, data.draw(st.sampled_from(sorted(described)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | TEXT
        | st.lists(TEXT)
        | st.dictionaries(TEXT, TEXT)
    )
    try:
        config = parse_config(described)
    except (ValueError, UserError):
        return
    assert through_json(config) == config
