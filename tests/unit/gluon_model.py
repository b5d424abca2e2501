"""Hopper's asynchronous machinery as a model that runs a Gluon kernel's own source on a CPU.

The functions of kernels/persistent.py are plain Python under their decorator; `run` calls them with the names of Gluon
replaced by this model's. Each partition is a thread, but one runs at a time: at every operation it hands over, and a
seeded scheduler picks who goes on, or which copy under way completes. What the hardware leaves to chance is thus tried
in many orders, and a race does not need to show in the numbers: reading what has not landed, overwriting what is still
being read, storing what no fence has ordered, arriving once too often are errors, and so is a standstill.

Not modelled: layouts, swizzles and register counts, which tests/compile reads from the machine code.
"""

import operator
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lora_kernels.kernels import device, persistent


class ModelError(AssertionError):
    """The kernel did what the hardware does not promise to survive."""


class Scheduler:
    """Partitions that run one at a time and copies that complete some time, in an order drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.may_go_on: dict[int, Callable[[], bool]] = {}  # a partition, and what it waits for
        self.turn: int | None = None
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.local = threading.local()

    @property
    def me(self) -> int:
        return self.local.me

    def hand_over(self, until: Callable[[], bool] = lambda: True) -> None:
        with self.changed:
            self.may_go_on[self.me], self.turn = until, None
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.turn == self.me or self.failure)
            if self.failure:
                raise SystemExit

    def run(self, partitions: list[Callable[[], None]]) -> None:
        def body(me: int, partition: Callable[[], None]) -> None:
            self.local.me = me
            try:
                self.hand_over()
                partition()
            except BaseException as error:  # raised again below, in the caller's thread
                self.failure = self.failure or error
            with self.changed:
                self.may_go_on.pop(me, None)
                self.turn = None
                self.changed.notify_all()

        threads = [threading.Thread(target=body, args=each, daemon=True) for each in enumerate(partitions)]
        for me, thread in enumerate(threads):
            self.may_go_on[me] = lambda: False
            thread.start()
            with self.changed:
                self.changed.wait_for(lambda me=me: self.may_go_on.get(me, bool)() or me not in self.may_go_on)
        while self.may_go_on and not self.failure:
            ready = [me for me, until in self.may_go_on.items() if until()]
            choice = self.random.randrange(len(ready) + len(self.copies)) if ready or self.copies else None
            if choice is None:
                self.failure = ModelError("every partition waits and no copy is under way")
            elif choice >= len(ready):
                try:
                    self.copies.pop(choice - len(ready))()
                except ModelError as error:
                    self.failure = error
            else:
                with self.changed:
                    self.turn = ready[choice]
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.turn is None)
        with self.changed:
            self.changed.notify_all()
        for thread in threads:
            thread.join(5)
        if self.failure:
            raise self.failure
        while self.copies:  # stores that the program has left behind
            self.copies.pop()()


class Barrier:
    """An mbarrier: a phase completes when its arrivals and its bytes have come; then the next one begins."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.completed = 0

    def init(self, count: int) -> None:
        self.count = self.pending = int(count)

    def arrive(self, count: int = 1) -> None:
        if self.pending < count:
            raise ModelError("more arrivals than the barrier counts")
        self.pending -= count
        self._turn_over()

    def add_bytes(self, count: int) -> None:
        self.bytes += count
        self._turn_over()

    def has_completed(self, parity: int) -> bool:
        return self.completed % 2 != parity  # the phase before the first, of parity 1, counts as completed

    def _turn_over(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.completed, self.pending = self.completed + 1, self.count


class Tile:
    """A tile in registers: a tensor with the methods that Gluon's has.

    in_flight: a product may still be adding to it, so that nobody but another product may touch it.
    """

    def __init__(self, t: Tensor, *, in_flight: bool = False) -> None:
        self.accumulated, self.in_flight = t, in_flight

    @property
    def t(self) -> Tensor:
        if self.in_flight:
            raise ModelError("an accumulator read before its last product has ended")
        return self.accumulated

    shape = property(lambda self: list(self.accumulated.shape))

    def to(self, dtype: Any) -> "Tile":
        return self

    def __getitem__(self, index: Any) -> "Tile":
        return Tile(self.t[index])

    def __add__(self, other: Any) -> "Tile":
        return Tile(self.t + (other.t if isinstance(other, Tile) else other))

    __radd__ = __add__

    def __mul__(self, factor: float) -> "Tile":
        return Tile(self.t * factor)

    def __lt__(self, other: int) -> "Tile":
        return Tile(self.t < other)

    def reshape(self, shape: list[int]) -> "Tile":
        return Tile(self.t.reshape(shape))

    def permute(self, *order: int) -> "Tile":
        return Tile(self.t.permute(*order))

    def split(self) -> tuple["Tile", "Tile"]:
        return Tile(self.t[..., 0]), Tile(self.t[..., 1])


class Buffer:
    """One slot of shared memory and who is at it."""

    def __init__(self, shape: list[int]) -> None:
        self.data = torch.full(shape, float("nan"), dtype=torch.float64)
        self.landing = self.leaving = self.readers = 0
        self.unfenced = False


class View:
    """A part of a buffer, or the buffers of a ring."""

    def __init__(self, data: Any, model: "Model", buffer: Buffer | None = None, dtype: Any = None) -> None:
        self.data, self.model, self.buffer, self.dtype = data, model, buffer, dtype

    shape = property(lambda self: list(self.data.shape))

    def index(self, slot: int) -> Any:
        chosen = self.data[slot]
        return chosen if isinstance(chosen, Barrier) else View(chosen.data, self.model, chosen)

    def slice(self, start: int, length: int, dim: int) -> "View":
        return View(self.data.narrow(dim, start, length), self.model, self.buffer)

    def permute(self, order: tuple[int, ...]) -> "View":
        return View(self.data.permute(*order), self.model, self.buffer)

    def store(self, t: Tile) -> None:
        self.model.write(self, t)


class Descriptor:
    """Global memory as the accelerator sees it: zeros beyond its edges, and nothing written there."""

    def __init__(self, t: Tensor, block: list[int], dtype: Any = torch.float64) -> None:
        self.t, self.block, self.layout, self.dtype = t, block, None, dtype
        self.block_type = SimpleNamespace(nbytes=2 * block[0] * block[1], shape=block)
        self.writes = torch.zeros_like(t, dtype=torch.int64)

    def windows(self, first: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(in the tensor, in the block) of what lies in both."""
        sizes = [max(0, min(b, n - f)) for f, b, n in zip(first, self.block, self.t.shape, strict=True)]
        return tuple(slice(f, f + n) for f, n in zip(first, sizes, strict=True)), tuple(slice(0, n) for n in sizes)


class Model:
    """What `persistent` finds under Gluon's names while one program runs."""

    def __init__(self, seed: int, program: int, programs: int, bias: Tensor | None) -> None:
        self.scheduler = Scheduler(seed)
        self.bias = bias
        self.products: dict[int, list[list[Buffer]]] = {}  # of each partition, in flight
        self.stores: dict[int, list[Buffer]] = {}
        self.written: dict[int, list[Buffer]] = {}  # and not fenced since
        self.gl = SimpleNamespace(
            int64="int64", float32="float32", float16=torch.float16, SliceLayout=mock.Mock(), BlockedLayout=mock.Mock(),
            NVMMADistributedLayout=mock.Mock(), static_range=range, num_warps=lambda: 4,
            program_id=lambda axis: program, num_programs=lambda axis: programs,
            zeros=lambda shape, dtype, layout: Tile(torch.full(shape, float("nan"), dtype=torch.float64)),
            arange=lambda start, stop, layout: Tile(torch.arange(start, stop)),
            convert_layout=lambda t, layout: t, load=self.load_bias, allocate_shared_memory=self.allocate,
            static_assert=self.static_assert, warp_specialize=self.warp_specialize,
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, parity: self.scheduler.hand_over(lambda: barrier.has_completed(parity)),
            expect=self.expect, arrive=self.arrive,
        )  # fmt: skip
        self.tma = SimpleNamespace(store_wait=self.store_wait)

    # -- outside the partitions

    def static_assert(self, condition: bool) -> None:
        assert condition

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> View:
        return View([Barrier() if dtype == "int64" else Buffer(shape[1:]) for _ in range(shape[0])], self, dtype=dtype)

    def warp_specialize(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1
        self.scheduler.run([lambda f=f, a=a: f(*a) for f, a in partitions])

    # -- barriers and copies

    def expect(self, barrier: Barrier, count: int) -> None:
        self.scheduler.hand_over()
        barrier.bytes += count
        barrier.arrive()

    def arrive(self, barrier: Barrier, *, count: int, pred: bool = True) -> None:
        self.scheduler.hand_over()
        if pred:
            barrier.arrive(count)

    def load_tile(self, descriptor: Descriptor, first: list[int], barrier: Barrier, to: View) -> None:
        self.scheduler.hand_over()
        buffer = to.buffer
        if buffer.readers or buffer.landing:
            raise ModelError("a copy into a slot that is being read or written")
        buffer.landing, buffer.data[:] = 1, float("nan")
        there, here = descriptor.windows(first)

        def land() -> None:
            buffer.data[:] = 0
            buffer.data[here] = descriptor.t[there]
            buffer.landing = 0
            barrier.add_bytes(-descriptor.block_type.nbytes)

        self.scheduler.copies.append(land)

    def write(self, view: View, t: Tile) -> None:
        self.scheduler.hand_over()
        if view.buffer.leaving:
            raise ModelError("a chunk overwritten while it is being stored")
        view.data[:] = t.t
        view.buffer.unfenced = True
        self.written.setdefault(self.scheduler.me, []).append(view.buffer)

    def store_tile(self, descriptor: Descriptor, first: list[int], source: View) -> None:
        self.scheduler.hand_over()
        buffer = source.buffer
        if buffer.unfenced:
            raise ModelError("a store of what no fence has ordered")
        buffer.leaving += 1
        self.stores.setdefault(self.scheduler.me, []).append(buffer)
        there, here = descriptor.windows(first)

        def leave() -> None:
            descriptor.t[there] = buffer.data[here]
            descriptor.writes[there] += 1
            buffer.leaving -= 1

        self.scheduler.copies.append(leave)

    def store_wait(self, pendings: int) -> None:
        mine = self.stores.setdefault(self.scheduler.me, [])
        oldest = mine[: max(0, len(mine) - pendings)]
        self.scheduler.hand_over(lambda: not any(buffer.leaving for buffer in oldest))
        del mine[: len(oldest)]

    def fence(self) -> None:
        for buffer in self.written.pop(getattr(self.scheduler.local, "me", -1), []):
            buffer.unfenced = False

    # -- arithmetic

    def load_bias(self, pointer: Tile, *, mask: Tile, other: float) -> Tile:
        inside = pointer.t[mask.t]
        values = torch.full(pointer.t.shape, other, dtype=torch.float64)
        values[mask.t] = self.bias[inside]
        return Tile(values)

    def multiply(self, lhs: View, rhs: View, acc: Tile, *, use_acc: bool, is_async: bool) -> Tile:
        assert is_async
        self.scheduler.hand_over()
        for view in (lhs, rhs):
            if view.buffer.landing:
                raise ModelError("a product of what has not landed")
            view.buffer.readers += 1
        self.products.setdefault(self.scheduler.me, []).append([lhs.buffer, rhs.buffer])
        product = lhs.data @ rhs.data
        return Tile(acc.accumulated + product if use_acc else product, in_flight=True)

    def multiply_wait(self, pendings: int, *, deps: list[Tile]) -> Tile:
        self.scheduler.hand_over()
        mine = self.products[self.scheduler.me]
        while len(mine) > pendings:
            for buffer in mine.pop(0):
                buffer.readers -= 1
        return Tile(deps[0].accumulated, in_flight=bool(mine))


def run(
    seed: int, *, lhs: Tensor, weight: Tensor, transpose_weight: bool, s: Tensor, e: Tensor, bias: Tensor | None,
    gain: float, blocks: tuple[int, int, int, int], chunk: int, stages: int, group_m: int, programs: int,
) -> Tensor:  # fmt: skip
    """What `persistent` computes, in fp64, every program in turn; raises ModelError for a broken protocol."""
    block_m, block_n, block_k, block_r = blocks
    (m, k), n, r = lhs.shape, weight.shape[0 if transpose_weight else 1], s.shape[1]
    rhs_block = [block_n, block_k] if transpose_weight else [block_k, block_n]
    dtype = torch.float64 if gain == 1.0 else torch.float16  # which alone has a gain
    out = Descriptor(torch.full((m, n), float("nan"), dtype=torch.float64), [block_m // 2, chunk])
    plain = {
        name: value.fn
        for name, value in vars(persistent).items()
        if type(value).__name__ in ("GluonJITFunction", "JITFunction")
    }
    arithmetic = {"minimum": min, "div_rn": operator.truediv, "float16": torch.float16}
    borrowed = {
        name: FunctionType(getattr(device, name).fn.__code__, {"tl": SimpleNamespace(**arithmetic)})
        for name in ("grouped_tile", "with_gain", "without_gain")
    }
    for program in range(programs):
        model = Model(seed + program, program, programs, bias)
        patches = {
            **plain, **borrowed, "gl": model.gl, "mbarrier": model.mbarrier, "tma": model.tma,
            "load_tile": model.load_tile, "store_tile": model.store_tile, "fence_async_shared": model.fence,
            "warpgroup_mma": model.multiply, "warpgroup_mma_wait": model.multiply_wait,
            "CONSUMERS": 2, "CHUNK": chunk, "CHUNKS_IN_FLIGHT": persistent.CHUNKS_IN_FLIGHT.value,
        }  # fmt: skip
        with ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(mock.patch.object(persistent, name, value))
            persistent.persistent_kernel(
                Descriptor(lhs, [block_m, block_k], dtype), Descriptor(weight, rhs_block),
                Descriptor(s, [block_m, block_k]),
                Descriptor(e.T if transpose_weight else e, rhs_block), out, 0, m, n, k, r, gain,
                HAS_BIAS=bias is not None, RHS_IS_NK=transpose_weight, BLOCK_M=block_m, BLOCK_N=block_n,
                BLOCK_K=block_k, BLOCK_R=block_r, GROUP_M=group_m, STAGES=stages,
            )  # fmt: skip
    if not (out.writes == 1).all():
        raise ModelError("an element of out stored never, or more than once")
    return out.t
