"""`LoRALinear`: a drop-in for torch.nn.Linear whose frozen weight is trained through a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import validation
from lora_kernels.errors import ArgumentError, DeviceError, UnsupportedError
from lora_kernels.functional.linear import lora_linear
from lora_kernels.nn import sharding
from lora_kernels.nn.adapter import (
    DEFAULT,
    NO_ADAPTER,
    AdapterSettings,
    InitLoRAWeights,
    NamedAdapter,
    check_adapter_name,
    check_plain,
    child_name,
    initialise,
    merge_again,
    merged_weight,
    move_scalings,
    new_parameters,
    resolve_adapter_dtype,
)

# What the layer shows as its own attributes, of the adapter that is active.
NUMBERS = tuple(field.name for field in fields(AdapterSettings) if field.name != "trains")


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
        active_adapter: name of the adapter whose numbers and parameters the attributes show; a new layer's only one is
            called "default". None where none is active: r is 0 then, and the layer computes its base.
        adapters: the names of all of them.

    Several adapters:
        `add_adapter` puts another one over the same base, `set_adapter` switches. An adapter called "french" keeps its
        parameters in the child `adapter_french` whether it is active or not, so names and state_dict keys never change,
        and each parameter stays the same object for its optimiser. Inactive adapters require no gradient; what they
        required before comes back with them.

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

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: InitLoRAWeights
    backend: str
    scaling: float | Tensor
    active_adapter: str | None
    _named: NamedAdapter | None
    _settings: dict[str, AdapterSettings]
    _merged: bool
    _plain_class: type[nn.Module] = nn.Linear  # what `release` makes of the layer
    fan_in_fan_out = False  # PEFT's name for a weight that is stored as [K, N]
    # (seed, offset) of a call where the batch is spread over ranks that share masks: `distributed.shard_dropout`.
    batch_shard: Callable[[Tensor], tuple[Tensor, tuple[Tensor, int]]] | None = None

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
        validation.check_features("in_features", in_features)
        validation.check_features("out_features", out_features)
        adapter_dtype = resolve_adapter_dtype(torch.get_default_dtype() if dtype is None else dtype, adapter_dtype)
        settings = AdapterSettings.checked(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            backend=backend,
        )
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
        self._start()
        self._attach(DEFAULT, settings, *self._new_parameters(r, adapter_dtype))
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
        check_plain(linear)
        adapter_dtype = resolve_adapter_dtype(linear.weight.dtype, adapter_dtype)
        settings = AdapterSettings.checked(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            backend=backend,
        )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        layer._start()
        layer._attach(DEFAULT, settings, *layer._new_parameters(r, adapter_dtype))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def _start(self) -> None:
        """No adapter yet."""
        self._settings, self._merged = {}, False
        self._show(None, NO_ADAPTER)

    def _new_parameters(self, r: int, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
        return new_parameters(self.in_features, self.out_features, r, device=self.weight.device, dtype=dtype)

    def _show(self, name: str | None, settings: AdapterSettings) -> None:
        """Makes the attributes those of an adapter."""
        self.active_adapter = name
        # The module itself, past nn.Module.__setattr__, which would register it a second time: a compiled forward
        # that read it by its name would be compiled again for each name.
        self.__dict__["_named"] = None if name in (None, DEFAULT) else self._modules[child_name(name)]
        for number in NUMBERS:
            setattr(self, number, getattr(settings, number))

    def _attach(self, name: str, settings: AdapterSettings, lora_A: nn.Parameter, lora_B: nn.Parameter) -> None:
        """Adds an adapter with these parameters, and makes it the active one."""
        merged = self.merged
        self._leave()
        if name == DEFAULT:
            self.register_parameter("lora_A", lora_A)
            self.register_parameter("lora_B", lora_B)
        else:
            self.add_module(child_name(name), NamedAdapter(lora_A, lora_B).train(self.training))
            if merge_again not in self._load_state_dict_post_hooks.values():
                self.register_load_state_dict_post_hook(merge_again)  # type: ignore[no-untyped-call]
        self._settings[name] = replace(settings, trains=(lora_A.requires_grad, lora_B.requires_grad))
        self._show(name, settings)
        if merged:
            self.merge()

    def _leave(self) -> None:
        """No adapter is active; the one that was keeps its numbers, and what is to be trained of it."""
        self.unmerge()
        if self.active_adapter is not None:
            self._settings[self.active_adapter] = self._active_settings()
            for parameter in self._active_parameters():
                parameter.requires_grad_(False)
        self._show(None, NO_ADAPTER)

    def _active_settings(self) -> AdapterSettings:
        numbers = {number: getattr(self, number) for number in NUMBERS}
        lora_A, lora_B = self._active_parameters()
        return AdapterSettings(**numbers, trains=(lora_A.requires_grad, lora_B.requires_grad))

    def _active_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        named = self._named
        return (self.lora_A, self.lora_B) if named is None else (named.lora_A, named.lora_B)

    @property
    def lora_A(self) -> nn.Parameter:
        """[R, K], the active adapter's; in a unit of FSDP, which reads it, the parameter of this name."""
        return self._shown_parameter("lora_A")

    @lora_A.setter
    def lora_A(self, value: nn.Parameter) -> None:
        # nn.Module.__setattr__ registers a Parameter before it comes here; nn.DataParallel's replicas hold tensors.
        self._parameters["lora_A"] = value

    @property
    def lora_B(self) -> nn.Parameter:
        """[N, R], as lora_A."""
        return self._shown_parameter("lora_B")

    @lora_B.setter
    def lora_B(self, value: nn.Parameter) -> None:
        self._parameters["lora_B"] = value

    def _shown_parameter(self, name: str) -> nn.Parameter:
        # FSDP takes what it reads for the parameter that it registered: another adapter's would become that, too.
        if self._named is not None and self._parameters.get(name) is not None and sharding.is_sharded(self):
            return cast(nn.Parameter, self._parameters[name])
        return self._adapter_parameter(name)

    def _adapter_parameter(self, name: str) -> nn.Parameter:
        named = self._named
        try:
            return cast(nn.Parameter, self._parameters[name] if named is None else getattr(named, name))
        except KeyError:
            raise AttributeError(f"{name}: this layer has no active adapter; call set_adapter.") from None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of this layer's adapters, in the order in which they were added."""
        return tuple(self._settings)

    def add_adapter(
        self,
        adapter_name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRAWeights = True,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        """Puts another adapter over the same base, and makes it the active one; arguments as for the class.

        Raises:
            ArgumentError: the layer has an adapter of this name; a number is out of range.
            DtypeError: adapter_dtype is neither the weight's dtype nor float32.
        """
        check_adapter_name(adapter_name)
        sharding.check_not_sharded(self, "add_adapter", sharding.ADD_FIRST)
        if adapter_name in self._settings:
            raise ArgumentError(
                f"adapter_name must be new to the layer; it has {list(self._settings)}; got {adapter_name!r}. "
                "Choose another name, or delete_adapter first."
            )
        settings = AdapterSettings.checked(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            backend=backend,
        )
        lora_A, lora_B = self._new_parameters(r, resolve_adapter_dtype(self.weight.dtype, adapter_dtype))
        initialise(lora_A, lora_B, init_lora_weights)
        self._attach(adapter_name, settings, lora_A, lora_B)

    def set_adapter(self, adapter_name: str | None) -> None:
        """Makes an adapter the active one, or none with None; a merged layer is merged again with it.

        Raises:
            ArgumentError: the layer has no adapter of this name.
        """
        if adapter_name == self.active_adapter:
            return
        if adapter_name is not None:
            self._check_has(adapter_name)
        sharding.check_not_gathered(self, "set_adapter")
        merged = self.merged
        self._leave()
        if adapter_name is not None:
            settings = self._settings[adapter_name]
            self._show(adapter_name, settings)
            for parameter, trains in zip(self._active_parameters(), settings.trains, strict=True):
                parameter.requires_grad_(trains)
        if merged:
            self.merge()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and its parameters; if it was the active one, none is active then.

        Raises:
            ArgumentError: the layer has no adapter of this name.
        """
        self._check_has(adapter_name)
        sharding.check_not_sharded(self, "delete_adapter", sharding.ADD_FIRST)
        if adapter_name == self.active_adapter:
            self._leave()
        if adapter_name == DEFAULT:
            del self._parameters["lora_A"], self._parameters["lora_B"]
        else:
            del self._modules[child_name(adapter_name)]
        del self._settings[adapter_name]

    @torch.no_grad()
    def load_adapter(self, adapter_name: str, settings: AdapterSettings, lora_A: Tensor, lora_B: Tensor) -> None:
        """Writes into the parameters of one of the layer's adapters; of settings, what y depends on: alpha, scaling."""
        sharding.check_not_gathered(self, "load_lora")
        merged = self.merged
        self.unmerge()
        for parameter, tensor in zip(self.parameters_of(adapter_name), (lora_A, lora_B), strict=True):
            sharding.write(parameter, tensor)
        now = self.settings_of(adapter_name)
        scaling = now.scaling.fill_(settings.scaling) if isinstance(now.scaling, Tensor) else settings.scaling
        now = replace(now, lora_alpha=settings.lora_alpha, use_rslora=settings.use_rslora, scaling=scaling)
        self._settings[adapter_name] = now
        if adapter_name == self.active_adapter:
            self._show(adapter_name, now)
        if merged:
            self.merge()

    def settings_of(self, adapter_name: str) -> AdapterSettings:
        """The numbers of one of the layer's adapters."""
        self._check_has(adapter_name)
        return self._active_settings() if adapter_name == self.active_adapter else self._settings[adapter_name]

    def parameters_of(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of one of the layer's adapters, active or not."""
        self._check_has(adapter_name)
        home = self if adapter_name == DEFAULT else cast(nn.Module, self._modules[child_name(adapter_name)])
        return cast(nn.Parameter, home._parameters["lora_A"]), cast(nn.Parameter, home._parameters["lora_B"])

    def _check_has(self, adapter_name: str) -> None:
        if adapter_name not in self._settings:
            raise ArgumentError(
                f"adapter_name must be one of the layer's adapters, {list(self._settings)}; got {adapter_name!r}."
            )

    def reset_parameters(self) -> None:
        """Unmerges, then initialises weight and bias as nn.Linear does and the adapter as `init_lora_weights` says."""
        self.unmerge()
        super().reset_parameters()
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Initialises the active adapter: A as PEFT's default does, B at zero unless init_lora_weights is False."""
        if self.r:
            initialise(*self._active_parameters(), self.init_lora_weights)

    @property
    def _base_weight(self) -> Tensor:
        """The weight as [N, K]."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    def forward(self, input: Tensor) -> Tensor:
        """[*, in_features] → [*, out_features]; dropout only in training mode; a merged layer is a plain linear."""
        # Not "is None": the rank is the same for many adapters, and a compiled graph holds on to what it asked.
        if self._merged or not self.r:
            return F.linear(input, self._base_weight, self.bias)
        dropout_p, seed, offset = self.lora_dropout if self.training else 0.0, None, None
        if dropout_p and self.batch_shard is not None:
            seed, offset = self.batch_shard(input)
        return lora_linear(
            input,
            self._base_weight,
            *self._active_parameters(),
            self.bias,
            scaling=self.scaling,
            dropout_p=dropout_p,
            dropout_seed=seed,
            dropout_offset=offset,
            backend=self.backend,
        )

    @property
    def merged(self) -> bool:
        """Whether weight holds the sum W + scaling B A."""
        return self._merged

    @torch.no_grad()
    def merge(self) -> None:
        """weight ← W + scaling B A, added in fp32 and rounded once; no-op when merged, or when no adapter is active.

        The base weight is kept aside, so that `unmerge` restores it to the bit and a weight that other modules share is
        never written to; a merged layer holds N * K elements more. In a merged layer the adapter gets no gradient.
        """
        if self.merged or self.active_adapter is None:
            return
        sharding.check_not_sharded(self, "merge", sharding.MERGE_ELSEWHERE)
        if self.weight.is_meta:
            raise DeviceError("weight must hold data to be merged; got a meta tensor. Materialise the layer first.")
        if "weight" not in self._parameters:
            raise UnsupportedError(
                "weight must be a parameter of the layer to be merged; got one that is computed, by a parametrization "
                "or pruning. Remove that first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)."
            )
        total = merged_weight(self.weight, *self._active_parameters(), self.scaling, transposed=self.fan_in_fan_out)
        base = cast(nn.Parameter, self.weight)
        self.register_parameter("unmerged_weight", base)
        self.weight = nn.Parameter(total, requires_grad=base.requires_grad)
        self._merged = True

    def unmerge(self) -> None:
        """weight ← W, the same tensor as before `merge`; no-op when not merged."""
        if self.merged:
            sharding.check_not_sharded(self, "unmerge", sharding.MERGE_ELSEWHERE)
            self.weight = self._parameters.pop("unmerged_weight")  # type: ignore[assignment]
            self._merged = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        """As for every module: to(), half(), to_empty(); scalings in tensors follow to the device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move_scalings([self.scaling, *(settings.scaling for settings in self._settings.values())], fn)
        return self

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
        if self.active_adapter is None:
            return f"{super().extra_repr()}, no active adapter"
        named = "" if self.active_adapter == DEFAULT else f", active_adapter={self.active_adapter!r}"
        dtype = self._active_parameters()[0].dtype
        adapter = "" if dtype == self.weight.dtype else f", adapter_dtype={dtype}"
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"scaling={self.scaling:.4g}{adapter}{named}{', merged' if self.merged else ''}"
        )
