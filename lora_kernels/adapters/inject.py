"""`add_lora`: LoRA layers into a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lora_kernels import validation
from lora_kernels.adapters.report import AdapterReport, report_on
from lora_kernels.adapters.targets import Names, Targets, check_pattern, pattern_value
from lora_kernels.adapters.tree import Place, lora_places, places
from lora_kernels.errors import ArgumentError, DtypeError, UnsupportedError
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.adapter import (
    AdapterSettings,
    InitLoRAWeights,
    check_adapter_name,
    initialise,
    new_parameters,
    resolve_adapter_dtype,
)
from lora_kernels.nn.adopt import adopt, features, obstacle
from lora_kernels.nn.sharding import ADD_FIRST, check_not_sharded, is_sharded


@dataclass(frozen=True)
class NewAdapter:
    """An adapter for one module, made and not yet attached."""

    place: Place
    settings: AdapterSettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter


def add_lora(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float = 8,
    target_modules: Names,
    lora_dropout: float = 0.0,
    exclude_modules: Names | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    init_lora_weights: InitLoRAWeights = True,
    adapter_dtype: torch.dtype | None = None,
    adapter_name: str = "default",
    backend: str = "auto",
) -> AdapterReport:
    """Puts a LoRA adapter on linears of a model, in place, and freezes the rest.

    Each chosen module turns into a `LoRALinear` and stays the same object: hooks, tied weights and modules that are
    used at several places stay as they are. The new adapter is the active one. On a model that has adapters already it
    is one more, over the same base; then other parameters keep their `requires_grad`, and a merged model is unmerged,
    since a merged layer trains nothing.

    Args:
        model: any module; its own linears are nn.Linear, or transformers' Conv1D.
        r: rank, 1 to 512.
        lora_alpha: numerator of the scaling.
        target_modules: as in PEFT: a list of names, each equal to a module's or its last components ("q_proj",
            "mlp.up_proj"); a string is a regular expression that the whole name matches; "all-linear" is every linear
            but the output embeddings of a transformers model.
        lora_dropout: probability to drop an element of the adapter's input while training, in [0, 1).
        exclude_modules: names, or a regular expression, of modules to leave out.
        rank_pattern: ranks by pattern, for names that differ from r; a pattern is a regular expression for the name or
            for what follows one of its dots, and the first that matches counts.
        alpha_pattern: the same for lora_alpha.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        init_lora_weights: True, "gaussian" or False, as for `LoRALinear`.
        adapter_dtype: of lora_A and lora_B: None for each linear's own, or torch.float32.
        adapter_name: "default" lives in the layer itself, as `lora_A` and `lora_B`; another in a child of it.
        backend: as for `lora_linear`.

    Returns:
        The report: adapted modules and trainable parameters, as data; printed, a table.

    Raises:
        ArgumentError: target_modules matches nothing (with near names), everything is excluded, the model has an
            adapter of this name, or a number is out of range.
        UnsupportedError: a matched module cannot be adapted; named, with the reason.
        DtypeError: adapter_dtype fits no linear it is meant for. After any error the model is as it was.

    Source:
        Hu et al., "LoRA", ICLR 2022; rules of choice: PEFT's LoraConfig.

    Example:
        >>> import torch
        >>> from lora_kernels import add_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> report = add_lora(model, r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["2"])
        >>> [module.name for module in report.modules], report.trainable
        (['0'], 768)
    """
    shared = {
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "init_lora_weights": init_lora_weights,
        "backend": backend,
    }
    AdapterSettings.checked(r=r, lora_alpha=lora_alpha, **shared)  # type: ignore[arg-type]
    ranks = _checked_pattern("rank_pattern", rank_pattern, validation.check_rank)
    alphas = _checked_pattern("alpha_pattern", alpha_pattern, validation.check_finite)
    targets = Targets(target_modules, exclude_modules)
    targets.check()
    modules = places(model)
    chosen = choose(model, modules, targets, adapter_name)

    made = []
    for place in chosen:
        settings = AdapterSettings.checked(
            r=pattern_value(ranks, place.name, r),
            lora_alpha=pattern_value(alphas, place.name, lora_alpha),
            **shared,  # type: ignore[arg-type]
        )
        lora_A, lora_B = _new_parameters(place, settings.r, adapter_dtype)
        initialise(lora_A, lora_B, init_lora_weights)
        made.append(NewAdapter(place, settings, lora_A, lora_B))
    attach(model, adapter_name, made)
    return report_on(model, adapter_name, targets.unmatched(modules))


def choose(model: nn.Module, modules: Sequence[Place], targets: Targets, adapter_name: str) -> list[Place]:
    """The modules for a new adapter, all of which can have it.

    Raises:
        ArgumentError, UnsupportedError: as for `add_lora`.
    """
    check_adapter_name(adapter_name)
    check_model(model, modules)
    owners = [place.name for place, layer in lora_places(model) if adapter_name in layer.adapters]
    if owners:
        raise ArgumentError(
            f"adapter_name must be new to the model; it has {adapter_name!r} on {len(owners)} modules, {owners[0]!r} "
            "first. Choose another name for a second adapter, or call delete_adapter."
        )
    chosen = targets.choose(model, modules)
    if not chosen:
        raise ArgumentError(targets.nothing_chosen(model, modules))
    check_adaptable(chosen)
    return chosen


def check_adaptable(chosen: Sequence[Place]) -> None:
    """Every module can have an adapter.

    Raises:
        UnsupportedError: naming those that cannot, and why.
    """
    found = [f"{place.name!r} ({reason})" for place in chosen if (reason := _obstacle(place)) is not None]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UnsupportedError(
            "target_modules must match linears with a plain floating-point weight only; it matches "
            f"{', '.join(found[:5])}{more}. Narrow target_modules, or name them in exclude_modules."
        )


def check_model(model: nn.Module, modules: Sequence[Place]) -> None:
    """Adapters may be added to the model.

    Raises:
        ArgumentError, UnsupportedError: they would not be trained, or PEFT's are there already.
    """
    if is_wrapped(model):
        raise ArgumentError(
            "model must not be wrapped in DistributedDataParallel yet, which would not synchronise parameters that are "
            "added later; got a wrapped one. Add the adapter first, then wrap."
        )
    sharded = next((place for place in modules if is_sharded(place.module)), None)
    if sharded is not None:
        check_not_sharded(sharded.module, "A new adapter", ADD_FIRST, sharded.name)
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()
    lazy = [name for name, parameter in parameters if is_lazy(parameter)]
    if lazy:
        raise ArgumentError(
            f"model must have all its parameters; got {lazy[0]!r}, which has no shape yet. Call the model once first."
        )
    foreign = [place for place in modules if type(place.module).__module__.partition(".")[0] == "peft"]
    if foreign:
        raise UnsupportedError(
            f"model must not hold PEFT's layers; got {foreign[0].name!r} ({type(foreign[0].module).__name__}). "
            "Call patch_peft to compute them with this package, or PEFT's merge_and_unload first."
        )


def is_wrapped(model: nn.Module) -> bool:
    """Whether DistributedDataParallel stands around the model or in it."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


