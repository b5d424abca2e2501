"""Problem → Plan: the backend, the strategy of each direction, the tiles and the reason, from rules in one place.

What can serve a direction is a list of ways. Where this device has measured them (`lora-kernels tune`), the fastest is
taken; elsewhere, on a GPU, the one that the cost model finds cheapest, and on a CPU a rule. M counts in buckets of
powers of two, so a stream of batch sizes shares a few plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from lora_kernels.errors import ArgumentError, UnsupportedError
from lora_kernels.planning import tiles
from lora_kernels.planning.cost import Costs, runs_beside
from lora_kernels.planning.device import cpu_capabilities
from lora_kernels.planning.measured import Direction, Key, Timings, row_bucket
from lora_kernels.planning.problem import DIRECTIONS, LIBRARY, Backend, Problem, Strategy, Way, obstacle_to_triton
from lora_kernels.planning.tiles import Tile

UPCAST_ROWS = 16
"""Above this M the weight is converted to fp32 on a CPU whose 16-bit GEMM lacks hardware. Assumed."""
SPLITS_MAX = 64
ONE_PASS_STEPS = 4
"""Steps of K that a split of `one_pass` has at least, to be worth its share of the partial sums."""
WARPS_PER_SM = 8
"""Of a gradient's kernel, whose shares are added up whatever their number: two programs of four warps, or one of eight.
On an H200, dB and dyb from dy [8192, 4096] (64 x 256, 8 warps) take 34.4 us with one a multiprocessor, 36.8 with two;
dA (64 x 64, 4 warps) 36.2 with one, 29.6 with two, 30.0 with four (`bench.kernels`)."""
MIXED_PROGRAMS_PER_SM = {"shrink": 4, "one_pass": 2, "bwd_lora_b": 4}
"""Where fp32 adapters are cut in parts, a program waits for itself, and others fill the time: on an H200 shrink takes
46 us for x [8192, 4096] in one split of K, 33 in four; one_pass at 16 x 4096 x 4096 49 in two, 38 in four; bwd_lora_b
(64 x 64) 60 in four splits of dy's rows, 54 in eight."""
STEPS_OF_A_SECOND = 4
"""Steps that each split has at least where a multiprocessor gets more than one."""
CHOSEN_BY_WAVES = ("gemm_expand_tma", "persistent")
NARROW = 128
NARROW_MARGIN = {"gemm_expand_tma": 1.14, "persistent": 1.05}
"""How much slower an element of a 128 x 128 tile is than one of 128 x 256. On an H200, forward 8192 x 4096 x 4096, both
8 waves of the wider's area: persistent 368 us and 355, descriptors 414 and 364 (`bench.kernels`)."""
MODEL_MARGIN = 1.02
"""What a way must win over the library's by, in the model, to be taken unmeasured: its rates are no better known."""


BACKWARD_OF: Mapping[Strategy, Strategy] = {"one_pass": "fused", "shrink_fused": "fused"}
"""The backward that goes with a forward where nothing else is said; the others have their own name's."""


