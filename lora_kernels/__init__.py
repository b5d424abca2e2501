"""Fused LoRA for PyTorch: base and low-rank product as one operation, forward and backward.

y = x W^T + b + (alpha / r) B (A drop(x))
"""

from lora_kernels.errors import AdapterFileError as AdapterFileError
from lora_kernels.errors import ArgumentError as ArgumentError
from lora_kernels.errors import DeviceError as DeviceError
from lora_kernels.errors import DtypeError as DtypeError
from lora_kernels.errors import LoRAKernelsError as LoRAKernelsError
from lora_kernels.errors import ShapeError as ShapeError
from lora_kernels.errors import UnsupportedError as UnsupportedError
from lora_kernels.functional import explain_plan as explain_plan
from lora_kernels.functional import lora_linear as lora_linear
from lora_kernels.nn import LoRALinear as LoRALinear

__version__ = "0.1.0"
