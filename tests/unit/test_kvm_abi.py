"""vmrun.kvm.abi against the installed kernel headers: every size, every offset, every number."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmrun.kvm import abi

# Our name -> C type, where C has no name for it of its own or another one.
ANONYMOUS = {
    "kvm_run": None,  # only its header; checked by offsets below
    "kvm_vcpu_events_exception": "__typeof__(((struct kvm_vcpu_events *)0)->exception)",
    "kvm_vcpu_events_interrupt": "__typeof__(((struct kvm_vcpu_events *)0)->interrupt)",
    "kvm_vcpu_events_nmi": "__typeof__(((struct kvm_vcpu_events *)0)->nmi)",
    "kvm_vcpu_events_smi": "__typeof__(((struct kvm_vcpu_events *)0)->smi)",
    "kvm_run_io": "__typeof__(((struct kvm_run *)0)->io)",
    "kvm_run_mmio": "__typeof__(((struct kvm_run *)0)->mmio)",
    "kvm_run_internal": "__typeof__(((struct kvm_run *)0)->internal)",
    "kvm_run_emulation_failure": "__typeof__(((struct kvm_run *)0)->emulation_failure)",
    "kvm_run_debug": "struct kvm_debug_exit_arch",
    "kvm_run_msr": "__typeof__(((struct kvm_run *)0)->msr)",
    "kvm_run_fail_entry": "__typeof__(((struct kvm_run *)0)->fail_entry)",
    "kvm_run_system_event": "__typeof__(((struct kvm_run *)0)->system_event)",
}
# Our field -> C's path to it, where they differ.
FIELDS = {
    ("kvm_guest_debug", "debugreg"): "arch.debugreg",
    ("kvm_vcpu_events", "triple_fault_pending"): "triple_fault.pending",
    ("kvm_msr_filter", "_pad"): None,
    ("kvm_msr_filter_range", "_pad"): None,
}


def structs() -> list[type[ctypes.Structure]]:
    found = [value for value in vars(abi).values() if isinstance(value, type)]
    return [value for value in found if issubclass(value, ctypes.Structure) and value is not ctypes.Structure]


def numbers() -> dict[str, int]:
    skipped = {"KVM_RUN_EXIT", "KVM_RUN_VALID_REGS", "KVM_RUN_DIRTY_REGS", "KVM_RUN_SYNC_REGS"}
    return {
        name: value
        for name, value in vars(abi).items()
        if name.startswith("KVM") and isinstance(value, int) and name not in skipped
    }


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler makes of the same names."""
    if shutil.which("cc") is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no C compiler or no kernel headers (Debian: build-essential)")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/kvm.h>", "int main(void) {"]

    def show(key: str, expression: str) -> None:
        lines.append(f'printf("{key} %llu\\n", (unsigned long long)({expression}));')

    for struct in structs():
        c_type = ANONYMOUS.get(struct.__name__, f"struct {struct.__name__}")
        if c_type is None:
            continue
        show(struct.__name__, f"sizeof({c_type})")
        for name, *_ in struct._fields_:
            path = FIELDS.get((struct.__name__, name), name)
            if path is not None:
                show(f"{struct.__name__}.{name}", f"offsetof({c_type}, {path})")
    for name in (
        "request_interrupt_window",
        "immediate_exit",
        "exit_reason",
        "if_flag",
        "cr8",
        "apic_base",
        "io",
    ):
        show(f"kvm_run.{name}", f"offsetof(struct kvm_run, {name})")
    for name in ("kvm_valid_regs", "kvm_dirty_regs", "s"):
        show(f"kvm_run.{name}", f"offsetof(struct kvm_run, {name})")
    for name in numbers():
        lines.append(f"#ifdef {name}")
        show(name, name)
        lines.append("#endif")
    lines.append("return 0; }")
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "abi.c"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", "-o", folder / "abi", source], check=True)
    output = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in (line.split() for line in output.splitlines())}


def test_sizes_and_offsets(headers: dict[str, int]) -> None:
    checked = 0
    for struct in structs():
        if struct is abi.kvm_run:
            continue
        assert ctypes.sizeof(struct) == headers[struct.__name__], struct.__name__
        for name, *_ in struct._fields_:
            if f"{struct.__name__}.{name}" in headers:
                offset = getattr(struct, name).offset
                assert offset == headers[f"{struct.__name__}.{name}"], f"{struct.__name__}.{name}"
                checked += 1
    assert checked > 200


def test_kvm_run(headers: dict[str, int]) -> None:
    for name in ("request_interrupt_window", "immediate_exit", "exit_reason", "if_flag", "cr8", "apic_base"):
        assert getattr(abi.kvm_run, name).offset == headers[f"kvm_run.{name}"]
    assert headers["kvm_run.io"] == abi.KVM_RUN_EXIT
    assert headers["kvm_run.kvm_valid_regs"] == abi.KVM_RUN_VALID_REGS
    assert headers["kvm_run.kvm_dirty_regs"] == abi.KVM_RUN_DIRTY_REGS
    assert headers["kvm_run.s"] == abi.KVM_RUN_SYNC_REGS


def test_numbers(headers: dict[str, int]) -> None:
    ours = numbers()
    compared = {name for name in ours if name in headers}
    assert {name: ours[name] for name in compared} == {name: headers[name] for name in compared}
    # A constant that no header knows is a typing error of ours; exit flags without a name of their own aside.
    assert set(ours) - compared <= {
        "KVM_IOEVENTFD_FLAG_DATAMATCH",
        "KVM_IOEVENTFD_FLAG_PIO",
        "KVM_IOEVENTFD_FLAG_DEASSIGN",
    }


def test_literals() -> None:
    """Known from the headers, for hosts without a compiler."""
    assert abi.KVM_SET_USER_MEMORY_REGION == 0x4020AE46
    assert abi.KVM_GET_SREGS == 0x8138AE83
    assert abi.KVM_RUN == 0xAE80
    assert abi.KVM_SET_CPUID2 == 0x4008AE90


def test_a_misspelt_field_is_an_error() -> None:
    with pytest.raises(AttributeError):
        abi.kvm_userspace_memory_region(slto=1)


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(TypeError, match="the kernel's is 5"):

        @abi.abi(5)
        class wrong(ctypes.Structure):
            value: abi.u32


def test_machine_is_x86_64() -> None:
    assert os.uname().machine == "x86_64"
