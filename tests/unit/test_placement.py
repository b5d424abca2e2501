"""tests.placement places what it says; MKL's reproducible mode makes placement not matter, as the documents say."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.placement import ALIGNMENT, PLACEMENTS, moved, placed


@pytest.mark.parametrize("offset", [0, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_moved_tensor_is_the_same_elsewhere(dtype, offset):
    for t in (torch.randn(5, 7), torch.randn(5, 7).T, torch.randn(6, 8)[::2, 1:4], torch.randn(())):
        given = t.to(dtype)
        other = moved(given, offset)
        assert other.data_ptr() % ALIGNMENT == offset
        assert (other.dtype, other.stride()) == (dtype, given.stride())
        assert torch.equal(other, given)


@pytest.mark.aligned  # it places for itself
def test_what_tests_make_is_placed_in_turn():
    with placed("in-turn"):
        made = [torch.randn(3), torch.rand(2, 2), torch.tensor([1.0]), torch.randn(3).double(), nn.Linear(3, 4).weight]
        offsets = [t.data_ptr() % ALIGNMENT for t in made]
        assert offsets[:3] == list(PLACEMENTS["in-turn"][:3])
        assert offsets[4] != copy.deepcopy(made[4]).data_ptr() % ALIGNMENT or offsets[4] == 0
        leaf = torch.randn(3, requires_grad=True)
        leaf.double().sum().backward()
        assert torch.equal(leaf.grad, torch.ones(3))
    assert torch.randn(3).data_ptr() % ALIGNMENT == 0


# Products of every class of size that the other tests have, with operands at every alignment: one line of bits each.
PROGRAM = """
import hashlib, torch
from tests.placement import moved
torch.set_num_threads(THREADS)
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for m, k, n in ((40, 56, 48), (3, 12, 12), (37, 139, 83), (300, 515, 130), (1, 160, 96)):
        x, w = (torch.randn(s, generator=generator, dtype=dtype) for s in ((m, k), (n, k)))
        found = set()
        for of_x in (0, 4, 8, 16):
            for of_w in (0, 4, 8, 16):
                y = torch.nn.functional.linear(moved(x, of_x), moved(w, of_w))
                found.add(hashlib.sha256(y.numpy().tobytes()).hexdigest()[:16])
        print(*sorted(found))
"""


def bits_of(threads):
    """A line a product under the mode: the bits that it gave, over alignments."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MKL_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("THREADS", str(threads))],
        env=environment | {"MKL_CBWR": "AVX2,STRICT"}, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip


CPUINFO = Path("/proc/cpuinfo")
IS_INTELS = CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text(errors="replace")
has_the_mode = pytest.mark.skipif(
    not torch.backends.mkl.is_available() or not torch.cpu._is_avx2_supported(),
    reason="the mode is MKL's, for processors with AVX2",
)


@has_the_mode
@pytest.mark.parametrize("threads", [1, 2])
def test_mkls_strict_mode_gives_the_same_bits_at_every_alignment(threads):
    assert [len(line.split()) for line in bits_of(threads)] == [1] * 10


@has_the_mode
@pytest.mark.skipif(not IS_INTELS, reason="MKL promises it for Intel's processors; two fp64 products of an EPYC differ")
def test_mkls_strict_mode_gives_the_same_bits_with_every_number_of_threads():
    assert bits_of(1) == bits_of(2)
