"""Compile a kernel for a GPU that is not there, and read what the assembler made of it.

Needs neither a driver nor a CUDA toolkit: Triton's wheel carries ptxas, cuobjdump and nvdisasm, and LLVM for
AMD. A kernel takes 0.2 to 1 s; its figures cost 10 ms more, and `opcodes`, which disassembles, about as much
as compiling again, so it is read only when asked for. `kept_figures` compiles only what tests/compile/figures.json
does not have.
"""

import dataclasses
import functools
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.compile import hazards as hazards_module
from tests.compile.figures import BOOK, Book, key_of
from tests.compile.hazards import hazards
from tests.compile.oldest import compiled_numbers

# Most shared memory that one block may ask for. NVIDIA: CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability" (the opt-in maximum: 1 KiB less than the multiprocessor has). AMD:
# "CDNA3 Instruction Set Architecture", local data share.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = tuple(SHARED_LIMIT)
WALKED = ("sm_90", "sm_100")
"""Whose machine code is searched for registers of products in flight."""
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 multiprocessor

# A line of SASS: /*0040*/ @!P0 HGMMA.64x128x16.F32.BF16 R24, ... ; of AMD's assembly: a tab, then the
# mnemonic.
_SASS_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_OF_REGISTERS = re.compile(r"\bUTC\w*MMA\b[^;\n]*\bR\d+")
_AMD_OPCODE = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one compiled kernel takes of one target.

    Attributes:
        registers: 32-bit registers of a thread (AMD: vector registers, accumulation registers included).
        spill_bytes: local memory of a thread: NVIDIA's stack frame, AMD's scratch. A kernel without arrays
            has it only where registers spill.
        spilled_registers: AMD's own count, vector and scalar, which also sees spills that need no memory; 0
            on NVIDIA.
        shared_bytes: shared memory that the launch asks for.
        tensor_memory_columns: of sm_100; 0 elsewhere.
        hazards: of registers that a matrix product in flight uses (`hazards.py`): on sm_90, whose wgmma has its
            accumulators there and may have an operand; on sm_100 the products that name a register at all, which
            tcgen05's do not; 0 elsewhere, where a product is done when the next instruction reads.
        machine_code: makes the cubin, or AMD's assembly as text: at hand where this was compiled, else compiled then.
    """

    target: str
    registers: int
    spill_bytes: int
    spilled_registers: int
    shared_bytes: int
    tensor_memory_columns: int
    hazards: int
    machine_code: Callable[[], bytes] = dataclasses.field(repr=False)

    @property
    def numbers(self) -> list[int]:
        """All that is kept of a kernel."""
        return [
            self.registers, self.spill_bytes, self.spilled_registers, self.shared_bytes, self.tensor_memory_columns,
            self.hazards,
        ]  # fmt: skip

    @functools.cached_property
    def binary(self) -> bytes:
        """What machine_code makes."""
        return self.machine_code()

    @functools.cached_property
    def sass(self) -> str:
        """NVIDIA's machine code as text."""
        return _nvidia_tool("nvdisasm", self.binary, "-c")

    @functools.cached_property
    def sequence(self) -> list[str]:
        """The instructions in the order of their addresses, by name up to the first dot: HGMMA, LDSM; v_mfma_..."""
        if self.target.startswith("gfx"):
            return _AMD_OPCODE.findall(self.binary.decode())
        return [opcode.partition(".")[0] for opcode in _SASS_OPCODE.findall(self.sass)]

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction occurs."""
        return Counter(self.sequence)

    def faults(self) -> list[str]:
        """Why this kernel should not be shipped: spills, more memory than the target has, registers used too early."""
        limit, faults = SHARED_LIMIT[self.target], []
        if self.spill_bytes or self.spilled_registers:
            faults.append(f"spills: {self.spill_bytes} B a thread, {self.spilled_registers} registers")
        if self.shared_bytes > limit:
            faults.append(f"shared memory: {self.shared_bytes} B of {limit} B")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            faults.append(f"tensor memory: {self.tensor_memory_columns} columns of {TENSOR_MEMORY_COLUMNS}")
        if self.hazards:
            faults.append(f"hazards: {self.hazards} instructions touch registers of products in flight")
        return faults


def compile_only(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int,
    num_stages: int,
    divisible_by_16: Collection[str] = (),
    **options: Any,
) -> Figures:
    """Compile `fn` as a launch with such arguments would.

    Args:
        fn: a @triton.jit or @gluon.jit function.
        signature: type of each runtime argument: "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>".
        constexprs: the constexpr arguments; also pointers that are None, and integers that are 1, because a
            launch makes constants of them too (unless the kernel is told not to specialise on them).
        target: one of TARGETS.
        num_warps: warps in a block (of 64 threads on AMD).
        num_stages: depth of the software pipeline.
        divisible_by_16: arguments that a launch would find to be multiples of 16 (bytes, for pointers).
        **options: further compile options, such as maxnreg.
    """
    source_of: type[ASTSource] = ASTSource
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(given) != set(fn.arg_names) or not given.keys() >= set(divisible_by_16):
        odd = sorted(set(given) ^ set(fn.arg_names) | set(divisible_by_16) - set(given))
        raise ValueError(f"{fn.__name__}: arguments missing, or unknown to it: {', '.join(odd)}")
    source = source_of(
        fn,
        {name: given[name] for name in fn.arg_names},
        dict(constexprs),
        {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16},
    )
    # Said outright, because Triton 3.9 warns that the default of fp fusion will change.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **options}
    kernel = triton.compile(source, target=_gpu_target(target), options=options)
    if target.startswith("gfx"):
        return _amd_figures(kernel, target)
    cubin = kernel.asm["cubin"]
    usage = _nvidia_tool("cuobjdump", cubin, "-res-usage")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return Figures(
        target=target,
        registers=int(found["REG"]),
        spill_bytes=int(found["STACK"]) + int(found["LOCAL"]),
        spilled_registers=0,
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        hazards=_hazards_of(cubin, target),
        machine_code=lambda: cubin,
    )


def kept_figures(
    fn: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], target: str, num_warps: int,
    num_stages: int, divisible_by_16: Collection[str] = (), *, book: Book = BOOK, version: str | None = None,
    **options: Any,
) -> Figures:  # fmt: skip
    """As `compile_only`, compiled only where the book has no figures of it, or is to be checked.

    version: of the Triton that compiles: None for the one that is imported, else `oldest_triton()`, whose machine code
    stays where it was made.
    """
    if version == triton.__version__:
        version = None
    signature = {name: signature[name] for name in fn.arg_names if name in signature}
    circumstances = signature, constexprs, target, num_warps, num_stages, frozenset(divisible_by_16), options
    # What was counted is a figure, too, and how it is counted may change.
    walk = (_walk(),) if target in WALKED else ()
    key = key_of(fn, *circumstances, *walk, version=version)
    label = f"{fn.__name__} {target}" + (f" Triton {version}" if version else "")

    def compiled() -> Figures:
        if version:
            figures = Figures(target, *compiled_numbers(fn, *circumstances), machine_code=_made_elsewhere)
        else:
            figures = compile_only(*(fn, *circumstances[:-1]), **options)
        book.add(key, label, figures.numbers)
        return figures

    numbers = book.find(key)
    return compiled() if numbers is None else Figures(target, *numbers, machine_code=lambda: compiled().binary)


def _made_elsewhere() -> bytes:
    raise RuntimeError("the oldest Triton's process hands over numbers; ask for machine code without `version`")


@functools.cache
def _walk() -> str:
    return inspect.getsource(hazards_module) + _OF_REGISTERS.pattern


def _hazards_of(cubin: bytes, target: str) -> int:
    if target not in WALKED:
        return 0
    sass = _nvidia_tool("nvdisasm", cubin, "-c")
    return len(hazards(sass)) if target == "sm_90" else len(_OF_REGISTERS.findall(sass))


def _gpu_target(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _amd_figures(kernel: Any, target: str) -> Figures:
    assembly = kernel.asm["amdgcn"]
    # The kernel's metadata, at the end of its assembly: "    .vgpr_count:     122".
    found = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    return Figures(
        target=target,
        registers=found["vgpr_count"],
        spill_bytes=found["private_segment_fixed_size"],
        spilled_registers=found["vgpr_spill_count"] + found["sgpr_spill_count"],
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=0,
        hazards=0,
        machine_code=assembly.encode,
    )


def _nvidia_tool(name: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = getattr(triton.knobs.nvidia, name).path
        return subprocess.run([tool, *arguments, path], check=True, capture_output=True, text=True).stdout
