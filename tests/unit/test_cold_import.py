"""`import lora_kernels` needs torch alone: shown in a fresh process without Triton and extras."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Refused outright: importing one of them raises, as on a machine where it does not exist.
BLOCKED = ("triton", "bitsandbytes", "matplotlib", "peft", "safetensors", "tqdm", "transformers")

# Loaded by torch only when a compiler is used; each costs seconds.
HEAVY = ("torch._dynamo", "torch._inductor")

PROBE = textwrap.dedent(
    """
    import json, os, random, sys, warnings

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Block())
    import torch

    def world():
        return {
            "environ": dict(os.environ),
            "filters": len(warnings.filters),
            "default dtype": str(torch.get_default_dtype()),
            "threads": torch.get_num_threads(),
            "torch generator": torch.get_rng_state().tolist(),
            "python generator": hash(random.getstate()),
            "grad mode": torch.is_grad_enabled(),
            "tf32": torch.get_float32_matmul_precision(),
        }

    before, modules = world(), set(sys.modules)
    import lora_kernels
    after = world()
    print(json.dumps({
        "new": sorted(set(sys.modules) - modules),
        "stdlib": sorted(sys.stdlib_module_names),
        "cuda": torch.cuda.is_initialized(),
        "changed": [key for key in before if before[key] != after[key]],
        "ops": [op for op in ("linear_forward", "linear_backward") if hasattr(torch.ops.lora_kernels, op)],
    }))
    """
)


@pytest.fixture(scope="module")
def probe() -> dict:
    program = f"BLOCKED = {BLOCKED!r}\n{PROBE}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_imports_torch_and_nothing_else(probe):
    packages = {name.partition(".")[0] for name in probe["new"]}
    assert packages - set(probe["stdlib"]) <= {"lora_kernels", "torch"}


def test_imports_no_compiler(probe):
    assert [name for name in probe["new"] if name.startswith(HEAVY)] == []


def test_does_not_import_the_kernels(probe):
    assert [name for name in probe["new"] if name.startswith("lora_kernels.kernels")] == []


def test_does_not_initialise_cuda(probe):
    assert probe["cuda"] is False


def test_changes_nothing_in_the_process(probe):
    assert probe["changed"] == []


def test_registers_the_ops(probe):
    assert probe["ops"] == ["linear_forward", "linear_backward"]
