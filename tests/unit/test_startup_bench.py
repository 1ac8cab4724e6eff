"""The start-up benchmark: its guest is what it says, and its tables add up."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from devices.memory import PAGE_SIZE
from vmrun.boot.elf import read_elf
from vmrun.boot.image import MemoryImage
from vmrun.machine import layout

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_startup.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_startup", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_machines_enter_the_guest_at_one_place(bench: ModuleType) -> None:
    kernel = read_elf(MemoryImage("guest", bench.guest()), ram_limit=layout.PCI_HOLE_START)
    assert kernel.entry == kernel.pvh_entry == bench.ENTRY
    assert bench.ENTRY % PAGE_SIZE == 0
    assert bench.DEBUG_EXIT_PORT == layout.DEBUG_EXIT_PORT


def test_the_tables(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_commands({"qemu": [0.1, 0.3, 0.2], "vmrun": [0.3, 0.5, 0.4]})
    assert "| vmrun | 400.0 ms | 300.0 ms | 500.0 ms | 2.00 | 3.00 |" in capsys.readouterr().out
    bench.print_phases({"first": [0.1, 0.2, 0.3], "second": [0.4, 0.3, 0.6]})
    assert "| second | 200.0 ms | 200.0 ms |\n| together | 400.0 ms | 300.0 ms |" in capsys.readouterr().out


def test_a_failing_command_stops_it(bench: ModuleType) -> None:
    assert bench.seconds(["sh", "-c", "exit 3"], 3) > 0
    with pytest.raises(SystemExit, match="exits with 3, not 0: no"):
        bench.seconds(["sh", "-c", "echo no >&2; exit 3"], 0)
