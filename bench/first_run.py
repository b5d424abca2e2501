"""The lent minutes of a GPU, in three calls: right first, then timed.

    python3 -m bench.first_run --call 1 [--device DEVICE] [--out FOLDER] [--only PARTS]

Each part is a process of its own with a time-out: a crash, a hang or a lack of memory costs that part. In the folder,
rewritten every 15 s: summary.txt, what ran, how it ended and the last lines of each, and all.tgz, everything written.
Nothing is installed, and neither make nor git is needed. `--device cpu` walks through the parts that a CPU has.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench import providers, suites
from lora_kernels.benchmarking.cases import LinearCase, select
from lora_kernels.benchmarking.providers import CaseInputs
from lora_kernels.benchmarking.records import device_slug

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 3
KEEP_S = 15.0
LINES_SHOWN = 12
REPEATS = 300


@dataclass(frozen=True)
class Part:
    """One process: its title, its time-out, and what python3 is given."""

    title: str
    limit_s: float
    command: tuple[str, ...]


def _tests(*arguments: str, workers: int = 14) -> tuple[str, ...]:
    """pytest, in as many workers as the machine has cores for."""
    processes = min(workers, max(1, (os.cpu_count() or 1) - 2))
    return (
        "-m", "pytest", "-v", "-W", "default", "--tb=short", "--maxfail=60", "-p", "no:cacheprovider",
        *(("-n", str(processes)) if importlib.util.find_spec("xdist") else ()), *arguments,
    )  # fmt: skip


def _linear(device: str, folder: Path, name: str, *arguments: str, total_s: float) -> tuple[str, ...]:
    return (
        "-m", "bench.linear", "--device", device, "--rows-only", "--out", str(folder / name),
        "--total", f"{total_s:g}", *arguments,
    )  # fmt: skip


def _contenders() -> str:
    return ",".join(p.name for p in (providers.BASELINES[0], providers.ADDMM, *providers.OURS))


SLOW_OR_LATER = "persistent or offsets_past or compiled or memory_saved"


def parts(call: int, device: str, folder: Path) -> list[Part]:
    """What a call runs, in order."""
    me = ("-m", "bench.first_run", "--device", device)
    if call == 1:
        return [
            Part("info", 15, ("-m", "lora_kernels", "info")),
            Part("tests of the linear", 145, _tests("-k", f"not ({SLOW_OR_LATER})", "tests/gpu/test_linear.py")),
            Part("every case once, in 14 processes", 60, (*me, "--part", "warm")),
            Part("300 times the same bits", 35, (*me, "--part", "repeat")),
            Part("tests of the persistent kernel", 40, _tests("-x", "tests/gpu/test_persistent.py", workers=8)),
            Part(
                "ceilings and strategies", 75,
                _linear(device, folder, "strategies", "--suite", "strategies", "--providers", _contenders(),
                        "--budget", "0.25", total_s=60),
            ),
            Part("host time", 15, ("-m", "bench.host", "--device", device, "--out", str(folder))),
        ]  # fmt: skip
    if call == 2:
        return [
            Part("kernels by themselves", 110, ("-m", "bench.kernels", "--budget", "0.5", "--total", "90",
                                                "--out", str(folder))),
            Part("tests of the linear", 100, _tests("-k", f"not ({SLOW_OR_LATER})", "tests/gpu/test_linear.py")),
            Part("tests of the branch", 70, _tests("-k", f"not ({SLOW_OR_LATER})", "tests/gpu/test_branch.py",
                                                  "tests/gpu/test_replay.py")),
            Part("tests of the persistent kernel", 45,
                 _tests("-k", "every_tile or long or graph or back_to_back", "tests/gpu/test_persistent.py")),
            Part("host time", 25, ("-m", "bench.host", "--device", device, "--out", str(folder))),
        ]  # fmt: skip
    named = (
        "frozen linear,unfused chain,peft,addmm,unsloth-style,lorafusion-style,auto,triton:shrink_fused,triton:library"
    )
    return [
        Part("tests of the linear", 80, _tests("-k", f"not ({SLOW_OR_LATER})", "tests/gpu/test_linear.py")),
        Part("every case once, in 14 processes", 35, (*me, "--part", "warm")),
        Part("headline", 70, _linear(device, folder, "headline", "--suite", "headline", "--budget", "0.35",
                                     "--providers", named, total_s=60)),
        Part("a Llama-shaped step", 50, ("-m", "bench.llama_step", "--device", device, "--out", str(folder),
                                         "--budget", "1.5", "--total", "35")),
        Part("kernels by themselves", 40, ("-m", "bench.kernels", "--budget", "0.4", "--total", "32", "--only",
                                           "fp32 adapters", "--out", str(folder))),
        Part("tests of the branch and of what is compiled", 50,
             _tests("-k", "(test_branch and mixed) or compiled or memory", "tests/gpu/test_branch.py",
                    "tests/gpu/test_linear.py")),
    ]  # fmt: skip


@dataclass
class Outcome:
    """How a part ended."""

    title: str
    status: str
    seconds: float
    log: Path


def run_part(part: Part, log: Path, folder: Path) -> Outcome:
    """Runs it in a session of its own, which is killed when its time is up: asked first, then not."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "LORA_KERNELS_CACHE": str(folder / "plans"),
    }
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = str(process.wait(part.limit_s))
        except subprocess.TimeoutExpired:
            status = f"stopped after {part.limit_s:g} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(4)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Outcome(part.title, status, time.perf_counter() - start, log)


