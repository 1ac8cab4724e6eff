"""What processor a saved machine was used to, and whether this one will do. VMM process.

With VMX or SVM a guest sees the CPUID leaves it was given, so a processor that can more is as good. Without,
its programs execute CPUID natively and see the host's own: what they found out once (a C library does at
their start) must stay true to the bit.
"""

from collections.abc import Collection, Sequence
from typing import Any

from vmrun.kvm import abi
from vmrun.kvm.packing import check_keys, check_number

# The leaves, subleaves and registers whose bits are features (SDM volume 2, CPUID; APM volume 3, appendix E;
# Documentation/virt/kvm/x86/cpuid.rst).
_FEATURE_WORDS = (
    (0x1, 0, "ecx"),
    (0x1, 0, "edx"),
    (0x7, 0, "ebx"),
    (0x7, 0, "ecx"),
    (0x7, 0, "edx"),
    (0x7, 1, "eax"),
    (0x7, 1, "edx"),
    (0xD, 1, "eax"),
    (0x40000001, 0, "eax"),
    (0x80000001, 0, "ecx"),
    (0x80000001, 0, "edx"),
    (0x80000007, 0, "edx"),
    (0x80000008, 0, "ebx"),
    (0x80000021, 0, "eax"),
)
_KEYS = ("kvm", "vendor", "signature", "features", "xsave", "flags")


def cpu_identity(
    supported_cpuid: Sequence[abi.kvm_cpuid_entry2], *, software: bool, host_flags: Collection[str]
) -> dict[str, Any]:
    """JSON-able; the same for every machine on this host until its kernel or its processor is another.

    `software`: KVM has no VMX or SVM. `host_flags` are the words of /proc/cpuinfo.
    """
    leaves = {(entry.function, entry.index): entry for entry in supported_cpuid}
    nothing = abi.kvm_cpuid_entry2()
    vendor = leaves.get((0, 0), nothing)
    name = b"".join(part.to_bytes(4, "little") for part in (vendor.ebx, vendor.edx, vendor.ecx))
    return {
        "kvm": "software" if software else "hardware",
        "vendor": name.decode("ascii", "replace"),
        "signature": leaves.get((1, 0), nothing).eax,
        "features": {
            _word_name(function, index, register): getattr(leaves.get((function, index), nothing), register)
            for function, index, register in _FEATURE_WORDS
        },
        "xsave": {
            str(entry.index): [entry.ebx, entry.eax]  # state component: offset and size in the standard form
            for entry in supported_cpuid
            if entry.function == 0xD and entry.index >= 2 and entry.eax
        },
        "flags": sorted(host_flags) if software else [],
    }


def cpu_difference(saved: dict[str, Any], here: dict[str, Any]) -> str | None:
    """One sentence about the first thing that makes a machine saved on the processor `saved` unsafe on
    `here`, or None. Raises ValueError when `saved` is none of `cpu_identity`.
    """
    _check(saved)
    if saved["kvm"] != here["kvm"]:
        names = {"hardware": "a KVM with VMX or SVM", "software": "a KVM without VMX and SVM"}
        return f"it was saved on {names[saved['kvm']]}, and this is {names[here['kvm']]}"
    if saved["vendor"] != here["vendor"]:
        return f"it was saved on a processor of {saved['vendor']}, and this is one of {here['vendor']}"
    software = here["kvm"] == "software"
    if software and saved["signature"] != here["signature"]:
        return (
            f"it was saved on the processor model {_model(saved['signature'])}, and this is "
            f"{_model(here['signature'])}"
        )
    if software and saved["flags"] != here["flags"]:
        word = min(set(saved["flags"]) ^ set(here["flags"]), default="")
        where = "only the processor it was saved on" if word in saved["flags"] else "only this processor"
        return f"{where} has {word!r}, which programs see"
    for name, value in saved["features"].items():
        there = here["features"].get(name, 0)
        if value & ~there or (software and value != there):
            return f"CPUID {name} was {value:#x} where it was saved, and is {there:#x} here"
    for component, place in saved["xsave"].items():
        if here["xsave"].get(component) != place:
            return f"the XSAVE state component {component} has another place or size here, or none"
    if software and saved["xsave"] != here["xsave"]:
        return "this processor has XSAVE state components that the one it was saved on has not"
    return None


def _check(saved: dict[str, Any]) -> None:
    check_keys(saved, _KEYS)
    if saved["kvm"] not in ("hardware", "software"):
        raise ValueError("the saved state tells of no kind of KVM that this version knows")
    check_number(saved["signature"], "signature", 32)
    if not isinstance(saved["features"], dict) or not isinstance(saved["xsave"], dict):
        raise ValueError("the saved processor has no features")
    if not isinstance(saved["flags"], list) or not all(isinstance(word, str) for word in saved["flags"]):
        raise ValueError("the saved processor's flags are not words")
    for name, value in saved["features"].items():
        check_number(value, f"CPUID {name}", 32)


def _word_name(function: int, index: int, register: str) -> str:
    return f"{function:#x}.{index} {register}"


def _model(signature: int) -> str:
    """Family, model and stepping as /proc/cpuinfo gives them."""
    family, model = signature >> 8 & 0xF, signature >> 4 & 0xF
    if family in (0x6, 0xF):
        model |= signature >> 12 & 0xF0
    if family == 0xF:
        family += signature >> 20 & 0xFF
    return f"{family}/{model}/{signature & 0xF}"
