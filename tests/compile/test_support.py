import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import triton.language as tl

from tests.compile.conftest import is_whole
from tests.compile.figures import Book, key_of
from tests.compile.support import SHARED_LIMIT, TARGETS, Figures, compile_only, kept_figures

POINTERS = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16"}
SIZES = dict.fromkeys(("M", "N", "K"), "i32")
MMA = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@triton.jit
def matmul_kernel(x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * K + offs_k[None, :], mask=rows[:, None] < M, other=0.0)
        w = tl.load(w_ptr + columns[None, :] * K + offs_k[:, None], mask=columns[None, :] < N, other=0.0)
        acc = tl.dot(x, w, acc)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], acc.to(tl.bfloat16), mask=mask)


@triton.jit
def descriptor_matmul_kernel(
    x_desc, w_desc, y_desc, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x_desc.load([row, k]), w_desc.load([column, k]).T, acc)
    y_desc.store([row, column], acc.to(tl.bfloat16))


def matmul(target: str, block: int, num_warps: int, num_stages: int, **options: int) -> Figures:
    return compile_only(
        matmul_kernel,
        {**POINTERS, **SIZES},
        {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 64},
        target,
        num_warps,
        num_stages,
        {*POINTERS, *SIZES},
        **options,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_matmul_uses_the_matrix_unit_and_has_no_faults(target: str) -> None:
    figures = matmul(target, block=128, num_warps=8, num_stages=2)
    assert figures.faults() == []
    assert 32 <= figures.registers <= 255
    assert any(opcode.startswith(MMA[target]) for opcode in figures.opcodes), figures.opcodes


# 128 x 128 fp32 accumulators over 128 threads are 128 registers each: more than these limits leave for them.
@pytest.mark.parametrize(
    ("target", "num_warps", "limit"),
    [("sm_80", 4, {"maxnreg": 64}), ("sm_90", 4, {"maxnreg": 128}), ("gfx942", 2, {"waves_per_eu": 8})],
)
def test_spills_are_seen(target: str, num_warps: int, limit: dict[str, int]) -> None:
    figures = matmul(target, block=128, num_warps=num_warps, num_stages=2, **limit)
    assert figures.spill_bytes >= 128
    assert "spills" in figures.faults()[0]
    if target.startswith("sm_"):
        assert figures.opcodes["STL"] > 0
        assert figures.opcodes["LDL"] > 0


def test_shared_memory_is_the_ring_of_tiles() -> None:
    stage = 2 * 128 * 64 * 2  # an x tile and a w tile of bf16
    assert matmul("sm_90", block=128, num_warps=8, num_stages=3).shared_bytes == 3 * stage
    over = matmul("sm_89", block=128, num_warps=8, num_stages=5)
    assert over.shared_bytes > SHARED_LIMIT["sm_89"]
    assert over.faults() == [f"shared memory: {over.shared_bytes} B of {SHARED_LIMIT['sm_89']} B"]


def test_descriptors_become_bulk_copies() -> None:
    figures = compile_only(
        descriptor_matmul_kernel,
        {
            **dict.fromkeys(("x_desc", "w_desc"), "tensordesc<bf16[128, 64]>"),
            "y_desc": "tensordesc<bf16[128, 128]>",
        }
        | {"K": "i32"},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
        "sm_90",
        num_warps=8,
        num_stages=3,
    )
    assert figures.faults() == []
    assert figures.opcodes["UTMALDG"] > 0
    assert figures.opcodes["UTMASTG"] > 0
    assert figures.opcodes["HGMMA"] > 0


def test_an_argument_left_out_is_named() -> None:
    with pytest.raises(ValueError, match=r"matmul_kernel: arguments missing, or unknown to it: K, bias_ptr"):
        compile_only(
            matmul_kernel,
            {**POINTERS, "M": "i32", "N": "i32", "bias_ptr": "*bf16"},
            {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
            "sm_90",
            num_warps=4,
            num_stages=1,
        )


# -- kept figures ------------------------------------------------------------------------------------------------------

SOURCE = """
import triton
import triton.language as tl

{constant}
rounded = {rounded}
@triton.jit{options}
def doubled(x):
    return x * {factor}

def enclosing(ENCLOSED):
    @triton.jit
    def inner(x):
        return x + ENCLOSED
    return inner

increased = enclosing({enclosed})
{before}
@triton.jit
def scale_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, rounded(increased(doubled(tl.load(x_ptr + offs)))) + ADDED)
"""
PLAIN = {
    "factor": "2", "before": "", "constant": "ADDED = tl.constexpr(1)", "rounded": "tl.floor", "options": "",
    "enclosed": "tl.constexpr(3)",
}  # fmt: skip


def kernel_of(folder: Path, **changed: object) -> Any:
    path = folder / f"kernels_{len(list(folder.iterdir()))}.py"
    path.write_text(SOURCE.format(**PLAIN | changed))
    spec = importlib.util.spec_from_file_location("tests_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.scale_kernel


CIRCUMSTANCES = {
    "signature": {"x_ptr": "*fp32"}, "constexprs": {"BLOCK": 64}, "target": "sm_90", "num_warps": 4, "num_stages": 3,
}  # fmt: skip


def test_a_kernel_that_moves_in_its_file_is_the_same(tmp_path: Path) -> None:
    key = key_of(kernel_of(tmp_path), CIRCUMSTANCES)
    assert key_of(kernel_of(tmp_path, before="# moved\n\n\n"), CIRCUMSTANCES) == key
    assert key_of(kernel_of(tmp_path), dict(reversed(CIRCUMSTANCES.items()))) == key
    assert key_of(kernel_of(tmp_path), {"x", "y"}) == key_of(kernel_of(tmp_path), {"y", "x"})


def test_whatever_changes_the_machine_code_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        key_of(kernel_of(tmp_path), CIRCUMSTANCES),
        key_of(kernel_of(tmp_path, factor=3), CIRCUMSTANCES),  # of a function that it calls
        key_of(kernel_of(tmp_path, constant="ADDED = tl.constexpr(2)"), CIRCUMSTANCES),  # of a global that it reads
        key_of(kernel_of(tmp_path, rounded="tl.ceil"), CIRCUMSTANCES),  # of a function of Triton's, by another name
        key_of(kernel_of(tmp_path, options="(noinline=True)"), CIRCUMSTANCES),  # of a decorator
        key_of(kernel_of(tmp_path, enclosed="tl.constexpr(4)"), CIRCUMSTANCES),  # of a variable of what encloses it
        key_of(kernel_of(tmp_path), CIRCUMSTANCES | {"signature": {"x_ptr": "*bf16"}}),
        key_of(kernel_of(tmp_path), CIRCUMSTANCES | {"constexprs": {"BLOCK": 128}}),
        key_of(kernel_of(tmp_path), CIRCUMSTANCES | {"constexprs": {"BLOCK": 64.0}}),
        key_of(kernel_of(tmp_path), CIRCUMSTANCES | {"target": "sm_80"}),
        key_of(kernel_of(tmp_path), CIRCUMSTANCES | {"num_warps": 8}),
    }
    monkeypatch.setattr(triton, "__version__", "0.0")
    keys.add(key_of(kernel_of(tmp_path), CIRCUMSTANCES))
    assert len(keys) == 12


def kept(kernel: Any, book: Book) -> Figures:
    c = CIRCUMSTANCES
    return kept_figures(
        kernel, c["signature"], c["constexprs"], c["target"], c["num_warps"], c["num_stages"], ["x_ptr"], book=book
    )


def test_what_is_known_is_not_compiled_and_what_is_not_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kernel = tmp_path / "figures.json", kernel_of(tmp_path)
    first = Book.of(file)
    compiled = kept(kernel, first)
    assert first.missing == ["scale_kernel sm_90"]
    first.write(file)
    second = Book.of(file)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled"))
        known = kept(kernel, second)
    assert known.numbers == compiled.numbers
    assert (second.missing, second.stale, second.compiled) == ([], [], {})
    assert known.opcodes == compiled.opcodes  # machine code is not kept: compiled when it is read
    third = Book.of(file)
    kept(kernel_of(tmp_path, factor=5), third)
    assert (third.missing, third.stale) == (["scale_kernel sm_90"], ["scale_kernel sm_90"])


def test_a_figure_that_is_not_the_assemblers_is_noticed_when_all_are_compiled(tmp_path: Path) -> None:
    file, kernel = tmp_path / "figures.json", kernel_of(tmp_path)
    book = Book.of(file)
    registers, *_ = kept(kernel, book).numbers
    book.write(file)
    file.write_text(file.read_text().replace(f'sm_90", {registers},', f'sm_90", {registers + 1},'))
    believed = Book.of(file)
    assert kept(kernel, believed).registers == registers + 1
    with pytest.raises(AssertionError, match=r"scale_kernel sm_90: compiled .* `make figures`"):
        kept(kernel, Book(Book.of(file).known, all=True))
    anew = Book(Book.of(file).known, all=True, anew=True)
    kept(kernel, anew)
    anew.write(tmp_path / "mended.json")
    assert kept(kernel, Book.of(tmp_path / "mended.json")).registers == registers
    with pytest.raises(AssertionError, match="scale_kernel sm_90"):  # and whenever its machine code is read
        _ = kept(kernel, believed).sass


def test_a_kept_spill_is_a_fault(tmp_path: Path) -> None:
    file, kernel = tmp_path / "figures.json", kernel_of(tmp_path)
    book = Book.of(file)
    registers, *_ = kept(kernel, book).numbers
    assert kept(kernel, book).faults() == []
    book.write(file)
    file.write_text(file.read_text().replace(f'sm_90", {registers}, 0,', f'sm_90", {registers}, 16,'))
    assert kept(kernel, Book.of(file)).faults() == ["spills: 16 B a thread, 0 registers"]


def test_workers_findings_are_joined(tmp_path: Path) -> None:
    book, worker = Book({"a": ("a kernel", [1]), "b": ("another", [2])}), Book({})
    worker.asked, worker.compiled = {"a", "c"}, {"c": ("a third", [3])}
    book.join(*json.loads(json.dumps([sorted(worker.asked), worker.compiled])))
    assert (book.stale, book.missing) == (["another"], ["a third"])
    book.write(tmp_path / "figures.json")
    assert Book.of(tmp_path / "figures.json").known == {"a": ("a kernel", [1]), "c": ("a third", [3])}


def test_a_part_of_the_tests_takes_nothing_from_the_file(tmp_path: Path) -> None:
    book = Book({"a": ("a kernel", [1]), "b": ("another", [2])}, whole=False)
    book.join(["c"], {"c": ("a third", [3])})
    assert book.stale == []
    book.write(tmp_path / "figures.json")
    assert sorted(Book.of(tmp_path / "figures.json").known) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "chosen", "whole"),
    [
        (["tests/compile"], {}, True),
        (["tests"], {}, True),
        (["tests/unit", "tests/compile"], {}, True),
        (["tests/compile/test_support.py"], {}, False),
        (["tests/compile"], {"keyword": "shrink"}, False),
        (["tests/compile"], {"markexpr": "slow"}, False),
        (["tests/compile"], {"collectonly": True}, False),
        (["tests/compile"], {"deselect": ["tests/compile/test_support.py"]}, False),
    ],
)
def test_a_run_knows_whether_it_is_the_whole_folder(arguments, chosen, whole, pytestconfig) -> None:
    plain = {"keyword": "", "markexpr": "", "collectonly": False, "deselect": None, "lf": False}
    assert is_whole(SimpleNamespace(**plain | chosen), arguments, pytestconfig.rootpath) == whole
