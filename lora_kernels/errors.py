"""One class for each thing a user can do wrong.

Every message names the argument, the rule, what came, and what to do about it.
"""


class LoRAKernelsError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentError(LoRAKernelsError, ValueError):
    """A value is outside its range: dropout_p, rank, backend name, seed, scaling."""


class ShapeError(LoRAKernelsError, ValueError):
    """Tensor shapes do not fit together."""


class DtypeError(LoRAKernelsError, TypeError):
    """A tensor's dtype, or a combination of dtypes, is not one the operation computes in."""


class DeviceError(LoRAKernelsError, ValueError):
    """Tensors live on different devices, or on one that holds no data."""


class UnsupportedError(LoRAKernelsError, NotImplementedError):
    """The request is meaningful, but the named backend (or the operation) cannot serve it."""


class AdapterFileError(LoRAKernelsError, ValueError):
    """An adapter file is damaged, incomplete, or describes another method."""
