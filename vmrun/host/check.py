"""What this host can do for a machine: its KVM, taps, rights, memory and tools. VMM process.

`kvm_flavour` is on the way of every start, so this file imports next to nothing at the top. The whole list of
checks is what `vmrun doctor` prints. KVM facts are from Documentation/virt/kvm/api.rst, section 4.1.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12  # the only one there has been since Linux 2.6.22
CAP_NET_ADMIN = 12  # linux/capability.h

KvmFlavour = Literal["vmx", "svm", "pvm", "unknown", "none"]
Level = Literal["ok", "info", "warning", "error"]

SOFTWARE_KVM = (
    "this host's KVM has no VMX or SVM beneath it (usual in clouds without nested virtualization). "
    "Guest programs run at native speed, but guest kernels and firmware are interpreted, some hundreds of "
    "times slower: a small Linux starts in tens of seconds, a distribution's own kernel in minutes. "
    "vmrun carries out what this KVM leaves undone. A host with VMX or SVM is far faster"
)


def kvm_flavour(
    cpuinfo: str = "/proc/cpuinfo", modules: str = "/sys/module", device: str = "/dev/kvm"
) -> KvmFlavour:
    """Which KVM this is: on "vmx" (Intel) or "svm" (AMD) hardware, "pvm" (kvm_pvm: neither), "unknown" or
    "none".

    "none" means there is no /dev/kvm at all; whether we may open it is another question. Takes under a
    millisecond.
    """
    if not os.path.exists(device):
        return "none"
    # Only one of the three modules can serve /dev/kvm. kvm_pvm as a loaded module (it has an initstate) does:
    # had another been first, loading it would have failed. A module built into the kernel is listed in any
    # case.
    if os.path.exists(f"{modules}/kvm_pvm/initstate"):
        return "pvm"
    flags = cpu_flags(cpuinfo)
    if not flags:
        return "unknown"
    pvm_is_built_in = os.path.exists(f"{modules}/kvm_pvm")
    if "vmx" in flags and (os.path.exists(f"{modules}/kvm_intel") or not pvm_is_built_in):
        return "vmx"
    if "svm" in flags and (os.path.exists(f"{modules}/kvm_amd") or not pvm_is_built_in):
        return "svm"
    return "pvm"  # a KVM, and no hardware for the others


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """The flags of the first processor."""
    try:
        with open(cpuinfo, "rb", buffering=0) as file:
            text = file.read(8192).decode(
                "ascii", "replace"
            )  # one processor's paragraph: there may be hundreds
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `detail` says what is, `advice` (may be empty) what to do or what it means.

    Levels: "ok", "info" (fine without), "warning" (some of vmrun will not work), "error" (no machine can
    run).
    """

    name: str
    level: Level
    detail: str
    advice: str = ""


def check_kvm(device: str = "/dev/kvm") -> Check:
    import fcntl

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        flags = cpu_flags()
        if flags & {"vmx", "svm"}:
            advice = "the CPU can: load the module (modprobe kvm_intel or kvm_amd)"
        else:
            advice = "the CPU shows no VMX or SVM: turn it on in the firmware, or nested virtualization on"
        return Check("KVM", "error", f"{device} is missing", advice)
    except PermissionError:
        return Check("KVM", "error", f"{device}: permission denied", "be root or a member of group kvm")
    except OSError as error:
        return Check(
            "KVM", "error", f"{device}: {error.strerror}", "the device file is there but no driver answers"
        )
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        return Check("KVM", "error", f"{device} is not KVM: {error.strerror}")
    finally:
        os.close(fd)
    if version != KVM_API_VERSION:
        return Check("KVM", "error", f"API version {version}", f"vmrun needs version {KVM_API_VERSION}")
    return Check("KVM", "ok", f"{device} opens, API version {version}")


def check_flavour() -> Check:
    flavour = kvm_flavour()
    if flavour == "vmx":
        return Check("KVM runs on", "ok", "Intel VMX (kvm_intel)")
    if flavour == "svm":
        return Check("KVM runs on", "ok", "AMD SVM (kvm_amd)")
    if flavour == "pvm":
        return Check("KVM runs on", "warning", "no virtualization hardware (kvm_pvm)", SOFTWARE_KVM)
    if flavour == "unknown":
        return Check(
            "KVM runs on", "warning", "something unknown", "none of kvm_intel, kvm_amd, kvm_pvm is loaded"
        )
    return Check("KVM runs on", "error", "nothing: there is no KVM")


