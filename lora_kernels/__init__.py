"""Fused LoRA for PyTorch: base and low-rank product as one operation, forward and backward.

y = x W^T + b + (alpha / r) B (A drop(x))
"""

from lora_kernels.adapters import (
    AdaptedModule as AdaptedModule,
    AdapterReport as AdapterReport,
    add_lora as add_lora,
    delete_adapter as delete_adapter,
    load_lora as load_lora,
    merge_lora as merge_lora,
    save_lora as save_lora,
    set_adapter as set_adapter,
    unload_lora as unload_lora,
    unmerge_lora as unmerge_lora,
)
from lora_kernels.errors import (
    AdapterFileError as AdapterFileError,
    ArgumentError as ArgumentError,
    DeviceError as DeviceError,
    DtypeError as DtypeError,
    LoRAKernelsError as LoRAKernelsError,
    ShapeError as ShapeError,
    UnsupportedError as UnsupportedError,
)
from lora_kernels.functional import (
    explain_plan as explain_plan,
    lora_branch as lora_branch,
    lora_linear as lora_linear,
)
from lora_kernels.interop import (
    PatchReport as PatchReport,
    PatchRow as PatchRow,
    patch_peft as patch_peft,
    unpatch_peft as unpatch_peft,
)
from lora_kernels.nn import LoRALinear as LoRALinear
from lora_kernels.planning import Plan as Plan

__version__ = "0.1.0"
