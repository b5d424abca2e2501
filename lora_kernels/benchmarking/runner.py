"""Gate, time and record a suite of cases."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.gate import Gate, Verdict
from lora_kernels.benchmarking.memory import peak_bytes, saved_bytes
from lora_kernels.benchmarking.providers import FROZEN, FROZEN_LINEAR, UNFUSED, CaseInputs, Provider
from lora_kernels.benchmarking.records import Environment, Record
from lora_kernels.benchmarking.roofline import Ceilings, floor_ms
from lora_kernels.benchmarking.timer import Samples, interleave


def run_suite(
    cases: Iterable[LinearCase],
    providers: Sequence[Provider],
    *,
    device: torch.device,
    budget_s: float,
    limit_s: float | None = None,
) -> Iterator[list[Record]]:
    """The records of each case as soon as they exist, one per contender; `run_case` has limit_s."""
    environment = Environment.current(device)
    for case in cases:
        yield run_case(case, providers, device=device, environment=environment, budget_s=budget_s, limit_s=limit_s)


def run_case(
    case: LinearCase,
    providers: Sequence[Provider],
    *,
    device: torch.device,
    environment: Environment,
    budget_s: float = 1.5,
    rounds: int | None = None,
    ceilings: Ceilings | None = None,
    keep: Callable[[LinearCase, Samples], None] | None = None,
    limit_s: float | None = None,
    in_graphs: bool = False,
) -> list[Record]:
    """Check every contender against fp64, then time those that passed, interleaved.

    A contender that raises, for want of memory or because it does not compile, is a record that says so; the others
    go on.

    Args:
        case: what to compute.
        providers: contenders, in the order of the table.
        device: where.
        environment: goes into each record.
        budget_s: seconds of timing for the case.
        rounds: exact number of timing rounds instead.
        ceilings: of this device, for the roofline columns; None leaves them empty.
        keep: is handed the samples of every round.
        limit_s: seconds for checking and timing together: where they would not do, the case gets fewer rows, for all
            contenders alike (`shortened`). None: as many rows as asked for.
        in_graphs: on a GPU, time every contender that can be captured as a CUDA graph, too, in half the budget again.
    """
    asked = case.M
    if limit_s is not None:
        case = shortened(case, len(providers), device=device, limit_s=limit_s)
    found = {provider.name: _Found(f"unavailable: {provider.why_not(case, device)}") for provider in providers}
    able = [provider for provider in providers if provider.why_not(case, device) is None]
    samples = graphs = Samples({})
    host_us: dict[str, float] = {}
    try:
        inputs = CaseInputs.of(case, device)
    except Exception as error:  # whatever it is, the other cases are still to be run
        found |= {provider.name: _Found(_failed(error)) for provider in able}
    else:
        found |= _check(case, inputs, able)
        fit = [provider for provider in able if found[provider.name].status == "ok"]
        calls: dict[str, Callable[[], object]] = {}
        failures: dict[str, str] = {}
        for provider in fit:
            call = timed_call(provider, case, inputs)
            try:
                peak = peak_bytes(call, device=device)
                calls[provider.name] = _captured(call, device) if case.graph else call
            except Exception as error:  # as in _check
                failures[provider.name] = _failed(error)
            else:
                found[provider.name] = dataclasses.replace(found[provider.name], peak=peak)
        samples, failed_later = _time(calls, device=device, rounds=rounds, budget_s=budget_s)
        if device.type == "cuda" and not case.graph:
            host_us = {name: _host_us(call, device) for name, call in calls.items() if name in samples.ms}
            if in_graphs:
                graphs = _in_graphs({name: calls[name] for name in host_us}, device, budget_s / 2)
        failures |= failed_later
        found |= {name: dataclasses.replace(found[name], status=status) for name, status in failures.items()}
        if keep is not None and samples.ms:
            keep(case, samples)
    floors = {
        provider.name: floor_ms(case, ceilings, has_lora=provider.has_lora) if ceilings else None
        for provider in providers
    }
    return [
        _record(case, asked, name, of_one, samples, graphs, host_us.get(name), floors[name], environment)
        for name, of_one in found.items()
    ]


LIMIT_S = 10.0  # of a CPU suite's case altogether, beyond which it gets fewer rows; the slowest of a Xeon's takes six
PROBES = (32, 256)  # rows; few, then enough that the rest of a call does not count, where few say that it is slow
LEAST_ROWS = 32  # below, a layer is planned for decoding
CALLS = 8  # of each contender, at least: eager's error, its own, bytes kept, bytes at most, warm-up, three rounds


def shortened(case: LinearCase, contenders: int, *, device: torch.device, limit_s: float) -> LinearCase:
    """The case, with half its rows, or a quarter ..., where so many calls of the library's product would take longer.

    Where a CPU's library multiplies 16-bit numbers one by one, the frozen linear takes a hundred times as long as in
    fp32 (an EPYC without AVX-512: 46 to 173 times ours), and every contender but ours is built on it.
    """
    rows = case.M
    for probe in PROBES:
        if probe >= rows:
            return case
        call_s = _frozen_call_s(dataclasses.replace(case, M=probe), device) * case.M / probe
        if call_s * contenders * CALLS <= limit_s:
            return case
    while rows > LEAST_ROWS and call_s * rows / case.M * contenders * CALLS > limit_s:
        rows = max(rows // 2, LEAST_ROWS)
    return dataclasses.replace(case, M=rows)


def _frozen_call_s(case: LinearCase, device: torch.device) -> float:
    """The faster of two calls of the frozen linear, since the first may make a library's primitive."""
    call = timed_call(FROZEN_LINEAR, case, CaseInputs.of(case, device))
    return min(interleave({FROZEN: call}, device=device, rounds=2, warmup=0).ms[FROZEN]) / 1e3


