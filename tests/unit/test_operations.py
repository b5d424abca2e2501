"""The registered ops of every declared operation, as torch.compile, FakeTensor, export and torch.func see them."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels.ops import OPERATIONS, Operation
from tests.equality import assert_same_numbers, differ, in_whole_numbers, whole, whole_numbers
from tests.linear_cases import assert_same_bits, laid_out
from tests.operations import CASES, K, N

M = 10

# torch's own compiler does what torch's own warnings advise against; none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning",  # Dynamo, for its ctx
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
)
every_operation = pytest.mark.parametrize("name", CASES)
some_dtypes = pytest.mark.parametrize(
    ("name", "dtypes"),
    [(name, d) for name, case in CASES.items() for d in ("fp32", "bf16-mixed", "bf16-over-fp32") if d in case.dtypes],
)
all_dtypes = pytest.mark.parametrize(("name", "dtypes"), [(n, d) for n, case in CASES.items() for d in case.dtypes])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def op_arguments(name, dtypes="fp32", *, p=0.0, m=M, optional=True):
    inputs = CASES[name].inputs(m, dtypes, optional=optional)
    return CASES[name].op_arguments(inputs, torch.tensor([3]) if p > 0 else None, p)


def test_every_declared_operation_is_tested_here():
    assert {operation.name: operation for operation in OPERATIONS} == {n: case.operation for n, case in CASES.items()}


@pytest.mark.parametrize("wrong", [{"out": "z"}, {"passes_dy": ("base",)}], ids=str)
def test_a_declaration_names_its_own_operands(wrong):
    operation = CASES["linear"].operation
    declared = {"out": "x", "needs": operation.needs, "plan": None, "backends": {}, **wrong}
    with pytest.raises(ValueError, match=r"^typo must declare every operand .*'bias'\]; got \['(z|base)'\] besides"):
        Operation("typo", operation.operands, **declared)


def test_a_declaration_says_in_which_dtype_a_gradient_is():
    operation = CASES["linear"].operation
    x, weight, lora_A, lora_B, bias = operation.operands
    declared = {"out": "x", "needs": operation.needs, "plan": None, "backends": {}}
    with pytest.raises(ValueError, match=r"^typo's gradient of lora_A must be 'adapters'; got 'out'\.$"):
        Operation("typo", (x, weight, replace(lora_A, gradient="out"), lora_B, bias), **declared)
    with pytest.raises(ValueError, match=r"^typo's gradient of x must be 'own'; got 'out'\.$"):
        Operation("typo", operation.operands, **declared | {"out": "bias"})
    with pytest.raises(ValueError, match=r"^typo's gradient of x must be computed or dy itself; got both\.$"):
        Operation("typo", operation.operands, **declared | {"passes_dy": ("x",)})


@every_operation
def test_schemas(name):
    # The contract that exported programs hold: a change breaks them.
    operation = CASES[name].operation
    assert str(operation.forward._schema) == CASES[name].forward
    assert str(operation.backward._schema) == CASES[name].backward


# With everything, and without all that may be left out; shapes, layouts and sets of gradients are the fakes' below.
@pytest.mark.parametrize(("optional", "p"), [(True, 0.5), (False, 0.0)])
@some_dtypes
def test_opcheck(name, dtypes, optional, p):
    operation = CASES[name].operation
    forward, backward = op_arguments(name, dtypes, p=p, optional=optional)
    torch.library.opcheck(operation.forward, forward)
    torch.library.opcheck(operation.backward, (*backward, CASES[name].all_needs[0 if optional else -1], "torch"))


def described(outputs):
    return [(tuple(t.shape), t.dtype, t.stride(), t.storage_offset(), t.device.type) for t in outputs]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(("p", "m"), [(0.0, M), (0.5, M), (0.5, 1), (0.0, 0)])
@all_dtypes
def test_fakes_describe_the_real_results(name, dtypes, p, m, layout):
    operation = CASES[name].operation
    forward, backward = op_arguments(name, dtypes, p=p, m=m)
    xa = backward[len(operation.saved) + 1]  # which the op itself made
    forward = [laid_out(a, layout) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in forward]
    backward = [
        laid_out(a, layout) if isinstance(a, torch.Tensor) and a.dim() == 2 and a is not xa else a for a in backward
    ]

    def faked(op, arguments):
        with FakeTensorMode() as mode:
            outputs = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        return described(outputs)

    assert faked(operation.forward, forward) == described(operation.forward(*forward))
    for needs in CASES[name].all_needs:
        arguments = (*backward, needs, "torch")
        assert faked(operation.backward, arguments) == described(operation.backward(*arguments))


@some_dtypes
def test_outputs_are_fresh(name, dtypes):
    operation = CASES[name].operation
    forward, backward = op_arguments(name, dtypes, p=0.5)
    backward = (*backward, CASES[name].all_needs[0], "torch")
    for op, arguments in ((operation.forward, forward), (operation.backward, backward)):
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        made = [t.untyped_storage().data_ptr() for t in op(*arguments)]
        assert len(set(made)) == len(made)
        assert not given & set(made)


@pytest.mark.parametrize(("p", "backend"), [(0.0, "torch"), (0.5, "auto")])
@some_dtypes
def test_compiled_function_is_the_eager_one(name, dtypes, p, backend):
    case = CASES[name]
    inputs = whole(case.inputs(M, dtypes, dropout_p=p))
    # Dynamo and AOTAutograd as they are; the layer's test below has inductor generate code, too.
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    for subset in (case.names, ("x", "lora_A", "lora_B"), ("x", "lora_A"), case.names[:1], ("lora_B",)):
        assert_same_bits(
            case.run(inputs, backend, requires_grad=subset, function=compiled),
            case.run(inputs, backend, requires_grad=subset),
        )


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for d in (torch.float32, torch.bfloat16) for n in CASES], ids=str)
def test_compiled_layer_trains_with_dropout(name, dtype):
    torch.manual_seed(0)
    layer = in_whole_numbers(CASES[name].layer(0.5, dtype))
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
    for tensor, value in eager.items():
        assert (fused[tensor].float() - value.float()).norm() <= 2 * torch.finfo(dtype).eps * value.float().norm()
    layer.eval()
    assert torch.equal(compiled(x), layer(x))


@every_operation
def test_compiled_under_autocast(name):
    layer = in_whole_numbers(CASES[name].layer(0.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = whole_numbers(torch.randn(M, K))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


@every_operation
def test_seed_tensor_is_an_input_of_the_graph(name):
    counter = CompileCounter()
    call = CASES[name].call(whole(CASES[name].inputs(M, "fp32")), dropout_p=0.5, backend="torch")
    compiled = torch.compile(lambda seed: call(dropout_seed=seed), backend=counter, fullgraph=True)
    for value in (1, 2, -3):
        seed = torch.tensor([value])
        assert torch.equal(compiled(seed), call(dropout_seed=seed))
    assert counter.frame_count == 1


@every_operation
def test_batch_size_is_dynamic(name):
    counter = CompileCounter()
    compiled = torch.compile(CASES[name].layer(0.1), backend=counter, fullgraph=True, dynamic=True)
    for m in (M, 33, 64, 5000):
        assert compiled(torch.randn(2, m, K)).shape == (2, m, N)
    assert counter.frame_count == 1


@every_operation
def test_dynamic_batch_compiles_forward_and_backward(name):
    layer = in_whole_numbers(CASES[name].layer())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (M, 33, 700):
        x = whole_numbers(torch.randn(m, K))
        gradients = []
        for module in (layer, compiled):
            layer.zero_grad()
            module(x).sum().backward()
            gradients.append({"dA": layer.lora_A.grad, "dB": layer.lora_B.grad})
        assert_same_bits(*gradients)


@every_operation
def test_export_holds_the_op(name):
    layer, x = CASES[name].layer().eval(), torch.randn(M, K)
    shapes = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert CASES[name].operation.forward in targets
    for m in (M, 77):
        x = torch.randn(m, K)
        assert_same_numbers(program.module()(x), layer(x))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
@every_operation
def test_eager_backward_calls_the_registered_op_where_it_is_needed(name, p, create_graph):
    case = CASES[name]
    inputs = case.inputs(M, "fp32")
    for needed in case.names:
        leaves = [getattr(inputs, operand).clone().requires_grad_(operand == needed) for operand in case.names]
        y = case.function(*leaves, dropout_p=p, backend="torch")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            torch.autograd.grad(y, leaves[case.names.index(needed)], inputs.dy, create_graph=create_graph)
        calls = sum(e.count for e in profile.key_averages() if e.key == f"lora_kernels::{name}_backward")
        assert calls == (needed not in case.operation.passes_dy), needed
