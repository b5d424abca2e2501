"""The registered ops as torch.compile, FakeTensor and export see them."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import LoRALinear, lora_linear
from lora_kernels.ops import LINEAR
from lora_kernels.testing import make_linear_inputs, run_linear
from tests.equality import assert_same_numbers, differ, in_whole_numbers, whole, whole_numbers
from tests.linear_cases import DTYPES, assert_same_bits, laid_out

M, N, K, R = 10, 12, 16, 4
# Everything, one each, and none: in the order x, weight, lora_A, lora_B, bias.
NEEDS = [[True] * 5, *([i == j for j in range(5)] for i in range(5)), [False] * 5, [True, False, True, True, False]]

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


def op_inputs(dtype="fp32", *, p=0.0, bias=True, m=M):
    x, adapters = DTYPES[dtype]
    i = make_linear_inputs(m, N, K, R, dtype=x, adapter_dtype=adapters, bias=bias)
    seed = torch.tensor([3]) if p > 0 else None
    forward = (i.x, i.weight, i.lora_A, i.lora_B, i.bias, seed, 2.0, p, "torch")
    xa = LINEAR.forward(*forward)[1]
    return forward, (i.dy, i.x, i.weight, i.lora_A, i.lora_B, xa, seed, 2.0, p)


# With everything, and without all that may be left out; shapes, layouts and sets of gradients are the fakes' below.
@pytest.mark.parametrize(("bias", "p"), [(True, 0.5), (False, 0.0)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_opcheck_forward(dtype, bias, p):
    torch.library.opcheck(LINEAR.forward, op_inputs(dtype, p=p, bias=bias)[0])


@pytest.mark.parametrize(("needs", "p"), [(NEEDS[0], 0.5), (NEEDS[-1], 0.0)], ids=["all", "adapters"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed"])
def test_opcheck_backward(dtype, needs, p):
    torch.library.opcheck(LINEAR.backward, (*op_inputs(dtype, p=p)[1], needs, "torch"))


def described(outputs):
    return [(tuple(t.shape), t.dtype, t.stride(), t.storage_offset(), t.device.type) for t in outputs]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(("p", "m"), [(0.0, M), (0.5, M), (0.5, 1), (0.0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fakes_describe_the_real_results(dtype, p, m, layout):
    forward, backward = op_inputs(dtype, p=p, m=m)
    forward = [laid_out(a, layout) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in forward]
    backward = [laid_out(a, layout) if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in backward]
    backward[5] = backward[5].contiguous()  # xa, which the op itself made

    def faked(op, arguments):
        with FakeTensorMode() as mode:
            outputs = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        return described(outputs)

    assert faked(LINEAR.forward, forward) == described(LINEAR.forward(*forward))
    for needs in NEEDS:
        arguments = (*backward, needs, "torch")
        assert faked(LINEAR.backward, arguments) == described(LINEAR.backward(*arguments))


def test_outputs_are_fresh():
    forward, backward = op_inputs(p=0.5)
    for op, arguments in ((LINEAR.forward, forward), (LINEAR.backward, (*backward, NEEDS[0], "torch"))):
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        made = [t.untyped_storage().data_ptr() for t in op(*arguments)]
        assert len(set(made)) == len(made)
        assert not given & set(made)


def test_schemas():
    # The contract that exported programs hold: a change breaks them.
    assert str(LINEAR.forward._schema) == (
        "lora_kernels::linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
        "Tensor? seed, float scaling, float dropout_p, str backend) -> (Tensor, Tensor)"
    )
    assert str(LINEAR.backward._schema) == (
        "lora_kernels::linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? xa, "
        "Tensor? seed, float scaling, float dropout_p, bool[] needs, str backend) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


@pytest.mark.parametrize(
    ("dtype", "p", "backend"),
    [("fp32", 0.0, "torch"), ("fp32", 0.5, "auto"), ("bf16-mixed", 0.5, "torch")],
)
def test_compiled_function_is_the_eager_one(dtype, p, backend):
    x, adapters = DTYPES[dtype]
    inputs = whole(make_linear_inputs(M, N, K, R, dtype=x, adapter_dtype=adapters, dropout_p=p))
    # Dynamo and AOTAutograd as they are; the layer's tests below have inductor generate code, too.
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_linear(inputs, backend, function=compiled), run_linear(inputs, backend))
    partly = ("x", "lora_A", "lora_B")
    assert_same_bits(
        run_linear(inputs, backend, requires_grad=partly, function=compiled),
        run_linear(inputs, backend, requires_grad=partly),
    )


def test_compiled_layer_trains_with_dropout():
    torch.manual_seed(0)
    layer = in_whole_numbers(LoRALinear(K, N, r=R, lora_alpha=R, lora_dropout=0.5, init_lora_weights=False))
    # The draw of the seed is in the graph; inductor has its own generator unless told to use torch's.
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True)
        results = []
        for module in (layer, compiled):
            x = torch.ones(2, M, K, requires_grad=True)
            layer.zero_grad()
            torch.manual_seed(7)
            y = module(x)
            y.square().sum().backward()
            results.append({"y": y.detach(), "dx": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad})
            assert differ(module(x), y)  # another mask
    assert_same_bits(*results)
    layer.eval()
    assert torch.equal(compiled(x), layer(x))


def test_seed_tensor_is_an_input_of_the_graph():
    counter = CompileCounter()
    i = whole(make_linear_inputs(M, N, K, R, dtype=torch.float32))
    call = partial(lora_linear, i.x, i.weight, i.lora_A, i.lora_B, i.bias, dropout_p=0.5, backend="torch")
    compiled = torch.compile(lambda seed: call(dropout_seed=seed), backend=counter, fullgraph=True)
    for value in (1, 2, -3):
        seed = torch.tensor([value])
        assert torch.equal(compiled(seed), call(dropout_seed=seed))
    assert counter.frame_count == 1


def test_batch_size_is_dynamic():
    counter = CompileCounter()
    layer = LoRALinear(K, N, r=R, lora_dropout=0.1)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for m in (M, 33, 64, 5000):
        x = torch.randn(2, m, K)
        assert compiled(x).shape == (2, m, N)
    assert counter.frame_count == 1


def test_dynamic_batch_compiles_forward_and_backward():
    layer = in_whole_numbers(LoRALinear(K, N, r=R, lora_alpha=R, init_lora_weights=False))
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
    layer = LoRALinear(K, N, r=R, init_lora_weights=False).eval()
    x = torch.randn(M, K)
    dynamic = {"input": {0: torch.export.Dim("tokens", min=2, max=4096)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert LINEAR.forward in targets
    for m in (M, 77):
        x = torch.randn(m, K)
        assert_same_numbers(program.module()(x), layer(x))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_eager_backward_calls_the_registered_op(create_graph, p):
    i = make_linear_inputs(M, N, K, R, dtype=torch.float32)
    x = i.x.clone().requires_grad_()
    y = lora_linear(x, i.weight, i.lora_A, i.lora_B, dropout_p=p, backend="torch")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        torch.autograd.grad(y, x, i.dy, create_graph=create_graph)
    assert sum(e.count for e in profile.key_averages() if e.key == "lora_kernels::linear_backward") == 1
