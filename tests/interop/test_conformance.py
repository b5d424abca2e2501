"""The instrument of `make conformance` itself: sound calls pass, and each fault is found where it is."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import patch_peft
from tests.conformance import compare, faults, report, suite
from tests.conformance.report import FaultRun, Run

ROOT = Path(__file__).resolve().parents[2]


def patched(base, dtype=torch.float32, train=True, autocast_adapter_dtype=True, **config):
    """One patched LoRA layer over `base`, whose B is not zero."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["0"], "init_lora_weights": False} | config
    model = get_peft_model(
        nn.Sequential(base).to(dtype),
        LoraConfig(**settings, fan_in_fan_out=isinstance(base, Conv1D)),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    patch_peft(model)
    return model.train(train).base_model.model[0]


def recorded(layer, x, operation="lora_linear"):
    """The call as the plugin records it."""
    call = compare.begin(layer, "default", operation, x)
    y = layer._fused_forward(x, "default", operation)
    return replace(call, y=y.detach().clone())


def beyond_budget(call):
    return {row.name for row in compare.judge(call).beyond}


def x_of(*shape, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


LAYERS = {
    "fp32": lambda: patched(nn.Linear(96, 80)),
    "no bias": lambda: patched(nn.Linear(96, 80, bias=False)),
    "bf16": lambda: patched(nn.Linear(96, 80), torch.bfloat16, autocast_adapter_dtype=False),
    "bf16, adapter fp32": lambda: patched(nn.Linear(96, 80), torch.bfloat16),
    "fp16, adapter fp32": lambda: patched(nn.Linear(96, 80), torch.float16),
    "fp64": lambda: patched(nn.Linear(96, 80), torch.float64),
    "dropout": lambda: patched(nn.Linear(96, 80), lora_dropout=0.3),
    "dropout, evaluation": lambda: patched(nn.Linear(96, 80), lora_dropout=0.3, train=False),
    "fp64, dropout": lambda: patched(nn.Linear(96, 80), torch.float64, lora_dropout=0.3),
    "bf16, adapter fp32, dropout": lambda: patched(nn.Linear(96, 80), torch.bfloat16, lora_dropout=0.3),
    "Conv1D": lambda: patched(Conv1D(80, 96)),
    "lora_bias": lambda: patched(nn.Linear(96, 80), lora_bias=True),
    "tiny": lambda: patched(nn.Linear(96, 3), r=1),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_sound_call_is_within_the_budget(layer, grad):
    layer = layer()
    x = x_of(2, 5, 96, dtype=layer.base_layer.weight.dtype)
    with torch.set_grad_enabled(grad):
        call = recorded(layer, x)
    rows = compare.judge(call).rows
    assert all(row.ok for row in rows), rows
    judged = {row.name for row in rows}
    assert {"y", "d_x", "d_lora_A", "d_lora_B"} <= judged
    assert ("d_lora_bias" in judged) == (layer.lora_B["default"].bias is not None)
    assert ("d_bias" in judged) == (layer.base_layer.bias is not None)
    assert call.needs >= {"lora_A", "lora_B"} if grad else call.needs == set()


@pytest.mark.parametrize("operation", ["lora_linear", "lora_branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_call_under_autocast_is_within_the_budget(operation, dtype):
    layer = patched(nn.Linear(96, 80), dtype, lora_dropout=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        call = recorded(layer, x_of(40, 96, dtype=dtype), operation)
    assert call.autocast is torch.bfloat16
    assert beyond_budget(call) == set()


class FrozenTable(nn.Module):
    """A base layer with a dtype of its own inside, that is no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(-8, 8, (80, 96), dtype=torch.int8))

    def forward(self, x):
        return x @ (self.table.to(x.dtype) * 0.05).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_no_linear_is_a_given_fact(dtype):
    layer = patched(nn.Linear(96, 80), dtype, lora_dropout=0.3)
    layer.base_layer = FrozenTable()
    call = recorded(layer, x_of(40, 96, dtype=dtype, requires_grad=True), "lora_branch")
    assert beyond_budget(call) == set()
    assert "y" in beyond_budget(replace(call, y=call.y * 1.1))


FOUND_IN = {
    "twice-d-lora-A": {"d_lora_A"},
    "d-x-of-the-base-alone": {"d_x"},
    "no-dropout": {"y", "d_x", "d_lora_A", "d_lora_B"},
}


@pytest.mark.parametrize("shape", [(40, 96), (1, 96)], ids=["40 rows", "1 row"])
@pytest.mark.parametrize("asked", [True, False], ids=["gradients asked", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_found_where_it_is(fault, dtype, asked, shape):
    layer = patched(nn.Linear(96, 80), dtype, lora_dropout=0.3)
    with faults.FAULTS[fault](), torch.set_grad_enabled(asked):
        call = recorded(layer, x_of(*shape, dtype=dtype, requires_grad=True))
        assert beyond_budget(call) == FOUND_IN[fault]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_y_is_the_calls_own(dtype):
    call = recorded(patched(nn.Linear(96, 80), dtype), x_of(40, 96, dtype=dtype))
    wrong = call.y.clone()
    wrong[3, 5] += 1
    assert beyond_budget(replace(call, y=wrong)) == {"y"}
    wrong[3, 5] = torch.nan
    assert beyond_budget(replace(call, y=wrong)) == {"y"}


def test_a_gradient_in_another_dtype_is_refused():
    call = recorded(patched(nn.Linear(96, 80), torch.bfloat16), x_of(40, 96, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="dtype"):
        compare.judge(replace(call, y=call.y.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_calls_are_judged_on_many_inputs(dtype):
    """Single norms of a few errors differ by more than twice now and then; no sound call may fail by that."""
    for seed in range(40):
        layer = patched(nn.Linear(10, 2), dtype, r=1, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(seed)
        assert beyond_budget(recorded(layer, torch.randn(1, 10, generator=generator).to(dtype))) == set()


def test_where_eager_is_exact_by_luck_the_bound_of_rounding_counts(monkeypatch):
    call = recorded(patched(nn.Linear(96, 80)), x_of(40, 96))
    assert not compare.judge(call).by_bound
    stock = compare.Problem.stock

    def exact(problem, double=False, **options):  # when a library's order rounds nothing is the processor's affair
        found = stock(problem, double=True, **options)
        return found if double else {name: t.float() for name, t in found.items()}

    monkeypatch.setattr(compare.Problem, "stock", exact)
    verdict = compare.judge(call)
    assert verdict.by_bound
    assert verdict.beyond == []
    wrong = replace(call, y=call.y + 1e-2)
    assert {row.name for row in compare.judge(wrong).beyond} == {"y"}


def test_the_bound_is_for_fp32_tensors_only():
    call = recorded(patched(nn.Linear(96, 80), torch.bfloat16), x_of(40, 96, dtype=torch.bfloat16))
    problem = compare.Problem(call, call.x, call.y, call.generator, call.y)
    within = {row.name for row in compare._bound_rows(problem, torch.float32) if row.ok}
    assert within == {"d_lora_A", "d_lora_B"}


def test_what_happens_after_the_call_does_not_matter():
    layer = patched(nn.Linear(96, 80), lora_dropout=0.3)
    x = x_of(40, 96)
    call = recorded(layer, x)
    with torch.no_grad():
        x.zero_()
        for parameter in layer.parameters():
            parameter.zero_()
        layer.scaling["default"] = 0.0
        layer.lora_dropout["default"].p = 0.9
    torch.manual_seed(123)
    assert beyond_budget(call) == set()


def test_judging_leaves_no_trace():
    layer = patched(nn.Linear(96, 80), lora_dropout=0.3)
    call = recorded(layer, x_of(40, 96, requires_grad=True))
    state = torch.get_rng_state()
    compare.judge(call)
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.grad for parameter in layer.parameters()] == [None] * len(list(layer.parameters()))
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


def test_a_call_in_inference_mode_is_judged():
    layer = patched(nn.Linear(96, 80))
    with torch.inference_mode():
        call = recorded(layer, x_of(40, 96))
    assert beyond_budget(call) == set()


def test_views_in_the_place_of_parameters_are_copied():
    layer = patched(nn.Linear(96, 80))
    flat = nn.Parameter(layer.base_layer.weight.detach().reshape(-1).clone())
    del layer.base_layer.weight
    layer.base_layer.weight = flat.view(80, 96)  # as FSDP leaves it
    copied = compare.copy_of(layer)
    assert isinstance(copied.base_layer.weight, nn.Parameter)
    assert torch.equal(copied.base_layer.weight, layer.base_layer.weight)
    assert copied.double().base_layer.weight.dtype == torch.float64


def outcomes(**tests):
    return Run({name: {"outcome": outcome, "why": "", "passed_by_itself": True} for name, outcome in tests.items()})


def test_only_what_passed_before_can_newly_fail():
    off = outcomes(a="passed", b="failed", c="passed", d="skipped", e="passed", f="passed")
    on = outcomes(a="passed", b="failed", c="failed", d="failed", e="skipped")
    assert report.new_failures(off, on) == ["c", "e", "f"]
    wrong = report.verdict(off, on, [])
    assert [line for line in wrong if "only: c" in line]
    assert wrong[-1].startswith("0 fused calls were compared")


def test_the_verdict_names_violations_and_unseen_faults():
    test = {"outcome": "passed", "kinds": {"lora_linear | Linear | float32 | ": report.FEWEST_CALLS}, "violations": []}
    test["by_bound"] = int(report.FEWEST_CALLS * report.MOST_BY_BOUND)
    off, on = outcomes(a="passed"), Run({"a": test})
    assert report.verdict(off, on, [FaultRun("seen", 3, 0, 2)]) == []
    assert report.verdict(off, on, [FaultRun("unseen", 3, 0, 0)]) == ["the comparison did not notice the fault unseen"]
    beyond = Run({"a": test | {"violations": ["d_x 1 > 0"]}})
    assert len(report.verdict(off, Run({"a": test | {"by_bound": test["by_bound"] + 1}}), [])) == 1
    assert report.verdict(off, beyond, []) == ["beyond the error budget: a: d_x 1 > 0"]


def test_a_fault_is_counted_over_tests_with_fused_calls():
    off = outcomes(a="passed", b="passed", c="failed", d="passed")
    seen = {"outcome": "failed", "kinds": {"k": 1}, "violations": ["d_x"], "passed_by_itself": True}
    unseen = {"outcome": "failed", "kinds": {"k": 1}, "violations": [], "passed_by_itself": False}
    broken = Run({"a": seen, "b": unseen, "c": seen, "d": seen | {"kinds": {}}})
    assert FaultRun.of("f", off, broken) == FaultRun("f", tests=2, by_suite=1, by_comparison=1)


def test_no_file_is_both_run_and_left_out():
    left_out = [name for names in suite.LEFT_OUT.values() for name in names]
    assert len({*suite.FILES, *left_out}) == len(suite.FILES) + len(left_out)


MINIATURE = """
import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from .testing_utils import hub_online_once

def model(**config):
    net = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **config)
    return get_peft_model(net, config)

def test_trains():
    with hub_online_once("a/model"):
        net = model(lora_dropout=0.2)
    net(torch.randn(20, 32)).square().mean().backward()

def test_fails():
    assert model()(torch.randn(20, 32)) is None

def test_is_left_to_peft():
    net = model()
    with net.disable_adapter():
        net(torch.randn(20, 32))

@pytest.mark.parametrize("config_cls", [LoraConfig, VeraConfig])
def test_of(config_cls):
    pass
"""


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A suite of four tests in the form of PEFT's, and what the plugin writes about it."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    (folder / "tests" / "testing_utils.py").write_text("def hub_online_once(model_id):\n    raise OSError\n")
    (folder / "tests" / "test_miniature.py").write_text(MINIATURE)
    (folder / "pyproject.toml").write_text("")

    def run(*options):
        path = folder / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "conformance.plugin", "--outcomes", str(path), *options]
        subprocess.run(command, cwd=folder, env=suite.environment(), capture_output=True, check=False, timeout=300)
        tests = Run.read(path).tests
        return {name.partition("::")[2]: test for name, test in tests.items()}

    return run


def test_the_plugin_records_what_a_suite_does(miniature):
    off = miniature("--lora-kernels=off")
    on = miniature("--lora-kernels=on", "-n", "1")
    expected = {"test_trains": "passed", "test_fails": "failed", "test_is_left_to_peft": "passed"}
    expected["test_of[LoraConfig]"] = "passed"
    for tests in (off, on):
        assert {name: test["outcome"] for name, test in tests.items()} == expected
        assert not any(test.get("violations") for test in tests.values())
    assert off["test_trains"]["kinds"] == {}
    assert on["test_trains"]["kinds"] == {"lora_linear | Linear | float32 | dropout": 2}
    assert set(on["test_trains"]["shares"]) == {"y", "d_x", "d_lora_A", "d_lora_B", "d_bias"}
    assert on["test_fails"]["kinds"] == {"lora_linear | Linear | float32 | ": 2}
    assert on["test_is_left_to_peft"]["fallbacks"] == {"adapters are disabled": 2}


def test_the_plugin_fails_a_test_whose_gradients_are_wrong(miniature):
    on = miniature("--lora-kernels=on", "--fault=twice-d-lora-A")
    assert on["test_trains"]["outcome"] == "failed"
    assert on["test_trains"]["passed_by_itself"]
    assert "d_lora_A" in on["test_trains"]["why"]
    assert on["test_is_left_to_peft"]["outcome"] == "passed"


def test_the_committed_page_has_no_new_failure():
    text = (ROOT / "docs" / "interop" / "conformance.md").read_text(encoding="utf-8")
    assert "**0 tests fail with `patch_peft` that pass without it." in text
    assert os.sep + "tmp" not in text
