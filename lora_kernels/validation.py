"""What an operation refuses, and how it says so: argument, rule, what came, what to do.

Each check is one cheap condition; the message is put together only once it has failed. Run before any work, and nowhere
below: ops and kernels trust what they are given.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_kernels.config import BACKENDS, INTERPRETED
from lora_kernels.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from lora_kernels.planning.tiles import MAX_RANK
from lora_kernels.reference.philox import COLUMNS_PER_COUNTER

HALF = (torch.float16, torch.bfloat16)
COMPUTED = (torch.float32, *HALF)
LAYER_DTYPES = (*COMPUTED, torch.float64)
_ORDINARY = (Tensor, nn.Parameter)

Offset = tuple[int | Tensor, int | Tensor] | None


def check_backend(backend: object) -> None:
    """One of the backends' names."""
    if backend not in BACKENDS:
        raise ArgumentError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}.")


def check_rank(name: str, rank: object) -> None:
    """An int from 1 to 512."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ArgumentError(f"{name} must be an int from 1 to {MAX_RANK}; got {rank!r}. Choose a rank such as 8 or 16.")


def check_features(name: str, features: object) -> None:
    """An int of at least 1."""
    if not isinstance(features, int) or isinstance(features, bool) or features < 1:
        raise ArgumentError(f"{name} must be an int of at least 1; got {features!r}.")


def check_dropout_p(p: object, name: str = "dropout_p") -> None:
    """A number in [0, 1)."""
    if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0.0 <= p < 1.0:
        raise ArgumentError(
            f"{name} must be a number in [0, 1); got {p!r}. Dropping everything (p = 1) leaves no LoRA to train."
        )


def check_scaling(scaling: object) -> None:
    """A finite number, or a 0-d floating-point tensor, whose value is not looked at: that would wait for the device."""
    if not isinstance(scaling, Tensor):
        check_finite("scaling", scaling)
    elif scaling.dim() or not scaling.is_floating_point():
        raise ArgumentError(
            "scaling must be a finite number or a 0-d floating-point tensor; got a tensor of shape "
            f"{_shape(scaling)} and dtype {_name(scaling.dtype)}."
        )


def check_finite(name: str, scaling: object) -> None:
    """A finite number, in the range of a float."""
    # Not abs(): of a float, torch 2.11's Dynamo writes a call into the graph, on which its optimiser for DDP breaks.
    most = sys.float_info.max
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool) or not -most <= scaling <= most:
        raise ArgumentError(f"{name} must be a finite number, usually lora_alpha / r; got {scaling!r}.")


def check_dtypes(device_type: str, **dtypes: torch.dtype | None) -> None:
    """x's dtype is computed in, and base_out's; weight has x's; adapters have it or are fp32; the bias has either's."""
    x = dtypes["x"]
    computed = LAYER_DTYPES if device_type == "cpu" else COMPUTED
    if x not in computed:
        raise DtypeError(
            f"x must be {_names(computed)} on {device_type}; got {_name(x)}. Convert x, or run the layer under "
            "torch.autocast."
        )
    if dtypes.get("base_out", x) not in computed:
        raise DtypeError(
            f"base_out must be {_names(computed)} on {device_type}; got {_name(dtypes['base_out'])}. Convert base_out."
        )
    weight = dtypes.get("weight")
    if weight is not None and weight != x:
        raise DtypeError(
            f"weight must have x's dtype, {_name(x)}; got {_name(weight)}. "
            "Convert one of them, or run the layer under torch.autocast, which converts both."
        )
    if dtypes["lora_A"] != dtypes["lora_B"]:
        raise DtypeError(
            f"lora_A and lora_B must share a dtype; got {_name(dtypes['lora_A'])} and {_name(dtypes['lora_B'])}. "
            "Convert one of them."
        )
    if dtypes["lora_A"] not in (x, torch.float32):
        raise DtypeError(
            f"lora_A and lora_B must have x's dtype, {_name(x)}, or be float32; got {_name(dtypes['lora_A'])}. "
            "Convert them."
        )
    bias = dtypes.get("bias")
    if bias is not None and bias not in (x, dtypes["lora_A"]):
        raise DtypeError(
            f"bias must have x's dtype, {_name(x)}, or the adapters', {_name(dtypes['lora_A'])}; got {_name(bias)}. "
            "Convert it."
        )


def check_linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    """Tensors, on one device that holds data, whose shapes fit together. Dtypes are checked after autocast."""
    named = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        named["bias"] = bias
    _check_tensors(named, x)
    if x.dim() >= 1 and weight.dim() == lora_A.dim() == lora_B.dim() == 2:
        k, (n, weight_k), (r, a_k) = x.shape[-1], weight.shape, lora_A.shape
        bias_fits = bias is None or bias.shape == (n,)
        if k == weight_k == a_k and lora_B.shape == (n, r) and bias_fits and k >= 1 and n >= 1 and 1 <= r <= MAX_RANK:
            return
    _refuse_shapes(x, weight, lora_A, lora_B, bias)


def check_branch(base_out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """As `check_linear`, for an operation whose base is an output."""
    _check_tensors({"x": x, "base_out": base_out, "lora_A": lora_A, "lora_B": lora_B}, x)
    if x.dim() >= 1 and lora_A.dim() == lora_B.dim() == 2:
        k, (r, a_k), (n, b_r) = x.shape[-1], lora_A.shape, lora_B.shape
        fit = k == a_k and r == b_r and base_out.shape == (*x.shape[:-1], n)
        if fit and k >= 1 and n >= 1 and 1 <= r <= MAX_RANK:
            return
    _refuse_branch_shapes(base_out, x, lora_A, lora_B)


def _check_tensors(named: dict[str, Tensor], x: Tensor) -> None:  # x comes first among them
    if getattr(x, "is_nested", False):
        raise UnsupportedError(
            "x must be a dense tensor; got a nested one. nn.TransformerEncoder makes them in eval mode: build it with "
            "enable_nested_tensor=False, or pad x."
        )
    device = getattr(x, "device", None)
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(
                f"{name} must be a torch.Tensor; got {type(tensor).__name__}. Convert it with torch.as_tensor."
            )
        if type(tensor) not in _ORDINARY and hasattr(type(tensor), "full_tensor"):
            _refuse_sharded(name, tensor)
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{name} must be a floating-point tensor; got {_name(tensor.dtype)}. Complex and integer LoRA is not "
                "defined here; convert it."
            )
        if tensor.is_meta:
            raise DeviceError(
                f"{name} must hold data; got a meta tensor of shape {_shape(tensor)}. "
                "Materialise the layer first, e.g. with module.to_empty(device=...) and loading its state."
            )
        if tensor.device != device:
            raise DeviceError(
                f"{name} must be on x's device, {device}; got {tensor.device}. Move it with {name}.to({str(device)!r})."
            )


def _refuse_sharded(name: str, tensor: Any) -> NoReturn:
    """For a DTensor: what a rank holds of it would fit together with nothing, or, worse, with another shard."""
    raise UnsupportedError(
        f"{name}{of_layer()} must be a whole tensor; got a DTensor of {_shape(tensor)} placed as "
        f"{list(tensor.placements)}, of which this rank holds {_shape(tensor.to_local())}. Under fully_shard, call the "
        "module that was sharded, whose forward gathers its parameters, and shard no part of a LoRA layer by itself; "
        "for tensor parallel, give the layer LoRAColwiseParallel or LoRARowwiseParallel of lora_kernels.distributed."
    )


def of_layer() -> str:
    """The layer that is being called, by its name in the outermost module that is: a module does not know its own."""
    frame: FrameType | None = sys._getframe()
    called: list[nn.Module] = []
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            called.append(found)
        frame = frame.f_back
    if not called:
        return ""
    names = {id(module): name for name, module in called[-1].named_modules()}
    name = names.get(id(called[0]), "")
    return f" of {type(called[0]).__name__} {name!r}" if name else f" of {type(called[0]).__name__}"


def _refuse_shapes(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> NoReturn:
    if x.dim() == 0:
        raise ShapeError("x must be [*, K]; got a 0-d tensor. Pass at least one dimension, the features.")
    for name, tensor, dims in (
        ("weight", weight, "[N, K]"),
        ("lora_A", lora_A, "[R, K]"),
        ("lora_B", lora_B, "[N, R]"),
    ):
        if tensor.dim() != 2:
            raise ShapeError(f"{name} must be {dims}, two-dimensional; got {_shape(tensor)}. Reshape it.")
    n, k = weight.shape
    if n < 1 or k < 1:
        raise ShapeError(
            f"weight must be [N, K] with N >= 1 and K >= 1; got {_shape(weight)}. There is nothing to compute."
        )
    if x.shape[-1] != k:
        hint = "Did you pass weight.T?" if x.shape[-1] == n else "Check in_features."
        raise ShapeError(f"x must be [*, K] = [*, {k}] to match weight {_shape(weight)}; got {_shape(x)}. {hint}")
    r = lora_A.shape[0]
    if lora_A.shape[1] != k:
        hint = " Did you pass lora_A.T?" if r == k else " Check the layer that the adapter was made for."
        raise ShapeError(
            f"lora_A must be [R, K] = [R, {k}] to match weight {_shape(weight)}; got {_shape(lora_A)}.{hint}"
        )
    if not 1 <= r <= MAX_RANK:
        hint = "Use a rank of at least 1." if r < 1 else "Use a smaller rank, or merge the adapter."
        raise ShapeError(f"lora_A must be [R, K] with 1 <= R <= {MAX_RANK}; got {_shape(lora_A)}. {hint}")
    if lora_B.shape != (n, r):
        hint = " Did you pass lora_B.T?" if lora_B.shape == (r, n) else " Check that lora_A and lora_B belong together."
        raise ShapeError(
            f"lora_B must be [N, R] = [{n}, {r}] to match weight {_shape(weight)} and lora_A {_shape(lora_A)}; "
            f"got {_shape(lora_B)}.{hint}"
        )
    assert bias is not None
    raise ShapeError(
        f"bias must be [N] = [{n}] to match weight {_shape(weight)}; got {_shape(bias)}. Pass one value per output."
    )


def _refuse_branch_shapes(base_out: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> NoReturn:
    if x.dim() == 0:
        raise ShapeError("x must be [*, K]; got a 0-d tensor. Pass at least one dimension, the features.")
    for name, tensor, dims in (("lora_A", lora_A, "[R, K]"), ("lora_B", lora_B, "[N, R]")):
        if tensor.dim() != 2:
            raise ShapeError(f"{name} must be {dims}, two-dimensional; got {_shape(tensor)}. Reshape it.")
    (r, k), n = lora_A.shape, lora_B.shape[0]
    if x.shape[-1] != k:
        hint = "Did you pass lora_A.T?" if x.shape[-1] == r else "Check the layer that the adapter was made for."
        raise ShapeError(f"x must be [*, K] = [*, {k}] to match lora_A {_shape(lora_A)}; got {_shape(x)}. {hint}")
    if k < 1 or not 1 <= r <= MAX_RANK:
        hint = "Use a smaller rank, or merge the adapter." if r > MAX_RANK else "There is nothing to compute."
        raise ShapeError(f"lora_A must be [R, K] with 1 <= R <= {MAX_RANK} and K >= 1; got {_shape(lora_A)}. {hint}")
    if lora_B.shape[1] != r:
        hint = "Did you pass lora_B.T?" if n == r else "Check that lora_A and lora_B belong together."
        raise ShapeError(
            f"lora_B must be [N, R] = [N, {r}] to match lora_A {_shape(lora_A)}; got {_shape(lora_B)}. {hint}"
        )
    if n < 1:
        raise ShapeError(f"lora_B must be [N, R] with N >= 1; got {_shape(lora_B)}. There is nothing to compute.")
    raise ShapeError(
        f"base_out must be [*, N] = {[*x.shape[:-1], n]} to match x {_shape(x)} and lora_B {_shape(lora_B)}; "
        f"got {_shape(base_out)}. Pass what the base layer returned for this x."
    )


def check_servable(backend: str, x: Tensor, base_out: Tensor | None = None) -> None:
    """An explicit triton backend can serve x's device and every dtype; only "auto" may fall back."""
    # While compiling, the op's own plan is left to say so: device look-ups are nothing for Dynamo to trace.
    if backend != "triton" or torch.compiler.is_compiling():
        return
    from lora_kernels.planning.device import device_traits, triton_available
    from lora_kernels.planning.problem import obstacle_to_triton

    arch = device_traits(x.device.type, x.device.index).arch
    for t in (x, base_out):
        obstacle = t is not None and obstacle_to_triton(
            t.dtype, arch, x.device.type, interpreted=INTERPRETED, triton_available=triton_available()
        )
        if obstacle:
            raise UnsupportedError(
                f"backend='triton' cannot serve this call: {obstacle}. Use backend='auto' to fall back."
            )