@dataclass(frozen=True)
class Plan:
    """What will run, and why.

    Attributes:
        backend: of the forward: "torch" (library GEMMs), "triton" or "reference".
        strategy: of the forward. "library" GEMMs in x's dtype, in the triton backend after
            `shrink`, and before `expand` where the adapters are fp32 beside a 16-bit x; "upcast" to fp32
            block by block; "one_pass"; "shrink_fused"; "persistent"; "eager".
        reason: one sentence on the forward, and one on the backward where that was chosen by itself.
        backward: backend and strategy of the backward: "library", "upcast" or "eager" as above; "fused": the GEMM of dx
            adds its low-rank term; "persistent": the same in the persistent kernel.
        costs: microseconds of the ways that were compared for the forward, cheapest first, by their names.
        backward_costs: the same for the backward.
        measured: whether the forward's costs were measured on this device, rather than modelled.
        precision: how fp32 operands are multiplied: "ieee", "tf32" or "tf32x3".
        sm_count: multiprocessors, each of which runs one program of a persistent kernel.
        use_tma: whether the large GEMMs may use tensor descriptors.
        use_pdl: whether the forward's GEMM may start before the shrink ends (programmatic dependent launch, with TMA).
        beside: whether dA is computed on a second stream while the persistent kernel computes dx.
        dy_reads: 1 where dyb and dB share one read of dy; 2 where the shares of dyb would outweigh dy.
        one_pass_splits: how many programs share K under one_pass; past 1, a second launch adds what they found.
        xa_splits, dyb_splits, d_lora_A_splits, d_lora_B_splits: how many programs share each reduction.
        dx_lora_A_splits: the same for dA where one kernel computes it beside the low-rank part of dx, under dropout.
        tiles: the tile of each kernel, by the kernel's name; "backward.<kernel>" where the backward has its own.
    """

    backend: Backend
    strategy: Strategy
    reason: str
    backward: Way | None = None
    costs: tuple[tuple[str, float], ...] = ()
    backward_costs: tuple[tuple[str, float], ...] = ()
    measured: bool = False
    precision: str = "ieee"
    sm_count: int = 1
    use_tma: bool = False
    use_pdl: bool = False
    beside: bool = False
    dy_reads: int = 1
    one_pass_splits: int = 1
    xa_splits: int = 1
    dyb_splits: int = 1
    d_lora_A_splits: int = 1  # noqa: N815 - the tensor's name
    d_lora_B_splits: int = 1  # noqa: N815
    dx_lora_A_splits: int = 1  # noqa: N815
    tiles: tuple[tuple[str, Tile], ...] = ()

    @property
    def backward_way(self) -> Way:
        """`backward`, or what goes with the forward where that is None."""
        return self.backward or Way(self.backend, BACKWARD_OF.get(self.strategy, self.strategy))

    def tile(self, kernel: str, *, backward: bool = False) -> Tile:
        """The tile of one kernel."""
        table = dict(self.tiles)
        own = f"backward.{kernel}"
        return table[own if backward and own in table else kernel]


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` in hardware; unknown counts as yes (the library knows best)."""
    capabilities = cpu_capabilities()
    if capabilities.get("architecture") != "x86_64":
        return True
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(capabilities.get(name, False) for name in names)


def cpu_way(problem: Problem) -> tuple[Way, str]:
    """What serves a CPU, and why."""
    half = problem.dtype in (torch.float16, torch.bfloat16)
    if half and problem.M > UPCAST_ROWS and not _cpu_multiplies(problem.dtype):
        name = str(problem.dtype).removeprefix("torch.")
        return Way("torch", "upcast"), f"this CPU has no {name} matrix instructions, so blocks are computed in fp32"
    return Way("torch", "library"), "library GEMMs serve a CPU best"


def ways_of(problem: Problem, direction: Direction, backends: tuple[Backend, ...]) -> list[Way]:
    """Every composition of these backends that can serve the problem in one direction; at least one for each."""
    backward = direction == "backward"
    ways: list[Way] = []
    if "torch" in backends:
        ways.append(Way("torch", "library"))
        if problem.device_type == "cpu" and problem.dtype in (torch.float16, torch.bfloat16):
            ways.append(Way("torch", "upcast"))
    if "triton" in backends:
        ways.append(Way("triton", "fused" if backward else "shrink_fused"))
        ways.append(Way("triton", "library"))
        if not backward and _one_row_of_tiles(problem):
            ways.append(Way("triton", "one_pass"))
        if _persistent_serves(problem) and not (backward and problem.dropout):
            ways.append(Way("triton", "persistent"))
    return ways


def paired(problem: Problem, plan: Plan, strategy: Strategy) -> Plan:
    """The plan with this strategy forward, whether or not it is the cheapest, and the backward that goes with it."""
    serving = ways_of(problem, "backward", (plan.backend,))
    backward = Way(plan.backend, BACKWARD_OF.get(strategy, strategy))
    return dataclasses.replace(
        plan, strategy=strategy, backward=backward if backward in serving else serving[0], costs=(), backward_costs=()
    )


def _persistent_serves(problem: Problem) -> bool:
    """Whether the persistent kernel can: it has tiles, and rows of every operand are whole 16 bytes.

    It takes fp32 adapters in parts of bf16, which only a bf16 base has.
    """
    whole = all(size % 8 == 0 for size in (problem.N, problem.K, problem.R))
    if problem.width == "mixed" and problem.dtype != torch.bfloat16:
        return False
    return problem.gluon and whole and "persistent" in tiles.kernels_of(problem.family, problem.width)


def _one_row_of_tiles(problem: Problem) -> bool:
    """Whether one_pass reads the weight once: M fits one tile, whose accumulators fit the registers."""
    tile = tiles.tile_of(problem.family, problem.width, "one_pass", rows=problem.M, rank=problem.R)
    return tile is not None and tile.block_m >= problem.M


def kernel_choices(problem: Problem) -> Plan:
    """What the kernels run with, whichever of them run: tiles, splits, precision."""
    family, width, m, rank = problem.family, problem.width, problem.M, problem.R
    table: dict[str, Tile] = {}
    for kernel in tiles.kernels_of(family, width):
        # N of the kernel's own product: the forward's, and K in the backward, whose product is dx.
        forward_only = kernel.startswith("one_pass")
        for name, columns in ((kernel, problem.N), *([] if forward_only else [(f"backward.{kernel}", problem.K)])):
            tile = _of_few_waves(problem, kernel, columns)
            if tile is not None and table.get(kernel) != tile:
                table[name] = tile
    one_pass_splits = 1
    in_parts = width == "mixed" and problem.dtype == torch.bfloat16
    per_sm = MIXED_PROGRAMS_PER_SM if in_parts and family == "hopper" else {}
    if "one_pass" in table:
        one_pass = table["one_pass"]
        one_pass_splits = _splits(
            problem,
            _tiles(m, one_pass.block_m) * _tiles(problem.N, one_pass.block_n),
            problem.K // one_pass.block_k,
            per_sm.get("one_pass", 1),
            each=ONE_PASS_STEPS,
        )
    precision = "ieee"  # the only choice on AMD, whose matrix units multiply fp32
    if family != "cdna3" and width == "mixed":
        precision = "tf32x3"
    elif family != "cdna3" and problem.tf32:
        precision = "tf32"
    n, k = problem.N, problem.K
    shrink, lora_a, lora_b = table["shrink"], table["bwd_lora_a"], table["bwd_lora_b"]
    dx_lora_a = table["bwd_dx_lora_a_dropout"]
    shrink_tiles = _tiles(m, shrink.block_m) * _tiles(rank, shrink.block_r)
    shares_of_dyb = tiles.dyb_columns(family, width, rank=rank, itemsize=problem.dtype.itemsize)
    return Plan(
        backend="triton",
        strategy="shrink_fused",
        reason="",
        precision=precision,
        sm_count=problem.sm_count,
        dy_reads=2 if shares_of_dyb is None else 1,
        use_tma=problem.has_descriptors,
        use_pdl=problem.has_descriptors,  # sm_90 brought both
        beside=runs_beside(problem),
        one_pass_splits=one_pass_splits,
        xa_splits=_splits(problem, shrink_tiles, _tiles(k, shrink.block_k), per_sm.get("shrink", 1)),
        dyb_splits=_splits(problem, shrink_tiles, _tiles(n, shrink.block_k), per_sm.get("shrink", 1)),
        d_lora_A_splits=_splits_of_gradient(problem, lora_a, _tiles(k, lora_a.block_k)),
        d_lora_B_splits=_splits_of_gradient(problem, lora_b, _tiles(n, lora_b.block_n), per_sm.get("bwd_lora_b", 1)),
        dx_lora_A_splits=_splits_of_gradient(problem, dx_lora_a, _tiles(k, dx_lora_a.block_k)),
        tiles=tuple(table.items()),
    )


def _of_few_waves(problem: Problem, kernel: str, columns: int) -> Tile | None:
    """The tile for a product of so many columns; the narrow one where it leaves fewer multiprocessors without work."""
    find = partial(tiles.tile_of, problem.family, problem.width, kernel, rows=problem.M, rank=problem.R)
    wide, narrow = find(columns=columns), find(columns=min(columns, NARROW))
    if kernel not in CHOSEN_BY_WAVES or wide is None or narrow is None:
        return wide

    def time(tile: Tile) -> int:
        return _waves(problem, tile, columns) * tile.block_m * tile.block_n

    return narrow if NARROW_MARGIN[kernel] * time(narrow) < time(wide) else wide


def _waves(problem: Problem, tile: Tile, columns: int) -> int:
    """How often every multiprocessor gets a tile of an [M, columns] product, the last time perhaps not all of them."""
    return _tiles(_tiles(problem.M, tile.block_m) * _tiles(columns, tile.block_n), problem.sm_count)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _splits(problem: Problem, programs: int, steps: int, per_sm: int = 1, *, each: int = 1) -> int:
    """How many ways to split a reduction of `steps`, of `each` at least, so that every multiprocessor has a program.

    More than one, up to per_sm, only as long as each has steps enough to fill its pipeline.
    """
    one, several = (count * problem.sm_count // max(programs, 1) for count in (1, per_sm))
    most = max(min(one, steps // each), min(several, steps // max(each, STEPS_OF_A_SECOND)))
    return max(1, min(most, SPLITS_MAX))


def _splits_of_gradient(problem: Problem, tile: Tile, columns: int, per_sm: int = 1) -> int:
    """The same over rows, for `WARPS_PER_SM` warps at least."""
    programs, steps = columns * _tiles(problem.R, tile.block_r), _tiles(problem.M, tile.block_m)
    return _splits(problem, programs, steps, max(per_sm, WARPS_PER_SM // tile.num_warps))


def _cheapest(
    problem: Problem, direction: Direction, ways: list[Way], timings: Timings
) -> tuple[Way, tuple[tuple[str, float], ...], str]:
    """The way to take, what each would cost, and one sentence."""
    known = {way: timings[str(way)].us for way in ways if str(way) in timings}
    if known:
        return ranked(known, measured=True)
    if len(ways) == 1 or (problem.device_type == "cpu" and LIBRARY not in ways):
        return ways[0], (), ""
    if problem.device_type == "cpu":
        way, reason = cpu_way(problem)
        return way, (), reason
    costs = Costs(problem, dict(kernel_choices(problem).tiles))
    return ranked(
        {way: costs.of(way, backward=direction == "backward") for way in ways},
        measured=False,
    )


def ranked(known: Mapping[Way, float], *, measured: bool) -> tuple[Way, tuple[tuple[str, float], ...], str]:
    """Of microseconds by way: the way to take, the costs in order, and one sentence."""
    order = sorted(known, key=known.__getitem__)
    chosen = order[0]
    source = "measured on this device" if measured else "modelled, not measured on this device"
    if not measured and LIBRARY in known and known[LIBRARY] < MODEL_MARGIN * known[chosen]:
        chosen, source = LIBRARY, f"{source}, and within {MODEL_MARGIN - 1:.0%} of the library's"
    figures = ", ".join(f"{way} {known[way]:.4g} us" for way in order)
    return chosen, tuple((str(way), known[way]) for way in order), f"{source}: {figures}"


def servable(
    problem: Problem, backend: str, dtypes: tuple[torch.dtype, ...], *, triton_available: bool
) -> tuple[tuple[Backend, ...], str]:
    """The backends that a plan for `backend` chooses from, and why, if there is something to say.

    Args:
        problem: what is to be computed, and where.
        backend: "auto", "torch" or "triton".
        dtypes: of the large tensors, each of which the kernels must serve.
        triton_available: whether triton can be imported.

    Raises:
        UnsupportedError: backend="triton" cannot serve the problem; the message says why.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ArgumentError(f"backend must be 'auto', 'torch', 'triton' or 'reference'; got {backend!r}.")
    if backend == "torch":
        return ("torch",), "asked for by name"
    obstacles = [
        obstacle_to_triton(
            dtype, problem.arch, problem.device_type,
            interpreted=problem.interpreted, triton_available=triton_available,
        )
        for dtype in dtypes
    ]  # fmt: skip
    obstacle = next(filter(None, obstacles), None)
    if backend == "triton":
        if obstacle:
            raise UnsupportedError(
                f"backend='triton' cannot serve this problem: {obstacle}. Use backend='auto' to fall back."
            )
        return ("triton",), "asked for by name"
    if problem.device_type == "cpu":
        return ("torch",), "tensors are on the CPU"
    return (("torch",), obstacle) if obstacle else (("torch", "triton"), "")


def make_plan(
    problem: Problem, backend: str, *, triton_available: bool, measured: Mapping[Key, Timings] | None = None
) -> Plan:
    """The plan for one problem; an explicit backend is honoured or raises, only "auto" chooses.

    Args:
        problem: what is to be computed, and where.
        backend: "auto", "torch", "triton" or "reference".
        triton_available: whether triton can be imported.
        measured: times of this device (`measured.table_of`); None where there are none.

    Raises:
        UnsupportedError: the named backend cannot serve the problem; the message says why.
    """
    if backend == "reference":
        return Plan("reference", "eager", "asked for by name")
    problem = dataclasses.replace(problem, M=row_bucket(problem.M))
    backends, why = servable(problem, backend, (problem.dtype,), triton_available=triton_available)
    chosen: dict[Direction, tuple[Way, tuple[tuple[str, float], ...], str]] = {}
    timed: dict[Direction, Timings] = {}
    for direction in DIRECTIONS:
        timed[direction] = (measured or {}).get(problem.key(direction), {})
        chosen[direction] = _cheapest(problem, direction, ways_of(problem, direction, backends), timed[direction])
    (way, costs, reason), (backward, backward_costs, backward_reason) = chosen["forward"], chosen["backward"]
    base = kernel_choices(problem) if "triton" in (way.backend, backward.backend) else Plan("torch", "library", "")
    table = dict(base.tiles)
    for direction in DIRECTIONS:
        prefix = "" if direction == "forward" else "backward."
        timing = timed[direction].get(str(chosen[direction][0]))
        for kernel, tile in timing.tiles if timing else ():
            if direction == "forward" and kernel in table:  # what was tuned forward is no news of the backward
                table.setdefault(f"backward.{kernel}", table[kernel])
            table[prefix + kernel] = tile
    reason = "; ".join(part for part in (why, reason) if part)
    if backward_costs:
        reason += f". Backward: {backward_reason}"
    return dataclasses.replace(
        base,
        backend=way.backend,
        strategy=way.strategy,
        reason=reason,
        backward=backward,
        costs=costs,
        backward_costs=backward_costs,
        measured=str(way) in timed["forward"],
        tiles=tuple(table.items()),
    )
