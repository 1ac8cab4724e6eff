"""Enough of the x86-64 instruction format to find the operands of the few instructions we finish (SDM volume
2, ch. 2).

Only 64-bit code gets here. The bytes were fetched by KVM's emulator, so they are the ones it choked on.
"""

from vmrun.kvm import abi

# The processor's numbering of general registers, in the spelling of struct kvm_regs.
REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip

_LEGACY_PREFIXES = frozenset((0x66, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65))


class Instruction:
    """Prefixes and opcode of one instruction. `opcode` includes the 0x0F escape; `length` grows as operands
    are read.
    """

    __slots__ = ("_bytes", "fs", "gs", "length", "modrm", "opcode", "operand_size_16", "repeat", "rex")

    def __init__(self, code: bytes) -> None:
        """Raises IndexError when `code` is too short to be an instruction."""
        self._bytes = code
        self.operand_size_16 = self.fs = self.gs = False
        self.repeat = 0
        self.rex = 0
        at = 0
        while code[at] in _LEGACY_PREFIXES:
            prefix = code[at]
            self.operand_size_16 |= prefix == 0x66
            self.fs |= prefix == 0x64
            self.gs |= prefix == 0x65
            if prefix in (0xF2, 0xF3):
                self.repeat = prefix
            at += 1
        if code[at] & 0xF0 == 0x40:
            self.rex = code[at]
            at += 1
        self.opcode = code[at]
        at += 1
        if self.opcode == 0x0F:
            self.opcode = 0x0F00 | code[at]
            at += 1
            if self.opcode == 0x0F38:
                self.opcode = 0x0F3800 | code[at]
                at += 1
        self.modrm = code[at] if at < len(code) else 0
        self.length = at

    @property
    def wide(self) -> bool:
        """REX.W: 64-bit operands."""
        return bool(self.rex & 8)

    @property
    def reg(self) -> int:
        """ModRM.reg without REX: the opcode extension of group instructions."""
        return self.modrm >> 3 & 7

    @property
    def register(self) -> str:
        """The register operand that ModRM.reg names."""
        return REGISTERS[self.reg | (self.rex & 4) << 1]

    @property
    def in_memory(self) -> bool:
        return self.modrm < 0xC0

    def register_operand(self) -> str:
        """The register that ModRM.rm names, when not `in_memory`. Counts the ModRM byte."""
        self._count_to(self.length + 1)
        return REGISTERS[self.modrm & 7 | (self.rex & 1) << 3]

    def address(self, regs: abi.kvm_regs, sregs: abi.kvm_sregs, immediate: int = 0) -> int:
        """The linear address of the memory operand. `immediate` is how many bytes follow it. Counts all
        operand bytes. Raises IndexError as the constructor does.
        """
        code = self._bytes
        at = self.length + 1
        mod, rm = self.modrm >> 6, self.modrm & 7
        result = 0
        relative = False
        if rm == 4:
            sib = code[at]
            at += 1
            index = sib >> 3 & 7 | (self.rex & 2) << 2
            base = sib & 7
            if index != 4:
                result += getattr(regs, REGISTERS[index]) << (sib >> 6)
            if base == 5 and mod == 0:
                mod = 2
            else:
                result += getattr(regs, REGISTERS[base | (self.rex & 1) << 3])
        elif rm == 5 and mod == 0:
            relative = True
            mod = 2
        else:
            result += getattr(regs, REGISTERS[rm | (self.rex & 1) << 3])
        if mod:
            size = 1 if mod == 1 else 4
            result += int.from_bytes(code[at : at + size], "little", signed=True)
            at += size
        self._count_to(at)
        if relative:
            result += regs.rip + at + immediate
        if self.fs:
            result += sregs.fs.base
        elif self.gs:
            result += sregs.gs.base
        return result & 0xFFFF_FFFF_FFFF_FFFF

    def _count_to(self, end: int) -> None:
        """Raises IndexError when the operands run past the bytes there are."""
        if end > len(self._bytes):
            raise IndexError("the instruction is cut off")
        self.length = end