def summary(outcomes: Sequence[Outcome], running: str, elapsed_s: float) -> str:
    """One screen: each part, how it ended, and its last lines."""
    lines = [f"{elapsed_s:.0f} s; running: {running or 'nothing'}"]
    for outcome in outcomes:
        lines.append(f"\n== {outcome.title}: {outcome.status}, {outcome.seconds:.0f} s")
        with contextlib.suppress(OSError):
            lines += outcome.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def kept(folder: Path, out: Path, text: Callable[[], str]) -> Iterator[None]:
    """While it runs, and at its end, brings what the folder holds to `out`: whoever lends the GPU may take it back."""
    done = threading.Event()

    def keep() -> None:
        (out / "summary.txt").write_text(text(), encoding="utf-8")
        beside = out / "all.tgz.new"
        with tarfile.open(beside, "w:gz") as archive:
            archive.add(folder, arcname="run")
        beside.replace(out / "all.tgz")

    def loop() -> None:
        while not done.wait(KEEP_S):
            with contextlib.suppress(OSError):  # a file that vanishes while it is read
                keep()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        keep()


def run(call: int, device: str, out: Path, only: str) -> int:
    """All parts of a call; 1 if one of them failed."""
    start = time.perf_counter()
    folder = out.parent / f"{out.name}-work"
    for path in (folder, out):
        path.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    running = [""]

    def text() -> str:
        return summary(outcomes, running[0], time.perf_counter() - start)

    with kept(folder, out, text):
        for number, part in enumerate(parts(call, device, folder)):
            if only and not any(word in part.title for word in only.split(",")):
                continue
            running[0] = part.title
            slug = part.title.replace(" ", "-").replace(",", "")
            outcome = run_part(part, folder / f"{call}{number}-{slug}.log", folder)
            outcomes.append(outcome)
            print(f"{time.perf_counter() - start:5.0f} s  {outcome.title}: {outcome.status}", flush=True)
        running[0] = ""
    print(text())
    return int(any(outcome.status != "0" for outcome in outcomes))


# -- parts of its own --------------------------------------------------------------------------------------------------