@dataclass(frozen=True)
class _Found:
    """What one contender's record says besides its times."""

    status: str
    verdict: Verdict | None = None
    saved: int | None = None
    peak: int | None = None


def _failed(error: Exception) -> str:
    """One line for tables; the compiler's and the allocator's messages go on for pages."""
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"


def _check(case: LinearCase, inputs: CaseInputs, providers: Sequence[Provider]) -> dict[str, _Found]:
    """Verdicts, and bytes saved for backward beyond x and the parameters (backward cases only)."""
    gate = Gate(case, inputs)
    found = {}
    for provider in providers:
        verdict = None
        try:
            verdict = gate.check(provider)
            saved = saved_bytes(_forward(provider, case, inputs), beyond=inputs.alive) if case.backward else None
        except Exception as error:  # any fault of one contender is a row, not the end of the suite
            found[provider.name] = _Found(_failed(error), verdict)
        else:
            status = "ok" if verdict.passed else f"refused: {verdict.reason}"
            found[provider.name] = _Found(status, verdict, saved)
    return found


def _time(
    calls: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int | None, budget_s: float
) -> tuple[Samples, dict[str, str]]:
    """Samples, and the failures of those that raised while they were timed; without them, the others start anew."""
    failures: dict[str, str] = {}
    while left := {name: call for name, call in calls.items() if name not in failures}:
        running: list[str] = []
        try:
            contenders = {name: partial(_announced, name, call, running) for name, call in left.items()}
            return interleave(contenders, device=device, rounds=rounds, budget_s=budget_s), failures
        except Exception as error:  # as in _check
            # Before the first call it is the clock that failed: its buffer is all contenders' loss.
            failures |= dict.fromkeys(running[-1:] or left, _failed(error))
    return Samples({}), failures


def _announced(name: str, call: Callable[[], object], running: list[str]) -> object:
    running[:] = [name]
    return call()


def _forward(provider: Provider, case: LinearCase, inputs: CaseInputs) -> Callable[[], torch.Tensor]:
    return lambda: provider.forward(inputs, case.dropout_p)


def timed_call(provider: Provider, case: LinearCase, inputs: CaseInputs) -> Callable[[], object]:
    """What is timed: forward without a graph, or forward and the gradients of x, lora_A and lora_B."""
    forward = _forward(provider, case, inputs)
    leaves = tuple(inputs.leaves.values()) if provider.has_lora else (inputs.x,)

    def without_graph() -> object:
        with torch.no_grad():
            return forward()

    def with_gradients() -> object:
        return torch.autograd.grad(forward(), leaves, inputs.dy)

    return with_gradients if case.backward else without_graph


def _captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph's replay: one launch for the host, whatever it holds."""
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device where case.graph is set; got {str(device)!r}")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compilation, autotuning and workspaces are not to be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


HOST_CALLS = 5  # few enough for the launch queue never to be full


def _host_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds until a call returns to the host, which does not wait for the GPU: the median of a few."""
    torch.cuda.synchronize(device)
    taken = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize(device)
    return statistics.median(taken)


def _in_graphs(calls: Mapping[str, Callable[[], object]], device: torch.device, budget_s: float) -> Samples:
    """The calls as CUDA graphs, interleaved; without those that cannot be captured."""
    captured: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        with contextlib.suppress(Exception):  # of a peer's; its plain time stands
            captured[name] = _captured(call, device)
    samples, _ = _time(captured, device=device, rounds=None, budget_s=budget_s)
    return samples


def _record(
    case: LinearCase,
    asked: int,
    name: str,
    found: _Found,
    samples: Samples,
    graphs: Samples,
    host_us: float | None,
    floor: float | None,
    environment: Environment,
) -> Record:
    verdict = found.verdict
    timed = name in samples.ms
    spread = samples.time(name) if timed else None
    speedup = samples.ratio(UNFUSED, name) if timed and UNFUSED in samples.ms else None
    cost = samples.ratio(name, FROZEN) if timed and FROZEN in samples.ms else None
    return Record(
        **dataclasses.asdict(case),
        provider=name,
        status=found.status,
        M_asked=asked,
        rounds=samples.rounds if timed else 0,
        median_ms=spread.median if spread else None,
        p10_ms=spread.p10 if spread else None,
        p90_ms=spread.p90 if spread else None,
        speedup=speedup.median if speedup else None,
        speedup_p10=speedup.p10 if speedup else None,
        speedup_p90=speedup.p90 if speedup else None,
        cost=cost.median if cost else None,
        cost_p10=cost.p10 if cost else None,
        cost_p90=cost.p90 if cost else None,
        worst_tensor=verdict.tensor if verdict else "",
        error=verdict.error if verdict else None,
        error_budget=verdict.budget if verdict else None,
        saved_bytes=found.saved,
        peak_bytes=found.peak,
        floor_ms=floor,
        host_us=host_us,
        graph_cost=graphs.ratio(name, FROZEN).median if name in graphs.ms and FROZEN in graphs.ms else None,
        roofline=floor / spread.median if floor is not None and spread and spread.median > 0 else None,
        **dataclasses.asdict(environment),
    )
