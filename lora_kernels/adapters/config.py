"""`adapter_config.json`: what PEFT writes there about a LoRA adapter, read and written."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from lora_kernels import validation
from lora_kernels.adapters.targets import Targets, check_pattern, pattern_value
from lora_kernels.adapters.tree import Place
from lora_kernels.errors import AdapterFileError, ArgumentError
from lora_kernels.nn.adapter import AdapterSettings

NAME = "adapter_config.json"
MAX_BYTES = 2**24  # 16 MiB; a model of thousands of modules, each named in full, comes to 1

V = TypeVar("V")

# Keys of PEFT's that switch on what a plain LoRA layer does not compute.
_FEATURES = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    }
)

# Keys that are read here, that only inform, or that tune a feature which another key switches on.
_HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)

# Of the ways to initialise, those that leave the base weight alone: with the others an adapter means something only
# beside the weight that its initialisation has changed.
_PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class LoRAConfig:
    """A plain LoRA adapter as its config describes it."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    targets: Targets | None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def settings(self, name: str, backend: str = "auto") -> AdapterSettings:
        """The numbers for the module of this name."""
        return AdapterSettings.checked(
            r=pattern_value(self.rank_pattern, name, self.r),
            lora_alpha=pattern_value(self.alpha_pattern, name, self.lora_alpha),
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            backend=backend,
        )


def read_config(path: Path) -> LoRAConfig:
    """The config in a file.

    Raises:
        AdapterFileError: naming the file, the key, what was expected and what was found.
    """
    if path.stat().st_size > MAX_BYTES:
        raise AdapterFileError(
            f"{path}: expected a config of at most {MAX_BYTES:,} bytes; found {path.stat().st_size:,}."
        )
    try:
        raw = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8, and of numbers beyond all measure
        raise AdapterFileError(f"{path}: expected JSON in UTF-8; found {type(error).__name__}: {error}.") from None
    if not isinstance(raw, dict):
        raise AdapterFileError(f"{path}: expected a JSON object; found {_shown(raw)}.")
    return _Reader(path, raw).read()


