"""Direct launches, against a driver that records them: the same binary and arguments as the JIT's own launch."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.kernels import launch as launching
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.persistent import MISSING
from lora_kernels.ops import Needs, _linear_triton
from lora_kernels.planning import Problem, make_branch_plan, make_plan
from lora_kernels.planning.plan import paired, ways_of
from lora_kernels.planning.tiles import WIDTHS
from lora_kernels.testing import make_branch_inputs, make_linear_inputs, run_branch_plan


@triton.jit(do_not_specialize=["M", "scale"])
def toy_kernel(x_ptr, y_ptr, none_ptr, M, N, scale, stride_x, HAS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride_x, mask=offs < M)
    if HAS:
        x += N
    tl.store(y_ptr + offs, (x * scale).to(y_ptr.dtype.element_ty), mask=offs < M)


@triton.jit
def descriptor_kernel(x_desc, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.sum(x_desc.load([0, 0]), 0))


WIDTH_DTYPES = {
    "16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "32": (torch.float32, torch.float32),
}


@pytest.fixture(autouse=True)
def forgotten():
    for kernel in (toy_kernel, descriptor_kernel):
        kernel.device_caches.clear()
    yield
    for kernel in (toy_kernel, descriptor_kernel):
        kernel.device_caches.clear()


X, Y = torch.randn(256), torch.empty(256)
HALF = X.half()
UNALIGNED = torch.randn(257)[1:]
FOUR_WARPS = {"num_warps": 4, "num_stages": 3}
CONSTEXPRS = {"HAS": True, "BLOCK": 64}

# Arguments, constexprs, options: each next to one that Triton serves with another binary, or with the same.
CALLS = [
    ((X, Y, None, 200, 100, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((X, Y, None, 131, 100, 3.0, 1), CONSTEXPRS, FOUR_WARPS),  # M and scale are not specialised: the same binary
    ((X, Y, None, 200, 100, 2, 1), CONSTEXPRS, FOUR_WARPS),  # an int where a float was
    ((X, Y, None, 2**33, 100, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((X, Y, None, 200, 112, 2.0, 1), CONSTEXPRS, FOUR_WARPS),  # a multiple of 16
    ((X, Y, None, 200, 1, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((X, Y, None, 200, 2**33, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((X, Y, None, 200, 101, 2.0, 1), CONSTEXPRS, FOUR_WARPS),  # the same class as 100
    ((X, Y, None, 200, 100, 2.0, 2), CONSTEXPRS, FOUR_WARPS),
    ((HALF, Y, None, 200, 100, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((UNALIGNED, Y, None, 200, 100, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((X, Y, X, 200, 100, 2.0, 1), CONSTEXPRS, FOUR_WARPS),
    ((X, Y, None, 200, 100, 2.0, 1), {"HAS": False, "BLOCK": 64}, FOUR_WARPS),
    ((X, Y, None, 200, 100, 2.0, 1), {"HAS": True, "BLOCK": 128}, FOUR_WARPS),
    ((X, Y, None, 200, 100, 2.0, 1), CONSTEXPRS, {"num_warps": 8, "num_stages": 3}),
    ((X, Y, None, 200, 100, 2.0, 1), CONSTEXPRS, {"num_warps": 4, "num_stages": 2}),
]


def test_the_binary_and_the_arguments_are_the_jits(driver):
    for args, constexprs, options in CALLS * 2:  # first through the JIT, then directly
        launch(toy_kernel, (4,), *args, **constexprs, **options)
        toy_kernel[(4,)](*args, **constexprs, **options)
        direct, jit = driver.launches[-2:]
        assert direct == jit, (args, constexprs, options)
    assert len({function for function, *_ in driver.launches}) >= 12


def test_the_second_launch_does_not_ask_the_jit(driver, monkeypatch):
    for args, constexprs, options in CALLS:
        launch(toy_kernel, (4, 2), *args, **constexprs, **options)
    before = list(driver.launches)
    monkeypatch.setattr(type(toy_kernel), "run", lambda *_, **__: pytest.fail("asked the JIT"))
    for args, constexprs, options in CALLS:
        launch(toy_kernel, (4, 2), *args, **constexprs, **options)
    assert driver.launches[len(before) :] == before


def test_descriptors(driver):
    for source in (torch.randn(64, 64), torch.randn(128, 64), torch.randn(64, 64).half()):
        for block in ([16, 32], [32, 32]):
            for _ in range(2):
                described = TensorDescriptor.from_tensor(source, block)
                launch(descriptor_kernel, (1,), described, Y, BLOCK=block[1], num_warps=4)
                descriptor_kernel[(1,)](described, Y, BLOCK=block[1], num_warps=4, num_stages=3)
                direct, jit = driver.launches[-2:]
                assert direct == jit
    assert len({function for function, *_ in driver.launches}) == 4


def test_each_device_has_its_own(driver):
    launch(toy_kernel, (4,), *CALLS[0][0], **CONSTEXPRS, **FOUR_WARPS)
    driver.device = 1
    launch(toy_kernel, (4,), *CALLS[0][0], **CONSTEXPRS, **FOUR_WARPS)
    first, second = driver.launches
    assert first[0] != second[0]


def test_constexprs_out_of_order_are_noticed(driver):
    with pytest.raises(AssertionError, match=r"must be \('HAS', 'BLOCK'\), in this order"):
        launch(toy_kernel, (4,), *CALLS[0][0], BLOCK=64, HAS=True, num_warps=4)


def test_a_profilers_hooks_are_called(driver, monkeypatch):
    launch(toy_kernel, (4,), *CALLS[0][0], **CONSTEXPRS, **FOUR_WARPS)
    launch(toy_kernel, (4,), *CALLS[0][0], **CONSTEXPRS, **FOUR_WARPS)
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launch(toy_kernel, (4,), *CALLS[0][0], **CONSTEXPRS, **FOUR_WARPS)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    by_jit, direct, profiled = driver.launches
    assert by_jit == direct == profiled
    assert driver.hooks == [triton.knobs.runtime.launch_enter_hook, None, triton.knobs.runtime.launch_enter_hook]


def problem_of(width, p):
    x, adapters = WIDTH_DTYPES[width]
    return Problem(16, 64, 80, 16, x, adapters, p > 0, arch="sm_90", device_type="cuda", sm_count=8, gluon=not MISSING)


SERVED = [
    (width, p, way.strategy)
    for width in WIDTHS
    for p in (0.0, 0.5)
    for way in ways_of(problem_of(width, p), "forward", ("triton",))
]


@pytest.mark.parametrize(("width", "p", "strategy"), SERVED)
def test_every_launcher_of_the_backend(driver, monkeypatch, width, p, strategy):
    # What the interpreter's tests go around: order of arguments and constexprs in each direct launch.
    x, adapters = WIDTH_DTYPES[width]
    i = make_linear_inputs(16, 64, 80, 16, dtype=x, adapter_dtype=adapters)
    problem = problem_of(width, p)
    plan = paired(problem, make_plan(problem, "triton", triton_available=True), strategy)
    seed = torch.tensor([1]) if p else None

    def step():
        start = len(driver.launches)
        _, xa = _linear_triton.forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, seed, 2.0, p, plan)
        needs = Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=True)
        _linear_triton.backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, xa, seed, 2.0, p, needs, plan)
        return driver.launches[start:]

    by_jit = step()
    monkeypatch.setattr(type(toy_kernel), "run", lambda *_, **__: pytest.fail("asked the JIT"))
    assert step() == by_jit
    assert len(by_jit) >= 3


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_launcher_of_the_branch(driver, monkeypatch, width, out, p):
    x, adapters = WIDTH_DTYPES[width]
    i = make_branch_inputs(16, 64, 80, 16, dtype=x, adapter_dtype=adapters, out_dtype=out, dropout_p=p)
    plan = make_branch_plan(problem_of(width, p), out, "triton", triton_available=True)

    def step():
        start = len(driver.launches)
        run_branch_plan(i, plan)
        return driver.launches[start:]

    by_jit = step()
    monkeypatch.setattr(type(toy_kernel), "run", lambda *_, **__: pytest.fail("asked the JIT"))
    assert step() == by_jit
    assert len(by_jit) >= 5


def test_a_full_table_is_emptied_and_goes_on(driver, monkeypatch):
    monkeypatch.setattr(launching, "MOST_BINARIES", 3)
    for n in range(2, 12):
        launch(toy_kernel, (4,), X, Y, None, 200, n, 2.0, 1, **CONSTEXPRS, num_warps=4)
        assert len(launching._compiled) <= 3
    assert len(driver.launches) == 10
    assert len({function for function, *_ in driver.launches}) == 1  # 2 to 11 are one class
