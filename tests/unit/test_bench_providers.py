"""The contenders: each computes a LoRA linear, and what cannot run says why."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import host, providers
from bench.providers.addmm import AddmmFunction
from bench.providers.lorafusion import LoRAFusionStyleFunction
from lora_kernels.benchmarking.cases import MODES, LinearCase, Mode
from lora_kernels.benchmarking.gate import Gate
from lora_kernels.benchmarking.providers import CaseInputs, Provider
from lora_kernels.benchmarking.records import Environment, read_csv, write_csv
from lora_kernels.benchmarking.runner import run_case

CPU = torch.device("cpu")
CASE = LinearCase("small", "none", 48, 40, 24, R=4)
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
# Inductor takes ten seconds; its chain is tested below, with a compiler that only traces.
QUICK = [p for p in providers.PROVIDERS if not p.name.startswith(("torch.compile", "compile"))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_every_provider_is_right_or_says_why_not(dtype: str, adapter_dtype: str, dropout_p: float, mode: Mode) -> None:
    case = dataclasses.replace(CASE, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p, mode=mode)
    gate = Gate(case, CaseInputs.of(case, CPU))
    for provider in QUICK:
        if provider.why_not(case, CPU) is None:
            verdict = gate.check(provider)
            assert verdict.passed, f"{provider.name}: {verdict.reason}"
        else:
            assert len(provider.why_not(case, CPU) or "") > 10


def test_the_contenders_of_a_cpu_are_there() -> None:
    able = {p.name for p in providers.PROVIDERS if p.why_not(CASE, CPU) is None}
    assert {"frozen linear", "unfused chain", "addmm", "unsloth-style", "lorafusion-style", "auto"} <= able
    assert "torch:library" in able
    assert {"triton:one_pass", "triton:shrink_fused", "compile-max", "torch:upcast"}.isdisjoint(able)


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("unsloth-style", {"dropout_p": 0.1}, "no dropout"),
        ("lorafusion-style", {"dtype": "bfloat16"}, "adapters in x's dtype"),
        ("triton:one_pass", {}, "needs a GPU"),
        ("torch:upcast", {}, "nothing to convert"),
        ("compile-max", {}, "on a CPU"),
    ],
)
def test_what_cannot_run_says_why(name: str, changed: dict[str, object], reason: str) -> None:
    (provider,) = providers.named([name])
    assert reason in (provider.why_not(dataclasses.replace(CASE, **changed), CPU) or "")


def test_peft_is_unavailable_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.providers import peft_layer

    peft_layer._not_installed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = providers.PEFT.why_not(CASE, CPU) or ""
    peft_layer._not_installed.cache_clear()
    assert reason == "not installed: peft, transformers, accelerate (pip install '.[dev]')"


def test_an_unknown_provider_is_named() -> None:
    with pytest.raises(ValueError, match=r"must be among frozen linear, .*; got magic"):
        providers.named(["auto", "magic"])


# The contenders with masks of their own are gated at p = 0. With the generator set back before each call, dropout is a
# fixed function as well, and its gradients can be held to differences.
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "apply",
    [
        pytest.param(lambda *a: AddmmFunction.apply(*a, False), id="addmm"),
        pytest.param(lambda *a: AddmmFunction.apply(*a, True), id="recompute"),
        pytest.param(LoRAFusionStyleFunction.apply, id="lorafusion"),
    ],
)
def test_hand_written_backwards_pass_gradcheck(apply, bias: bool, dropout_p: float) -> None:
    case = dataclasses.replace(CASE, M=6, N=5, K=7, R=2, dtype="float64", adapter_dtype="float64", bias=bias)
    inputs = CaseInputs.of(case, CPU)

    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return apply(x, inputs.weight, lora_A, lora_B, inputs.bias, 2.0, dropout_p)

    assert torch.autograd.gradcheck(forward, (inputs.x, inputs.lora_A, inputs.lora_B))


@pytest.mark.parametrize("provider", [providers.ADDMM, providers.LORAFUSION_STYLE], ids=lambda provider: provider.name)
def test_dropout_drops_and_keeps_the_mean(provider: Provider) -> None:
    case = dataclasses.replace(CASE, M=4000, K=16, N=8, mode="forward", bias=False)
    inputs = CaseInputs.of(case, CPU)
    ones = dataclasses.replace(inputs, x=torch.ones_like(inputs.x))
    torch.manual_seed(0)
    dropped, whole = provider.forward(ones, 0.25), provider.forward(ones, 0.0)
    assert not torch.equal(dropped, whole)
    torch.testing.assert_close(dropped.mean(0), whole.mean(0), rtol=0.1, atol=0.05)


def test_what_is_kept_for_backward_is_each_plans() -> None:
    case = dataclasses.replace(CASE, dropout_p=0.25)
    found = run_case(case, QUICK, device=CPU, environment=Environment.current(CPU), rounds=1)
    kept = {record.provider: record.saved_bytes for record in found if record.timed}
    m, k, r = case.M, case.K, case.R
    assert kept["auto"] == 4 * m * r + 8
    assert kept["lorafusion-style"] == kept["addmm"] == m * k * (4 + 1) + 4 * m * r  # dropped x, mask, xa
    found = run_case(CASE, QUICK, device=CPU, environment=Environment.current(CPU), rounds=1)
    kept = {record.provider: record.saved_bytes for record in found if record.timed}
    assert (kept["addmm"], kept["unsloth-style"]) == (4 * m * r, 0)
    peaks = {record.provider: record.peak_bytes for record in found if record.timed}
    assert all(peak is not None and peak > 0 for peak in peaks.values())


def test_each_case_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (compiled,) = providers.named(["torch.compile"])
    with torch._dynamo.config.patch(recompile_limit=1):  # monkeypatch would leave the setting deleted
        for m in (8, 10, 12):  # were they one function's, the second shape would raise
            case = dataclasses.replace(CASE, M=m)
            assert Gate(case, CaseInputs.of(case, CPU)).check(compiled).passed


def test_a_thing_is_built_once_per_case_and_contender() -> None:
    inputs = CaseInputs.of(CASE, CPU)
    made: list[int] = []
    for _ in range(3):
        inputs.build("key", lambda: made.append(1))
    dataclasses.replace(inputs, scaling=3.0).build("key", lambda: made.append(2))
    assert made == [1, 2]


@pytest.mark.parametrize(
    ("device", "name", "model"), [("cpu", "bert-base.attention", "BERT-base"), ("cuda", "llama3-8b.down", "Llama-3-8B")]
)
def test_the_lineup_follows_the_tables_order(device: str, name: str, model: str) -> None:
    case = LinearCase(name, model, 1024, 768, 768)
    names = [provider.name for provider in providers.lineup(case, torch.device(device))]
    assert names == [name for name in providers.NAMES if name in names]
    assert {"frozen linear", "unfused chain", "peft", "torch.compile", "addmm", "auto"} <= set(names)
    dropped = providers.lineup(dataclasses.replace(case, mode="forward"), torch.device(device))
    assert "torch.compile" not in {provider.name for provider in dropped}


def test_host_time_is_above_the_node_that_does_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(host, "LAUNCHED", ("one_pass",))  # compiling takes seconds
    rows = host.measure(CPU, rounds=2)
    by_name = {row.contender: row for row in rows}
    assert by_name["nothing"].over_nothing_us == 0
    assert by_name["lora_linear"].over_nothing_us > 0
    if host.triton_available():
        assert by_name["triton:one_pass for sm_90, launched to nowhere"].over_nothing_us > 0
    write_csv(rows, tmp_path / "host.csv")
    assert read_csv(tmp_path / "host.csv", host.HostRow) == rows
    assert "lora_linear" in "\n".join(host.lines(rows))
