"""The persistent Gluon GEMM on a Hopper GPU: both directions against fp64, and what only a device can show."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lora_kernels.kernels.persistent import persistent, persistent_available, persistent_serves
from lora_kernels.planning.tiles import Tile, tile_of
from lora_kernels.testing import budget_rows, poisoned_allocation

CUDA = torch.device("cuda")
SM_COUNT = torch.cuda.get_device_properties(CUDA).multi_processor_count if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.skipif(not persistent_available(), reason=persistent_available().reason),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = {"forward": True, "dx": False}


def persistent_tile(n: int, rank: int) -> Tile:
    tile = tile_of("hopper", "16", "persistent", columns=n, rank=rank)
    assert tile is not None
    return tile


@dataclass(frozen=True)
class Operands:
    """of out = lhs rhs + bias + s e, as the launcher takes them."""

    lhs: Tensor
    weight: Tensor
    transpose_weight: bool
    s: Tensor
    e: Tensor
    bias: Tensor | None

    @property
    def n(self) -> int:
        return self.e.shape[1]

    def run(self, tile: Tile | None = None, programs: int = SM_COUNT) -> Tensor:
        assert persistent_serves(
            lhs=self.lhs, weight=self.weight, transpose_weight=self.transpose_weight, s=self.s, e=self.e
        )
        return persistent(
            **vars(self), tile=tile or persistent_tile(self.n, self.s.shape[1]), sm_count=programs
        )  # fmt: skip

    def eager(self) -> Tensor:
        """The same by plain PyTorch: a rounding after each operation."""
        rhs = self.weight.T if self.transpose_weight else self.weight
        base = self.lhs @ rhs if self.bias is None else torch.addmm(self.bias, self.lhs, rhs)
        return base + self.s @ self.e

    def truth(self) -> Tensor:
        wide = {name: t.double() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **wide).eager()


def make(m: int, n: int, k: int, r: int, dtype: str, direction: str, *, bias: bool = True, seed: int = 0) -> Operands:
    """Base and low-rank term of about one size; drawn on the CPU, so that a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(CUDA, DTYPES[dtype])

    forward = DIRECTIONS[direction]
    return Operands(
        lhs=normal(m, k),
        weight=normal(*((n, k) if forward else (k, n)), std=k**-0.5),
        transpose_weight=forward,
        s=normal(m, r),
        e=normal(n, r, std=r**-0.5).T if forward else normal(r, n, std=r**-0.5),
        bias=normal(n) if bias else None,
    )


def assert_within_budget(problems: list[Operands], tile: Tile | None = None, programs: int = SM_COUNT) -> None:
    """Over a handful of elements the norm of errors is a matter of luck, so small problems come as several."""
    actual, eager, truth = (
        {"out": torch.cat([f(p).cpu().flatten() for p in problems])}
        for f in (lambda p: p.run(tile, programs), Operands.eager, Operands.truth)
    )
    (row,) = budget_rows(actual, eager, truth)
    assert row.ok, row


def pooled(m: int, n: int, *rest, **options) -> list[Operands]:
    return [make(m, n, *rest, seed=seed, **options) for seed in range(min(10, math.ceil(200 / (m * n))))]


# One tile; tails of every kind; less than a tile; more tiles than programs, by one and by far.
SIZES = [
    (128, 256, 64), (1, 8, 8), (37, 56, 48), (150, 200, 168), (129, 264, 72), (1000, 1032, 520), (4096, 2304, 1024),
]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_over_sizes(dtype, direction, size, bias):
    assert_within_budget(pooled(*size, 16, dtype, direction, bias=bias))


