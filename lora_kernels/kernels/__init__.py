"""Triton: device functions, kernels, and one launcher for each kernel.

No autograd, no validation, no look-up of configurations: tensors and a tile come in, tensors go out. The only package
that imports triton; imported only inside the implementation functions of `lora_kernels.ops`.
"""