def check_seed(dropout_seed: Any, dropout_offset: Any, device: torch.device) -> None:
    """None, an int of 64 bits, or a one-element int64 tensor on `device`; and a row and a column to begin at."""
    if dropout_offset is not None:
        _check_offset(dropout_offset, device)
    if dropout_seed is None:
        return
    if isinstance(dropout_seed, Tensor):
        _check_one_int("dropout_seed", dropout_seed, device, "Draw one seed per call.")
        return
    if not isinstance(dropout_seed, int) or isinstance(dropout_seed, bool):
        raise DtypeError(
            f"dropout_seed must be an int, a one-element int64 tensor or None; got {type(dropout_seed).__name__}."
        )
    if not -(2**63) <= dropout_seed < 2**64:
        raise ArgumentError(f"dropout_seed must fit in 64 bits; got {dropout_seed}. Use torch.seed() or a smaller int.")


def _check_one_int(name: str, tensor: Tensor, device: torch.device, hint: str) -> None:
    if tensor.dtype != torch.int64:
        raise DtypeError(f"{name} must be int64; got {_name(tensor.dtype)}. Convert it with .to(torch.int64).")
    if tensor.numel() != 1:
        raise ShapeError(f"{name} must have one element; got shape {_shape(tensor)}. {hint}")
    if tensor.device != device:
        raise DeviceError(
            f"{name} must be on x's device, {device}; got {tensor.device}. Draw it with device={str(device)!r}."
        )


