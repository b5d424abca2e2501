"""The persistent GEMM's own source against a model of the hardware: results, races, standstills."""

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from lora_kernels.kernels import persistent
from lora_kernels.kernels.interpreter import is_interpreting
from tests.unit import gluon_model
from tests.unit.gluon_model import ModelError

pytestmark = pytest.mark.skipif(is_interpreting(), reason="TRITON_INTERPRET is set, and it does not run Gluon")


@dataclass(frozen=True)
class Case:
    """Sizes against blocks of 4 x 8 x 4, of out in chunks of 2 columns."""

    m: int = 4
    n: int = 8
    k: int = 4
    r: int = 1
    block_r: int = 2
    stages: int = 3
    programs: int = 1
    group_m: int = 2
    transpose_weight: bool = True
    bias: bool = True
    gain: float = 1.0


CASES = [
    Case(),
    Case(m=1, n=1, k=1),
    Case(k=5, r=5, block_r=4),  # two steps and two of the expand, each with a tail
    Case(k=23, r=2),  # more steps than slots, and no multiple of them
    Case(m=17, n=19, k=9, programs=4, group_m=3),  # several tiles a program, unevenly
    Case(m=17, n=19, k=9, programs=4, group_m=3, transpose_weight=False, bias=False),
    Case(m=9, n=8, k=12, programs=7),  # more programs than tiles
    Case(m=12, n=16, k=4, stages=2),
    Case(m=12, n=16, k=4, r=9, block_r=4, stages=5, transpose_weight=False),
    Case(m=17, n=19, k=9, r=6, block_r=4, programs=2, gain=8.0),
    Case(m=12, n=16, k=4, gain=0.25, bias=False),
]


def run(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the model computes, what it should), exact: small integers in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).double()

    c = case
    lhs, s, e, bias = integers(c.m, c.k), integers(c.m, c.r), integers(c.r, c.n), integers(c.n)
    weight = integers(*((c.n, c.k) if c.transpose_weight else (c.k, c.n)))
    actual = gluon_model.run(
        seed, lhs=lhs, weight=weight, transpose_weight=c.transpose_weight, s=s, e=e, bias=bias if c.bias else None,
        gain=c.gain, blocks=(4, 8, 4, c.block_r), chunk=2, stages=c.stages, group_m=c.group_m, programs=c.programs,
    )  # fmt: skip
    expected = lhs @ (weight.T if c.transpose_weight else weight) + c.gain * s @ e
    return actual, expected + bias if c.bias else expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_order_of_events_gives_the_product(case):
    for seed in range(4):
        actual, expected = run(case, seed)
        assert torch.equal(actual, expected)


# What must not go unseen, each a change of the source; run over several tiles, slots and chunks.
FAULTS = {
    "the loader does not wait": ("load_step", "parity_of(step, STAGES) ^ 1", "parity_of(step, STAGES)"),
    "the loader waits for nothing": ("load_step", "mbarrier.wait(empty.index(slot), parity_of(step, STAGES) ^ 1)", ""),
    "fewer bytes than come": ("load_step", "lhs_desc.block_type.nbytes + ", ""),
    "the multiplier waits for nothing": (
        "multiply_step", "mbarrier.wait(full.index(slot), parity_of(step, STAGES))", "",
    ),
    "a slot goes back while it is read": ("multiply_step", "slot_of(step + STAGES - 1, STAGES)", "slot"),
    "two products in flight": ("multiply_step", "warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "a slot goes back before any was read": ("multiply_step", "pred=accumulate", "pred=True"),
    "acc keeps the tile before": ("multiply_step", "use_acc=accumulate", "use_acc=True"),
    "the last slot is kept": ("consume", "mbarrier.arrive(empty.index(slot_of(step - 1, STAGES)), count=1)", ""),
    "the last product is not waited for": (
        "consume", "acc = warpgroup_mma_wait(0, deps=[acc])\n        mbarrier", "mbarrier",
    ),
    "an fp16 product is divided before it ends": (
        "consume", "acc = warpgroup_mma_wait(0, deps=[acc])\n            acc = without_gain", "acc = without_gain",
    ),
    "the gain is not taken out": ("consume", "acc = without_gain(acc, gain, lhs_ring.dtype)", ""),
    "the expand has its own count": ("consume", "range(steps_over(R, BLOCK_K))", "range(steps_over(R, BLOCK_M // 2))"),
    "one consumer is enough": ("persistent_kernel", "count=CONSUMERS", "count=1"),
    "no fence before a store": ("store_columns", "        fence_async_shared()\n", ""),
    "a chunk is not waited for": ("store_columns", "CHUNKS_IN_FLIGHT - 1)", "CHUNKS_IN_FLIGHT)"),
    "consumers share chunks": ("consume", "CHUNKS_IN_FLIGHT * CONSUMER", "0"),
    "one slot": ("persistent_kernel", "gl.static_assert(STAGES > 1)", "STAGES = 1"),
}  # fmt: skip


def goes_wrong(case: Case, seed: int) -> bool:
    try:
        actual, expected = run(case, seed)
    except ModelError:
        return True
    return not torch.equal(actual, expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    name, old, new = FAULTS[fault]
    source = inspect.getsource(getattr(persistent, name).fn)
    source = source[source.index("def ") :]
    assert source.count(old) == 1
    faulty: dict = {}
    exec(source.replace(old, new), vars(persistent), faulty)
    with mock.patch.object(persistent, name, faulty[name]):
        assert any(goes_wrong(Case(m=16, n=16, k=9, r=6, programs=2, block_r=4, gain=4.0), seed) for seed in range(4))


def test_without_gluon_the_module_says_what_is_missing():
    spec = importlib.util.spec_from_file_location("persistent_without_gluon", persistent.__file__)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"triton.experimental.gluon": None}):
        spec.loader.exec_module(module)
    available = module.persistent_available()
    assert not available
    assert "triton.experimental.gluon" in available.reason
    assert persistent.persistent_available()


def test_what_descriptors_cannot_hold_is_refused():
    def tensor(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    good = {"lhs": tensor(64, 72), "weight": tensor(40, 72), "s": tensor(64, 16), "e": tensor(40, 16).T}

    def serves(**changes) -> bool:
        return persistent.persistent_serves(**(good | {"transpose_weight": True} | changes))

    assert serves()
    assert serves(transpose_weight=False, weight=tensor(72, 40), e=tensor(16, 40))
    assert serves(lhs=tensor(64, 88)[:, 8:80])  # rows of a wider tensor
    refused = {
        "e laid out otherwise than weight": {"e": tensor(16, 40)},
        "a rank that is no multiple of 8": {"s": tensor(64, 12), "e": tensor(40, 12).T},
        "N that is none": {"weight": tensor(41, 72), "e": tensor(41, 16).T},
        "K that is none": {"lhs": tensor(64, 70), "weight": tensor(40, 70)},
        "a first address that is not aligned": {"s": tensor(64, 24)[:, 1:17]},
        "fp32 adapters": {"s": tensor(64, 16, dtype=torch.float32), "e": tensor(40, 16, dtype=torch.float32).T},
        "all fp32": {name: t.float() for name, t in good.items()},
        "two 16-bit dtypes": {"lhs": tensor(64, 72, dtype=torch.float16)},
    }
    assert [why for why, changes in refused.items() if serves(**changes)] == []
