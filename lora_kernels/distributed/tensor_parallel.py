"""Tensor parallel LoRA: styles for `parallelize_module` that shard a layer's adapter to match its weight.

Over the W ranks of a mesh, rank i holds of y = x W^T + b + s (drop(x) A^T) B^T:

    column-wise   W_i, b_i, B_i: rows of N; A: all of it        y_i = x W_i^T + b_i + s (drop(x) A^T) B_i^T
                  backward: dx = sum_i dx_i, dA = sum_i dA_i
    row-wise      x_i, W_i, A_i: columns of K; B, b: all of it   y = sum_i x_i W_i^T + s (drop(x_i) A_i^T) B^T, + b once
                  backward: dB = sum_i dB_i

Each rank computes its term with the same fused operation; a sum is one all-reduce, or a reduce-scatter where the
sequence is sharded. Beside what the frozen layer communicates, that is only dA [R, K] or dB [N, R]. A mask is a
function of seed, row and column: column-wise all ranks have the whole of it, row-wise each has its columns.

Source: Shoeybi et al., "Megatron-LM", 2019, section 3, for W; the same cut through A and B.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F

from lora_kernels.distributed.dropout import BatchShard, check_apart, gather, require, same_seed
from lora_kernels.errors import ArgumentError, UnsupportedError
from lora_kernels.functional.linear import lora_linear
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.adapter import AdapterSettings, names_of, own_names
from lora_kernels.nn.adopt import adopted_class
from lora_kernels.nn.sharding import is_dtensor, is_sharded
from lora_kernels.reference.philox import COLUMNS_PER_COUNTER
from lora_kernels.validation import draw_seed, of_layer


class ShardedLoRALinear(LoRALinear):
    """A LoRALinear whose parameters are DTensors over a mesh of one dimension; so are its input and output."""

    placements: ClassVar[dict[str, Placement]]
    mesh: DeviceMesh

    def _attach(self, name: str, settings: AdapterSettings, lora_A: nn.Parameter, lora_B: nn.Parameter) -> None:
        super()._attach(name, settings, self._shard("lora_A", lora_A), self._shard("lora_B", lora_B))

    def _shard(self, name: str, parameter: nn.Parameter, source: int | None = 0) -> nn.Parameter:
        """This rank's part, of rank `source`'s parameter."""
        sharded = distribute_tensor(parameter.detach(), self.mesh, [self.placements[name]], src_data_rank=source)
        return nn.Parameter(sharded, requires_grad=parameter.requires_grad)

    def shard_parameters(self, source: int | None) -> None:
        """Each parameter as its placement says, from rank `source`; the adapters' that are not active, too."""
        merged = self.merged
        self.unmerge()
        for owner in self.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = self._shard(name, parameter, source)
        if merged:
            self.merge()

    def _term(
        self, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, first_column: int
    ) -> Tensor:
        """What this rank computes of a call; x begins at first_column of the whole input."""
        dropout_p, seed = self.lora_dropout if self.training else 0.0, None
        offset: tuple[int | Tensor, int | Tensor] | None = None
        if dropout_p:
            seed = draw_seed(x.device)
            agree = same_seed(gather(self.mesh, seed))
            if self.batch_shard is None:
                require(agree)
                offset = (0, first_column)
            else:
                offset = (cast(BatchShard, self.batch_shard).first_row(seed, x, agree), first_column)
        scaling = self.scaling
        if isinstance(scaling, Tensor) and scaling.requires_grad:
            scaling = _summed_gradient(DTensor.from_local(scaling, self.mesh, [Replicate()], run_check=False))
        return lora_linear(
            x, weight, lora_A, lora_B, bias,
            scaling=scaling, dropout_p=dropout_p, dropout_seed=seed, dropout_offset=offset, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """And over how many ranks it is sharded."""
        return f"{super().extra_repr()}, sharded over {self.mesh.size()} ranks"


class ColwiseLoRALinear(ShardedLoRALinear):
    """x [*, K] whole on every rank → y [*, N] sharded along N."""

    placements: ClassVar[dict[str, Placement]] = {
        "weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0),
    }  # fmt: skip

    def forward(self, input: Any) -> Any:
        """A DTensor, replicated, to a DTensor, sharded along the features."""
        if self._merged or not self.r:
            return F.linear(input, self.weight, self.bias)
        lora_A, lora_B = self._active_parameters()
        y = self._term(
            input.to_local(grad_placements=[Partial()]),
            _local(self.weight), _summed_gradient(lora_A), _local(lora_B), _local(self.bias),
            first_column=0,
        )  # fmt: skip
        shape = torch.Size((*input.shape[:-1], self.out_features))
        return DTensor.from_local(
            y, self.mesh, [Shard(-1)], run_check=False, shape=shape, stride=_contiguous_stride(shape)
        )


class RowwiseLoRALinear(ShardedLoRALinear):
    """x [*, K] sharded along K → y [*, N] as terms that are still to be summed."""

    placements: ClassVar[dict[str, Placement]] = {
        "weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate(),
    }  # fmt: skip

    def forward(self, input: Any) -> Any:
        """A DTensor, sharded along the features, to a DTensor, partial."""
        if self._merged or not self.r:
            return F.linear(input, self.weight, self.bias)
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        columns = -(-self.in_features // size)  # of every rank but the last
        if self.training and self.lora_dropout and columns % COLUMNS_PER_COUNTER and size > 1:
            raise ArgumentError(  # here, on all ranks: by lora_linear, the first rank's columns would not be refused
                f"in_features must be sharded in multiples of {COLUMNS_PER_COUNTER} for dropout, since so many columns "
                f"share one random number; got {self.in_features} over {size} ranks, {columns} each. Set lora_dropout "
                "to 0 for this layer, or do not shard it."
            )
        bias = _local(self.bias)
        if bias is not None and rank:
            # It is added once; its gradient, the sum over dy, is each rank's own.
            bias = bias - bias.detach() if bias.requires_grad else torch.zeros_like(bias)
        lora_A, lora_B = self._active_parameters()
        y = self._term(
            input.to_local(),
            _local(self.weight), _local(lora_A), _summed_gradient(lora_B), bias,
            first_column=rank * columns,
        )  # fmt: skip
        return DTensor.from_local(y, self.mesh, [Partial()], run_check=False)


def _local(parameter: Any) -> Any:
    return None if parameter is None else _dtensor(parameter).to_local()


def _dtensor(parameter: Any) -> Any:
    if not isinstance(parameter, DTensor):
        raise UnsupportedError(
            f"parameters{of_layer()} must stay DTensors, this rank's parts; got a whole tensor of "
            f"{list(parameter.shape)}. Load a state_dict by torch.distributed.checkpoint.state_dict."
            "set_model_state_dict, and without assign=True."
        )
    return parameter


def _summed_gradient(parameter: Any) -> Tensor:
    """A replicated parameter, whose gradient is the sum of what the ranks find."""
    local: Tensor = _dtensor(parameter).redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return local


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return tuple(stride)


class _LoRAParallel(ParallelStyle):
    """What the two styles share: they shard a LoRALinear, and leave every other module to PyTorch's style."""

    _layer: ClassVar[type[ShardedLoRALinear]]
    _stock: ClassVar[type[ColwiseParallel] | type[RowwiseParallel]]
    _takes: ClassVar[Placement]  # of the x that its layers compute with
    _layouts: ClassVar[tuple[Placement, Placement]]  # what the modules around them have, unless told

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        of_input, of_output = self._layouts
        self.input_layouts, self.output_layouts = input_layouts or of_input, output_layouts or of_output
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear):
            stock = self._stock(
                input_layouts=self.input_layouts,
                output_layouts=self.output_layouts,
                use_local_output=self.use_local_output,
            )
            stock.src_data_rank = self.src_data_rank
            return stock._apply(module, device_mesh)
        self._check(module, device_mesh)
        cast(Any, module).__class__ = adopted_class(self._layer, module._plain_class)
        layer = cast(ShardedLoRALinear, module)
        layer.mesh = device_mesh
        layer.shard_parameters(self.src_data_rank)
        return distribute_module(layer, device_mesh, None, cast(Any, self._take), cast(Any, self._give))

    def _check(self, layer: LoRALinear, mesh: DeviceMesh) -> None:
        unsharded = type(layer) is adopted_class(LoRALinear, layer._plain_class)
        elsewhere = unsharded and any(is_dtensor(parameter) for parameter in layer.parameters())
        if is_sharded(layer) or elsewhere:
            raise UnsupportedError(
                f"{type(self).__name__} must be given a LoRALinear over an nn.Linear that is not sharded yet; got one "
                "whose parameters FSDP or another style has sharded. Call parallelize_module first, then fully_shard."
            )
        if not unsharded:
            raise UnsupportedError(
                f"{type(self).__name__} must be given a LoRALinear over an nn.Linear that is not sharded yet; got "
                f"{type(layer).__name__}. Transposed weights (Conv1D) are not sharded."
            )
        plain = layer._plain_class
        taken = sorted(own_names(plain) & names_of(self._layer))
        if taken:
            raise UnsupportedError(
                f"{type(self).__name__} must be given a linear without attributes of a sharded layer's; got "
                f"{plain.__name__}, which has a {', '.join(taken[:3])}. Rename it, or do not shard this layer."
            )
        dim = self._layer.placements["weight"].dim  # type: ignore[attr-defined]
        name, features = ("out_features", layer.out_features) if dim == 0 else ("in_features", layer.in_features)
        size = mesh.size()
        if -(-features // size) * (size - 1) >= features:
            raise ArgumentError(
                f"{name} must leave every rank a part; got {features} for {size} ranks. Do not shard this layer."
            )
        if isinstance(layer.batch_shard, BatchShard):
            check_apart(layer.batch_shard.mesh, mesh)

    def _take(self, layer: Any, inputs: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
        if not inputs:
            raise ArgumentError("x must be passed by position to a sharded layer; got it by name. Call layer(x).")
        x = inputs[0]
        if not isinstance(x, DTensor):
            layout = self.input_layouts
            whole: dict[str, Any] = {}
            if isinstance(layout, Shard) and layout.dim in (-1, x.dim() - 1):
                shape = torch.Size((*x.shape[:-1], layer.in_features))  # ranks' parts may differ in size
                whole = {"shape": shape, "stride": _contiguous_stride(shape)}
            x = DTensor.from_local(x, mesh, [layout], run_check=False, **whole)
        elif x.device_mesh != mesh:
            raise ArgumentError(
                f"x must be a tensor, or a DTensor on the mesh that the layer is sharded over, {mesh}; got one on "
                f"{x.device_mesh}. Pass its local tensor: x.to_local()."
            )
        return x.redistribute(placements=[self._takes])

    def _give(self, _layer: nn.Module, y: DTensor, _mesh: DeviceMesh) -> Any:
        y = y.redistribute(placements=[self.output_layouts])
        return y.to_local() if self.use_local_output else y


class LoRAColwiseParallel(_LoRAParallel):
    """`parallelize_module`'s column-wise style for LoRA layers: out_features is divided among the ranks.

    y_i = x W_i^T + b_i + scaling (drop(x) A^T) B_i^T       dx = sum_i dx_i       dA = sum_i dA_i

    weight, bias and lora_B are sharded along their first dimension; lora_A is on every rank, and its gradient is summed
    over them, like that of x. Sharded parameters are DTensors, in state_dicts, optimisers and checkpoints too. Modules
    that are no LoRALinear get torch's ColwiseParallel, so that one plan serves a whole model.

    Args:
        input_layouts: the placement of x; None is Replicate(); Shard(1) for sequence parallel, which is gathered first.
        output_layouts: of y; None is Shard(-1).
        use_local_output: whether y is a plain tensor, the rank's part, or a DTensor.

    Raises:
        UnsupportedError: the layer is sharded already, or its weight is transposed.
        ArgumentError: a rank would have no part of out_features. In a training call with dropout: the ranks drew
            different seeds; they need the same `torch.manual_seed`, since all of them apply one mask.

    Numerics:
        Each rank's term is within the budget of `lora_linear`; sums over ranks are in the tensor's dtype, as torch's.

    Source:
        Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
        section 3.

    Example:
        >>> import torch
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from lora_kernels import add_lora
        >>> from lora_kernels.distributed import LoRAColwiseParallel, LoRARowwiseParallel
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
        >>> report = add_lora(mlp, r=8, target_modules=["0", "2"])
        >>> mlp = parallelize_module(mlp, mesh, {"0": LoRAColwiseParallel(), "2": LoRARowwiseParallel()})
        >>> mlp(torch.randn(4, 64)).shape
        torch.Size([4, 64])
        >>> torch.distributed.destroy_process_group()
    """

    _layer, _stock = ColwiseLoRALinear, ColwiseParallel
    _takes: ClassVar[Placement] = Replicate()
    _layouts: ClassVar[tuple[Placement, Placement]] = (Replicate(), Shard(-1))


class LoRARowwiseParallel(_LoRAParallel):
    """`parallelize_module`'s row-wise style for LoRA layers: in_features is divided among the ranks.

    y = sum_i x_i W_i^T + scaling (drop(x_i) A_i^T) B^T, + b once       dB = sum_i dB_i

    weight and lora_A are sharded along their second dimension; bias and lora_B are on every rank, and the gradient of
    lora_B is summed over them. The low-rank term is part of the one sum that the frozen layer needs anyway.

    Args:
        input_layouts: the placement of x; None is Shard(-1), what a column-wise layer gives.
        output_layouts: of y; None is Replicate(); Shard(1) for sequence parallel, which makes the sum a reduce-scatter.
        use_local_output: whether y is a plain tensor or a DTensor.

    Raises:
        UnsupportedError: the layer is sharded already, or its weight is transposed.
        ArgumentError: a rank would have no part of in_features. In a training call with dropout: as for
            `LoRAColwiseParallel`, or the ranks' parts of in_features are not multiples of 8.

    Numerics:
        As for `LoRAColwiseParallel`; y is a sum of W terms, each rounded to y's dtype, as the frozen layer's is.

    Source:
        As for `LoRAColwiseParallel`.

    Example:
        As for `LoRAColwiseParallel`.
    """

    _layer, _stock = RowwiseLoRALinear, RowwiseParallel
    _takes: ClassVar[Placement] = Shard(-1)
    _layouts: ClassVar[tuple[Placement, Placement]] = (Shard(-1), Replicate())
