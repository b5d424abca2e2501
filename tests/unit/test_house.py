"""The rules of the house that no linter knows: where a thing lies, and who may touch what."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lora_kernels import ops

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_kernels"

# One stem per operation: its name is the name of its file in every room.
OPERATIONS = tuple(operation.name for operation in ops.OPERATIONS)
ROOMS = ("reference", "ops", "functional", "nn")
WITHOUT_LAYER = {"branch"}  # its base is somebody else's layer, and its parameters are that layer's, too
TEST_ROOMS = ("unit", "reference", "interpret", "compile", "gpu")

TOP_LEVEL = {
    "LICENSE",
    "Makefile",
    "README.md",
    "bench",
    "docs",
    "lora_kernels",
    "pyproject.toml",
    "setup.cfg",
    "tests",
}

MAX_LINES = 500

# Besides config.py, and why: none of them reads a setting of ours.
ENVIRONMENT_USERS = {
    "benchmarking/memory.py": "silences the profiler's native logger, which has no other switch",
    "benchmarking/records.py": "hands the environment on to git",
}


def tracked_files() -> list[Path]:
    """What git tracks, and what it would track: new files count before they are committed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for line in listing.stdout.splitlines() if (path := ROOT / line).is_file()]


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def names(tree: ast.AST) -> set[str]:
    """Every dotted name in the tree, with `from os import environ` read as `os.environ`."""
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("stem", OPERATIONS)
@pytest.mark.parametrize("room", ROOMS)
def test_operation_has_its_file(room, stem):
    expected = room != "nn" or stem not in WITHOUT_LAYER
    assert (PACKAGE / room / f"{stem}.py").is_file() == expected


@pytest.mark.parametrize("stem", OPERATIONS)
@pytest.mark.parametrize("room", TEST_ROOMS)
def test_operation_has_its_tests(room, stem):
    assert list((ROOT / "tests" / room).glob(f"test_{stem}*.py"))


@pytest.mark.parametrize("stem", OPERATIONS)
def test_operation_has_its_document(stem):
    assert (ROOT / "docs" / "ops" / f"{stem}.md").is_file()


def test_every_function_is_a_listed_operation():
    stems = {p.stem for p in (PACKAGE / "functional").glob("[!_]*.py")}
    assert stems - {"plan"} == set(OPERATIONS)  # plan.py tells about operations and is none


def test_top_level_is_fixed():
    seen = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in seen if not name.startswith(".")} == TOP_LEVEL


def test_files_are_short():
    kinds = {".py", ".md", ".toml", ".cfg"}
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked_files()
        if path.suffix in kinds
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_only_config_reads_the_environment():
    environment = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    readers = {name for name, tree in sources() if environment & names(tree)}
    assert readers == {"config.py", *ENVIRONMENT_USERS}


def test_triton_kernels_lie_in_kernels_only():
    users = {name for name, tree in sources() if {"triton.jit", "triton.autotune"} & names(tree)}
    assert {name for name in users if not name.startswith("kernels/")} == set()


def test_kernel_files_keep_their_annotations():
    # Triton reads `BLOCK: tl.constexpr` from the annotation itself; as a string it is only mostly understood.
    deferred = {
        name for name, tree in sources() if "triton.jit" in names(tree) and "__future__.annotations" in names(tree)
    }
    assert deferred == set()


def test_kernels_use_no_atomics():
    # The order of atomic additions is the scheduler's; results would differ from run to run.
    users = {
        name
        for name, tree in sources()
        if name.startswith("kernels/") and any(".atomic_" in used for used in names(tree))
    }
    assert users <= {"kernels/interpreter.py"}


def recipe(target: str) -> list[str]:
    """The commands of one of the Makefile's targets, with a .venv."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]


def parsed(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_hooks_before_a_commit_are_lint():
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == recipe("lint")
    assert {(hook["language"], hook["pass_filenames"]) for hook in repository["hooks"]} == {("system", False)}


def test_continuous_integration_makes_targets_that_exist():
    workflow = parsed(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    made = {job: " ".join(spec["strategy"]["matrix"]["targets"]).split() for job, spec in workflow["jobs"].items()}
    assert made == {"make": ["lint", "test", "bench"], "nightly": ["test-cpus", "test-compile-all"]}
    assert all(recipe(target) for targets in made.values() for target in targets)
    for job in workflow["jobs"].values():
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_a_bug_report_has_a_form():
    form = parsed(".github/ISSUE_TEMPLATE/bug.yml")
    assert {"name", "description", "body"} <= form.keys()
    assert all({"label"} <= field["attributes"].keys() for field in form["body"])
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert required == {"called", "expected", "check", "info"}
