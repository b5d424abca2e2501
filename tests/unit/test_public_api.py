"""The public surface, written out: a change here is a breaking change and goes through docs/changelog.md."""

import inspect
import re
import types

import pytest

import lora_kernels
import lora_kernels.distributed

NAMES = {
    "AdaptedModule",
    "AdapterReport",
    "AdapterFileError",
    "ArgumentError",
    "DeviceError",
    "DtypeError",
    "LoRAKernelsError",
    "LoRALinear",
    "PatchReport",
    "PatchRow",
    "Plan",
    "ShapeError",
    "UnsupportedError",
    "add_lora",
    "delete_adapter",
    "explain_plan",
    "load_lora",
    "lora_branch",
    "lora_linear",
    "merge_lora",
    "patch_peft",
    "save_lora",
    "set_adapter",
    "unload_lora",
    "unmerge_lora",
    "unpatch_peft",
}

# Imported by name: with it come torch's distributed tensors.
DISTRIBUTED = {"LoRAColwiseParallel", "LoRARowwiseParallel", "shard_dropout"}

SIGNATURES = {
    "distributed.LoRAColwiseParallel": "(*, input_layouts=None, output_layouts=None, use_local_output=True)",
    "distributed.LoRARowwiseParallel": "(*, input_layouts=None, output_layouts=None, use_local_output=True)",
    "distributed.shard_dropout": "(model, mesh=None)",
    "lora_linear": (
        "(x, weight, lora_A, lora_B, bias=None, *, scaling=1.0, dropout_p=0.0, dropout_seed=None, "
        "dropout_offset=None, backend='auto')"
    ),
    "lora_branch": (
        "(base_out, x, lora_A, lora_B, *, scaling=1.0, dropout_p=0.0, dropout_seed=None, dropout_offset=None, "
        "backend='auto')"
    ),
    "explain_plan": ("(M, N, K, R, *, dtype, device, adapter_dtype=None, dropout_p=0.0, training=True)"),
    "LoRALinear": (
        "(in_features, out_features, bias=True, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, "
        "init_lora_weights=True, device=None, dtype=None, adapter_dtype=None, backend='auto')"
    ),
    # Device and dtype are the given layer's.
    "LoRALinear.from_linear": (
        "(linear, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, "
        "init_lora_weights=True, adapter_dtype=None, backend='auto')"
    ),
    "add_lora": (
        "(model, *, r=8, lora_alpha=8, target_modules, lora_dropout=0.0, exclude_modules=None, rank_pattern=None, "
        "alpha_pattern=None, use_rslora=False, init_lora_weights=True, adapter_dtype=None, adapter_name='default', "
        "backend='auto')"
    ),
    "delete_adapter": "(model, adapter_name)",
    "load_lora": "(model, directory, *, adapter_name='default', adapter_dtype=None, backend='auto')",
    "merge_lora": "(model)",
    "save_lora": "(model, directory, *, adapter_name=None, base_model_name_or_path=None, task_type=None)",
    "set_adapter": "(model, adapter_name)",
    "unload_lora": "(model)",
    "unmerge_lora": "(model)",
    "LoRALinear.add_adapter": (
        "(self, adapter_name, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, init_lora_weights=True, "
        "adapter_dtype=None, backend='auto')"
    ),
    "LoRALinear.delete_adapter": "(self, adapter_name)",
    "LoRALinear.set_adapter": "(self, adapter_name)",
    "LoRALinear.merge": "(self)",
    "LoRALinear.unmerge": "(self)",
    "patch_peft": "(model)",
    "unpatch_peft": "(model)",
}

ERRORS = {
    "AdapterFileError": ValueError,
    "ArgumentError": ValueError,
    "DeviceError": ValueError,
    "DtypeError": TypeError,
    "ShapeError": ValueError,
    "UnsupportedError": NotImplementedError,
}


def public_names(package: types.ModuleType = lora_kernels) -> set[str]:
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def resolve(path: str):
    value = lora_kernels
    for name in path.split("."):
        value = getattr(value, name)
    return value


def names_kinds_defaults(function) -> str:
    """The signature without annotations: those may become more precise without breaking a caller."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_names():
    assert public_names() == NAMES
    assert public_names(lora_kernels.distributed) == DISTRIBUTED


def test_star_import_gives_the_same_names():
    namespace: dict[str, object] = {}
    exec("from lora_kernels import *", namespace)
    assert {n for n in namespace if not n.startswith("_")} >= NAMES


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    assert names_kinds_defaults(resolve(path)) == SIGNATURES[path]


@pytest.mark.parametrize("path", SIGNATURES)
def test_every_parameter_and_result_is_annotated(path):
    signature = inspect.signature(resolve(path))
    missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert missing == []


@pytest.mark.parametrize(("name", "base"), ERRORS.items())
def test_error_bases(name, base):
    assert issubclass(resolve(name), base)
    assert issubclass(resolve(name), lora_kernels.LoRAKernelsError)


@pytest.mark.parametrize("name", sorted(NAMES | {f"distributed.{name}" for name in DISTRIBUTED}))
def test_has_a_docstring(name):
    # Not the one a dataclass makes of its fields.
    assert not re.match(rf"{name.rpartition('.')[2]}\(|$", inspect.getdoc(resolve(name)) or "")


def test_layer_has_torch_and_peft_names():
    layer = lora_kernels.LoRALinear(6, 5, r=4, lora_alpha=8)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.scaling == 2.0
    assert layer.merged is False


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", lora_kernels.__version__)
