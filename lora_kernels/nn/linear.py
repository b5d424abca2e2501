"""`LoRALinear`: a drop-in for torch.nn.Linear whose frozen weight is trained through a LoRA adapter."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.errors import ArgumentError, DeviceError, DtypeError
from lora_kernels.functional import _checks
from lora_kernels.functional.linear import lora_linear

InitLoRAWeights = bool | Literal["gaussian"]


class LoRALinear(nn.Linear):
    """A linear layer with a frozen weight and a trainable low-rank update, computed as one operation.

    y = x W^T + b + scaling * (drop(x) A^T) B^T        scaling = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA

    Args:
        in_features, out_features: K and N, at least 1.
        bias: whether there is a (frozen) bias.
        r: rank, 1 to 512.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability to drop an element of the adapter's input while training, in [0, 1).
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        init_lora_weights: True: A Kaiming-uniform and B zero, so that the new layer equals its base; "gaussian": A
            normal with standard deviation 1 / r and B zero; False: both Kaiming-uniform, for tests that need a non-zero
            update.
        device, dtype: of the frozen weight and bias.
        adapter_dtype: of lora_A and lora_B: dtype, or torch.float32 over a 16-bit weight; None means dtype.
        backend: as for `lora_linear`.

    Attributes:
        weight [N, K], bias [N]: frozen (`requires_grad` False; set it to train them, and they get gradients).
        lora_A [R, K], lora_B [N, R]: trainable.
        merged: whether weight holds W + scaling B A.

    Raises:
        ArgumentError: a size, the rank, alpha, dropout, init scheme or backend is out of range.
        DtypeError: adapter_dtype is neither dtype nor float32.

    Saved for backward:
        Per call, x and M * R elements of the adapters' dtype; nothing of y's size, no mask.

    Source:
        Hu et al., "LoRA", ICLR 2022, section 4.1; rsLoRA: Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023.

    Example:
        >>> import torch
        >>> from lora_kernels import LoRALinear
        >>> layer = LoRALinear(64, 32, r=8, lora_alpha=16, lora_dropout=0.05)
        >>> layer(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 32])
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        768
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRAWeights = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        _checks.check_features("in_features", in_features)
        _checks.check_features("out_features", out_features)
        adapter_dtype = _adapter_dtype(torch.get_default_dtype() if dtype is None else dtype, adapter_dtype)
        self._configure(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, backend)
        # nn.Linear's constructor calls reset_parameters, which here needs the adapters; so the parameters are made by
        # hand.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype), requires_grad=False
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._make_adapter(adapter_dtype)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRAWeights = True,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> LoRALinear:
        """A LoRALinear over an existing layer: shares its weight and bias, which become frozen, and copies nothing.

        Args:
            linear: the base; its weight is [N, K] in a float dtype (quantised layers are not plain linears).
            r: as for the class, like all that follow.
            lora_alpha: numerator of the scaling.
            lora_dropout: probability to drop, in [0, 1).
            use_rslora: divide lora_alpha by sqrt(r).
            init_lora_weights: True, "gaussian" or False.
            adapter_dtype: linear's dtype, or torch.float32.
            backend: as for `lora_linear`.

        Returns:
            A layer on linear's device, in its training mode, that computes what linear does until lora_B is trained.

        Raises:
            DtypeError: linear is not an nn.Linear with a plain floating-point weight.
            ArgumentError: as for the class.
        """
        _check_plain(linear)
        adapter_dtype = _adapter_dtype(linear.weight.dtype, adapter_dtype)
        layer = cls.__new__(cls)
        layer._configure(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, backend)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        layer._make_adapter(adapter_dtype)
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def _configure(
        self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init: InitLoRAWeights, backend: str
    ) -> None:
        _checks.check_rank("r", r)
        _checks.check_finite("lora_alpha", lora_alpha)
        _checks.check_dropout_p(lora_dropout, "lora_dropout")
        _checks.check_backend(backend)
        if init not in (True, False, "gaussian"):
            raise ArgumentError(f"init_lora_weights must be True, False or 'gaussian'; got {init!r}.")
        # nn.Module.__setattr__ works before nn.Module.__init__ for plain values, and __init__ keeps them.
        self.r, self.lora_alpha, self.lora_dropout, self.backend = r, lora_alpha, float(lora_dropout), backend
        self.use_rslora, self.init_lora_weights = use_rslora, init
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)

    def _make_adapter(self, dtype: torch.dtype) -> None:
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty((self.r, self.in_features), device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, self.r), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Unmerges, then initialises weight and bias as nn.Linear does and the adapter as `init_lora_weights` says."""
        self.unmerge()
        super().reset_parameters()
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialises the adapter only: A as PEFT's default does, B at zero unless init_lora_weights is False."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        """[*, in_features] → [*, out_features]; dropout only in training mode; a merged layer is a plain linear."""
        if self.merged:
            return F.linear(input, self.weight, self.bias)
        return lora_linear(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            backend=self.backend,
        )

    @property
    def merged(self) -> bool:
        """Whether weight holds the sum W + scaling B A."""
        return "unmerged_weight" in self._parameters

    @torch.no_grad()
    def merge(self) -> None:
        """weight ← W + scaling B A, added in fp32 and rounded once; no-op when merged.

        The base weight is kept aside, so that `unmerge` restores it to the bit and a weight that other modules share is
        never written to; a merged layer holds N * K elements more. In a merged layer the adapter gets no gradient.
        """
        if self.merged:
            return
        if self.weight.is_meta:
            raise DeviceError("weight must hold data to be merged; got a meta tensor. Materialise the layer first.")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = (self.scaling * self.lora_B.to(wide)) @ self.lora_A.to(wide)
        total = update.add_(self.weight).to(self.weight.dtype)
        base = cast(nn.Parameter, self.weight)
        self.register_parameter("unmerged_weight", base)
        self.weight = nn.Parameter(total, requires_grad=base.requires_grad)

    def unmerge(self) -> None:
        """weight ← W, the same tensor as before `merge`; no-op when not merged."""
        if self.merged:
            self.weight = self._parameters.pop("unmerged_weight")  # type: ignore[assignment]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A merged layer saves what the unmerged one would: base and adapter, never their sum beside the adapter."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = destination.pop(prefix + "unmerged_weight")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads base and adapter; a merged layer is merged again with what it loaded."""
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        """The arguments that differ from a plain linear's."""
        adapter = "" if self.lora_A.dtype == self.weight.dtype else f", adapter_dtype={self.lora_A.dtype}"
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"scaling={self.scaling:.4g}{adapter}{', merged' if self.merged else ''}"
        )


def _adapter_dtype(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The adapters' dtype in a layer of `dtype`, both checked."""
    if dtype not in _checks.LAYER_DTYPES:
        raise DtypeError(f"dtype must be float32, float16, bfloat16 or float64; got {dtype}. Choose one of them.")
    if adapter_dtype not in (None, dtype, torch.float32):
        raise DtypeError(f"adapter_dtype must be the layer's dtype, {dtype}, or torch.float32; got {adapter_dtype}.")
    return dtype if adapter_dtype is None else adapter_dtype


def _check_plain(linear: Any) -> None:
    """Refuses what only looks like a linear: packed or parametrized weights, layers that compute something else."""
    hint = "Dequantise it, merge its adapter or remove its parametrization first, or adapt another layer."
    found = type(linear).__name__
    if isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward:
        weight = linear._parameters.get("weight")
        if weight is None:
            found += " without a weight parameter"
        elif weight.dtype in _checks.LAYER_DTYPES and weight.shape == (linear.out_features, linear.in_features):
            return
        else:
            found += f" with weight {list(weight.shape)} {weight.dtype}"
    raise DtypeError(
        "linear must be an nn.Linear with a floating-point weight parameter [out_features, in_features]; "
        f"got {found}. {hint}"
    )
