"""Reads the resource usage of kernels' machine code from the cubins inside a serialized executable.

A cubin is an ELF file with a section of code for each kernel. Registers stand in the section .nv.info, static shared
memory is a section of its own. Spills stand nowhere: they are counted as the assembler counts them, from the
instructions that store to and load from a thread's local memory (STL, LDL). A kernel that keeps an array of its own in
local memory counts here too; none of ours does, and such traffic is as unwelcome.

Sources: the "CUDA Binary Utilities" manual names the sections. The encoding of instructions, not documented, is that of
nvdisasm's listings for compute capabilities 8.0 to 9.0: 16 bytes each, the opcode in bits 0 to 11, the width of a
memory access in bits 73 to 75.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

_MAGIC = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_EM_CUDA = 190

_CODE = ".text."
_INFO = ".nv.info"
_SYMBOLS = ".symtab"
_SYMBOL = struct.Struct("<IBBHQQ")
_REGISTER_COUNT = 0x2F04
"""Attribute 0x2f of .nv.info in format 4: a symbol's number and the registers of a thread of that function."""

_SHARED = ".nv.shared."
_INSTRUCTION = 16
_STORE_LOCAL = 0x387
_LOAD_LOCAL = 0x983
_RESERVED_SHARED = 1024
"""Bytes of a block's shared memory that the system reserves from compute capability 9.0 on, included in the
kernel's."""

_WIDTHS = (1, 1, 2, 2, 4, 8, 16, 16)
"""Bytes of a memory access by its width code: U8, S8, U16, S16, 32, 64, 128, U.128."""

COMPUTE_CAPABILITIES = (80, 86, 87, 89, 90)
"""Compute capabilities whose instructions are known to be encoded in this way."""


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """Describes one kernel's machine code.

    Attributes:
        registers: of a thread.
        static_shared_memory_bytes: of a block, fixed in the code.
        spill_store_bytes: widths of the code's stores to local memory, each instruction counted once, as ptxas does.
        spill_load_bytes: the same of its loads.
        code_bytes: size of the code.
    """

    name: str
    registers: int
    static_shared_memory_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    code_bytes: int


def kernels(data: bytes) -> list[KernelCode]:
    """Returns the kernels of every cubin in `data`, in order. Raises ValueError for machine code of an unknown kind."""
    found: list[KernelCode] = []
    for start in _cubins(data):
        found.extend(_kernels_of(data, start))
    return found


def _cubins(data: bytes) -> Iterator[int]:
    start = data.find(_MAGIC)
    while start >= 0:
        if start + _HEADER.size <= len(data) and _HEADER.unpack_from(data, start)[2] == _EM_CUDA:
            yield start
        start = data.find(_MAGIC, start + 1)


def _kernels_of(data: bytes, start: int) -> Iterator[KernelCode]:
    _, _, _, _, _, _, table, flags, _, _, _, entry, count, names = _HEADER.unpack_from(data, start)
    if start + table + count * entry > len(data):
        raise ValueError(f"executable holds a cubin at byte {start} that goes past its end, byte {len(data)}")
    sections = [_SECTION.unpack_from(data, start + table + number * entry) for number in range(count)]
    text = start + sections[names][4]

    def name(section: tuple[int, ...]) -> str:
        return data[text + section[0] : data.index(b"\0", text + section[0])].decode()

    by_name = {name(section): section for section in sections}

    def content(label: str) -> bytes:
        section = by_name.get(label)
        return b"" if section is None else data[start + section[4] : start + section[4] + section[5]]

    capability = _compute_capability(flags)
    reserved = _RESERVED_SHARED if capability >= 90 else 0
    registers = _registers(content(_INFO), content(_SYMBOLS))
    numbers = {id(section): number for number, section in enumerate(sections)}
    for label, section in by_name.items():
        if not label.startswith(_CODE):
            continue
        kernel = label.removeprefix(_CODE)
        code = content(label)
        stored, loaded = _local_traffic(code)
        shared = by_name.get(_SHARED + kernel)
        yield KernelCode(
            name=kernel,
            registers=registers[numbers[id(section)]],
            static_shared_memory_bytes=shared[5] - reserved if shared else 0,
            spill_store_bytes=stored,
            spill_load_bytes=loaded,
            code_bytes=len(code),
        )


def _compute_capability(flags: int) -> int:
    """Returns ten times the compute capability from an ELF header's flags; ValueError where the encoding is not known.

    The number is in the lowest byte, in newer cubins in the second one.
    """
    capability = flags & 0xFF
    if capability not in COMPUTE_CAPABILITIES:
        capability = flags >> 8 & 0xFF
    if capability not in COMPUTE_CAPABILITIES:
        raise ValueError(
            f"executable holds machine code with flags {flags:#x}; known are compute capabilities "
            f"{', '.join(f'{one / 10}' for one in COMPUTE_CAPABILITIES)}"
        )
    return capability


def _registers(info: bytes, symbols: bytes) -> dict[int, int]:
    """Returns the registers of a thread by the number of the section that holds the function's code."""
    found: dict[int, int] = {}
    place = 0
    while place + 4 <= len(info):
        attribute, size = struct.unpack_from("<HH", info, place)
        place += 4
        if attribute & 0xFF != 4:  # other formats hold their value in `size`
            continue
        if attribute == _REGISTER_COUNT:
            symbol, registers = struct.unpack_from("<II", info, place)
            found[_SYMBOL.unpack_from(symbols, symbol * _SYMBOL.size)[3]] = registers
        place += size
    return found


def _local_traffic(code: bytes) -> tuple[int, int]:
    stored = loaded = 0
    for low, high in struct.iter_unpack("<QQ", code[: len(code) // _INSTRUCTION * _INSTRUCTION]):
        opcode = low & 0xFFF
        if opcode == _STORE_LOCAL:
            stored += _WIDTHS[high >> 9 & 7]
        elif opcode == _LOAD_LOCAL:
            loaded += _WIDTHS[high >> 9 & 7]
    return stored, loaded