def warm(device: str) -> int:
    """Runs every case of the suites once with every contender, which compiles; says what failed, in parallel."""
    cases = list(dict.fromkeys([*suites.suite("strategies"), *suites.suite("headline")]))
    workers = min(14, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    faults = 0
    with context.Pool(workers, maxtasksperchild=8) as pool:
        for line in pool.imap_unordered(partial(_warm, device), cases):
            if line:
                faults += 1
                print(line, flush=True)
    print(f"{len(cases)} cases in {workers} processes")
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
    """The same call gives the same bits, 300 times: the masked shrink, shrink and GEMM overlapped, and in a graph."""
    from bench.providers.strategies import strategy_provider
    from lora_kernels.kernels.shrink import shrink
    from lora_kernels.planning.tiles import Tile, tile_of
    from lora_kernels.reference.philox import dropout_threshold, keep_mask

    where = torch.device(device)
    failed = 0
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        for rank in (16, 32, 64):
            x = torch.randn(8192, 4096, device=where).to(dtype)
            lora_A = torch.randn(rank, 4096, device=where).to(dtype)
            seed = torch.tensor([7], device=where)
            keep = keep_mask(seed, 8192, 4096, 0.1)
            truth = torch.where(keep, x, 0).double() @ lora_A.double().T
            shipped = tile_of("hopper", "16", "shrink", rank=rank)
            # What was shipped before: wgmma's registers are overwritten under Triton 3.6, by its machine code.
            stages = 4 if rank == 16 else 3
            suspect = Tile(block_m=64, block_k=128, block_r=rank, num_warps=4, num_stages=stages)
            for label, tile in (("shipped", shipped), ("suspect", suspect)):
                for splits in (1, 4):
                    call = partial(
                        shrink, x=x, lora_A=lora_A, seed=seed, threshold=dropout_threshold(0.1), scale=1.0,
                        splits=splits, precision="ieee", tile=tile,
                    )  # fmt: skip
                    first = call()
                    error = ((first.double() - truth).norm() / truth.norm()).item()
                    same = sum(torch.equal(call(), first) for _ in range(REPEATS))
                    bad = not (error < 4e-3 and same == REPEATS)
                    failed += bad and label == "shipped"
                    print(f"shrink {name} r={rank} splits={splits} {label}: error {error:.2e}, same {same}/{REPEATS}"
                          f"{'  <-- WRONG' if bad else ''}", flush=True)  # fmt: skip
    cases = select(suites.suite("strategies"), "llama3-8b.q forward+backward M=8192")
    for case in cases:
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
            same = sum(all(torch.equal(a, b) for a, b in zip(step(), first, strict=True)) for _ in range(REPEATS // 3))
            stream = torch.cuda.Stream(where)
            stream.wait_stream(torch.cuda.current_stream(where))
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream(where).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                in_graph = step()
            replays = 0
            for _ in range(REPEATS // 3):
                graph.replay()
                replays += all(torch.equal(a, b) for a, b in zip(in_graph, first, strict=True))
            bad = min(same, replays) < REPEATS // 3
            failed += bad
            print(f"{case.name} {case.dtypes} p={case.dropout_p:g} {strategy}: same {same}, in a graph {replays} of "
                  f"{REPEATS // 3}{'  <-- WRONG' if bad else ''}", flush=True)  # fmt: skip
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_run", description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--device", default="cuda", help="cpu: a dry run of the script")
    parser.add_argument("--out", type=Path, help="folder (default: $OUT, else bench/results/local/<device>)")
    parser.add_argument("--only", default="", help="parts whose title has one of these words, separated by commas")
    parser.add_argument("--part", choices=("warm", "repeat"), help="one part, in this process")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("bench.first_run needs a GPU that torch can use, and there is none here; --device cpu tries the script.")
        return NO_GPU
    if arguments.part:
        return {"warm": warm, "repeat": repeat}[arguments.part](arguments.device)
    default = os.environ.get("OUT") or ROOT / "bench" / "results" / "local" / device_slug(
        torch.device(arguments.device)
    )
    return run(arguments.call, arguments.device, Path(arguments.out or default), arguments.only)


if __name__ == "__main__":
    raise SystemExit(main())
