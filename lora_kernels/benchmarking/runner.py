"""Gate, time and record a suite of cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.gate import Gate, Verdict
from lora_kernels.benchmarking.memory import saved_bytes
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED, LinearInputs, Provider
from lora_kernels.benchmarking.records import Environment, Record
from lora_kernels.benchmarking.timer import Samples, interleave


def run_suite(
    cases: Iterable[LinearCase],
    providers: Sequence[Provider],
    *,
    device: torch.device,
    budget_s: float = 1.5,
    rounds: int | None = None,
) -> Iterator[list[Record]]:
    """The records of each case as soon as they exist, one per contender."""
    environment = Environment.current(device)
    for case in cases:
        yield run_case(case, providers, device=device, environment=environment, budget_s=budget_s, rounds=rounds)


def run_case(
    case: LinearCase,
    providers: Sequence[Provider],
    *,
    device: torch.device,
    environment: Environment,
    budget_s: float = 1.5,
    rounds: int | None = None,
) -> list[Record]:
    """Check every contender against fp64, then time those that passed, interleaved.

    Args:
        case: what to compute.
        providers: contenders, in the order of the table.
        device: where.
        environment: goes into each record.
        budget_s: seconds of timing for the case.
        rounds: exact number of timing rounds instead.
    """
    inputs = LinearInputs.of(case, device)
    reasons = {provider.name: provider.why_not(case, device) for provider in providers}
    able = [provider for provider in providers if reasons[provider.name] is None]
    verdicts, saved = _check(case, inputs, able)
    fit = [provider for provider in able if verdicts[provider.name].passed]
    samples = Samples({})
    if fit:
        calls = {provider.name: _call(provider, case, inputs) for provider in fit}
        samples = interleave(calls, device=device, rounds=rounds, budget_s=budget_s)
    return [
        _record(
            case,
            provider.name,
            reasons[provider.name],
            verdicts.get(provider.name),
            samples,
            saved.get(provider.name),
            environment,
        )
        for provider in providers
    ]


def _check(
    case: LinearCase, inputs: LinearInputs, providers: Sequence[Provider]
) -> tuple[dict[str, Verdict], dict[str, int]]:
    """Verdicts, and bytes saved for backward beyond x and the parameters (backward cases only)."""
    gate = Gate(case, inputs)
    verdicts = {provider.name: gate.check(provider) for provider in providers}
    saved = {}
    if case.backward:
        for provider in providers:
            forward = _forward(provider, case, inputs)
            saved[provider.name] = saved_bytes(forward, beyond=inputs.alive)
    return verdicts, saved


def _forward(provider: Provider, case: LinearCase, inputs: LinearInputs) -> Callable[[], torch.Tensor]:
    return lambda: provider.forward(inputs, case.dropout_p)


def _call(provider: Provider, case: LinearCase, inputs: LinearInputs) -> Callable[[], object]:
    """What is timed: forward without a graph, or forward and the gradients of x, lora_A and lora_B."""
    forward = _forward(provider, case, inputs)
    leaves = tuple(inputs.leaves.values()) if provider.has_lora else (inputs.x,)

    def without_graph() -> object:
        with torch.no_grad():
            return forward()

    def with_gradients() -> object:
        return torch.autograd.grad(forward(), leaves, inputs.dy)

    return with_gradients if case.backward else without_graph


def _record(
    case: LinearCase,
    name: str,
    reason: str | None,
    verdict: Verdict | None,
    samples: Samples,
    saved: int | None,
    environment: Environment,
) -> Record:
    status = f"unavailable: {reason}"
    if verdict is not None:
        status = "ok" if verdict.passed else f"refused: {verdict.reason}"
    timed = name in samples.ms
    time = samples.time(name) if timed else None
    speedup = samples.ratio(UNFUSED, name) if timed and UNFUSED in samples.ms else None
    cost = samples.ratio(name, FROZEN) if timed and FROZEN in samples.ms else None
    return Record(
        **dataclasses.asdict(case),
        provider=name,
        status=status,
        rounds=samples.rounds if timed else 0,
        median_ms=time.median if time else None,
        p10_ms=time.p10 if time else None,
        p90_ms=time.p90 if time else None,
        speedup=speedup.median if speedup else None,
        speedup_p10=speedup.p10 if speedup else None,
        speedup_p90=speedup.p90 if speedup else None,
        cost=cost.median if cost else None,
        cost_p10=cost.p10 if cost else None,
        cost_p90=cost.p90 if cost else None,
        worst_tensor=verdict.tensor if verdict else "",
        error=verdict.error if verdict else None,
        error_budget=verdict.budget if verdict else None,
        saved_bytes=saved,
        **dataclasses.asdict(environment),
    )
