import pytest
import triton
import triton.language as tl

from tests.compile.support import SHARED_LIMIT, TARGETS, Figures, compile_only

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