def _check_offset(offset: Any, device: torch.device) -> None:
    if not isinstance(offset, tuple) or len(offset) != 2:
        raise ArgumentError(f"dropout_offset must be a (row, column) pair or None; got {offset!r}.")
    for name, value in zip(("row", "column"), offset, strict=True):
        if isinstance(value, Tensor):
            _check_one_int(f"dropout_offset's {name}", value, device, "It is where x begins.")
        elif not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or not 0 <= value < 2**32:
            raise ArgumentError(
                f"dropout_offset's {name} must be an int from 0 to 2^32 - 1, or a one-element int64 tensor; got "
                f"{value!r}."
            )
    column = offset[1]
    if not isinstance(column, Tensor) and column % COLUMNS_PER_COUNTER:
        raise ArgumentError(
            f"dropout_offset's column must be a multiple of {COLUMNS_PER_COUNTER}, since so many columns share one "
            f"random number; got {column}. Shard in_features in such multiples, or set dropout_p to 0."
        )


def draw_seed(device: torch.device) -> Tensor:
    """[1] int64 from torch's generator for `device`, which manual_seed governs."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def seed_tensor(dropout_seed: int | Tensor | None, dropout_offset: Offset, device: torch.device) -> Tensor:
    """[1] int64 on `device`: what was passed, or a draw; [3] where x is a shard."""
    if dropout_seed is None:
        key = draw_seed(device)
    elif isinstance(dropout_seed, Tensor):
        key = dropout_seed.reshape(1)
    else:
        # torch's own seeds are unsigned: the upper half of their range is the negative half of int64, bit by bit.
        signed = dropout_seed - 2**64 if dropout_seed >= 2**63 else dropout_seed
        key = torch.full((1,), signed, dtype=torch.int64, device=device)
    if dropout_offset is None:
        return key
    beginning = (
        value.reshape(1) if isinstance(value, Tensor) else torch.full((1,), value, dtype=torch.int64, device=device)
        for value in dropout_offset
    )
    return torch.cat([key, *beginning])


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = map(_name, dtypes)
    return f"{', '.join(most)} or {last}"


def _shape(t: Tensor) -> str:
    return str(list(t.shape))