def has_capability(number: int, status: str = "/proc/self/status") -> bool:
    """Whether capability `number` is in this process's effective set."""
    with open(status, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def check_tun(device: str = "/dev/net/tun") -> Check:
    if not os.path.exists(device):
        return Check(
            "taps", "warning", f"{device} is missing", "no --nic: load the tun module (modprobe tun)"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        return Check("taps", "warning", f"{device}: permission denied", "no --nic without access to it")
    return Check("taps", "ok", f"{device} is ours to open")


def check_net_admin() -> Check:
    if has_capability(CAP_NET_ADMIN):
        return Check("CAP_NET_ADMIN", "ok", "taps can be made, and be given addresses")
    advice = "--nic works with a tap made for you: ip tuntap add tap0 mode tap user $USER vnet_hdr"
    return Check("CAP_NET_ADMIN", "info", "no", advice)


def check_userfaultfd(device: str = "/dev/userfaultfd") -> Check:
    if os.access(device, os.R_OK | os.W_OK):
        return Check("userfaultfd", "ok", f"{device} is ours to open")
    return Check("userfaultfd", "info", "not available", "only loading snapshots lazily will want it")


def check_memory(meminfo: str = "/proc/meminfo") -> Check:
    with open(meminfo, encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    available = int(facts["MemAvailable"].split()[0]) >> 10
    if available < 256:
        return Check(
            "memory", "warning", f"{available} MiB available", "a machine has 128 MiB unless --mem says less"
        )
    return Check("memory", "ok", f"{available} MiB available")


def check_sandbox() -> Check:
    try:
        from devices.worker import sandbox
    except ImportError:
        return Check("worker sandbox", "warning", "not part of this installation")
    return _check_layers("worker sandbox", sandbox.layers(), "workers run with what is left")


def check_confinement() -> Check:
    from vmrun.machine import confine

    return _check_layers("VMM's confinement", confine.layers(), "`vmrun run` makes do with what is left")


def _check_layers(name: str, layers: list[tuple[str, str, bool]], advice: str) -> Check:
    missing = [f"{layer} ({meaning})" for layer, meaning, present in layers if not present]
    if missing:
        return Check(name, "warning", f"lacks {'; '.join(missing)}", advice)
    return Check(name, "ok", ", ".join(layer for layer, _, _ in layers))


def check_cgroups() -> Check:
    from vmrun.host import cgroup

    place = cgroup.find_place(look=True)
    advice = "a machine has no limit of its own there: only rlimits, and the cgroup vmrun is started in"
    if place is None:
        return Check("cgroups", "info", "none of version 2 is ours to use", advice)
    missing = [each for each in cgroup.CONTROLLERS if each not in place.controllers]
    if missing:
        return Check("cgroups", "info", f"{place.directory}, without {', '.join(missing)}", advice)
    return Check("cgroups", "ok", f"{place.directory}: memory, pids and cpu can be limited")


def check_guest_kit() -> Check:
    advice = "only --kernel works: make one with vmrun guest build"
    try:
        from vmrun.guestkit import kit
    except ImportError:
        return Check("guest kit", "warning", "not part of this installation", "give --kernel")
    found = kit.find()
    if found is None:
        return Check("guest kit", "warning", "not built", advice)
    return Check("guest kit", "ok", str(found.kernel.parent))


def check_tool(name: str, purpose: str) -> Check:
    import shutil

    path = shutil.which(name) or next(
        (p for p in (f"/usr/libexec/{name}", f"/usr/lib/qemu/{name}") if os.access(p, os.X_OK)), None
    )
    if path is None:
        return Check(name, "info", "not installed", f"wanted for {purpose}")
    return Check(name, "ok", path, purpose)


def check_virtiofsd() -> Check:
    from vmrun.errors import UserError
    from vmrun.host import virtiofsd

    path = virtiofsd.find()
    if path is None:
        return Check("virtiofsd", "info", "not installed", "wanted for run --mount; --copy-in does without")
    try:
        program = virtiofsd.probe(path)
    except UserError as error:
        return Check("virtiofsd", "warning", str(error).removeprefix("--mount: "))
    kind = "in Rust" if program.rust else "QEMU's in C"
    return Check("virtiofsd", "ok", f"{path} ({kind})", "shared directories: run --mount")


def all_checks() -> list[Check]:
    """Every check, in the order to read them. A check that fails itself is reported as one that says so."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("KVM", check_kvm),
        ("KVM runs on", check_flavour),
        ("memory", check_memory),
        ("worker sandbox", check_sandbox),
        ("VMM's confinement", check_confinement),
        ("cgroups", check_cgroups),
        ("guest kit", check_guest_kit),
        ("taps", check_tun),
        ("CAP_NET_ADMIN", check_net_admin),
        ("userfaultfd", check_userfaultfd),
        ("qemu-img", lambda: check_tool("qemu-img", "making and checking disk images")),
        ("passt", lambda: check_tool("passt", "a network without root: --net user, --nic user")),
        ("virtiofsd", check_virtiofsd),
    ]
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except Exception as error:  # one broken check must not hide the others
            found.append(Check(name, "warning", f"could not be checked: {error}"))
    return found


def can_run(checks: list[Check]) -> bool:
    return not any(check.level == "error" for check in checks)
