"""A fork's launches, against a driver that records them: what goes to which stream, and what is freed when."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.kernels import beside, replay
from lora_kernels.kernels.beside import Fork
from lora_kernels.kernels.launch import Launch
from lora_kernels.ops import Needs, _linear_triton
from lora_kernels.planning import make_plan
from lora_kernels.planning.plan import paired
from lora_kernels.testing import make_linear_inputs
from tests.compile.test_launch import WIDTH_DTYPES, problem_of


@pytest.mark.parametrize("width", ["16", "mixed"])
def test_d_a_is_launched_beside_the_product(driver, monkeypatch, width):
    # As written (twice, at first compiled), recorded and repeated: after the fork the product, dA on the second stream,
    # the join. Repeated, no memory is free between fork and join, which the other stream could be given.
    dtype, adapters = WIDTH_DTYPES[width]
    problem = problem_of(width, 0.0)
    plan = replace(paired(problem, make_plan(problem, "triton", triton_available=True), "persistent"), beside=True)
    seen, inside, freed = [], [], []

    class Second:
        cuda_stream = 77

    class Fake(Fork):
        @staticmethod
        def of(device):
            seen.append("fork")
            return Fake(None, Second)

        def join(self):
            freed.append(sum(storage.expired() for storage in inside))
            seen.append("join")

    @contextmanager
    def on(stream):
        monkeypatch.setattr(driver, "stream", stream)
        yield
        monkeypatch.setattr(driver, "stream", 0)

    def keep(binary, grid, args, hook):
        seen.append((driver.names[binary - 1].removesuffix("_kernel"), driver.stream))
        if seen.count("fork") > seen.count("join"):
            tensors = [getattr(arg, "base", arg) for arg in args]
            inside.extend(StorageWeakRef(t.untyped_storage()) for t in tensors if isinstance(t, torch.Tensor))

    def run(launch, stream, args, run=Launch.run):
        with on(stream):
            run(launch, stream, args)

    monkeypatch.setattr(driver, "keep", keep)
    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(torch.cuda, "stream", lambda second: on(second.cuda_stream))
    monkeypatch.setattr(beside, "has_streams", lambda t: True)
    for module in (beside, replay):
        monkeypatch.setattr(module, "Fork", Fake)
    i = make_linear_inputs(16, 64, 80, 16, dtype=dtype, adapter_dtype=adapters)
    needs, xa = Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=False), torch.randn(16, 16, dtype=adapters)
    told = []
    for _ in range(5):
        seen.clear()
        inside.clear()
        _linear_triton.backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, xa, None, 2.0, 0.0, needs, plan)
        told.append(list(seen))
    first, *others = told
    assert all(other == first for other in others)
    fork = first.index("fork")
    assert {stream for _, stream in first[:fork]} == {0}
    assert first[fork + 1 :] == [("persistent", 0), ("bwd_lora_a", 77), ("reduce_partials", 77), "join"]
    assert freed[2:] == [0, 0, 0]