@pytest.mark.parametrize("r", [8, 16, 24, 32, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_over_ranks(dtype, direction, r):
    assert_within_budget([make(300, 520, 136, r, dtype, direction)])


@pytest.mark.parametrize("programs", [1, 3, 7, 10_000])
@pytest.mark.parametrize("n", [128, 520])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_budget_over_grids(direction, n, programs):
    assert_within_budget([make(700, n, 200, 16, "bf16", direction)], programs=programs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_tile_gives_the_same_bits(direction):
    # The order of additions is that of k, whatever the tile, the grid or the trim of the expand.
    operands = make(700, 520, 328, 16, "bf16", direction)
    expected = operands.run()
    for n in (128, 4096):
        for block_r in (16, 32, 64):
            tile = replace(persistent_tile(n, 16), block_r=block_r)
            for stages in (2, 3, tile.num_stages):
                for group_m in (1, 8):
                    actual = operands.run(replace(tile, num_stages=stages, group_m=group_m), SM_COUNT)
                    assert torch.equal(actual, expected), (tile, stages, group_m)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_ones_and_zeros_are_exact(dtype, direction):
    # Each element of out is a small integer that says which row of lhs met which column of rhs.
    k, size, r = 256, 512, 16
    one_hot = torch.eye(k, dtype=DTYPES[dtype], device=CUDA).repeat(2, 1)[:size]
    codes = torch.randint(-128, 128, (k, size), device=CUDA).to(DTYPES[dtype])
    s = torch.eye(r, dtype=DTYPES[dtype], device=CUDA).repeat(size // r, 1)
    e = torch.randint(-128, 128, (r, size), device=CUDA).to(DTYPES[dtype])
    forward = DIRECTIONS[direction]
    operands = Operands(
        one_hot, codes.T.contiguous() if forward else codes, forward, s, e.T.contiguous().T if forward else e, None
    )
    assert torch.equal(operands.run(), (one_hot.float() @ codes.float() + s.float() @ e.float()).to(DTYPES[dtype]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unwritten_memory_does_not_show_and_bits_repeat(dtype, direction):
    operands = make(1111, 1224, 520, 24, dtype, direction)
    expected = operands.run()
    for _ in range(20):
        assert torch.equal(operands.run(), expected)
    with poisoned_allocation():
        assert torch.equal(operands.run(), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_a_wider_tensor_and_nan_around_them(direction):
    operands = make(200, 264, 136, 16, "bf16", direction)

    def widened(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0] + 3, t.shape[1] + 8), float("nan"), dtype=t.dtype, device=CUDA)
        view = wide[: t.shape[0], : t.shape[1]]
        return view.copy_(t)

    e = widened(operands.e.T).T if DIRECTIONS[direction] else widened(operands.e)
    around = replace(
        operands, lhs=widened(operands.lhs), weight=widened(operands.weight), s=widened(operands.s), e=e
    )  # fmt: skip
    assert torch.equal(around.run(), operands.run())


def test_nan_and_inf_stay_in_their_rows():
    operands = make(300, 264, 136, 16, "bf16", "forward")
    expected = operands.run()
    operands.lhs[5, 7], operands.s[200, 3] = float("nan"), float("inf")
    actual = operands.run()
    hit = torch.zeros(300, dtype=torch.bool, device=CUDA)
    hit[[5, 200]] = True
    assert not actual[hit].isfinite().any()
    assert torch.equal(actual[~hit], expected[~hit])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_long_and_large(direction):
    # 58 tiles a program and hundreds of laps of the ring: a slip in a barrier's phase would stand still or show.
    operands = make(8192, 14336, 1024, 16, "bf16", direction)
    actual = operands.run()
    eager = operands.eager()
    assert ((actual.float() - eager.float()).norm() <= 2**-7 * eager.float().norm()).item()
    assert torch.equal(operands.run(), actual)


def test_many_launches_back_to_back():
    operands = make(2048, 2048, 512, 16, "bf16", "forward")
    expected = operands.run()
    results = [operands.run() for _ in range(200)]
    assert all(torch.equal(result, expected) for result in results)


def test_cuda_graph():
    operands = make(512, 520, 136, 16, "bf16", "forward")
    operands.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operands.run()
    operands.lhs.normal_()
    graph.replay()
    assert torch.equal(out, operands.run())
