"""The page docs/interop/conformance.md, from the outcomes of the runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_kernels.benchmarking.records import Environment
from lora_kernels.testing import ERROR_FACTOR

from .suite import LEFT_OUT

TENSORS = {
    "y": "y",
    "d_x": "dx",
    "d_lora_A": "dA",
    "d_lora_B": "dB",
    "d_lora_bias": "gradient of B's bias",
    "d_bias": "gradient of the base's bias",
    "d_weight": "dW",
}
# A whole run has ten thousand; far fewer would mean that the patch, or the plugin, no longer reaches the layers.
FEWEST_CALLS = 5000
# Of the calls, at most this share may need the bound of rounding instead of the budget.
MOST_BY_BOUND = 1e-3


@dataclass(frozen=True)
class Run:
    """What one run of the tests left: a dictionary for each test, by its name."""

    tests: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Run:
        """The outcomes that the plugin wrote."""
        lines = path.read_text(encoding="utf-8").splitlines()
        return cls({test["test"]: test for test in map(json.loads, lines)})

    def outcomes(self, file: str = "") -> Counter[str]:
        """How many tests passed, failed, were skipped or failed as expected."""
        return Counter(test["outcome"] for name, test in self.tests.items() if name.startswith(file))

    def total(self, key: str, file: str = "") -> Counter[str]:
        """The sum of a counter that the plugin attached to each test."""
        total: Counter[str] = Counter()
        for name, test in self.tests.items():
            if name.startswith(file):
                total.update(test.get(key, {}))
        return total

    def largest_shares(self) -> dict[str, float]:
        """The largest error of each tensor, as a share of its budget."""
        shares: dict[str, float] = {}
        for test in self.tests.values():
            for name, share in test.get("shares", {}).items():
                shares[name] = max(share, shares.get(name, 0.0))
        return shares

    def by_bound(self) -> int:
        """How many calls are within the bound of rounding only."""
        return sum(test.get("by_bound", 0) for test in self.tests.values())

    def violations(self) -> dict[str, list[str]]:
        """The tests with a call beyond the budget."""
        return {name: test["violations"] for name, test in self.tests.items() if test.get("violations")}


def new_failures(off: Run, on: Run) -> list[str]:
    """Tests that pass without the patch and not with it."""
    passed = [name for name, test in off.tests.items() if test["outcome"] == "passed"]
    return [name for name in passed if name not in on.tests or on.tests[name]["outcome"] != "passed"]


@dataclass(frozen=True)
class FaultRun:
    """How a broken operation fared: by PEFT's own assertions, and by the comparison."""

    fault: str
    tests: int
    by_suite: int
    by_comparison: int

    @classmethod
    def of(cls, fault: str, off: Run, broken: Run) -> FaultRun:
        """From a run of the same tests without a fault and one with it: those that pass, and have a fused call."""
        passed = (name for name, test in off.tests.items() if test["outcome"] == "passed")
        names = [name for name in passed if broken.tests.get(name, {}).get("kinds")]
        own = sum(not broken.tests[name].get("passed_by_itself", False) for name in names)
        return cls(fault, len(names), own, sum(name in broken.violations() for name in names))


def verdict(off: Run, on: Run, faults: Sequence[FaultRun]) -> list[str]:
    """What is wrong, a line each; empty if nothing is."""
    wrong = [
        f"fails with the patch only: {name}\n{on.tests.get(name, {}).get('why', '')}" for name in new_failures(off, on)
    ]
    wrong += [f"beyond the error budget: {name}: {'; '.join(lines)}" for name, lines in on.violations().items()]
    calls = on.total("kinds").total()
    if calls < FEWEST_CALLS:
        wrong.append(f"{calls} fused calls were compared, of at least {FEWEST_CALLS} that these tests make")
    if on.by_bound() > MOST_BY_BOUND * calls:
        wrong.append(f"{on.by_bound()} of {calls} calls are beyond twice eager's error, within the bound of rounding")
    wrong += [f"the comparison did not notice the fault {fault.fault}" for fault in faults if not fault.by_comparison]
    return wrong


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def page(off: Run, on: Run, faults: Sequence[FaultRun]) -> str:
    """The whole page."""
    return "\n\n".join(_parts(off, on, faults)) + "\n"


