"""`add_lora`, `merge_lora`, `unmerge_lora`, `unload_lora`: LoRA layers in a model, in place."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels import (
    AdaptedModule,
    ArgumentError,
    DeviceError,
    DtypeError,
    LoRALinear,
    UnsupportedError,
    add_lora,
    lora_linear,
    merge_lora,
    unload_lora,
    unmerge_lora,
)
from lora_kernels.testing import budget_rows
from tests.adapter_models import Block, Stack, state_of
from tests.equality import assert_same_numbers, differ


def adapted(report) -> list[str]:
    return [module.name for module in report.modules]


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["q_proj"], None, ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        (["attn.q_proj", "head"], None, ["layers.0.attn.q_proj", "layers.1.attn.q_proj", "head"]),
        (("head",), None, ["head"]),
        ({"layers.1.up"}, None, ["layers.1.up"]),
        (r".*\.1\..*_proj", None, ["layers.1.attn.q_proj", "layers.1.attn.v_proj"]),
        # The whole name is matched, not a part of it.
        (r".*\.up", None, ["layers.0.up", "layers.1.up"]),
        ("all-linear", r"layers\.0.*", ["layers.1.attn.q_proj", "layers.1.attn.v_proj", "layers.1.up", "head"]),
        ("ALL-LINEAR", ["attn.v_proj", "q_proj", "up"], ["head"]),
        (["q_proj", "up"], ["layers.0.attn.q_proj", "1.up"], ["layers.0.up", "layers.1.attn.q_proj"]),
    ],
)  # fmt: skip
def test_targets(target, exclude, expected):
    model = Stack()
    report = add_lora(model, r=2, target_modules=target, exclude_modules=exclude)
    assert adapted(report) == expected
    assert [name for name, module in model.named_modules() if isinstance(module, LoRALinear)] == expected


def test_a_suffix_counts_after_a_dot_only():
    model = nn.ModuleDict({"proj": nn.Linear(3, 3), "q_proj": nn.Linear(3, 3)})
    assert adapted(add_lora(model, target_modules=["proj"])) == ["proj"]


def test_the_output_embeddings_are_no_target_of_all_linear():
    class Decoder(Stack):
        def get_output_embeddings(self):
            return self.head

    assert "head" not in adapted(add_lora(Decoder(), target_modules="all-linear"))
    assert "head" in adapted(add_lora(Stack(), target_modules="all-linear"))
    assert adapted(add_lora(Decoder(), target_modules=["head"])) == ["head"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["q_prjo"], r"got \['q_prjo'\], which matches none. Near names: 'q_proj'"),
        (["zzz"], r"The model's linears are called 'q_proj', 'v_proj', 'up', 'head'\."),
        ("q_proj", r"match the whole name of at least one .* which matches none. Near names: 'q_proj'"),
        ([], "must name at least one module"),
        ("", "must name at least one module"),
        (3, "must be a string or a list of strings; got 3"),
        (["q_proj", 3], "must be a string or a list of strings"),
        ("(", r"must be a regular expression; got '\('"),
    ],
)  # fmt: skip
def test_targets_that_match_nothing(target, message):
    model = Stack()
    before = state_of(model)
    with pytest.raises(ArgumentError, match=rf"^target_modules must .*{message}|^target_modules {message}"):
        add_lora(model, target_modules=target)
    assert state_of(model) == before


def test_everything_excluded():
    with pytest.raises(
        ArgumentError, match=r"^exclude_modules must leave some .* excludes all 2 of them, 'layers.0.up'"
    ):
        add_lora(Stack(), target_modules=["up"], exclude_modules=".*up")


def test_a_model_without_linears():
    with pytest.raises(ArgumentError, match=r"^model must have linear layers; got ReLU"):
        add_lora(nn.ReLU(), target_modules="all-linear")
    with pytest.raises(ArgumentError, match=r"^model must have linear layers; got Linear without any below"):
        add_lora(nn.Linear(3, 3), target_modules="all-linear")


def test_some_targets_without_a_match_are_reported():
    report = add_lora(Stack(), target_modules=["q_proj", "k_proj", "o_proj"])
    assert report.unmatched == ("k_proj", "o_proj")
    assert "target_modules that matched nothing: 'k_proj', 'o_proj'" in str(report)


def test_patterns_for_rank_and_alpha():
    model = Stack()
    report = add_lora(
        model,
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={r"layers\.0\.up": 2, "up": 3, r"layers.*v_proj": 5},
        alpha_pattern={"^head": 1, "proj": 7, "attn.q_proj": 6},
    )
    found = {module.name: (module.r, module.scaling) for module in report.modules}
    assert found == {
        "layers.0.attn.q_proj": (4, 6 / 4),
        "layers.0.attn.v_proj": (5, 8 / 5),
        "layers.0.up": (2, 8 / 2),
        "layers.1.attn.q_proj": (4, 6 / 4),
        "layers.1.attn.v_proj": (5, 8 / 5),
        "layers.1.up": (3, 8 / 3),
        "head": (4, 1 / 4),
    }
    assert model.layers[1].up.lora_A.shape == (3, 12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ArgumentError, "^r must be"),
        ({"lora_alpha": math.nan}, ArgumentError, "^lora_alpha must be"),
        ({"lora_dropout": 1.0}, ArgumentError, "^lora_dropout must be"),
        ({"backend": "cuda"}, ArgumentError, "^backend must be"),
        ({"init_lora_weights": "pissa"}, ArgumentError, "^init_lora_weights must be"),
        ({"rank_pattern": {"up": 0}}, ArgumentError, r"^rank_pattern\['up'\] must be an int"),
        ({"rank_pattern": {"(": 4}}, ArgumentError, "^rank_pattern must be a regular expression"),
        ({"rank_pattern": [4]}, ArgumentError, "^rank_pattern must be a dict"),
        ({"alpha_pattern": {"up": math.inf}}, ArgumentError, r"^alpha_pattern\['up'\] must be a finite number"),
        ({"exclude_modules": 3}, ArgumentError, "^exclude_modules must be"),
        ({"adapter_name": "a.b"}, ArgumentError, "^adapter_name must be a non-empty string without dots"),
        ({"adapter_name": ""}, ArgumentError, "^adapter_name must be"),
        ({"adapter_dtype": torch.float16}, DtypeError, r"^'layers.0.up': adapter_dtype must be"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(options, error, message):
    model = Stack()
    before = state_of(model)
    with pytest.raises(error, match=message):
        add_lora(model, **{"target_modules": ["up"], **options})
    assert state_of(model) == before


def test_what_cannot_be_adapted_is_named():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "embed": nn.Embedding(5, 4),
            "scaled": Scaled(4, 4),
            "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "block": nn.Sequential(nn.Linear(4, 4)),
        }
    )
    moved = nn.Linear(4, 4)
    moved.forward = lambda x: x
    model["moved"] = moved
    for name, reason in {
        "embed": "Embedding",
        "scaled": "Scaled, which has its own forward",
        "normed": "ParametrizedLinear without a weight parameter",
        "block": "Sequential",
        "moved": "Linear whose forward was replaced, as offloading does",
    }.items():
        before = state_of(model)
        with pytest.raises(UnsupportedError, match=rf"it matches '{name}' \({reason}\)\. Narrow"):
            add_lora(model, target_modules=["plain", name])
        assert state_of(model) == before
    assert adapted(add_lora(model, target_modules=["plain", "embed"], exclude_modules=["embed"])) == ["plain"]


def test_lazy_modules_are_to_be_called_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(
        ArgumentError, match=r"^model must have all its parameters; got '1.weight', which has no shape yet"
    ):
        add_lora(model, target_modules=["0"])
    with pytest.raises(DtypeError, match=r"got LazyLinear whose weight has no shape yet"):
        LoRALinear.from_linear(model[1])
    model(torch.randn(2, 4))
    assert adapted(add_lora(model, target_modules="all-linear")) == ["0", "1"]


def test_weights_that_somebody_else_reads_are_refused():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(UnsupportedError, match=r"'out_proj' \(NonDynamicallyQuantizableLinear whose weight nn.Multi"):
        add_lora(attention, target_modules="all-linear")


@pytest.mark.parametrize("merged", [False, True])
def test_the_fast_path_of_an_encoder_layer_sees_the_adapter(merged):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    add_lora(model, r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
    model.eval()
    slow = model(x)  # with gradients
    if merged:
        merge_lora(model)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    unload_lora(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_trainable_parameters_are_counted():
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    report = add_lora(model, r=8, target_modules=["0"])
    assert (report.trainable, report.base, report.percent) == (8192, 262144, 3.125)
    assert report.modules == (AdaptedModule("0", 512, 512, 8, 1.0, 8192),)
    assert "8,192 trainable parameters, 3.125 % of the base model's 262,144" in str(report)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.trainable


def test_the_report_has_a_row_for_each_kind_of_layer():
    lines = str(add_lora(Stack(), r=2, target_modules="all-linear")).splitlines()
    assert [line.split()[:4] for line in lines[2:]] == [
        ["2", "x", "layers.*.attn.q_proj", "12"],
        ["2", "x", "layers.*.attn.v_proj", "12"],
        ["2", "x", "layers.*.up", "12"],
        ["1", "x", "head", "12"],
    ]


def test_the_rest_is_frozen_and_the_adapter_trains():
    model = Stack()
    add_lora(model, r=2, target_modules=["q_proj"], init_lora_weights=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.attn.q_proj.{part}" for i in (0, 1) for part in ("lora_A", "lora_B")}
    model(torch.randn(3, 12)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_adapter_changes_nothing(dtype):
    model, x = Stack().to(dtype), torch.randn(3, 12, dtype=dtype)
    expected = model(x)
    add_lora(model, target_modules="all-linear", lora_dropout=0.5)
    tolerance = 8 * torch.finfo(dtype).eps  # bias and product are added in another order
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_the_layer_computes_the_equation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    add_lora(model, r=4, lora_alpha=16, use_rslora=True, target_modules=["0"], init_lora_weights=False)
    layer, x = model[0], torch.randn(5, 12).double()
    expected = F.linear(x, layer.weight, layer.bias) + 8 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(model(x), expected, rtol=1e-14, atol=1e-14)


def test_mode_device_and_dtype_are_the_linear_s():
    model = Stack().bfloat16().eval()
    model.layers[1].train()
    add_lora(model, target_modules=["up"], adapter_dtype=torch.float32, adapter_name="x")
    for index, training in ((0, False), (1, True)):
        layer = model.layers[index].up
        assert all(module.training == training for module in layer.modules())
        assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (
            torch.bfloat16,
            torch.float32,
            torch.float32,
        )
    with torch.device("meta"):
        empty = Stack()
    add_lora(empty, target_modules=["up"])
    assert empty.layers[0].up.lora_A.is_meta


def test_linears_are_turned_in_place():
    model = Stack()
    linear, weight, bias = model.head, model.head.weight, model.head.bias
    linear.note = "kept"
    seen, elsewhere = [], [linear]
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    add_lora(model, target_modules=["head"])
    assert model.head is linear is elsewhere[0]
    assert model.head.weight is weight
    assert model.head.bias is bias
    assert linear.note == "kept"
    model(torch.randn(1, 12))
    assert seen == [LoRALinear]
    handle.remove()
    model(torch.randn(1, 12))
    assert seen == [LoRALinear]


def test_a_module_at_two_places_stays_one():
    block = Block()
    model = nn.ModuleDict({"a": block, "b": nn.ModuleDict({"inner": block}), "c": block.up})
    report = add_lora(model, r=2, target_modules=["c"])
    # Chosen by its third name; reported by its first.
    assert adapted(report) == ["a.up"]
    assert model["c"] is block.up is model["b"]["inner"].up
    assert isinstance(model["c"], LoRALinear)
    assert report.trainable == 2 * (12 + 12)
    assert adapted(add_lora(Stack(), target_modules="all-linear", exclude_modules=["up"]))
    with pytest.raises(ArgumentError, match="exclude_modules must leave"):
        add_lora(model, target_modules=["a.up"], exclude_modules=["c"], adapter_name="x")


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.detach().clone()
    add_lora(model, r=2, target_modules=["head"], init_lora_weights=False)
    assert model["head"].weight is model["embed"].weight
    merge_lora(model)
    assert torch.equal(model["embed"].weight, before)
    unmerge_lora(model)
    assert model["head"].weight is model["embed"].weight


def test_a_module_that_holds_itself_is_walked_once():
    model = Stack()
    model.layers[0].parent = model
    assert adapted(add_lora(model, target_modules=["head"])) == ["head"]


def test_names_leave_out_wrappers():
    model = Stack()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    report = add_lora(torch.compile(model, backend="eager"), target_modules=["layers.0.up"])
    assert adapted(report) == ["layers.0.up"]
    assert isinstance(model.layers[0]._orig_mod.up, LoRALinear)
    assert adapted(add_lora(nn.DataParallel(Stack()), target_modules=["head"])) == ["head"]


def test_data_parallel_replicas_compute_the_same():
    # What nn.DataParallel does on each device with a replica: plain tensors in the place of parameters.
    model = nn.Sequential(nn.Linear(6, 4))
    add_lora(model, r=2, target_modules=["0"], init_lora_weights=False)
    layer, x = model[0], torch.randn(3, 6)
    for merged in (False, True):
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():
            setattr(replica, name, parameter.detach().clone())
        assert_same_numbers(replica(x), layer(x), f"merged: {merged}")
        layer.merge()


def test_peft_s_own_layers_are_left_to_patch_peft():
    foreign = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    model = nn.ModuleDict({"q": foreign(), "head": nn.Linear(3, 3)})
    with pytest.raises(
        UnsupportedError, match=r"^model must not hold PEFT's layers; got 'q' \(Linear\)\. Call patch_peft"
    ):
        add_lora(model, target_modules=["head"])


def test_a_model_is_wrapped_for_ddp_after_not_before(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Stack())
        with pytest.raises(ArgumentError, match=r"^model must not be wrapped in DistributedDataParallel yet"):
            add_lora(model, target_modules=["head"])
    finally:
        torch.distributed.destroy_process_group()


def test_the_same_name_twice():
    model = Stack()
    add_lora(model, target_modules=["up"])
    before = state_of(model)
    for target in (["up"], ["head"]):
        with pytest.raises(
            ArgumentError, match=r"^adapter_name must be new to the model; it has 'default' on 2 modules"
        ):
            add_lora(model, target_modules=target)
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_and_unmerge(dtype):
    torch.manual_seed(0)
    model = Stack().to(dtype).eval()
    add_lora(model, r=4, target_modules="all-linear", init_lora_weights=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(64, 12, dtype=dtype)
    y, truth = model(x), copy.deepcopy(model).double()(x.double())
    merge_lora(model)
    merge_lora(model)
    layer = model.layers[0].up
    assert layer.merged
    assert_same_numbers(layer(x), F.linear(x, layer.weight, layer.bias))
    row = budget_rows({"y": model(x).detach()}, {"y": y.detach()}, {"y": truth.detach()})[0]
    assert row.ok, row
    unmerge_lora(model)
    unmerge_lora(model)
    assert_same_numbers(model(x), y)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("function", [merge_lora, unmerge_lora, unload_lora])
def test_a_model_without_lora_layers(function):
    with pytest.raises(ArgumentError, match=r"^model must have LoRA layers of this package; got Stack without any"):
        function(Stack())


def test_a_merge_that_fails_leaves_nothing_merged():
    model = Stack()
    add_lora(model, r=2, target_modules="all-linear", init_lora_weights=False)
    model.layers[0].up.merge()
    model.head.to("meta")
    before = state_of(model)
    with pytest.raises(DeviceError, match=r"^weight must hold data to be merged"):
        merge_lora(model)
    assert state_of(model) == before


def test_unload_after_merge_leaves_a_plain_model_with_the_sum():
    torch.manual_seed(0)
    model = Stack().eval()
    shape, x = {name: type(m) for name, m in model.named_modules()}, torch.randn(3, 12)
    attributes = set(vars(model.head))
    for name in ("default", "other"):
        add_lora(model, r=4, target_modules="all-linear", init_lora_weights=False, adapter_name=name)
    merge_lora(model)
    y = model(x)
    unload_lora(model)
    assert {name: type(m) for name, m in model.named_modules()} == shape
    assert set(vars(model.head)) == attributes
    assert set(model.state_dict()) == set(Stack().state_dict())
    assert_same_numbers(model(x), y)


def test_unload_without_merge_gives_the_base_back():
    model, x = Stack(), torch.randn(3, 12)
    y, state = model(x), state_of(model)
    add_lora(model, r=4, target_modules="all-linear", init_lora_weights=False)
    assert differ(model(x), y)
    unload_lora(model)
    assert_same_numbers(model(x), y)
    model.requires_grad_(True)
    assert state_of(model) == state


def test_a_layer_that_was_built_as_one_can_be_unloaded():
    model = nn.Sequential(LoRALinear(6, 4, r=2))
    unload_lora(model)
    assert type(model[0]) is nn.Linear
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_copies_and_pickles():
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 12)
    for name in ("default", "other"):
        add_lora(model, r=2, target_modules=["up"], init_lora_weights=False, adapter_name=name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_numbers(other(x), model(x))
        assert other.layers[0].up.lora_A is not model.layers[0].up.lora_A
        # The active adapter is the copy's own.
        with torch.no_grad():
            other.layers[0].up.adapter_other.lora_B.zero_()
        assert not other.layers[0].up.lora_B.any()
        assert model.layers[0].up.lora_B.any()


def test_training_a_model_is_training_its_layers():
    torch.manual_seed(0)
    model = Stack().double()
    add_lora(model, r=2, target_modules=["head"], init_lora_weights=False)
    twin = copy.deepcopy(model)
    layer = twin.head
    lora_A, lora_B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    theirs = torch.optim.SGD([lora_A, lora_B], lr=0.1)
    for _ in range(3):
        x = torch.randn(4, 12).double()
        hidden = twin.layers[1](twin.layers[0](x))
        expected = lora_linear(hidden, layer.weight, lora_A, lora_B, layer.bias, scaling=layer.scaling)
        for optimizer, y in ((ours, model(x)), (theirs, expected)):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        assert_same_numbers(model(x), model(x))
    assert torch.equal(model.head.lora_A, lora_A)
    assert torch.equal(model.head.lora_B, lora_B)
