"""The values of command line options: `--disk x.qcow2,ro`, `--mem 1.5G`, `--timeout 90s`. User side of the
VMM process.

Comma-separated options follow QEMU: a comma that belongs to a value is written twice. Everything wrong is a
UserError that names the option, the key and, where there is one, the nearest right spelling.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmrun.errors import UserError
from vmrun.host.disks import disk_format
from vmrun.host.tap import check_interface_name, parse_host_address, parse_mac
from vmrun.machine.config import DiskConfig, Mount, NicConfig, VhostUserDisk

VHOST_USER = "vhost-user:"
MAX_PATH = 4095  # linux/limits.h, without the NUL
SERIAL_SIZE = 20  # VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6

# The keys of an option: whether each takes a value.
Keys = dict[str, bool]
DISK_KEYS: Keys = {"ro": False, "format": True, "serial": True, "backing": True, "throwaway": False}
NIC_KEYS: Keys = {
    "mac": True,
    "ip": True,
    "bridge": True,
    "mtu": True,
    "locked": False,
    "local": False,
    "boot": True,
    "rom": True,
    "allow": True,
    "allow-private": False,
}
USER_CARD = "user"  # in the place of a tap's name
NETWORKS_OF_DOCKER = ("host", "bridge", "default", "container")


def split_commas(text: str) -> list[str]:
    """Split at single commas; a doubled one is a comma of the value. From the left, so "a,,,b" is "a," and
    "b".
    """
    parts = [""]
    index = 0
    while index < len(text):
        if text[index] != ",":
            parts[-1] += text[index]
        elif text[index + 1 : index + 2] == ",":
            parts[-1] += ","
            index += 1
        else:
            parts.append("")
        index += 1
    return parts


def parse_keys(option: str, text: str, keys: Keys) -> tuple[str, dict[str, str]]:
    """The leading value of "value,key=value,flag" and its keys (a flag's value is "")."""
    value, *settings = split_commas(text)
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, content = setting.partition("=")
        if key not in keys:
            raise UserError(f"{option} {text}: {_unknown_key(key, keys)}")
        if key in found:
            raise UserError(f"{option} {text}: {key} is given twice")
        if keys[key] and not content:
            raise UserError(f"{option} {text}: {key} takes a value: {key}=...")
        if not keys[key] and equals:
            raise UserError(f"{option} {text}: {key} takes no value")
        found[key] = content
    return value, found


def _unknown_key(key: str, keys: Keys) -> str:
    from difflib import get_close_matches

    known = ", ".join(f"{name}=" if takes_value else name for name, takes_value in keys.items())
    close = get_close_matches(key, keys, n=1)
    hint = f": did you mean {close[0]}?" if close else f" (there are {known})"
    if not key:
        return f"an empty key{hint}; a comma inside a value is written twice"
    return f"unknown key {key!r}{hint}" + ("" if close else "; a comma inside a value is written twice")


def parse_any_disk(text: str) -> DiskConfig | VhostUserDisk:
    """As `parse_disk`, or vhost-user:SOCKET, a back end of somebody else's."""
    if not text.startswith(VHOST_USER):
        return parse_disk(text)
    path, _ = parse_keys("--disk", text.removeprefix(VHOST_USER), {})
    if not path:
        raise UserError(f"--disk {text}: give the path of a socket, as in --disk {VHOST_USER}/run/disk.sock")
    return VhostUserDisk(Path(path))


def parse_disk(text: str) -> DiskConfig:
    """PATH[,ro][,throwaway][,format=raw|qcow2][,serial=TEXT][,backing=DIRECTORY[:DIRECTORY...]]"""
    path, keys = parse_keys("--disk", text, DISK_KEYS)
    if not path:
        raise UserError(f"--disk {text!r}: give the path of a disk image, as in --disk x.qcow2,ro")
    if path.startswith("file=") and not os.path.lexists(path):
        raise UserError(f"--disk {text}: leave out file=: the path comes first, as in --disk x.qcow2,ro")
    serial = keys.get("serial", "")
    if len(serial) > SERIAL_SIZE or not serial.isascii() or not serial.isprintable():
        raise UserError(f"--disk {text}: serial is at most {SERIAL_SIZE} printable ASCII characters")
    backing = tuple(Path(each) for each in keys["backing"].split(":")) if "backing" in keys else ()
    for each in backing:
        if not each.is_dir():
            raise UserError(f"--disk {text}: backing={each}: give directories that its backing files are in")
    throw_away = "throwaway" in keys
    if throw_away and "ro" in keys:
        raise UserError(
            f"--disk {text}: throwaway is for what the guest writes, and ro lets it write nothing"
        )
    fmt = disk_format(Path(path), keys.get("format"))
    return DiskConfig(Path(path), fmt, "ro" in keys, serial, backing, throw_away)


def parse_nic(text: str) -> NicConfig:
    """TAP[,mac=52:54:00:12:34:56][,ip=172.16.0.1/24][,bridge=br0][,mtu=9000][,locked][,local][,boot=FILE]
    [,rom=FILE] or user[,mac=MAC][,mtu=N][,rom=FILE][,allow=HOST[:PORT][+HOST[:PORT]...]][,allow-private]
    """
    tap, keys = parse_keys("--nic", text, NIC_KEYS)
    check_interface_name(tap)
    address = keys.get("ip")
    if address is not None:
        parse_host_address(address)
    bridge = keys.get("bridge")
    if bridge is not None:
        check_interface_name(bridge, "bridge=")
    mtu = keys.get("mtu")
    if mtu is not None and not (mtu.isascii() and mtu.isdecimal() and len(mtu) < 6):
        raise UserError(f"--nic {text}: mtu={mtu}: give a number of bytes, as in mtu=9000")
    return NicConfig(
        tap,
        parse_mac(keys["mac"]) if "mac" in keys else None,
        address,
        int(mtu) if mtu is not None else None,
        "locked" in keys,
        "local" in keys,
        bridge,
        keys.get("boot", ""),
        Path(keys["rom"]) if "rom" in keys else None,
        tap == USER_CARD,
        _allowed(keys["allow"].split("+")) if "allow" in keys else (),
        "allow-private" in keys,
    )


def _allowed(texts: Sequence[str]) -> tuple[str, ...]:
    from vmrun.host.outbound import parse_allowed

    for text in texts:
        parse_allowed(text)
    return tuple(texts)


def parse_net(
    text: str | None, allow_host: Sequence[str] = (), allow_private: bool = False
) -> tuple[NicConfig, ...]:
    """The cards of `--net none|user|NIC`, with `--allow-host` (repeatable) and `--allow-private`, which are
    for "user". No tap is made by the name of a network that docker has, which is not what was meant.
    """
    if text is not None and text.partition(",")[0].partition(":")[0] in NETWORKS_OF_DOCKER:
        raise UserError(f"--net {text}: there is no such network: give none, user, or a tap by another name")
    cards = () if text is None or text == "none" else (parse_nic(text),)
    if not allow_host and not allow_private:
        return cards
    if not cards or not cards[0].user:
        raise UserError("--allow-host and --allow-private are for --net user: add it")
    allow = (*cards[0].allow, *_allowed(allow_host))
    return (replace(cards[0], allow=allow, allow_private=cards[0].allow_private or allow_private),)


@dataclass(frozen=True, slots=True)
class MountOption:
    """Which directory of the host's is to be where in the guest. The machine knows directories by tags, so
    the guest path is for who mounts it there."""

    host: Path
    guest: str
    read_only: bool = False

    def config(self, tag: str) -> Mount:
        return Mount(self.host, tag, self.read_only)


def parse_mount(text: str) -> MountOption:
    """HOST:GUEST[:ro]: a directory here, and the absolute path it has in the guest. Only HOST may have colons
    in it.
    """
    read_only = text.endswith(":ro")
    host, colon, guest = text.removesuffix(":ro").removesuffix(":rw").rpartition(":")
    if not colon or not host or not guest.startswith("/"):
        raise UserError(
            f"--mount {text}: give a directory and where it is to be in the guest, as in "
            "--mount src:/src or --mount src:/src:ro"
        )
    parts = guest.split("/")
    if ".." in parts or not any(parts) or "\0" in guest or len(os.fsencode(guest)) > MAX_PATH:
        raise UserError(f"--mount {text}: {guest} is no path in the guest that a directory can be mounted at")
    path = Path(host)
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "is not there"
        raise UserError(f"--mount {text}: {host} {what}: give a directory, or use --copy-in for a file")
    return MountOption(path, guest, read_only)


def parse_environment(text: str) -> tuple[str, str]:
    """K=V, or K for what our own environment has."""
    name, equals, value = text.partition("=")
    if not name or "\0" in text:
        raise UserError(f"--env {text!r}: give NAME=VALUE, or NAME to pass on our own")
    if not equals:
        if name not in os.environ:
            raise UserError(f"--env {name}: there is no such variable here: give {name}=VALUE")
        value = os.environ[name]
    return name, value


def parse_pair(option: str, text: str) -> tuple[str, str]:
    """FROM:TO, cut at the first colon; a colon inside a path is written twice."""
    source = [""]
    target: list[str] = []
    parts = source
    index = 0
    while index < len(text):
        if text[index] == ":" and text[index + 1 : index + 2] == ":":
            index += 1
            parts[-1] += ":"
        elif text[index] == ":" and parts is source:
            parts = target
            target.append("")
        else:
            parts[-1] += text[index]
        index += 1
    if not source[0] or not target or not target[0]:
        raise UserError(f"{option} {text}: give FROM:TO; a colon inside a path is written twice")
    return source[0], target[0]