def _parts(off: Run, on: Run, faults: Sequence[FaultRun]) -> Iterator[str]:
    environment = Environment.current(torch.device("cpu"))
    calls = on.total("kinds").total()
    new = new_failures(off, on)
    yield "# PEFT's own tests, with the patch active"
    yield (
        "Written by `make conformance`. "
        f"peft {version('peft')} · transformers {version('transformers')} · torch {environment.torch} · "
        f"Python {environment.python} · commit {environment.commit}"
    )
    yield (
        f"**{len(new)} tests fail with `patch_peft` that pass without it. {calls:,} fused calls were compared with "
        f"PEFT's own forward in y and every gradient; {len(on.violations())} tests had one beyond the limits.**"
    )
    yield "## The tests"
    names = ("passed", "failed", "skipped", "xfailed")
    yield table(
        ["", "without the patch", "with the patch"],
        [[name, off.outcomes()[name], on.outcomes()[name]] for name in names],
    )
    yield METHOD
    yield table(
        ["file", "passed without", "passed with", "calls compared", "calls left to PEFT"],
        [
            [
                f"`{file}`",
                off.outcomes(file)["passed"],
                on.outcomes(file)["passed"],
                on.total("kinds", file).total(),
                on.total("fallbacks", file).total(),
            ]
            for file in sorted({name.partition("::")[0] for name in off.tests})
        ],
    )
    yield "Not run:"
    yield "\n".join(f"- files that {reason}: {', '.join(files)}" for reason, files in LEFT_OUT.items())
    yield "## The comparison"
    yield COMPARISON
    kinds = sorted(on.total("kinds").items(), key=lambda kind: -kind[1])
    yield table(
        ["operation", "base layer", "dtypes", "with", "calls"], [[*kind.split(" | "), count] for kind, count in kinds]
    )
    shares = on.largest_shares()
    yield "The largest error of all, as a share of what is allowed:"
    yield table(["tensor", "share"], [[TENSORS[name], f"{shares[name]:.2f}"] for name in TENSORS if name in shares])
    yield f"{on.by_bound()} of the {calls:,} calls needed the bound of rounding; they are not in this table."
    if not_compared := on.total("not_compared"):
        yield "Fused, but not compared:"
        yield table(["why", "calls"], not_compared.most_common())
    yield "## Calls that were left to PEFT"
    yield FALLBACKS
    yield table(["why", "calls"], on.total("fallbacks").most_common())
    if faults:
        yield "## That the comparison sees faults"
        yield FAULTS
        yield table(
            ["fault", "tests", "failed by PEFT's assertions", "failed by the comparison"],
            [[fault.fault, fault.tests, fault.by_suite, fault.by_comparison] for fault in faults],
        )


METHOD = """\
The tests come with PEFT's source distribution of the installed version, which is downloaded when they are run; nothing
of them is in this repository. Of the files below, those tests run that are not parametrised with the configuration of
another method. They run twice, on the CPU, without a network, each test from the same seeds. The models they ask for
are random ones, with the architecture of the real ones and other sizes; a few tests want more of the hub than that and
fail in both runs. In the second run `patch_peft` is called on each model after PEFT has injected adapters into it. The
rule by which a small call on a CPU is left to PEFT's forward is off, since these tests make no other calls."""

COMPARISON = f"""\
PEFT's assertions hardly look at gradients. So each fused call is recorded (x, the layer with its parameters, autocast,
the state of torch's generator) and, when its test is over, compared. The truth is PEFT's forward in fp64, with
`nn.Dropout` replaced by the mask that `lora_kernels.reference` makes of the call's seed. Held against it are y of the
call itself and, from a replay with a random dy, the gradients of x, A, B and every bias (and of the weight, where it
trains). Each may have at most {ERROR_FACTOR:g} times the error that PEFT's forward makes in the call's dtypes, or what
rounding the truth may cost if that is more. The replay is made with the gradients that the call itself could be asked
for, and again with all of them. A call with fewer than 100 roundings in a tensor that misses this budget is repeated on
other inputs, and judged on all of them together: the norm of a few errors is a matter of luck. That leaves calls on
which PEFT's forward happens to be exact, because an fp32 adapter holds 16-bit numbers or its columns cancel. There an
fp32 tensor may also be within the textbook's bound of rounding, n u times the same chain over absolute values; at most
one call in a thousand may need that. One call beyond all this fails its test. Calls that torch.compile has traced are
not recorded."""

FALLBACKS = """\
As the patch's own rules name it. Layers other than `lora.Linear` (embeddings, convolutions, attention, experts) are
PEFT's and not counted."""

FAULTS = """\
The same over some of the tests, with the operation broken on purpose. The second column counts the tests that pass
without a fault and have a fused call; where B is zero, or nothing is dropped, a fault changes nothing."""
