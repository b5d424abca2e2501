"""What is to be computed and where: `Problem`, the strategies that can serve one, and what keeps kernels from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from lora_kernels.planning import tiles
from lora_kernels.planning.measured import Direction, Key, row_bucket
from lora_kernels.planning.tiles import Family, Width

Backend = Literal["torch", "triton", "reference"]
Strategy = Literal["library", "upcast", "one_pass", "shrink_fused", "persistent", "fused", "shrink_expand", "eager"]

OLDEST_SM = 80


class Way(NamedTuple):
    """One composition that can serve a direction; prints as "triton/shrink_fused"."""

    backend: Backend
    strategy: Strategy

    def __str__(self) -> str:
        return f"{self.backend}/{self.strategy}"


@dataclass(frozen=True)
class Problem:
    """What a plan depends on. dropout: whether a mask is applied; arch: "sm_90", "gfx942", or the device's type.

    gluon: whether this Triton has the language of the persistent kernel; device: the GPU's name, for its rates.
    """

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool
    arch: str
    device_type: str
    sm_count: int = 1
    tf32: bool = False
    interpreted: bool = False
    gluon: bool = False
    device: str = ""

    @property
    def width(self) -> Width:
        """Which column of the tile table serves these dtypes."""
        if self.dtype == torch.float32:
            return "32"
        return "16" if self.adapter_dtype == self.dtype else "mixed"

    @property
    def family(self) -> Family:
        """The GPU's family; an unknown one is given the least shared memory of its vendor."""
        unknown: Family = "cdna3" if self.arch.startswith("gfx") else "ada"
        return tiles.FAMILY_OF_ARCH.get(self.arch, unknown)

    @property
    def has_descriptors(self) -> bool:
        """Whether the large GEMMs may use tensor descriptors."""
        return "gemm_expand_tma" in tiles.kernels_of(self.family, self.width) and not self.interpreted

    def key(self, direction: Direction) -> Key:
        """Under which measured times of it are kept."""
        dtype, adapter_dtype = (str(d).removeprefix("torch.") for d in (self.dtype, self.adapter_dtype))
        return Key(direction, row_bucket(self.M), self.N, self.K, self.R, dtype, adapter_dtype, self.dropout, self.tf32)


LIBRARY = Way("torch", "library")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def obstacle_to_triton(
    dtype: torch.dtype, arch: str, device_type: str, *, interpreted: bool, triton_available: bool
) -> str | None:
    """The reason why the triton backend cannot serve x of this dtype there, or None if it can."""
    if dtype == torch.float64:
        return "the kernels compute in fp32, fp16 and bf16; fp64 is served by 'torch' and 'reference'"
    if not triton_available:
        return "triton is not installed"
    if device_type == "cpu":
        hint = "set TRITON_INTERPRET=1 before the import to run the kernels in Triton's interpreter"
        return None if interpreted else f"tensors are on the CPU; {hint}"
    if interpreted:
        return "TRITON_INTERPRET is set, and the interpreter runs on CPU tensors"
    if device_type != "cuda":
        return f"the kernels run on CUDA and ROCm devices, not on {device_type!r}"
    if arch.startswith("sm_") and int(arch[3:]) < OLDEST_SM:
        return f"{arch} is older than sm_{OLDEST_SM}, the oldest NVIDIA GPU the kernels are compiled for"
    return None
