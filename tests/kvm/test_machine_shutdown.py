"""Shutdown requests to a real machine whose guest is a few lines of C: it drives vmmci, or the ACPI button.

The guest is an ELF file with a PVH entry (Xen's x86 HVM direct boot ABI) and polls: it takes no interrupt.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PATIENCE = 60.0

# The first letter of the command line says what the guest does.
SOURCE = r"""
__asm__(".pushsection .note.pvh,\"a\",@note\n"
        ".long 4, 4, 18\n .asciz \"Xen\"\n .long _start\n .popsection\n"
        ".globl _start\n_start:\n mov $stack + 4096, %esp\n push %ebx\n call guest\n1: hlt\n jmp 1b\n");
char stack[4096];
typedef unsigned u32;

static u32 in(int port) { u32 v; __asm__ volatile("inl %w1, %0" : "=a"(v) : "Nd"(port)); return v; }
static void out(int port, u32 v) { __asm__ volatile("outl %0, %w1" :: "a"(v), "Nd"(port)); }
static u32 in2(int port) { u32 v = 0; __asm__ volatile("inw %w1, %w0" : "+a"(v) : "Nd"(port)); return v; }
static void out2(int port, u32 v) { __asm__ volatile("outw %w0, %w1" :: "a"(v), "Nd"(port)); }
static void out1(int port, u32 v) { __asm__ volatile("outb %b0, %w1" :: "a"(v), "Nd"(port)); }
static void say(const char *text) { while (*text) out1(0x3f8, *text++); }
static void power_off(void) { out2(0x604, 5 << 10 | 1 << 13); }

static u32 config(u32 slot, u32 offset) { out(0xcf8, 1u << 31 | slot << 11 | offset); return in(0xcfc); }

static int find_vmmci(void)
{
	for (u32 slot = 0; slot < 32; slot++) {
		if (config(slot, 0) != 0x07770b5d)
			continue;
		u32 base = config(slot, 0x10) & ~3u;
		config(slot, 4);
		out(0xcfc, 1);
		out1(base + 18, 0);
		out1(base + 18, 3);
		out(base + 4, in(base));
		out1(base + 18, 7);
		return base;
	}
	say("no vmmci\n");
	return 0;
}

void guest(char *start_info)
{
	char mode = **(char **)(start_info + 24);
	int base = mode == 'b' ? 0 : find_vmmci();
	if (mode == 'b')
		out2(0x602, 1 << 8);
	say("READY\n");
	if (mode == 'i')
		out(base + 20, 1);		/* shuts down by itself, and then does nothing */
	while (mode == 'i' || mode == 'd')	/* deaf */
		;
	if (mode == 'b') {
		while (!(in2(0x600) & 1 << 8))
			;
		out2(0x600, 1 << 8);
		say("BUTTON\n");
		power_off();
	}
	while (!in(base + 20))
		;
	out1(0x3f8, '0' + in(base + 20));
	say(" COMMAND\n");
	out(base + 20, in(base + 20));
	if (mode == 'f') {			/* as OpenBSD ends */
		static struct { unsigned short limit; u32 base; } __attribute__((packed)) nothing;
		__asm__ volatile("lidt %0; ud2" :: "m"(nothing));
	}
	if (mode == 'v')
		power_off();
	for (;;)
		;
}
"""

LINKER_SCRIPT = """
ENTRY(_start)
PHDRS { all PT_LOAD FLAGS(7); note PT_NOTE; }
SECTIONS
{
    . = 0x200000;
    .all : { *(.text*) *(.rodata*) *(.data*) *(.bss*) } :all
    .note.pvh : { *(.note.pvh) } :all :note
    /DISCARD/ : { *(*) }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("guest")
    (folder / "guest.c").write_text(SOURCE)
    (folder / "guest.lds").write_text(LINKER_SCRIPT)
    flags = "-m32 -O1 -ffreestanding -fno-pic -fno-stack-protector -nostdlib -static -no-pie -mno-sse"
    link = "-Wl,--build-id=none,--no-warn-rwx-segments,-T,guest.lds"
    subprocess.run(
        ["gcc", *flags.split(), *link.split(), "-o", "guest.32", "guest.c"], cwd=folder, check=True
    )
    subprocess.run(["objcopy", "-O", "elf64-x86-64", "guest.32", "guest"], cwd=folder, check=True)
    return folder / "guest"


class Machine:
    def __init__(self, kernel: Path, mode: str) -> None:
        command = [sys.executable, "-m", "vmrun", "boot", "--kernel", str(kernel), "--append", mode]
        self.process = subprocess.Popen(
            [*command, "--timeout", str(PATIENCE)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        self.output = b""

    def wait_for(self, text: bytes) -> None:
        assert self.process.stdout is not None
        while text not in self.output:
            data = os.read(self.process.stdout.fileno(), 4096)
            assert data, self.output
            self.output += data

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def boot(kernel: Path) -> Iterator[Callable[[str], Machine]]:
    machines: list[Machine] = []

    def start(mode: str) -> Machine:
        machines.append(Machine(kernel, mode))
        machines[-1].wait_for(b"READY")
        return machines[-1]

    yield start
    for machine in machines:
        machine.process.kill()
        machine.process.wait()
        assert machine.process.stdout is not None
        machine.process.stdout.close()


def test_vmmci(boot: Callable[[str], Machine]) -> None:
    machine = boot("v")
    machine.signal()
    machine.wait_for(b"1 COMMAND")
    assert machine.wait() == 0


def test_a_guest_that_ends_by_a_triple_fault_after_it_was_asked(boot: Callable[[str], Machine]) -> None:
    machine = boot("f")
    machine.signal()
    assert machine.wait() == 0


def test_the_power_button(boot: Callable[[str], Machine]) -> None:
    machine = boot("b")
    machine.signal()
    machine.wait_for(b"BUTTON")
    assert machine.wait() == 0


def test_a_deaf_driver_has_three_seconds(boot: Callable[[str], Machine]) -> None:
    machine = boot("d")
    before = time.monotonic()
    machine.signal()
    assert machine.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - before >= 3


def test_a_guest_that_announces_its_shutdown(boot: Callable[[str], Machine]) -> None:
    assert boot("i").wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(boot: Callable[[str], Machine], number: signal.Signals) -> None:
    """The guest acknowledges and goes on for ever."""
    machine = boot("a")
    machine.signal()
    machine.wait_for(b"1 COMMAND")
    machine.signal(number)
    assert machine.wait() == 128 + number


def test_sigint_asks_nobody(boot: Callable[[str], Machine]) -> None:
    machine = boot("v")
    machine.signal(signal.SIGINT)
    assert machine.wait() == 128 + signal.SIGINT


@pytest.mark.slow
def test_a_machine_that_was_stopped_for_a_while_is_told_to_set_its_clock(
    boot: Callable[[str], Machine],
) -> None:
    machine = boot("v")
    assert machine.process.stdout is not None
    # The first stop may come before the main loop has looked at the clock at all.
    for _ in range(3):
        machine.signal(signal.SIGSTOP)
        time.sleep(8)  # what is tested is that this time passes unseen
        machine.signal(signal.SIGCONT)
        if select.select([machine.process.stdout], [], [], 5)[0]:
            break
    machine.wait_for(b"3 COMMAND")
