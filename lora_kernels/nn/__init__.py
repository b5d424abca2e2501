"""Modules over the operations."""

from lora_kernels.nn.linear import LoRALinear as LoRALinear
