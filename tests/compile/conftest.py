"""Tests that compile kernels and launch nothing.

Where TRITON_INTERPRET is set there is nothing to compile, because kernels are then Python functions: the
folder is left out. Kernels land in a cache that goes with the session, so that every run compiles anew and no home
directory is written to; its workers share it.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.driver import Driver
from tests.compile.figures import BOOK, FILE

_FOLDER = Path(__file__).parent
COMPILING = os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "yes", "on", "y")

if not COMPILING:
    collect_ignore_glob = ["*"]


def pytest_report_header() -> str:
    if COMPILING:
        return "tests/compile: kernels are compiled for GPUs that need not be there"
    return "tests/compile: left out, TRITON_INTERPRET is set"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker("compile_only")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-figures", action="store_true", help=f"compile what {FILE.name} has, too, and compare")
    parser.addoption("--write-figures", action="store_true", help=f"write {FILE.name}: all that this run asked for")


def pytest_configure(config: pytest.Config) -> None:
    BOOK.all = config.getoption("--all-figures", False)
    BOOK.anew = BOOK.all and config.getoption("--write-figures", False)
    BOOK.whole = is_whole(config.option, config.args, config.invocation_params.dir)


def is_whole(option: Any, arguments: Sequence[str], start: Path) -> bool:
    """Whether a command line, begun in this folder, leaves out none of these tests."""
    chosen = (option.keyword, option.markexpr, option.collectonly, option.deselect, getattr(option, "lf", False))
    folders = [Path(start, argument).resolve() for argument in arguments]
    return not any(chosen) and any(folder in (_FOLDER, *_FOLDER.parents) for folder in folders)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = sorted(BOOK.asked), BOOK.compiled
    elif session.config.getoption("--write-figures", False):
        BOOK.write(FILE)
    elif BOOK.all and BOOK.stale and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    BOOK.join(*getattr(node, "workeroutput", {}).get("figures", ((), {})))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not BOOK.asked:
        return
    write = terminalreporter.write_line
    write(f"figures of {len(BOOK.asked)} kernels, {len(BOOK.compiled)} of them compiled in this run")
    if BOOK.missing:
        write(f"not in {FILE.name}, hence compiled in every run until `make figures`: {len(BOOK.missing)}")
    if BOOK.all and BOOK.stale:
        write(f"in {FILE.name}, and nothing asks for it any more (`make figures`): {', '.join(BOOK.stale)}", red=True)


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    own = tmp_path_factory.getbasetemp()
    shared = own if "PYTEST_XDIST_WORKER" not in os.environ else own.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(shared / "kernels"))
        yield


class Recording(Driver):
    """Keeps (binary, grid, arguments) of each launch, as described and as they are, and the hooks that came with it."""

    def __init__(self):
        super().__init__(lambda *launched: self.keep(*launched))  # noqa: PLW0108 - a test may replace keep
        self.launches, self.hooks, self.raw = [], [], []

    def keep(self, binary, grid, args, hook):
        self.hooks.append(hook)
        self.launches.append((binary, grid, [described(arg) for arg in args]))
        self.raw.append((binary, grid, args))


def described(argument):
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.shape, argument.stride())
    return described(argument.base) if type(argument).__name__ == "TensorDescriptor" else argument


@pytest.fixture(scope="session")
def the_driver() -> Recording:
    # One for all tests: a compiled kernel keeps the launcher it was loaded with.
    return Recording()


@pytest.fixture
def driver(the_driver: Recording) -> Iterator[Recording]:
    the_driver.launches.clear()
    the_driver.hooks.clear()
    the_driver.raw.clear()
    the_driver.device = 0
    with the_driver.active():
        yield the_driver
