"""What `bench.first_run` runs on a GPU, part by part, and the parts that are nothing else's.

    python -m bench.gpu_parts warm | repeat | sanitize [--tool racecheck] [TEST ...] | bisect TEST ...

`warm` compiles every case of the suites in as many processes as there are cores; `repeat` makes the same calls 300
times, alone, overlapped and in CUDA graphs; `sanitize` runs tests, or small cases of every strategy and of lora_branch,
under compute-sanitizer; `bisect` runs tests with one mechanism after another switched off (`bench.switches`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench import providers, suites
from bench.switches import SWITCHES, VARIABLE
from lora_kernels.benchmarking.cases import LinearCase, select
from lora_kernels.benchmarking.providers import CaseInputs

WORKERS = 14
REPEATS = 300
REHEARSED = 4.0
"""Times its limit has a part in a rehearsal."""
CUDA_BIN = "/usr/local/cuda/bin"
LINEAR, BRANCH, REPLAY, STACK, BESIDE = (
    f"tests/gpu/test_{name}.py" for name in ("linear", "branch", "replay", "stack", "beside")
)
PERSISTENT, RANGE = "tests/gpu/test_persistent.py", "tests/gpu/test_fp16_range.py"
LARGE = "offsets_past or memory_saved or captured_training"
"""Of the tests: too long or too large for the first day, and what --later is for."""
LATER = f"compiled or {LARGE}"
"""What call 1 leaves: what another compiler makes of the ops is call 2's."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        title: what it is for.
        limit_s: its time-out.
        command: what python3 is given.
        shows: what of it no CPU can show.
        needs_gib: GPU memory without which it is left out.
        environment: beside the caller's.
    """

    title: str
    limit_s: float
    command: tuple[str, ...]
    shows: str
    needs_gib: float = 0.0
    environment: tuple[tuple[str, str], ...] = ()


def _tests(device: str, *arguments: str, workers: int = WORKERS) -> tuple[str, ...]:
    """pytest, in as many workers as the machine has cores for; on a CPU the tests are found and not run."""
    command = ("-m", "pytest", "-W", "default", "--tb=short", "--maxfail=60", "-p", "no:cacheprovider")
    if device == "cpu":
        return (*command, "-q", "--collect-only", *arguments)
    processes = min(workers, max(1, (os.cpu_count() or 1) - 2))
    # -v: a run that is stopped has named what it had found.
    parallel = ("-n", str(processes)) if importlib.util.find_spec("xdist") else ()
    return (*command, "-v", *parallel, *arguments)


def _linear(device: str, folder: Path, name: str, *arguments: str, total_s: float) -> tuple[str, ...]:
    where = ("-m", "bench.linear", "--device", device, "--rows-only", "--out", str(folder / name))
    if device == "cpu":
        return (*where, "--suite", "cpu", "--only", "minilm.attention fp32 p=0", "--budget", "0.02", "--total", "5",
                "--providers", "frozen linear,unfused chain,auto")  # fmt: skip
    return (*where, "--in-graphs", "--total", f"{total_s:g}", *arguments)


def _step(device: str, folder: Path, *, total_s: float) -> tuple[str, ...]:
    small = ("--size", "tiny", "--budget", "0.1", "--only", "fp32 p=0.05") if device == "cpu" else ("--budget", "1.5")
    where = ("-m", "bench.llama_step", "--device", device, "--out", str(folder))
    return (*where, *small, "--total", f"{total_s:g}")


def _kernels(device: str, folder: Path, only: str, *, total_s: float) -> tuple[str, ...]:
    if device == "cpu":
        return ("-m", "bench.kernels", "--list", "--only", only)
    return ("-m", "bench.kernels", "--budget", "0.4", "--total", f"{total_s:g}", "--only", only, "--out", str(folder))


def _tune(device: str, *, total_s: float) -> tuple[str, ...]:
    cpu = ("--shapes", "32x64x64", "--dtype", "fp32") if device == "cpu" else ()
    return ("-m", "lora_kernels", "tune", "--device", device, "--budget", f"{total_s:g}", *cpu)


def _host(device: str, folder: Path) -> tuple[str, ...]:
    few = ("--rounds", "1") if device == "cpu" else ()
    return ("-m", "bench.host", "--device", device, "--out", str(folder), *few)


def _headline() -> str:
    """Every contender but what torch compiles, which takes half a minute a case."""
    chosen = (*providers.BASELINES, *providers.PEERS, providers.AUTO)
    return ",".join(p.name for p in chosen if p not in (providers.COMPILED, providers.COMPILED_MAX))


def _strategies() -> str:
    return ",".join(p.name for p in (providers.BASELINES[0], providers.ADDMM, *providers.OURS))


RIGHT = "whether the kernels are right there: wgmma, TMA and dependent launches are no interpreter's"
FAST = "every time in it"


def parts(call: str, device: str, folder: Path, failed: Sequence[str], *, warmed: bool) -> list[Part]:
    """What a call runs, in order.

    failed: the tests that call 1 left red, which call 2 then looks into; warmed: kernels compiled before are at hand.
    """
    found = _parts(call, device, folder, failed, warmed)
    if device == "cpu":  # whose speed, and what else it does, a GPU's minutes know nothing of
        return [dataclasses.replace(part, limit_s=REHEARSED * part.limit_s) for part in found]
    return found


def _parts(call: str, device: str, folder: Path, failed: Sequence[str], warmed: bool) -> list[Part]:
    own = ("-m", "bench.gpu_parts")
    where = ("--device", device)
    interpreted = (("TRITON_INTERPRET", "1"),) if device == "cpu" else ()
    mixed = Part(
        "tests of the linear under fp32 adapters", 60, _tests(device, "-k", f"mixed and not ({LATER})", LINEAR), RIGHT
    )
    linear = Part("tests of the linear", 75, _tests(device, "-k", f"not (mixed or {LATER})", LINEAR, RANGE), RIGHT)
    branch = Part(
        "tests of the branch and of repeated launches",
        65,
        _tests(device, "-k", f"not ({LATER})", BRANCH, REPLAY, BESIDE),
        RIGHT,
    )
    persistent = Part("tests of the persistent kernel", 60, _tests(device, "-x", PERSISTENT, workers=8), RIGHT)
    repeat = Part("300 times the same bits", 30, (*own, "repeat", *where), "races", 4, interpreted)
    info = Part("info", 10, ("-m", "lora_kernels", "info"), "the GPU's name and limits")
    warm = Part("every case once, in many processes", 45, (*own, "warm", *where), "kernels that do not load", 8)
    right = [info, *([] if warmed else [warm]), mixed, linear, branch, repeat, persistent]
    if call == "1":
        strategies = _linear(device, folder, "strategies", "--suite", "strategies", "--providers", _strategies(),
                             "--budget", "0.2", total_s=55)  # fmt: skip
        timed = Part("ceilings and strategies", 70, strategies, FAST, 8)
        return [*right, timed, *([Part("host time", 20, _host(device, folder), FAST)] if warmed else [])]
    headline = Part(
        "headline", 85,
        _linear(device, folder, "headline", "--suite", "headline", "--budget", "0.35", "--providers", _headline(),
                total_s=70),
        FAST, 8,
    )  # fmt: skip
    kernels = Part(
        "kernels by themselves", 45, _kernels(device, folder, "beside,fp32 adapters,one pass", total_s=36), FAST, 4
    )
    if call == "2" and failed:
        chosen = tuple(failed[:6])
        return [
            Part("what failed, alone", 50, _tests(device, *chosen, workers=1), RIGHT),
            Part("what failed, under memcheck", 85, (*own, "sanitize", *chosen), "reads and writes out of bounds"),
            Part("what failed, with mechanisms off", 100, (*own, "bisect", *chosen), "which mechanism it is"),
            headline,
        ]
    compiled = Part("tests of what is compiled", 55, _tests(device, "-k", "compiled", LINEAR, STACK, workers=4),
                    "inductor and CUDA graphs around the ops")  # fmt: skip
    if call == "2":
        return [
            headline,
            Part("a Llama-shaped step", 45, _step(device, folder, total_s=34), FAST, 24),
            kernels,
            Part("torch.compile", 45,
                 _linear(device, folder, "compile", "--suite", "headline", "--only", "8192", "--budget", "0.2",
                         "--providers", f"{providers.BASELINES[0].name},{providers.COMPILED.name},auto", total_s=32),
                 FAST, 8),
            Part("tune", 35, _tune(device, total_s=20), FAST, 4),
            compiled,
        ]  # fmt: skip
    return [
        *right, headline, *([kernels] if warmed else []),
        Part("tests that are long or large", 85,
             _tests(device, "-k", LARGE, LINEAR, BRANCH, STACK, workers=2),
             "offsets past 2^31 and what a call takes of the memory", 75),
    ]  # fmt: skip


# -- parts of its own --------------------------------------------------------------------------------------------------


def warm(device: str) -> int:
    """Runs every case of the suites once with every contender, which compiles; says what failed, in parallel."""
    cases = list(dict.fromkeys([*suites.suite("strategies"), *suites.suite("headline")]))
    if device == "cpu":
        cases = [dataclasses.replace(case, M=16, N=64, K=64) for case in cases[:2]]
    workers = min(16, os.cpu_count() or 1)
    faults = 0
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        for line in pool.imap_unordered(partial(_warm, device), cases):
            if line:
                faults += 1
                print(line, flush=True)
    print(f"{len(cases)} cases in {workers} processes, {faults} with faults")
    return int(faults > 0)


def _warm(device: str, case: LinearCase) -> str:
    where = torch.device(device)
    faults = []
    inputs = CaseInputs.of(case, where)
    for provider in providers.lineup(case, where):
        if provider.why_not(case, where) is not None or provider.name == providers.COMPILED.name:
            continue
        try:
            y = provider.forward(inputs, case.dropout_p)
            if case.backward:
                torch.autograd.grad(y, tuple(inputs.leaves.values()) if provider.has_lora else (inputs.x,), inputs.dy)
            if where.type == "cuda":
                torch.cuda.synchronize(where)
        except Exception as error:  # said, and the next one is tried
            faults.append(f"{case} {provider.name}: {type(error).__name__}: {str(error)[:300]}")
    return "\n".join(faults)


def repeat(device: str) -> int:
    """The same call gives the same bits: the masked shrink; and steps, whose launches overlap, alone and in a graph."""
    from lora_kernels.ops.low_rank_triton import launch_scope

    where = torch.device(device)
    gpu = where.type == "cuda"
    with launch_scope(torch.empty(0, device=where)):
        failed = sum(not line.endswith("right") for line in _shrinks(where, REPEATS if gpu else 2, large=gpu))
    if gpu:
        failed += sum(not line.endswith("right") for line in _steps(where, REPEATS // 3))
    return int(failed > 0)


def _printed(line: str, right: bool) -> str:
    line += ": right" if right else ": WRONG"
    print(line, flush=True)
    return line


def _shrinks(where: torch.device, repeats: int, *, large: bool) -> Iterator[str]:
    from lora_kernels.kernels.shrink import shrink
    from lora_kernels.planning.tiles import tile_of
    from lora_kernels.reference.philox import dropout_threshold, keep_mask

    m, k = (8192, 4096) if large else (64, 256)
    for dtype in (torch.bfloat16, torch.float16):
        for rank in (16, 32, 64):
            x = torch.randn(m, k, device=where).to(dtype)
            lora_A = torch.randn(rank, k, device=where).to(dtype)
            seed = torch.tensor([7], device=where)
            truth = torch.where(keep_mask(seed, m, k, 0.1), x, 0).double() @ lora_A.double().T
            tile = tile_of("hopper", "16", "shrink", rank=rank)
            assert tile is not None
            for splits in (1, 4):
                call = partial(
                    shrink, x=x, lora_A=lora_A, seed=seed, threshold=dropout_threshold(0.1), scale=1.0, splits=splits,
                    precision="ieee", tile=tile,
                )  # fmt: skip
                first = call()
                error = ((first.double() - truth).norm() / truth.norm()).item()
                same = sum(torch.equal(call(), first) for _ in range(repeats))
                told = f"shrink {dtype} r={rank} splits={splits}, error {error:.1e}, same {same} of {repeats}"
                yield _printed(told, error < 4e-3 and same == repeats)


def _steps(where: torch.device, repeats: int) -> Iterator[str]:
    from bench.providers.strategies import strategy_provider

    for case in select(suites.suite("strategies"), "llama3-8b.q forward+backward M=8192"):
        inputs = CaseInputs.of(case, where)
        for strategy in ("persistent", "shrink_fused", "library"):
            provider = strategy_provider("triton", strategy)  # type: ignore[arg-type]
            if provider.why_not(case, where) is not None:
                continue
            leaves = tuple(inputs.leaves.values())

            def step(provider=provider, inputs=inputs, case=case, leaves=leaves):  # type: ignore[no-untyped-def]
                y = provider.forward(inputs, case.dropout_p)
                return (y.detach(), *torch.autograd.grad(y, leaves, inputs.dy))

            first = step()
            same = sum(all(torch.equal(a, b) for a, b in zip(step(), first, strict=True)) for _ in range(repeats))
            stream = torch.cuda.Stream(where)
            stream.wait_stream(torch.cuda.current_stream(where))
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream(where).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                in_graph = step()
            replays = 0
            for _ in range(repeats):
                graph.replay()
                replays += all(torch.equal(a, b) for a, b in zip(in_graph, first, strict=True))
            told = f"{case.name} {case.dtypes} p={case.dropout_p:g} {strategy}, same {same} and {replays} of {repeats}"
            yield _printed(told, min(same, replays) == repeats)


SMALL_CASES = (
    "-k", "bf16 and (37 or 150) and (strategy or backend) and not (persistent or over or mixed or torch or auto)",
    LINEAR, BRANCH,
)  # fmt: skip


def sanitize(tests: Sequence[str], tool: str) -> int:
    """The tests under compute-sanitizer, without PyTorch's pool of memory: there a read past a tensor is another's.

    What is found in a library's kernel is the library's; the report names the kernel.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), CUDA_BIN])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        print("compute-sanitizer is not here")
        return 1
    pytest = (sys.executable, "-m", "pytest", "-q", "-W", "default", "--tb=short", *(tests or SMALL_CASES))
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest], env=environment, check=False
    ).returncode


def bisect(tests: Sequence[str]) -> int:
    """The tests with one mechanism after another switched off: which of them turns one green."""
    for switch in SWITCHES:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "bench.switches",
            "-p",
            "no:cacheprovider",
            "--tb=line",
            *tests,
        ]
        environment = os.environ | {VARIABLE: switch}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = found.stdout.strip().splitlines() or [found.stderr.strip()[-300:]]
        print(f"without {switch}: {lines[-1]}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_parts", description="Parts of bench.first_run.")
    parser.add_argument("part", choices=("warm", "repeat", "sanitize", "bisect"))
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tool", choices=("memcheck", "racecheck"), default="memcheck", help="of sanitize")
    arguments = parser.parse_args(argv)
    found = {
        "warm": functools.partial(warm, arguments.device),
        "repeat": functools.partial(repeat, arguments.device),
        "sanitize": functools.partial(sanitize, arguments.tests, arguments.tool),
        "bisect": functools.partial(bisect, arguments.tests),
    }
    with contextlib.suppress(KeyboardInterrupt):  # the time is up, and what was found is printed
        return found[arguments.part]()
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
