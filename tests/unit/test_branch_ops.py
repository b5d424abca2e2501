"""The branch's registered ops as torch.compile, FakeTensor and export see them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import lora_branch
from lora_kernels.ops import BRANCH
from lora_kernels.testing import run_branch
from tests.branch_cases import DTYPES, inputs_of
from tests.equality import assert_same_numbers, differ, in_whole_numbers, whole, whole_numbers
from tests.linear_cases import assert_same_bits, laid_out

M, N, K, R = 10, 12, 16, 4
# All, each alone, none, and a frozen A: in the order x, lora_A, lora_B.
NEEDS = [[True] * 3, *([i == j for j in range(3)] for i in range(3)), [False] * 3, [True, False, True]]

# torch's own compiler does what torch's own warnings advise against; none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning",  # Dynamo, for its ctx
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def op_inputs(dtypes="fp32", *, p=0.0, m=M):
    i = inputs_of((m, N, K), dtypes, R)
    seed = torch.tensor([3]) if p > 0 else None
    forward = (i.base_out, i.x, i.lora_A, i.lora_B, seed, 2.0, p, "torch")
    xa = BRANCH.forward(*forward)[1]
    return forward, (i.dy, i.x, i.lora_A, i.lora_B, xa, seed, 2.0, p, i.x.dtype)


# Of each family of dtypes; shapes, layouts and every set of gradients are the fakes' below.
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-mixed", "bf16-over-fp32"])
def test_opcheck_forward(dtypes, p):
    torch.library.opcheck(BRANCH.forward, op_inputs(dtypes, p=p)[0])


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-mixed", "bf16-over-fp32"])
def test_opcheck_backward(dtypes, p):
    torch.library.opcheck(BRANCH.backward, (*op_inputs(dtypes, p=p)[1], NEEDS[0], "torch"))


def described(outputs):
    return [(tuple(t.shape), t.dtype, t.stride(), t.storage_offset(), t.device.type) for t in outputs]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(("p", "m"), [(0.0, M), (0.5, M), (0.5, 1), (0.0, 0)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_fakes_describe_the_real_results(dtypes, p, m, layout):
    forward, backward = op_inputs(dtypes, p=p, m=m)
    forward = [laid_out(a, layout) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in forward]
    backward = [laid_out(a, layout) if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in backward]
    backward[4] = backward[4].contiguous()  # xa, which the op itself made

    def faked(op, arguments):
        with FakeTensorMode() as mode:
            outputs = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        return described(outputs)

    assert faked(BRANCH.forward, forward) == described(BRANCH.forward(*forward))
    for needs in NEEDS:
        arguments = (*backward, needs, "torch")
        assert faked(BRANCH.backward, arguments) == described(BRANCH.backward(*arguments))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16-over-fp32"])
def test_outputs_are_fresh(dtypes):
    forward, backward = op_inputs(dtypes, p=0.5)
    for op, arguments in ((BRANCH.forward, forward), (BRANCH.backward, (*backward, NEEDS[0], "torch"))):
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        made = [t.untyped_storage().data_ptr() for t in op(*arguments)]
        assert len(set(made)) == len(made)
        assert not given & set(made)


def test_schemas():
    # The contract that exported programs hold: a change breaks them.
    assert str(BRANCH.forward._schema) == (
        "lora_kernels::branch_forward(Tensor base_out, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? seed, "
        "float scaling, float dropout_p, str backend) -> (Tensor, Tensor)"
    )
    assert str(BRANCH.backward._schema) == (
        "lora_kernels::branch_backward(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, "
        "float scaling, float dropout_p, ScalarType x_dtype, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
    )


@pytest.mark.parametrize(
    ("dtypes", "p", "backend"),
    [("fp32", 0.0, "torch"), ("fp32", 0.5, "auto"), ("bf16-mixed", 0.5, "torch"), ("bf16-over-fp32", 0.5, "torch")],
)
def test_compiled_function_is_the_eager_one(dtypes, p, backend):
    inputs = whole(inputs_of((M, N, K), dtypes, R, dropout_p=p))
    # Dynamo and AOTAutograd as they are; the layer's test below has inductor generate code, too.
    compiled = torch.compile(lora_branch, fullgraph=True, backend="aot_eager")
    for subset in (("base_out", "x", "lora_A", "lora_B"), ("x", "lora_A"), ("base_out",), ("lora_B",)):
        assert_same_bits(
            run_branch(inputs, backend, requires_grad=subset, function=compiled),
            run_branch(inputs, backend, requires_grad=subset),
        )


class Branched(nn.Module):
    """A layer whose base is computed elsewhere, with its activation."""

    def __init__(self, dropout_p=0.0, dtype=None):
        super().__init__()
        self.base, self.dropout_p = nn.Linear(K, N, dtype=dtype).requires_grad_(False), dropout_p
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(N, R))

    def forward(self, x):
        return lora_branch(self.base(x), x, self.lora_A, self.lora_B, scaling=2.0, dropout_p=self.dropout_p).relu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_layer_trains_with_dropout(dtype):
    torch.manual_seed(0)
    layer = in_whole_numbers(Branched(0.5, dtype))
    # The draw of the seed is in the graph; inductor has its own generator unless told to use torch's.
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True)
        results = []
        for module in (layer, compiled):
            x = torch.ones(2, M, K, dtype=dtype, requires_grad=True)
            layer.zero_grad()
            torch.manual_seed(7)
            y = module(x)
            y.square().sum().backward()
            results.append({"y": y.detach(), "dx": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad})
            assert differ(module(x), y)  # another mask
    eager, fused = results
    if dtype == torch.float32:
        assert_same_bits(eager, fused)
    # In 16 bits inductor fuses without a rounding in between.
    for name, value in eager.items():
        assert (fused[name].float() - value.float()).norm() <= 2 * torch.finfo(dtype).eps * value.float().norm(), name


def test_compiled_under_autocast():
    layer = in_whole_numbers(Branched(0.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = whole_numbers(torch.randn(M, K))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


def test_seed_tensor_is_an_input_of_the_graph():
    counter = CompileCounter()
    i = whole(inputs_of((M, N, K), "fp32", R))
    call = partial(lora_branch, i.base_out, i.x, i.lora_A, i.lora_B, dropout_p=0.5, backend="torch")
    compiled = torch.compile(lambda seed: call(dropout_seed=seed), backend=counter, fullgraph=True)
    for value in (1, 2, -3):
        seed = torch.tensor([value])
        assert torch.equal(compiled(seed), call(dropout_seed=seed))
    assert counter.frame_count == 1


def test_batch_size_is_dynamic():
    counter = CompileCounter()
    compiled = torch.compile(Branched(0.1), backend=counter, fullgraph=True, dynamic=True)
    for m in (M, 33, 64, 5000):
        assert compiled(torch.randn(2, m, K)).shape == (2, m, N)
    assert counter.frame_count == 1


def test_dynamic_batch_compiles_forward_and_backward():
    layer = in_whole_numbers(Branched())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (M, 33, 700):
        x = whole_numbers(torch.randn(m, K))
        gradients = []
        for module in (layer, compiled):
            layer.zero_grad()
            module(x).sum().backward()
            gradients.append({"dA": layer.lora_A.grad, "dB": layer.lora_B.grad})
        assert_same_bits(*gradients)


def test_export_holds_the_op():
    layer = Branched().eval()
    x = torch.randn(M, K)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2, max=4096)}})
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert BRANCH.forward in targets
    for m in (M, 77):
        x = torch.randn(m, K)
        assert_same_numbers(program.module()(x), layer(x))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_eager_backward_calls_the_registered_op_where_it_is_needed(create_graph, p):
    i = inputs_of((M, N, K), "fp32", R)
    for name, calls in (("x", 1), ("lora_B", 1), ("base_out", 0)):
        leaves = [getattr(i, n).clone().requires_grad_(n == name) for n in ("base_out", "x", "lora_A", "lora_B")]
        y = lora_branch(*leaves, dropout_p=p, backend="torch")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            torch.autograd.grad(y, [t for t in leaves if t.requires_grad], i.dy, create_graph=create_graph)
        assert sum(e.count for e in profile.key_averages() if e.key == "lora_kernels::branch_backward") == calls
