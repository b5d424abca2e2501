"""pytest plugin for PEFT's tests: the LoRA cases alone, patched or not, with every fused call compared.

    pytest -p conformance.plugin --lora-kernels {off,on} --outcomes FILE

`on` calls patch_peft on every model that PEFT injects adapters into, as a user would after get_peft_model or
add_adapter. Each test starts from the same seeds. What happened to each test, and what its LoRA layers did, goes to
FILE, one line of JSON for each.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from . import compare, faults
from .compare import Call

SEED = 0


class Log:
    """What the LoRA layers did in the test that is running; closed while calls are judged."""

    def __init__(self) -> None:
        self.open = True
        self.calls: list[Call] = []
        self.fallbacks: Counter[str] = Counter()
        self.not_compared: Counter[str] = Counter()

    def clear(self) -> None:
        self.__init__()


log = Log()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora_kernels")
    group.addoption("--lora-kernels", choices=("off", "on"), default="off", help="whether patch_peft is active")
    group.addoption("--outcomes", type=Path, help="file for one line of JSON per test")
    group.addoption("--fault", choices=sorted(faults.FAULTS), help="break the fused operation in this way")


def pytest_configure(config: pytest.Config) -> None:
    stay_offline()
    if config.getoption("--lora-kernels") == "on":
        observe()
        patch_what_peft_makes()
    if fault := config.getoption("--fault"):
        config.stash[_fault] = contextlib.ExitStack()
        config.stash[_fault].enter_context(faults.FAULTS[fault]())
    if not hasattr(config, "workerinput") and (path := config.getoption("--outcomes")):
        config.pluginmanager.register(Outcomes(path))


_fault = pytest.StashKey[contextlib.ExitStack]()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _fault in config.stash:
        config.stash[_fault].close()


def stay_offline() -> None:
    """PEFT's context manager would switch the hub back on; the local cache has what can be had."""
    sys.path.insert(0, str(Path.cwd()))
    import tests.testing_utils

    @contextlib.contextmanager
    def hub_online_once(model_id: str) -> Iterator[None]:
        yield

    tests.testing_utils.hub_online_once = hub_online_once


def patch_what_peft_makes() -> None:
    """patch_peft on every model, once PEFT has injected adapters into it."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    from lora_kernels import patch_peft

    inject = BaseTuner.inject_adapter

    def inject_and_patch(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            patch_peft(model)
        return result

    BaseTuner.inject_adapter = inject_and_patch


def observe() -> None:
    """Record each fused call of the patched layers, and why each other call was left to PEFT.

    No call is too small to be fused here, as it would be on a CPU: PEFT's tests have only small ones.
    """
    from lora_kernels.interop import _peft_layers

    _peft_layers.is_small = lambda layer, x: False
    layer_class = _peft_layers.FusedLayer
    layer_class.forward = _counting(layer_class.forward, _peft_layers)
    layer_class._fused_forward = _recording(layer_class._fused_forward)


def _counting(forward: Callable[..., Any], rules: Any) -> Callable[..., Any]:
    def observed_forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and (why := _fallback(self, x, args, kwargs, rules)):
            log.fallbacks[why] += 1
        return forward(self, x, *args, **kwargs)

    return observed_forward


def _fallback(layer: Any, x: Any, args: Any, kwargs: Any, rules: Any) -> str:
    """Why this call goes to PEFT's forward, by the patch's own rules; "" where it does not."""
    if args or kwargs:
        return f"arguments besides x: {', '.join(sorted(kwargs)) or 'positional'}"
    adapter, why = rules.servable_adapter(layer)
    if adapter is None:
        return why
    operation, why = rules.operation_for(layer, adapter, x)
    return why if operation is None else ""


def _recording(fused_forward: Callable[..., Any]) -> Callable[..., Any]:
    def observed_fused_forward(self: Any, x: Any, adapter: str, operation: str) -> Any:
        if torch.compiler.is_compiling() or not log.open:
            return fused_forward(self, x, adapter, operation)
        if why := _not_recordable(x):
            log.not_compared[why] += 1
            return fused_forward(self, x, adapter, operation)
        call = compare.begin(self, adapter, operation, x)
        y = fused_forward(self, x, adapter, operation)
        log.calls.append(replace(call, y=y.detach().clone()))
        return y

    return observed_fused_forward


def _not_recordable(x: Any) -> str:
    if isinstance(x, FakeTensor):
        return "traced with FakeTensors"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are parametrised with the configuration of another method."""
    kept = [item for item in items if not _other_method(item)]
    config.hook.pytest_deselected(items=[item for item in items if _other_method(item)])
    items[:] = kept


def _other_method(item: pytest.Item) -> bool:
    from peft import LoraConfig, PeftConfig

    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    classes = (value if isinstance(value, type) else type(value) for value in parameters)
    return any(issubclass(cls, PeftConfig) and cls is not LoraConfig for cls in classes)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    log.clear()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Once the test is over, judge its calls; a call out of budget fails the test."""
    passed = False
    try:
        yield
        passed = True
    finally:
        violations = _judge(item, passed)
        if violations and passed:
            pytest.fail("fused calls beyond the error budget:\n" + "\n".join(violations), pytrace=False)


def _judge(item: pytest.Item, passed: bool) -> list[str]:
    """Compares the test's calls, up to the first that is beyond the budget, and attaches what was found to the item."""
    kinds: Counter[str] = Counter()
    shares: dict[str, float] = {}
    violations = []
    log.open = False
    by_bound = 0
    for call in log.calls:
        kind = " | ".join(call.kind)
        kinds[kind] += 1
        verdict = compare.judge(call)
        by_bound += verdict.by_bound
        for row in () if verdict.by_bound else verdict.rows:
            shares[row.name] = max(shares.get(row.name, 0.0), row.error / row.limit if row.error else 0.0)
        violations += [
            f"{kind} {list(call.x.shape)}: {row.name} {row.error:.2e} > {row.limit:.2e}" for row in verdict.beyond
        ]
        if violations:
            break
    item.user_properties.append(
        (
            "lora_kernels",
            {
                "kinds": dict(kinds),
                "shares": shares,
                "fallbacks": dict(log.fallbacks),
                "not_compared": dict(log.not_compared),
                "by_bound": by_bound,
                "violations": violations,
                "passed_by_itself": passed,
            },
        )
    )
    return violations


class Outcomes:
    """Collects the reports where they all arrive, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
        test["seconds"] += report.duration
        if report.outcome != "passed" and test["outcome"] == "passed":
            test["outcome"] = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            test["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)[-2000:]
        test.update(dict(report.user_properties).get("lora_kernels", {}))

    def pytest_sessionfinish(self) -> None:
        lines = (json.dumps({"test": name} | test) for name, test in sorted(self.tests.items()))
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
