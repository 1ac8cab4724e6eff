"""Which processors a saved machine may go on upon."""

import copy
import json
from typing import Any

import pytest

from vmrun.kvm import abi
from vmrun.kvm.identity import cpu_difference, cpu_identity

LEAVES = [
    abi.kvm_cpuid_entry2(function=0, eax=0xD, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65),
    abi.kvm_cpuid_entry2(function=1, eax=0xA10F11, ecx=0x1000, edx=0x2000),
    abi.kvm_cpuid_entry2(function=7, index=0, ebx=0x30),
    abi.kvm_cpuid_entry2(function=0xD, index=2, eax=256, ebx=576),
]
FLAGS = ["avx2", "sse2"]


def identity(*, software: bool, flags: list[str] = FLAGS) -> dict[str, Any]:
    made = cpu_identity(LEAVES, software=software, host_flags=flags)
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


@pytest.mark.parametrize("software", [False, True])
def test_the_same_processor(software: bool) -> None:
    here = identity(software=software)
    assert here["vendor"] == "AuthenticAMD"
    assert cpu_difference(here, identity(software=software)) is None


def changed(here: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    other = copy.deepcopy(here)
    parent = other
    *parents, last = path.split("/")
    for key in parents:
        parent = parent[key]
    parent[last] = value
    return other


@pytest.mark.parametrize(
    ("path", "value", "hardware", "software"),
    [
        ("vendor", "GenuineIntel", "AuthenticAMD, and this is one of GenuineIntel", "GenuineIntel"),
        ("features/0x7.0 ebx", 0x10, "CPUID 0x7.0 ebx was 0x30", "CPUID 0x7.0 ebx was 0x30"),
        ("features/0x7.0 ebx", 0x31, None, "is 0x31 here"),  # more than before
        ("signature", 0xA20F10, None, "25/17/1, and this is 25/33/0"),
        ("xsave", {}, "component 2", "component 2"),
        ("xsave", {"2": [576, 128]}, "component 2", "component 2"),
        ("xsave", {"2": [576, 256], "9": [2688, 8]}, None, "which the one it was saved on has not|has not"),
    ],
)
def test_another_processor(path: str, value: Any, hardware: str | None, software: str | None) -> None:
    for kind, sentence in ((False, hardware), (True, software)):
        here = identity(software=kind)
        difference = cpu_difference(here, changed(here, path, value))
        if sentence is None:
            assert difference is None
        else:
            assert any(part in str(difference) for part in sentence.split("|")), difference


def test_another_kind_of_kvm() -> None:
    sentence = cpu_difference(identity(software=True), identity(software=False))
    assert sentence == "it was saved on a KVM without VMX and SVM, and this is a KVM with VMX or SVM"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["avx2", "avx512f", "sse2"], "only this processor has 'avx512f', which programs see"),
        (["sse2"], "only the processor it was saved on has 'avx2', which programs see"),
    ],
)
def test_what_programs_find_out_for_themselves(flags: list[str], sentence: str) -> None:
    assert cpu_difference(identity(software=True), identity(software=True, flags=flags)) == sentence
    assert cpu_difference(identity(software=False), identity(software=False, flags=flags)) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kvm", "qemu"),
        ("kvm", None),
        ("signature", -1),
        ("features", []),
        ("features/0x7.0 ebx", "x"),
        ("xsave", None),
        ("flags", 5),
        ("flags", [1]),
        ("more", 1),
    ],
)
def test_malformed(path: str, value: Any) -> None:
    here = identity(software=True)
    with pytest.raises(ValueError, match="saved"):
        cpu_difference(changed(here, path, value), here)