class _Reader:
    """One file's keys, checked one by one."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw

    def read(self) -> LoRAConfig:
        if self.raw.get("peft_type") != "LORA":
            self.refuse("peft_type", "'LORA'", self.raw.get("peft_type"))
        self.no_other_computation()
        r = self.number("r", 8, validation.check_rank)
        alpha = self.number("lora_alpha", 8, validation.check_finite)
        dropout = self.number("lora_dropout", 0.0, lambda name, value: validation.check_dropout_p(value, name))
        rslora = self.raw.get("use_rslora", False)
        if not isinstance(rslora, bool):
            self.refuse("use_rslora", "true or false", rslora)
        return LoRAConfig(
            r,
            alpha,
            float(dropout),
            rslora,
            self.targets(),
            self.pattern("rank_pattern", validation.check_rank),
            self.pattern("alpha_pattern", validation.check_finite),
        )

    def refuse(self, key: str, expected: str, found: object, hint: str = "") -> NoReturn:
        raise AdapterFileError(f"{self.path}: {key!r} must be {expected}; found {_shown(found)}.{hint}")

    def no_other_computation(self) -> None:
        """Nothing asks for more than B A x beside a frozen linear."""
        if self.raw.get("bias", "none") != "none":
            self.refuse("bias", "'none'", self.raw["bias"], " Trained biases are not supported.")
        init = self.raw.get("init_lora_weights", True)
        if not isinstance(init, bool) and init not in _PLAIN_INITS:
            self.refuse(
                "init_lora_weights",
                f"true, false or one of {', '.join(map(repr, _PLAIN_INITS))}",
                init,
                " This initialisation changes the base weight, so the adapter fits the changed one only; PEFT converts "
                "it on saving: save_pretrained(path_initial_model_for_weight_conversion=...).",
            )
        for key, value in self.raw.items():
            # A key that PEFT has added since: a feature is switched on by true or by a config of its own, while
            # numbers and words tune it.
            unknown = key not in _HARMLESS and (value is True or (isinstance(value, (dict, list)) and bool(value)))
            if (key in _FEATURES and value) or unknown:
                self.refuse(key, "off", value, " This feature is not supported; PEFT computes it.")

    def number(self, key: str, default: float, check: Any) -> Any:
        value = self.raw.get(key, default)
        self.checked(key, value, check)
        return value

    def checked(self, key: str, value: object, check: Any) -> None:
        try:
            check(key, value)
        except ArgumentError as error:
            raise AdapterFileError(f"{self.path}: {error}") from None

    def pattern(self, key: str, check: Any) -> dict[str, Any]:
        patterns = self.raw.get(key) or {}
        if not isinstance(patterns, dict):
            self.refuse(key, "an object of pattern to number", patterns)
        for pattern, value in patterns.items():
            self.checked(f"{key}[{pattern!r}]", pattern, check_pattern)
            self.checked(f"{key}[{pattern!r}]", value, check)
        return dict(patterns)

    def targets(self) -> Targets | None:
        if self.raw.get("target_modules") is None:
            return None
        indices = self.raw.get("layers_to_transform")
        indices = [indices] if isinstance(indices, int) else indices or None
        if indices is not None and not (isinstance(indices, list) and all(isinstance(index, int) for index in indices)):
            self.refuse("layers_to_transform", "a number or a list of numbers", indices)
        after = self.raw.get("layers_pattern")
        after = [after] if isinstance(after, str) else after or []
        if not isinstance(after, list):
            self.refuse("layers_pattern", "a string or a list of strings", after)
        for pattern in after:
            self.checked("layers_pattern", pattern, check_pattern)
        found = Targets(self.raw["target_modules"], self.raw.get("exclude_modules") or None, indices, after)
        try:
            found.check()
        except ArgumentError as error:
            raise AdapterFileError(f"{self.path}: {error}") from None
        return found


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 200 else text[:200] + "…"


def describe(
    modules: Sequence[Place],
    adapted: Mapping[str, AdapterSettings],
    *,
    fan_in_fan_out: bool,
    base_model_name_or_path: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """The config that tells PEFT, and `read_config`, of these layers and of no others: nothing but them is asked.

    Args:
        modules: of the whole model.
        adapted: first name of each adapted module → its numbers.
        fan_in_fan_out: whether the weights are stored transposed.
        base_model_name_or_path: for PEFT's AutoPeftModel.
        task_type: the same.
    """
    rslora = all(settings.use_rslora for settings in adapted.values())
    ranks = {name: settings.r for name, settings in adapted.items()}
    alphas = {name: _alpha(settings, rslora) for name, settings in adapted.items()}
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "alpha_pattern": _pattern(alphas, alpha),
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _most_common([settings.lora_dropout for settings in adapted.values()]),
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": _pattern(ranks, r),
        "target_modules": _targets(modules, adapted),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": rslora,
    }


def _alpha(settings: AdapterSettings, rslora: bool) -> float:
    """What gives this layer its scaling, also where scaling was set by hand."""
    divisor = math.sqrt(settings.r) if rslora else settings.r
    implied = settings.lora_alpha / divisor
    # A tensor holds the number that follows from alpha and r to its own precision.
    tensor = isinstance(settings.scaling, Tensor)
    if implied == settings.scaling or (tensor and math.isclose(implied, settings.scaling, rel_tol=1e-6)):
        return settings.lora_alpha
    return float(settings.scaling) * divisor


def _targets(modules: Sequence[Place], adapted: Collection[str]) -> list[str] | str:
    """The shortest form that chooses the adapted modules and no others: last components, full names, or a regex."""
    full = sorted(adapted)
    for names in (sorted({name.rpartition(".")[2] for name in full}), full):
        targets = Targets(names)
        if all((place.name in adapted) == targets.wants(place.name) for place in modules):
            return names
    return "|".join(map(re.escape, full))


def _pattern(values: Mapping[str, V], default: V) -> dict[str, V]:
    """The exceptions from the default: by last component where all that share it agree, else by full name."""
    by_suffix: dict[str, set[V]] = {}
    for name, value in values.items():
        by_suffix.setdefault(name.rpartition(".")[2], set()).add(value)
    patterns = {}
    for name, value in values.items():
        if value != default:
            suffix = name.rpartition(".")[2]
            patterns[re.escape(suffix) if len(by_suffix[suffix]) == 1 else f"^{re.escape(name)}"] = value
    return patterns


def _most_common(values: Collection[V]) -> V:
    return Counter(values).most_common(1)[0][0]
