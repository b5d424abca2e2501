"""PEFT's tests: where they come from, which of them are run, and how."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from . import models

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "conformance"

# Files with LoRA cases that run on a CPU without a network; of these, the tests that name no other method.
FILES = (
    "arrow",
    "bdlora",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "helpers",
    "initialization",
    "lora_conversion",
    "lora_ga",
    "lora_intruders",
    "lora_variants",
    "lorafa",
    "loraplus",
    "low_level_api",
    "mixed",
    "other",
    "seq_classifier",
    "token_classification_qa",
    "trainable_tokens",
    "tuners_utils",
    "velora",
    "xlora",
)
LEFT_OUT = {
    "need a GPU, Megatron, or a long torch.compile": (
        "common_gpu",
        "gptqmodel",
        "gpu_examples",
        "lora_megatron",
        "torch_compile",
    ),
    "need files of the hub that a random model cannot stand for": (
        "auto",
        "config",
        "hub_features",
        "incremental_pca",
        "integrations",
        "stablediffusion",
        "vision_models",
    ),
    "adapt parameters of experts, which are no linear layers": ("target_parameters",),
    "test other methods, or parts without a LoRA layer": (
        "adamss_asa",
        "adaption_prompt",
        "boft",
        "bufferdict",
        "cartridge",
        "cpt",
        "deft",
        "frod",
        "mapping",
        "multitask_prompt_tuning",
        "osf",
        "poly",
        "pvera",
        "quantization",
        "randlora",
        "riemannian_lora",
        "shadow",
        "shira",
        "supertuning",
        "unilora",
        "vblora",
        "vera",
    ),
}


def fetch() -> Path:
    """The folder with PEFT's tests of the installed version, downloaded once."""
    name = f"peft-{version('peft')}"
    folder = BUILD / name
    if (folder / "tests" / "__init__.py").is_file():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    requirement = name.replace("-", "==")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-binary", "peft", "--dest", BUILD, requirement], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            wanted = path.parts[1:2] == ("tests",) or path.parts[1:] == ("pyproject.toml",)
            if member.isfile() and wanted and ".." not in path.parts and path.parts[0] == name:
                target = BUILD / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    (folder / "tests" / "__init__.py").touch()  # the distribution leaves it out; the tests import each other
    return folder


def check_files(folder: Path) -> None:
    """Every file of the distribution is run or left out for a reason."""
    known = {*FILES, *(name for names in LEFT_OUT.values() for name in names)}
    found = {path.stem.removeprefix("test_") for path in (folder / "tests").glob("test_*.py")}
    if known != found:
        sys.exit(
            f"PEFT's tests are not the ones that FILES and LEFT_OUT in {Path(__file__).name} list: "
            f"new {sorted(found - known)}, gone {sorted(known - found)}. Put each in its place."
        )


def environment() -> dict[str, str]:
    """CPU only, no network, one thread per worker, and nothing that somebody tuned or set on this machine."""
    hidden = {name for name in os.environ if name.startswith(("LORA_KERNELS_", "HF_", "TRITON_"))}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(BUILD / "home"),
        "HF_HUB_CACHE": str(BUILD / "hub"),
        "HF_HUB_OFFLINE": "1",
        "LORA_KERNELS_CACHE": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TRANSFORMERS_OFFLINE": "1",
    }


def run(folder: Path, outcomes: Path, options: Sequence[str], files: Sequence[str], workers: int) -> None:
    """pytest over the files, in a process of its own; its outcomes lie in the file `outcomes`."""
    models.write(BUILD / "hub")
    outcomes.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-W",
        "ignore::FutureWarning",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-p", "conformance.plugin", "-n", str(workers), "-q", "--tb=no", "-r", "N", "--no-header"]
    command += ["--disable-warnings", "--outcomes", str(outcomes), *options]
    command += [f"tests/test_{name}.py" for name in files]
    status = subprocess.run(command, cwd=folder, env=environment(), check=False).returncode
    if status not in (0, 1) or not outcomes.is_file():  # 1: some tests failed, as some do without the hub
        sys.exit(f"pytest ended with status {status}: {' '.join(command)}")
