"""Everything `lora_branch` refuses: the class, the whole message, and that it comes before any work."""

import math

import pytest
import torch

from lora_kernels import (
    ArgumentError,
    DeviceError,
    DtypeError,
    LoRAKernelsError,
    ShapeError,
    UnsupportedError,
    lora_branch,
    validation,
)
from tests.linear_cases import Nothing

M, N, K, R = 6, 8, 5, 3
NAMES = ("base_out", "x", "lora_A", "lora_B")


def arguments(**changes):
    shapes = {"base_out": (M, N), "x": (M, K), "lora_A": (R, K), "lora_B": (N, R)}
    return {**{name: torch.ones(shape) for name, shape in shapes.items()}, **changes}


def refused(error, message, **changes):
    given = arguments(**changes)
    with Nothing(), pytest.raises(error) as caught:
        lora_branch(**given)
    assert type(caught.value) is error
    assert isinstance(caught.value, LoRAKernelsError)
    assert str(caught.value) == message


t = torch.ones
SHAPES = {
    "0-d x": ({"x": t(())}, "x must be [*, K]; got a 0-d tensor. Pass at least one dimension, the features."),
    "other K": (
        {"x": t(M, 7)},
        "x must be [*, K] = [*, 5] to match lora_A [3, 5]; got [6, 7]. Check the layer that the adapter was made for.",
    ),
    "lora_A.T": (
        {"lora_A": t(K, R)},
        "x must be [*, K] = [*, 3] to match lora_A [5, 3]; got [6, 5]. Did you pass lora_A.T?",
    ),
    "1-D lora_A": ({"lora_A": t(K)}, "lora_A must be [R, K], two-dimensional; got [5]. Reshape it."),
    "3-D lora_B": ({"lora_B": t(N, R, 1)}, "lora_B must be [N, R], two-dimensional; got [8, 3, 1]. Reshape it."),
    "no inputs": (
        {"x": t(M, 0), "lora_A": t(R, 0)},
        "lora_A must be [R, K] with 1 <= R <= 512 and K >= 1; got [3, 0]. There is nothing to compute.",
    ),
    "rank 0": (
        {"lora_A": t(0, K), "lora_B": t(N, 0)},
        "lora_A must be [R, K] with 1 <= R <= 512 and K >= 1; got [0, 5]. There is nothing to compute.",
    ),
    "rank 513": (
        {"lora_A": t(513, K), "lora_B": t(N, 513)},
        "lora_A must be [R, K] with 1 <= R <= 512 and K >= 1; got [513, 5]. Use a smaller rank, or merge the adapter.",
    ),
    "lora_B.T": (
        {"lora_B": t(R, N)},
        "lora_B must be [N, R] = [N, 3] to match lora_A [3, 5]; got [3, 8]. Did you pass lora_B.T?",
    ),
    "lora_B of another rank": (
        {"lora_B": t(N, 4)},
        "lora_B must be [N, R] = [N, 3] to match lora_A [3, 5]; got [8, 4]. "
        "Check that lora_A and lora_B belong together.",
    ),
    "no outputs": (
        {"base_out": t(M, 0), "lora_B": t(0, R)},
        "lora_B must be [N, R] with N >= 1; got [0, 3]. There is nothing to compute.",
    ),
    "base_out of another N": (
        {"base_out": t(M, 9)},
        "base_out must be [*, N] = [6, 8] to match x [6, 5] and lora_B [8, 3]; got [6, 9]. "
        "Pass what the base layer returned for this x.",
    ),
    "base_out of fewer tokens": (
        {"base_out": t(1, N)},
        "base_out must be [*, N] = [6, 8] to match x [6, 5] and lora_B [8, 3]; got [1, 8]. "
        "Pass what the base layer returned for this x.",
    ),
    "base_out flattened": (
        {"base_out": t(M, N), "x": t(2, 3, K)},
        "base_out must be [*, N] = [2, 3, 8] to match x [2, 3, 5] and lora_B [8, 3]; got [6, 8]. "
        "Pass what the base layer returned for this x.",
    ),
    "0-d base_out": (
        {"base_out": t(()), "x": t(K)},
        "base_out must be [*, N] = [8] to match x [5] and lora_B [8, 3]; got []. "
        "Pass what the base layer returned for this x.",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case):
    changes, message = SHAPES[case]
    refused(ShapeError, message, **changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [[[1.0]], 1.0, None], ids=["list", "float", "None"])
def test_not_a_tensor(name, value):
    kind = type(value).__name__
    refused(DtypeError, f"{name} must be a torch.Tensor; got {kind}. Convert it with torch.as_tensor.", **{name: value})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_not_floating_point(name, dtype):
    # What a quantised base stores may be uint8; what it returns is not.
    refused(
        DtypeError,
        f"{name} must be a floating-point tensor; got {str(dtype)[6:]}. Complex and integer LoRA is not defined here; "
        "convert it.",
        **{name: arguments()[name].to(dtype)},
    )


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_fp8_is_refused_wherever_it_stands(name, backend):
    changed = {name: arguments()[name].to(torch.float8_e4m3fn)}
    with pytest.raises(DtypeError, match=rf"{name}.* must .*got .*float8_e4m3fn.*Convert"):
        lora_branch(**arguments(**changed), backend=backend)


def test_base_outs_dtype():
    refused(
        DtypeError,
        "base_out must be float32, float16, bfloat16 or float64 on cpu; got float8_e5m2. Convert base_out.",
        base_out=t(M, N).to(torch.float8_e5m2),
    )
    same = {"x": torch.float32, "lora_A": torch.float32, "lora_B": torch.float32}
    with pytest.raises(DtypeError) as caught:
        validation.check_dtypes("cuda", **same, base_out=torch.float64)
    assert str(caught.value) == (
        "base_out must be float32, float16 or bfloat16 on cuda; got float64. Convert base_out."
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        validation.check_dtypes("cuda", **same, base_out=dtype)
        assert lora_branch(**arguments(base_out=t(M, N, dtype=dtype))).dtype == dtype


def test_adapters_share_a_dtype_that_is_xs_or_fp32():
    refused(
        DtypeError,
        "lora_A and lora_B must share a dtype; got float32 and bfloat16. Convert one of them.",
        lora_B=t(N, R, dtype=torch.bfloat16),
    )
    refused(
        DtypeError,
        "lora_A and lora_B must have x's dtype, float32, or be float32; got float16. Convert them.",
        lora_A=t(R, K, dtype=torch.float16),
        lora_B=t(N, R, dtype=torch.float16),
        base_out=t(M, N, dtype=torch.float16),  # base_out's dtype is no excuse
    )


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name):
    meta = arguments()[name].to("meta")
    refused(
        DeviceError,
        f"{name} must hold data; got a meta tensor of shape {list(meta.shape)}. "
        "Materialise the layer first, e.g. with module.to_empty(device=...) and loading its state.",
        **{name: meta},
    )


def test_mixed_devices():
    class Elsewhere(torch.Tensor):
        """A tensor that says it is on the second GPU; there is none here."""

        @property
        def device(self):
            return torch.device("cuda:1")

    for name in ("base_out", "lora_A", "lora_B"):
        refused(
            DeviceError,
            f"{name} must be on x's device, cpu; got cuda:1. Move it with {name}.to('cpu').",
            **{name: arguments()[name].as_subclass(Elsewhere)},
        )


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan, True, "0.1", None])
def test_dropout_p(p):
    refused(
        ArgumentError,
        f"dropout_p must be a number in [0, 1); got {p!r}. Dropping everything (p = 1) leaves no LoRA to train.",
        dropout_p=p,
    )


