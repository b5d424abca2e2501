"""Masks of shards: computed piece by piece, with each piece's place in the whole input, the whole call's results."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import Shard, distribute_tensor

from lora_kernels import (
    ArgumentError,
    DeviceError,
    DtypeError,
    LoRALinear,
    ShapeError,
    UnsupportedError,
    lora_branch,
    lora_linear,
)
from lora_kernels.reference.philox import keep_mask
from lora_kernels.testing import make_branch_inputs, make_linear_inputs, run_branch, run_linear
from tests.equality import assert_same_numbers

BACKENDS = ("torch", "reference")
M, N, K, R, P = 22, 9, 40, 3, 0.4


@pytest.mark.parametrize("offset", [(0, 0), (5, 0), (0, 16), (7, 24), (2**31 - 3, 2**31 - 8), (2**32 - 40, 8)])
def test_the_mask_is_a_window_of_the_wholes(offset):
    seed = torch.tensor([-9, *offset])
    window = keep_mask(torch.tensor([-9]), M, K, P, first_row=offset[0], first_column=offset[1])
    assert torch.equal(keep_mask(seed, M, K, P), window)
    # And blocks within the shard count from its beginning.
    assert torch.equal(keep_mask(seed, 4, 8, P, first_row=3, first_column=16), window[3:7, 16:24])


@pytest.mark.parametrize("row", [2**32 - 4, 2**32 + 7, -1])
def test_rows_wrap_alike(row):
    # Counters are 32 bits wide, as in the kernels; a row in a tensor is not looked at, whatever it is.
    masks = [keep_mask(torch.tensor([5]), 1, K, 0.5, first_row=(row + i) % 2**32) for i in range(10)]
    options = {"dropout_p": 0.5, "dropout_seed": 5, "dropout_offset": (torch.tensor(row), 0)}
    for backend in BACKENDS:
        y = lora_linear(torch.ones(10, K), torch.zeros(K, K), torch.eye(K), torch.eye(K), **options, backend=backend)
        assert torch.equal(y != 0, torch.cat(masks)), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_the_batch_are_the_whole(backend):
    whole = make_linear_inputs(M, N, K, R, dtype=torch.float64, dropout_p=P, seed=4)
    expected = run_linear(whole, backend)
    pieces = [
        run_linear(replace(whole, x=whole.x[rows], dy=whole.dy[rows], dropout_offset=(rows.start, 0)), backend)
        for rows in (slice(0, 5), slice(5, 13), slice(13, M))
    ]
    for name in ("y", "d_x"):
        torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), expected[name])
    for name in ("d_lora_A", "d_lora_B", "d_weight", "d_bias"):
        torch.testing.assert_close(sum(piece[name] for piece in pieces), expected[name])
    at_zero = run_linear(replace(whole, x=whole.x[5:13], dy=whole.dy[5:13]), backend)
    assert not torch.allclose(at_zero["y"], expected["y"][5:13])  # the offset is what made them agree


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_the_features_are_the_whole(backend):
    whole = make_linear_inputs(M, N, K, R, dtype=torch.float64, bias=False, dropout_p=P, seed=4)
    expected = run_linear(whole, backend)
    pieces = []
    for columns in (slice(0, 16), slice(16, K)):
        x, weight, lora_A = (t[:, columns] for t in (whole.x, whole.weight, whole.lora_A))
        shard = replace(whole, x=x, weight=weight, lora_A=lora_A, dropout_offset=(0, columns.start))
        pieces.append(run_linear(shard, backend))
    for name in ("d_x", "d_lora_A", "d_weight"):
        torch.testing.assert_close(torch.cat([piece[name] for piece in pieces], 1), expected[name])
    for name in ("y", "d_lora_B"):
        torch.testing.assert_close(sum(piece[name] for piece in pieces), expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_branch_has_the_same_masks(backend):
    whole = make_branch_inputs(M, N, K, R, dtype=torch.float64, dropout_p=P, seed=4)
    expected = run_branch(whole, backend)
    shard = replace(whole, base_out=whole.base_out[6:], x=whole.x[6:], dy=whole.dy[6:], dropout_offset=(6, 0))
    torch.testing.assert_close(run_branch(shard, backend)["y"], expected["y"][6:])
    torch.testing.assert_close(run_branch(shard, backend)["d_x"], expected["d_x"][6:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_may_be_tensors(backend):
    i = make_linear_inputs(M, N, K, R, dtype=torch.float32, dropout_p=P)
    arguments = (i.x, i.weight, i.lora_A, i.lora_B)
    options = {"dropout_p": P, "dropout_seed": 3, "backend": backend}
    y = lora_linear(*arguments, **options, dropout_offset=(11, 8))
    for row in (torch.tensor(11), torch.tensor([11])):
        assert_same_numbers(lora_linear(*arguments, **options, dropout_offset=(row, torch.tensor([8]))), y)


def test_a_whole_input_keeps_eight_bytes_and_a_shard_twenty_four():
    i = make_linear_inputs(M, N, K, R, dtype=torch.float32, dropout_p=P)
    for offset, count in ((None, 1), ((0, 0), 3)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            lora_linear(i.x, i.weight, i.lora_A.clone().requires_grad_(), i.lora_B, dropout_p=P, dropout_offset=offset)
        assert [t.numel() for t in saved if t.dtype == torch.int64] == [count]


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning")
def test_one_compilation_for_every_offset():
    torch._dynamo.reset()
    i = make_linear_inputs(M, N, K, R, dtype=torch.float32, dropout_p=P)
    compilations = CompileCounterWithBackend("aot_eager")

    def call(x, row, seed):
        return lora_linear(
            x, i.weight, i.lora_A, i.lora_B, dropout_p=P, dropout_seed=seed, dropout_offset=(row, 8), backend="torch"
        )

    compiled = torch.compile(call, fullgraph=True, backend=compilations)
    for row in (2, 7, 300):
        arguments = (i.x, torch.tensor([row]), torch.tensor([5]))
        assert_same_numbers(compiled(*arguments), call(*arguments))
    assert compilations.frame_count == 1


BAD = {
    "no pair": (ArgumentError, 8, "dropout_offset must be a (row, column) pair or None; got 8."),
    "three": (ArgumentError, (1, 8, 0), "dropout_offset must be a (row, column) pair or None; got (1, 8, 0)."),
    "negative": (
        ArgumentError,
        (-1, 0),
        "dropout_offset's row must be an int from 0 to 2^32 - 1, or a one-element int64 tensor; got -1.",
    ),
    "too large": (
        ArgumentError,
        (2**32, 0),
        f"dropout_offset's row must be an int from 0 to 2^32 - 1, or a one-element int64 tensor; got {2**32}.",
    ),
    "float": (
        ArgumentError,
        (0, 8.0),
        "dropout_offset's column must be an int from 0 to 2^32 - 1, or a one-element int64 tensor; got 8.0.",
    ),
    "odd column": (
        ArgumentError,
        (0, 12),
        "dropout_offset's column must be a multiple of 8, since so many columns share one random number; got 12. Shard "
        "in_features in such multiples, or set dropout_p to 0.",
    ),
    "int32": (
        DtypeError,
        (torch.tensor([1], dtype=torch.int32), 0),
        "dropout_offset's row must be int64; got int32. Convert it with .to(torch.int64).",
    ),
    "two rows": (
        ShapeError,
        (torch.tensor([1, 2]), 0),
        "dropout_offset's row must have one element; got shape [2]. It is where x begins.",
    ),
    "elsewhere": (
        DeviceError,
        (0, torch.zeros(1, dtype=torch.int64, device="meta")),
        "dropout_offset's column must be on x's device, cpu; got meta. Draw it with device='cpu'.",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_bad_offsets(case, p):
    error, offset, message = BAD[case]
    t = torch.ones(2, 2)
    for call in (
        lambda: lora_linear(t, t, t, t, dropout_p=p, dropout_offset=offset),
        lambda: lora_branch(t, t, t, t, dropout_p=p, dropout_offset=offset),
    ):
        with pytest.raises(error) as info:
            call()
        assert str(info.value) == message


@pytest.fixture
def one_rank():
    """A mesh of this process alone: DTensors of one shard, which is the whole, and still no plain tensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_weight_is_refused_by_the_layers_name(one_rank):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(LoRALinear(8, 6, r=2)))
    layer = model[1][0]
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, one_rank, [Shard(0)]))
    told = (
        "must be a whole tensor; got a DTensor of [6, 8] placed as [Shard(dim=0)], of which this rank holds [6, 8]. "
        "Under fully_shard, call the module that was sharded, whose forward gathers its parameters, and shard no part "
        "of a LoRA layer by itself; for tensor parallel, give the layer LoRAColwiseParallel or LoRARowwiseParallel of "
        "lora_kernels.distributed."
    )
    x = torch.ones(2, 8)
    for call, named in (
        (lambda: model(x), "weight of LoRALinear '1.0' "),
        (lambda: layer(x), "weight of LoRALinear "),
        (lambda: lora_linear(x, layer.weight, layer.lora_A, layer.lora_B), "weight "),
        (lambda: lora_branch(x, layer.weight, layer.lora_A, torch.ones(8, 2)), "x "),
    ):
        with pytest.raises(UnsupportedError) as info:
            call()
        assert str(info.value) == named + told
