"""What the tests of the LoRA branch share, beside tests.linear_cases: dtypes of three tensors, and inputs by name."""

from itertools import chain, combinations

import torch

from lora_kernels.testing import BranchInputs, make_branch_inputs
from tests.linear_cases import pooled

TENSORS = ("base_out", "x", "lora_A", "lora_B")
SUBSETS = list(chain.from_iterable(combinations(TENSORS, size) for size in range(len(TENSORS) + 1)))

# x's dtype, the adapters', and that of base_out and y. "over": a base that answers in another dtype than x's, as a
# quantised one does under autocast.
_FP32, _FP16, _BF16 = torch.float32, torch.float16, torch.bfloat16
SAME = {
    "fp32": (_FP32, _FP32, _FP32),
    "fp16": (_FP16, _FP16, _FP16),
    "bf16": (_BF16, _BF16, _BF16),
    "fp16-mixed": (_FP16, _FP32, _FP16),
    "bf16-mixed": (_BF16, _FP32, _BF16),
}
OVER = {
    "bf16-over-fp32": (_BF16, _BF16, _FP32),
    "bf16-mixed-over-fp32": (_BF16, _FP32, _FP32),
    "bf16-over-fp16": (_BF16, _BF16, _FP16),
    "bf16-mixed-over-fp16": (_BF16, _FP32, _FP16),
    "fp32-over-bf16": (_FP32, _FP32, _BF16),
}
DTYPES = SAME | OVER


def inputs_of(size, dtypes, r=8, **options) -> BranchInputs:
    """One problem of [M, N, K], its dtypes by name or as three."""
    x, adapters, out = DTYPES[dtypes] if isinstance(dtypes, str) else dtypes
    return make_branch_inputs(*size, r, dtype=x, adapter_dtype=adapters, out_dtype=out, **options)


def problems(size, dtypes, r=8, **options) -> list[BranchInputs]:
    """`pooled`, by the same names."""
    x, adapters, out = DTYPES[dtypes] if isinstance(dtypes, str) else dtypes
    return pooled(make_branch_inputs, *size, r, dtype=x, adapter_dtype=adapters, out_dtype=out, **options)
