"""vmrun.kvm.clocks over vCPUs that only remember: what a KVM with VMX or SVM does with offsets, and one
without.
"""

import errno
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmrun.kvm import Vcpu, Vm, abi
from vmrun.kvm.clocks import (
    MSR_IA32_TSC,
    MSR_IA32_TSC_DEADLINE,
    clock_difference,
    load_clocks,
    save_clocks,
    since_saved,
)

KHZ = 2_500_000
MASK = (1 << 64) - 1


class FakeHost:
    """A host whose time-stamp counter moves on with every look at it."""

    def __init__(self, tsc: int, *, offsets: bool) -> None:
        self.tsc = tsc
        self.offsets = offsets
        self.clock = 0

    def get_clock(self) -> abi.kvm_clock_data:
        return abi.kvm_clock_data(clock=self.clock)

    def set_clock(self, data: abi.kvm_clock_data) -> None:
        assert data.flags == 0
        self.clock = data.clock


class FakeVcpu:
    def __init__(self, host: FakeHost, offset: int = 0, deadline: int = 0) -> None:
        self.host = host
        self.offset = offset if host.offsets else 0
        self.deadline = deadline
        self.khz = KHZ

    def get_msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
        assert indices == (MSR_IA32_TSC,)
        self.host.tsc += 1000
        return {MSR_IA32_TSC: self.host.tsc + self.offset & MASK}

    def read_msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
        return {MSR_IA32_TSC_DEADLINE: self.deadline}

    def set_msrs(self, values: dict[int, int]) -> None:
        self.deadline = values[MSR_IA32_TSC_DEADLINE]

    def get_tsc_offset(self) -> int:
        self.host.tsc += 1000
        return self.offset

    def set_tsc_offset(self, offset: int) -> None:
        self.host.tsc += 1000
        if self.host.offsets:
            self.offset = offset

    def get_tsc_khz(self) -> int:
        return self.khz

    def set_tsc_khz(self, khz: int) -> None:
        if khz != KHZ:
            raise OSError(errno.EINVAL, "no scaling")


def save(host: FakeHost, *vcpus: FakeVcpu) -> dict[str, Any]:
    return save_clocks(cast(Vm, host), cast(list[Vcpu], vcpus))


def load(state: dict[str, Any], host: FakeHost, *vcpus: FakeVcpu, elapsed: int = 0) -> None:
    load_clocks(cast(Vm, host), cast(list[Vcpu], vcpus), state, elapsed=elapsed)


@settings(max_examples=100, deadline=None)
@given(
    before=st.integers(0, 1 << 50),
    after=st.integers(0, 1 << 50),
    offsets=st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=4),
    elapsed=st.integers(0, 10**15),
)
def test_counters_go_on_and_keep_their_distance(
    before: int, after: int, offsets: list[int], elapsed: int
) -> None:
    host = FakeHost(before, offsets=True)
    host.clock = 777
    vcpus = [FakeVcpu(host, offset & MASK, deadline=5000) for offset in offsets]
    state = save(host, *vcpus)
    there = FakeHost(after, offsets=True)
    loaded = [FakeVcpu(there) for _ in offsets]
    load(state, there, *loaded, elapsed=elapsed)
    assert there.clock == 777 + elapsed
    for old, new in zip(vcpus, loaded, strict=True):
        assert new.offset - loaded[0].offset & MASK == old.offset - vcpus[0].offset & MASK
        assert new.deadline == 5000
    gone = (there.tsc + loaded[0].offset) - (host.tsc + vcpus[0].offset) - elapsed * KHZ // 1_000_000
    assert -20_000 <= (gone + (1 << 63) & MASK) - (1 << 63) <= 20_000  # a few looks at the counter


def test_deadlines_move_with_a_counter_that_cannot_be_set() -> None:
    host = FakeHost(10**12, offsets=False)
    state = save(host, FakeVcpu(host, deadline=10**12 + 10**6), FakeVcpu(host, deadline=0))
    there = FakeHost(3 * 10**9, offsets=False)  # started since
    soon, none = FakeVcpu(there), FakeVcpu(there)
    load(state, there, soon, none)
    assert abs(soon.deadline - (3 * 10**9 + 10**6)) < 20_000
    assert none.deadline == 0
    state["vcpus"][0]["tsc_deadline"] = 5  # long over: it fires, and is not disarmed
    load(state, there, soon, none)
    assert soon.deadline == 1


def test_a_frequency_that_cannot_be_had() -> None:
    host = FakeHost(0, offsets=True)
    state = save(host, FakeVcpu(host))
    assert clock_difference(state, cast(Vcpu, FakeVcpu(host)), software=False, scaling=False) is None
    state["vcpus"][0]["tsc_khz"] = KHZ + 600  # KVM takes it for the same up to 250 ppm
    assert clock_difference(state, cast(Vcpu, FakeVcpu(host)), software=False, scaling=False) is None
    state["vcpus"][0]["tsc_khz"] = KHZ + 700
    assert "kHz" in str(clock_difference(state, cast(Vcpu, FakeVcpu(host)), software=False, scaling=False))
    assert clock_difference(state, cast(Vcpu, FakeVcpu(host)), software=False, scaling=True) is None
    with pytest.raises(ValueError, match="2500700 kHz"):
        load(state, host, FakeVcpu(host))


def test_a_counter_that_would_go_back() -> None:
    host = FakeHost(10**12, offsets=False)
    state = save(host, FakeVcpu(host))
    assert clock_difference(state, cast(Vcpu, FakeVcpu(host)), software=True, scaling=False) is None
    there = cast(Vcpu, FakeVcpu(FakeHost(10**9, offsets=False)))
    assert "behind" in str(clock_difference(state, there, software=True, scaling=False))
    assert clock_difference(state, there, software=False, scaling=False) is None


def test_since_saved() -> None:
    host = FakeHost(0, offsets=True)
    state = save(host, FakeVcpu(host))
    state["realtime"] -= 10**12
    assert 10**12 <= since_saved(state) < 2 * 10**12
    state["realtime"] += 10**13
    assert since_saved(state) == 0


def test_another_number_of_vcpus() -> None:
    host = FakeHost(0, offsets=True)
    with pytest.raises(ValueError, match="1 vCPUs, not of 2"):
        load(save(host, FakeVcpu(host)), host, FakeVcpu(host), FakeVcpu(host))