@pytest.mark.parametrize("scaling", [math.nan, math.inf, "2", None, True])
def test_scaling(scaling):
    refused(
        ArgumentError, f"scaling must be a finite number, usually lora_alpha / r; got {scaling!r}.", scaling=scaling
    )


@pytest.mark.parametrize("backend", ["cuda", "", None, ["torch"]], ids=str)
def test_backend(backend):
    refused(
        ArgumentError,
        f"backend must be one of 'auto', 'torch', 'triton', 'reference'; got {backend!r}.",
        backend=backend,
    )


SEEDS = {
    "float": (DtypeError, 1.5, "dropout_seed must be an int, a one-element int64 tensor or None; got float."),
    "int32 tensor": (
        DtypeError, torch.ones(1, dtype=torch.int32),
        "dropout_seed must be int64; got int32. Convert it with .to(torch.int64).",
    ),
    "two seeds": (
        ShapeError, torch.ones(2, dtype=torch.int64),
        "dropout_seed must have one element; got shape [2]. Draw one seed per call.",
    ),
    "elsewhere": (
        DeviceError, torch.ones(1, dtype=torch.int64, device="meta"),
        "dropout_seed must be on x's device, cpu; got meta. Draw it with device='cpu'.",
    ),
    "65 bits": (
        ArgumentError, 2**64, f"dropout_seed must fit in 64 bits; got {2**64}. Use torch.seed() or a smaller int.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEDS)
def test_seed(case):
    error, seed, message = SEEDS[case]
    refused(error, message, dropout_p=0.5, dropout_seed=seed)


@pytest.mark.parametrize("wide", ["x", "base_out"])
def test_an_explicit_backend_that_cannot_serve(wide):
    given = arguments()
    if wide == "x":
        given = {name: value.double() for name, value in given.items()}
    else:
        given["base_out"] = given["base_out"].double()
    with Nothing(), pytest.raises(UnsupportedError, match=r"^backend='triton' cannot serve.*: .*Use backend='auto'"):
        lora_branch(**given, backend="triton")


def test_nothing_fails():
    # The guard itself must be able to fail.
    with Nothing(), pytest.raises(AssertionError, match="ran before"):
        lora_branch(**arguments())