def check_not_wrapped(model: nn.Module, layers: Sequence[LoRALinear], adapter_name: str) -> None:
    """The adapter of these layers is active already, or there is no wrapper that has registered another's parameters.

    Raises:
        ArgumentError: it would be trained without being synchronised.
    """
    if any(layer.active_adapter != adapter_name for layer in layers) and is_wrapped(model):
        raise ArgumentError(
            "adapter_name must be the active adapter of a model in DistributedDataParallel, which synchronises only "
            f"what required a gradient when it was wrapped; got {adapter_name!r}. Call it on the model inside, then "
            "wrap that anew."
        )


def _obstacle(place: Place) -> str | None:
    if isinstance(place.module, LoRALinear):
        return None
    reason = obstacle(place.module)
    if reason is None and any(isinstance(parent, nn.MultiheadAttention) for parent in place.parents):
        return f"{type(place.module).__name__} whose weight nn.MultiheadAttention reads without calling it"
    return reason


def _new_parameters(place: Place, r: int, adapter_dtype: torch.dtype | None) -> tuple[nn.Parameter, nn.Parameter]:
    weight = base_weight(place)
    dtype = resolve_for(place, adapter_dtype)
    return new_parameters(*features(place.module), r, device=weight.device, dtype=dtype)


def resolve_for(place: Place, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of an adapter for a module.

    Raises:
        DtypeError: naming the module.
    """
    try:
        return resolve_adapter_dtype(base_weight(place).dtype, adapter_dtype)
    except DtypeError as error:
        raise DtypeError(f"{place.name!r}: {error}") from None


def base_weight(place: Place) -> torch.Tensor:
    """The weight of a module that can have an adapter."""
    weight = place.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def attach(model: nn.Module, adapter_name: str, made: Sequence[NewAdapter]) -> None:
    """Gives the modules their adapters, makes these the active ones, unmerged, and freezes a model that had none."""
    others = [layer for _, layer in lora_places(model)]
    if not others:
        model.requires_grad_(False)
    for layer in others:
        layer.set_adapter(None)
    for new in made:
        module = new.place.module
        layer = module if isinstance(module, LoRALinear) else adopt(module)
        encoder_layers = [parent for parent in new.place.parents if isinstance(parent, nn.TransformerEncoderLayer)]
        if encoder_layers:
            _keep_off_the_fast_path(model, encoder_layers, layer)
        layer._attach(adapter_name, new.settings, new.lora_A, new.lora_B)


def _keep_off_the_fast_path(model: nn.Module, encoder_layers: Sequence[nn.Module], layer: LoRALinear) -> None:
    """nn.TransformerEncoderLayer's fast path for inference reads its linears' weights, unless one has a hook.

    nn.TransformerEncoder makes a nested tensor for that path where x is padded, whatever hooks there are.
    """
    if _called not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_called)
    for encoder in model.modules():
        if (
            isinstance(encoder, nn.TransformerEncoder)
            and encoder.use_nested_tensor
            and any(below is one for below in encoder.modules() for one in encoder_layers)
        ):
            encoder.__dict__.update({"use_nested_tensor": False, _NESTED_BEFORE: True})


_NESTED_BEFORE = "_use_nested_tensor_before_lora"


def restore_fast_paths(model: nn.Module, layers: Sequence[LoRALinear]) -> None:
    """Undoes it."""
    for layer in layers:
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _called]:
            del layer._forward_pre_hooks[key]
    for encoder in model.modules():
        if encoder.__dict__.pop(_NESTED_BEFORE, False):
            encoder.__dict__["use_nested_tensor"] = True


def _called(_module: nn.Module, _args: Any) -> None:
    """A hook that does nothing."""


def _checked_pattern(argument: str, patterns: Mapping[str, Any] | None, check: Any) -> Mapping[str, Any]:
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping):
        raise ArgumentError(f"{argument} must be a dict of pattern to value; got {patterns!r}.")
    for pattern, value in patterns.items():
        check_pattern(argument, pattern)
        check(f"{argument}[{pattern!r}]", value)
    return patterns
