"""Sizes and times as people write them: "1.5G", "90s". User side, and programs that use vmrun."""

import os

from vmrun.errors import UserError

SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LEAST_MEMORY = 2 << 20  # as a machine's config has it
TIME_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def _split_unit(text: str) -> tuple[float, str] | None:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if not number or not number.isascii() or not number.replace(".", "", 1).isdigit():
        return None
    return float(number), text[len(number) :]


def parse_size(option: str, text: str) -> int:
    """Bytes of "128M", "1G", "1.5G", "131072K" or "512MiB" (powers of two, as everywhere for memory).

    A bare number would be bytes to some and MiB to others (QEMU), so it is refused, but for 0.
    """
    split = _split_unit(text.strip())
    unit = ""
    if split is not None:
        unit = split[1].upper().removesuffix("IB") if split[1].upper() != "IB" else "IB"
        unit = unit[:-1] if len(unit) == 2 and unit.endswith("B") else unit
    if split is None or unit not in SIZE_UNITS:
        raise UserError(f"{option} {text}: not a size: give a number and K, M, G or T, as in 128M or 1.5G")
    if not unit and split[0]:
        raise UserError(f"{option} {text}: say the unit: {text}M?")
    size = split[0] * SIZE_UNITS[unit]
    if not size.is_integer():
        raise UserError(f"{option} {text}: not a whole number of bytes")
    return int(size)


def parse_memory(option: str, text: str) -> int:
    """As `parse_size`, enough for a machine, and no more than this host has."""
    size = parse_size(option, text)
    if size < LEAST_MEMORY:
        raise UserError(f"{option} {text}: give at least {LEAST_MEMORY >> 20}M")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > host:
        raise UserError(f"{option} {text}: more memory than this host has: give at most {host >> 20}M")
    return size


def parse_duration(option: str, text: str) -> float:
    """Seconds of "90", "90s", "500ms", "1.5m" or "2h"; more than zero."""
    split = _split_unit(text.strip())
    if split is None or split[1] not in TIME_UNITS:
        raise UserError(f"{option} {text}: not a time: give a number and ms, s, m or h, as in 90s")
    seconds = split[0] * TIME_UNITS[split[1]]
    if not 0 < seconds < 1e9:
        raise UserError(f"{option} {text}: give more than zero, and less than 30 years")
    return seconds
