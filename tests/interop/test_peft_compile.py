"""torch.compile of patched models: one graph, no more compilations than stock PEFT, the same numbers."""

import pytest
import torch
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch._dynamo.utils import counters

from lora_kernels import patch_peft
from tests.equality import assert_same_numbers, differ
from tests.interop.peft_cases import adapted, inputs, layers_of, patched_twin, run

FP32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning",  # Dynamo, for its ctx
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_run(model, scenario):
    """(how many graphs the scenario makes, its outputs); AOT autograd decides, too, which floats become constants."""
    torch.compiler.reset()
    counters["stats"].clear()
    outputs = scenario(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    return counters["stats"]["unique_graphs"], outputs


def once(model, compiled):
    return [compiled(inputs(FP32))]


def rows_that_change(model, compiled):
    return [compiled(inputs(FP32, rows, 5)) for rows in (2, 3, 7, 9, 2)]


def modes_that_change(model, compiled):
    outputs = []
    for _ in range(3):
        outputs.append(compiled(inputs(FP32)))
        model.eval()
        outputs.append(compiled(inputs(FP32)))
        model.train()
    return outputs


def scaling_that_changes(model, compiled):
    outputs = []
    for scale in (1.0, 2.0, 0.5, 3.0, 0.25):
        for layer in layers_of(model):
            layer.set_scale("default", scale)
        outputs.append(compiled(inputs(FP32)))
    return outputs


def adapters_that_change(model, compiled):
    outputs = []
    for name in ("default", "second", "default", "second"):
        model.set_adapter(name)
        outputs.append(compiled(inputs(FP32)))
    return outputs


def disabled_and_enabled(model, compiled):
    outputs = []
    for _ in range(2):
        outputs.append(compiled(inputs(FP32)))
        model.base_model.disable_adapter_layers()
        outputs.append(compiled(inputs(FP32)))
        model.base_model.enable_adapter_layers()
    return outputs


def merged_and_unmerged(model, compiled):
    outputs = []
    for _ in range(2):
        outputs.append(compiled(inputs(FP32)))
        model.merge_adapter()
        outputs.append(compiled(inputs(FP32)))
        model.unmerge_adapter()
    return outputs


SCENARIOS = (
    once, rows_that_change, modes_that_change, scaling_that_changes, adapters_that_change, disabled_and_enabled,
    merged_and_unmerged,
)  # fmt: skip


# set_scale makes a float of a tensor, in stock PEFT, too: scalings that change come as floats only.
CASES = [(scenario, False) for scenario in SCENARIOS]
CASES += [(scenario, True) for scenario in SCENARIOS if scenario is not scaling_that_changes]


@pytest.mark.parametrize(
    ("scenario", "tensor_scaling"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_no_more_compilations_than_stock(scenario, tensor_scaling):
    model = adapted(FP32, lora_bias=True)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False))
    if tensor_scaling:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    patched = patched_twin(model)
    stock_count, expected = compiled_run(model, scenario)
    count, outputs = compiled_run(patched, scenario)
    assert 1 <= count <= stock_count
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_hot_swap_without_compiling_again(tmp_path):
    adapted(FP32, seed=1, r=4, lora_alpha=32).save_pretrained(tmp_path)

    def swapped(model, compiled):
        before = compiled(inputs(FP32))
        hotswap_adapter(model, tmp_path, adapter_name="default")
        return [before, compiled(inputs(FP32))]

    model = adapted(FP32).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    patched = patched_twin(model)
    stock_count, expected = compiled_run(model, swapped)
    count, outputs = compiled_run(patched, swapped)
    assert count == stock_count == 1
    assert not torch.allclose(*outputs, rtol=1e-2)
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def hook_base(model):
    for layer in layers_of(model):
        layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("operation", ["lora_linear", "lora_branch"])
def test_training_in_one_graph(operation, kind):
    """Outputs and gradients are those of the patched model in eager mode, with fp32 adapters over a bf16 base."""
    model = adapted(BF16, kind=kind, lora_bias=True)
    if operation == "lora_branch":
        hook_base(model)
    report = patch_peft(model)
    assert {row.operation for row in report.rows} == {operation}
    x = inputs(BF16)
    expected = run(model, x)
    model.compile(backend="aot_eager", fullgraph=True)
    actual = run(model, x)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-2, atol=1e-2)


def test_dropout_in_a_compiled_graph():
    """Another mask at each call, the same for the same seed, and B's gradient comes from what y dropped."""
    model = adapted(FP32, lora_dropout=0.5)
    patch_peft(model)
    (up, _) = layers_of(model)
    x = inputs(FP32)
    compiled = torch.compile(up, backend="aot_eager", fullgraph=True)

    def step(seed):
        torch.manual_seed(seed)
        up.zero_grad()
        y = compiled(x)
        y.sum().backward()
        return y.detach(), up.lora_B["default"].weight.grad.clone()

    (first, d_first), (again, d_again), (other, _) = step(0), step(0), step(1)
    assert_same_numbers(first, again)
    assert_same_numbers(d_first, d_again)
    assert differ(first, other)
    # The sum of y's LoRA part over all outputs is linear in B: sum(B * dB).
    part = (first - up.base_layer(x)).sum()
    torch.testing.assert_close((up.lora_B["default"].weight * d_first).sum(), part, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("operation", ["lora_linear", "lora_branch"])
def test_export(operation, strict):
    model = adapted(FP32, lora_dropout=0.1).eval()
    if operation == "lora_branch":
        hook_base(model)
    patch_peft(model)
    x = inputs(FP32)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        called = [str(node.target) for node in program.graph.nodes if "lora_kernels" in str(node.target)]
        assert called == [f"lora_kernels.{operation.removeprefix('lora_')}_forward.default"] * 2
        torch.testing.assert_close(program.module()(x), model(x))
