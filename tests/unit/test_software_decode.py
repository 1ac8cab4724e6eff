"""Operands in memory, against the assembler: it encodes what we decode, and we name the addresses."""

import re
import shutil
import subprocess

import pytest

from vmrun.kvm import abi
from vmrun.kvm.software.decode import REGISTERS, Instruction

RIP = 0x7F00_1234_5678
FS, GS = 0x1111_0000_0000, 0xFFFF_8880_0000_0000
VALUES = {name: 0x0101_0203_0405_0607 * (index + 3) & (1 << 64) - 1 for index, name in enumerate(REGISTERS)}

_OPERAND = re.compile(
    r"(?:(?P<segment>fs|gs):)?\[(?:(?P<base>\w+)(?=[]+-]))?(?:\+?(?P<index>\w+)\*(?P<scale>\d))?(?P<displacement>[+-]?\w+)?\]"
)


def _operands() -> list[str]:
    forms = []
    for base in REGISTERS:
        forms += [f"[{base}]", f"[{base}+0x10]", f"[{base}-0x12345678]"]
        forms += [f"[{base}+r12*8-1]", f"gs:[{base}+rbp*1]"]
    for index in REGISTERS:
        if index != "rsp":
            forms += [f"[rsp+{index}*4+0x77]", f"[r13+{index}*2]", f"fs:[{index}*8+0x1000]"]
    return [*forms, "gs:[0x28]", "fs:[0x7fffffff]", "[rip+0x1000]", "gs:[rip-0x20]"]


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Machine code by source line."""
    if shutil.which("as") is None:
        pytest.skip("no assembler (Debian: binutils)")
    folder = tmp_path_factory.mktemp("decode")
    lines = []
    for operand in _operands():
        lines += [f"xsave64 {operand}", f"xrstor {operand}", f"popcnt r9d, dword ptr {operand}"]
        lines += [f"popcnt rax, qword ptr {operand}", f"popcnt r15w, word ptr {operand}"]
    for name in REGISTERS:
        lines += [f"popcnt {name}, r8", f"popcnt rcx, {name}"]
    lines += ["int3", "fwait", "clac", "stac", "xgetbv", "ud2"]
    source = (
        ".intel_syntax noprefix\n" + "\n".join(f"l{n}: {line}" for n, line in enumerate(lines)) + "\nend:\n"
    )
    (folder / "code.s").write_text(source)
    subprocess.run(["as", "-o", "code.o", "code.s"], cwd=folder, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "code.o", "code.bin"], cwd=folder, check=True)
    names = subprocess.run(["nm", "code.o"], cwd=folder, check=True, capture_output=True, text=True).stdout
    at = {line.split()[2]: int(line.split()[0], 16) for line in names.splitlines()}
    code = (folder / "code.bin").read_bytes()
    ends = [at[f"l{n}"] for n in range(1, len(lines))] + [at["end"]]
    return {line: code[at[f"l{n}"] : end] for n, (line, end) in enumerate(zip(lines, ends, strict=True))}


def _meant(operand: str, length: int) -> int:
    match = _OPERAND.fullmatch(operand)
    assert match, operand
    address = 0
    base, displacement = match["base"], match["displacement"]
    if base is not None and base.startswith("0x"):
        base, displacement = None, base
    if base == "rip":
        address += RIP + length
    elif base:
        address += VALUES[base]
    if match["index"]:
        address += VALUES[match["index"]] * int(match["scale"])
    address += int(displacement or "0", 16 if "0x" in (displacement or "") else 10)
    address += {"fs": FS, "gs": GS, None: 0}[match["segment"]]
    return address & (1 << 64) - 1


def _state() -> tuple[abi.kvm_regs, abi.kvm_sregs]:
    sregs = abi.kvm_sregs()
    sregs.fs.base, sregs.gs.base = FS, GS
    return abi.kvm_regs(rip=RIP, **VALUES), sregs


def test_every_addressing_form(assembled: dict[str, bytes]) -> None:
    regs, sregs = _state()
    checked = 0
    for line, code in assembled.items():
        operand = re.search(r"(?:[fg]s:)?\[.*\]", line)
        if operand is None:
            continue
        # What follows the instruction in memory must not matter.
        instruction = Instruction((code + bytes(range(0x90, 0x9F)))[:15])
        assert instruction.in_memory, line
        assert instruction.address(regs, sregs) == _meant(operand[0], len(code)), (line, code.hex(" "))
        assert instruction.length == len(code), (line, code.hex(" "))
        checked += 1
    assert checked > 600


def test_opcodes_and_operand_sizes(assembled: dict[str, bytes]) -> None:
    for line, code in assembled.items():
        instruction = Instruction(code)
        name = line.split()[0]
        assert instruction.opcode == {
            "xsave64": 0x0FAE, "xrstor": 0x0FAE, "popcnt": 0x0FB8, "int3": 0xCC, "fwait": 0x9B,
            "clac": 0x0F01, "stac": 0x0F01, "xgetbv": 0x0F01, "ud2": 0x0F0B,
        }[name], line  # fmt: skip
        if name in ("xsave64", "xrstor"):
            assert instruction.reg == {"xsave64": 4, "xrstor": 5}[name]
            assert instruction.wide == (name == "xsave64")
        if name == "popcnt":
            assert instruction.repeat == 0xF3
            assert instruction.operand_size_16 == ("r15w" in line)
            assert instruction.wide == ("dword" not in line and "r15w" not in line)


def test_register_operands(assembled: dict[str, bytes]) -> None:
    for name in REGISTERS:
        instruction = Instruction(assembled[f"popcnt {name}, r8"])
        assert not instruction.in_memory
        assert (instruction.register, instruction.register_operand()) == (name, "r8")
        assert instruction.length == 5
        instruction = Instruction(assembled[f"popcnt rcx, {name}"])
        assert (instruction.register, instruction.register_operand()) == ("rcx", name)


@pytest.mark.parametrize("code", ["", "66", "66" * 15, "0f", "0f38", "48"])
def test_too_short(code: str) -> None:
    with pytest.raises(IndexError):
        Instruction(bytes.fromhex(code))


@pytest.mark.parametrize("code", ["0fae", "0fae24", "0fae2425", "0fae242501", "0fae60", "0faea0010203"])
def test_operand_cut_off(code: str) -> None:
    """A displacement that is not there must not be taken for a shorter one."""
    instruction = Instruction(bytes.fromhex(code))
    with pytest.raises(IndexError):
        instruction.address(*_state())
