"""Everything `lora_linear` refuses: the class, the whole message, and that it comes before any work."""

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
    explain_plan,
    lora_linear,
    validation,
)
from tests.linear_cases import Nothing

M, N, K, R = 6, 8, 5, 3


def arguments(**changes):
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {**{name: torch.ones(shape) for name, shape in shapes.items()}, **changes}


def refused(error, message, **changes):
    given = arguments(**changes)
    with Nothing(), pytest.raises(error) as caught:
        lora_linear(**given)
    assert type(caught.value) is error
    assert isinstance(caught.value, LoRAKernelsError)
    assert str(caught.value) == message


t = torch.ones
SHAPES = {
    "0-d x": (
        {"x": t(())},
        "x must be [*, K]; got a 0-d tensor. Pass at least one dimension, the features.",
    ),
    "other K": (
        {"x": t(M, 7)},
        "x must be [*, K] = [*, 5] to match weight [8, 5]; got [6, 7]. Check in_features.",
    ),
    "other K, 3-D": (
        {"x": t(2, 3, 4)},
        "x must be [*, K] = [*, 5] to match weight [8, 5]; got [2, 3, 4]. Check in_features.",
    ),
    "weight.T": (
        {"weight": t(K, N)},
        "x must be [*, K] = [*, 8] to match weight [5, 8]; got [6, 5]. Did you pass weight.T?",
    ),
    "1-D weight": ({"weight": t(K)}, "weight must be [N, K], two-dimensional; got [5]. Reshape it."),
    "3-D weight": ({"weight": t(1, N, K)}, "weight must be [N, K], two-dimensional; got [1, 8, 5]. Reshape it."),
    "no outputs": (
        {"weight": t(0, K), "lora_B": t(0, R), "bias": t(0)},
        "weight must be [N, K] with N >= 1 and K >= 1; got [0, 5]. There is nothing to compute.",
    ),
    "no inputs": (
        {"x": t(M, 0), "weight": t(N, 0), "lora_A": t(R, 0)},
        "weight must be [N, K] with N >= 1 and K >= 1; got [8, 0]. There is nothing to compute.",
    ),
    "1-D lora_A": ({"lora_A": t(K)}, "lora_A must be [R, K], two-dimensional; got [5]. Reshape it."),
    "lora_A.T": (
        {"lora_A": t(K, R)},
        "lora_A must be [R, K] = [R, 5] to match weight [8, 5]; got [5, 3]. Did you pass lora_A.T?",
    ),
    "lora_A of another layer": (
        {"lora_A": t(R, 9)},
        "lora_A must be [R, K] = [R, 5] to match weight [8, 5]; got [3, 9]. "
        "Check the layer that the adapter was made for.",
    ),
    "rank 513": (
        {"lora_A": t(513, K), "lora_B": t(N, 513)},
        "lora_A must be [R, K] with 1 <= R <= 512; got [513, 5]. Use a smaller rank, or merge the adapter.",
    ),
    "3-D lora_B": ({"lora_B": t(N, R, 1)}, "lora_B must be [N, R], two-dimensional; got [8, 3, 1]. Reshape it."),
    "lora_B.T": (
        {"lora_B": t(R, N)},
        "lora_B must be [N, R] = [8, 3] to match weight [8, 5] and lora_A [3, 5]; got [3, 8]. Did you pass lora_B.T?",
    ),
    "lora_B of another rank": (
        {"lora_B": t(N, 4)},
        "lora_B must be [N, R] = [8, 3] to match weight [8, 5] and lora_A [3, 5]; got [8, 4]. "
        "Check that lora_A and lora_B belong together.",
    ),
    "bias of K": (
        {"bias": t(K)},
        "bias must be [N] = [8] to match weight [8, 5]; got [5]. Pass one value per output.",
    ),
    "2-D bias": (
        {"bias": t(1, N)},
        "bias must be [N] = [8] to match weight [8, 5]; got [1, 8]. Pass one value per output.",
    ),
    "scalar bias": (
        {"bias": t(())},
        "bias must be [N] = [8] to match weight [8, 5]; got []. Pass one value per output.",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case):
    changes, message = SHAPES[case]
    refused(ShapeError, message, **changes)


def test_rank_zero_is_not_told_to_be_smaller():
    given = arguments(lora_A=t(0, K), lora_B=t(N, 0))
    with Nothing(), pytest.raises(ShapeError) as caught:
        lora_linear(**given)
    assert str(caught.value).startswith("lora_A must be [R, K] with 1 <= R <= 512; got [0, 5]. ")
    assert "smaller" not in str(caught.value)


def test_square_layer_cannot_tell_a_transposed_weight_but_takes_it():
    assert lora_linear(t(2, 4), t(4, 4).T, t(1, 4), t(4, 1)).shape == (2, 4)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("value", [[[1.0]], 1.0, "x"], ids=["list", "float", "str"])
def test_not_a_tensor(name, value):
    kind = type(value).__name__
    refused(
        DtypeError,
        f"{name} must be a torch.Tensor; got {kind}. Convert it with torch.as_tensor.",
        **{name: value},
    )


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_none_is_not_a_tensor(name):
    refused(
        DtypeError, f"{name} must be a torch.Tensor; got NoneType. Convert it with torch.as_tensor.", **{name: None}
    )


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_not_floating_point(name, dtype):
    wrong = arguments()[name].to(dtype)
    refused(
        DtypeError,
        f"{name} must be a floating-point tensor; got {str(dtype)[6:]}. Complex and integer LoRA is not defined here; "
        "convert it.",
        **{name: wrong},
    )


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_is_refused_wherever_it_stands(dtype, backend):
    everywhere = {name: value.to(dtype) for name, value in arguments().items()}
    with pytest.raises(
        DtypeError, match=r"^x must be float32, float16, bfloat16 or float64 on cpu; got float8_.*Convert"
    ):
        lora_linear(**everywhere, backend=backend)
    for name, value in everywhere.items():
        with pytest.raises(DtypeError, match=rf"{name}.* must .*got .*{str(dtype)[6:]}.*Convert"):
            lora_linear(**arguments(**{name: value}), backend=backend)


def test_weight_has_xs_dtype_and_bias_that_or_the_adapters():
    refused(
        DtypeError,
        "weight must have x's dtype, float32; got bfloat16. Convert one of them, or run the layer under "
        "torch.autocast, which converts both.",
        weight=t(N, K, dtype=torch.bfloat16),
    )
    half = {name: value.half() for name, value in arguments().items()}
    for adapter_dtype, other in (torch.float16, torch.float32), (torch.float32, torch.bfloat16):
        adapters = {name: half[name].to(adapter_dtype) for name in ("lora_A", "lora_B")}
        told = f"bias must have x's dtype, float16, or the adapters', {str(adapter_dtype)[6:]}; got {str(other)[6:]}"
        with pytest.raises(DtypeError, match=f"^{told}. Convert it.$"):
            lora_linear(**{**half, **adapters, "bias": t(N, dtype=other)})


def test_adapters_share_a_dtype_that_is_xs_or_fp32():
    refused(
        DtypeError,
        "lora_A and lora_B must share a dtype; got float32 and bfloat16. Convert one of them.",
        lora_B=t(N, R, dtype=torch.bfloat16),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        refused(
            DtypeError,
            f"lora_A and lora_B must have x's dtype, float32, or be float32; got {str(dtype)[6:]}. Convert them.",
            lora_A=t(R, K, dtype=dtype),
            lora_B=t(N, R, dtype=dtype),
        )
    half = {name: value.half() for name, value in arguments().items()}
    with pytest.raises(DtypeError, match="must have x's dtype, float16, or be float32; got bfloat16"):
        lora_linear(**{**half, "lora_A": half["lora_A"].bfloat16(), "lora_B": half["lora_B"].bfloat16()})


def test_fp64_elsewhere_than_on_the_cpu():
    fp64 = {"x": torch.float64, "weight": torch.float64, "lora_A": torch.float64, "lora_B": torch.float64}
    with pytest.raises(DtypeError, match=r"^x must be float32, float16 or bfloat16 on cuda; got float64\. Convert x"):
        validation.check_dtypes("cuda", **fp64)
    validation.check_dtypes("cpu", **fp64)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
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

    for name in ("weight", "lora_A", "lora_B", "bias"):
        refused(
            DeviceError,
            f"{name} must be on x's device, cpu; got cuda:1. Move it with {name}.to('cpu').",
            **{name: arguments()[name].as_subclass(Elsewhere)},
        )


@pytest.mark.parametrize("p", [1.0, 1, -0.1, 2, math.nan, math.inf, -math.inf, True, False, "0.1", None, 0.5j])
def test_dropout_p(p):
    refused(
        ArgumentError,
        f"dropout_p must be a number in [0, 1); got {p!r}. Dropping everything (p = 1) leaves no LoRA to train.",
        dropout_p=p,
    )


@pytest.mark.parametrize("scaling", [math.nan, math.inf, "2", None, True, 1j])
def test_scaling(scaling):
    refused(
        ArgumentError,
        f"scaling must be a finite number, usually lora_alpha / r; got {scaling!r}.",
        scaling=scaling,
    )


@pytest.mark.parametrize("scaling", [torch.ones(1), torch.tensor(2), torch.ones(2, 2)], ids=["1-d", "int", "2-d"])
def test_scaling_as_a_tensor(scaling):
    refused(
        ArgumentError,
        "scaling must be a finite number or a 0-d floating-point tensor; got a tensor of shape "
        f"{list(scaling.shape)} and dtype {str(scaling.dtype)[6:]}.",
        scaling=scaling,
    )


@pytest.mark.parametrize("backend", ["cuda", "", "Torch", None, 1, ["torch"]], ids=str)
def test_backend(backend):
    refused(
        ArgumentError,
        f"backend must be one of 'auto', 'torch', 'triton', 'reference'; got {backend!r}.",
        backend=backend,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_explicit_backend_that_cannot_serve(dtype):
    given = {name: value.to(dtype) for name, value in arguments().items()}
    with Nothing(), pytest.raises(UnsupportedError, match=r"^backend='triton' cannot serve.*: .*Use backend='auto'"):
        lora_linear(**given, backend="triton")


SEEDS = {
    "float": (DtypeError, 1.5, "dropout_seed must be an int, a one-element int64 tensor or None; got float."),
    "str": (DtypeError, "1", "dropout_seed must be an int, a one-element int64 tensor or None; got str."),
    "bool": (DtypeError, True, "dropout_seed must be an int, a one-element int64 tensor or None; got bool."),
    "generator": (
        DtypeError,
        torch.Generator(),
        "dropout_seed must be an int, a one-element int64 tensor or None; got Generator.",
    ),
    "int32 tensor": (
        DtypeError,
        torch.ones(1, dtype=torch.int32),
        "dropout_seed must be int64; got int32. Convert it with .to(torch.int64).",
    ),
    "float tensor": (
        DtypeError,
        torch.ones(1),
        "dropout_seed must be int64; got float32. Convert it with .to(torch.int64).",
    ),
    "two seeds": (
        ShapeError,
        torch.ones(2, dtype=torch.int64),
        "dropout_seed must have one element; got shape [2]. Draw one seed per call.",
    ),
    "no seed": (
        ShapeError,
        torch.ones(0, dtype=torch.int64),
        "dropout_seed must have one element; got shape [0]. Draw one seed per call.",
    ),
    "elsewhere": (
        DeviceError,
        torch.ones(1, dtype=torch.int64, device="meta"),
        "dropout_seed must be on x's device, cpu; got meta. Draw it with device='cpu'.",
    ),
    "65 bits": (
        ArgumentError,
        2**64,
        f"dropout_seed must fit in 64 bits; got {2**64}. Use torch.seed() or a smaller int.",
    ),
    "65 bits, negative": (
        ArgumentError,
        -(2**63) - 1,
        f"dropout_seed must fit in 64 bits; got {-(2**63) - 1}. Use torch.seed() or a smaller int.",
    ),
}


@pytest.mark.parametrize("case", SEEDS)
def test_seed(case):
    error, seed, message = SEEDS[case]
    refused(error, message, dropout_p=0.5, dropout_seed=seed)


def test_torchs_own_seeds_are_taken():
    # They are unsigned 64-bit numbers, and manual_seed(-1) is one of them by its bits.
    for seed in (torch.initial_seed(), torch.Generator().seed(), 2**63):
        assert lora_linear(**arguments(dropout_p=0.5, dropout_seed=seed)).shape == (M, N)
    unsigned = torch.Generator().manual_seed(-1).initial_seed()
    y = [lora_linear(**arguments(dropout_p=0.5, dropout_seed=seed)) for seed in (unsigned, -1)]
    assert torch.equal(*y)


@pytest.mark.parametrize("name", ["M", "N", "K"])
@pytest.mark.parametrize("size", [-1, 0])
def test_explain_plan_sizes(name, size):
    sizes = {"M": 4, "N": 4, "K": 4, "R": 4} | {name: size}
    if name == "M" and size == 0:
        assert explain_plan(**sizes, dtype=torch.float32, device="cpu").backend == "torch"
        return
    with pytest.raises(ArgumentError, match=rf"^{name} must be .*at least .*; got {size}\."):
        explain_plan(**sizes, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("rank", [0, 513, -1, 1.0, True, "8"])
def test_explain_plan_rank(rank):
    with pytest.raises(ArgumentError, match=r"^R must be an int from 1 to 512; got .*Choose a rank such as 8 or 16"):
        explain_plan(4, 4, 4, rank, dtype=torch.float32, device="cpu")


def test_explain_plan_dropout_and_dtypes():
    with pytest.raises(ArgumentError, match="dropout_p must be a number in"):
        explain_plan(4, 4, 4, 4, dtype=torch.float32, device="cpu", dropout_p=1.0)
    with pytest.raises(DtypeError, match="must be float32, float16, bfloat16 or float64 on cpu; got int64"):
        explain_plan(4, 4, 4, 4, dtype=torch.int64, device="cpu")
    with pytest.raises(DtypeError, match="must have x's dtype, float32, or be float32; got float16"):
        explain_plan(4, 4, 4, 4, dtype=torch.float32, adapter_dtype=torch.float16, device="cpu")


def test_nothing_fails():
    # The guard itself must be able to fail.
    with Nothing(), pytest.raises(AssertionError, match="ran before"):
        lora_linear(**arguments())
