"""PEFT's layers over bitsandbytes, apart from the others because importing them imports bitsandbytes."""

from __future__ import annotations

from peft.tuners.lora import bnb

from lora_kernels.interop._peft_layers import FusedLayer


class Linear8bitLt(FusedLayer, bnb.Linear8bitLt):  # type: ignore[misc]
    """peft.tuners.lora.bnb.Linear8bitLt."""

    _stock_class = bnb.Linear8bitLt
    _promotes = True


class Linear4bit(FusedLayer, bnb.Linear4bit):  # type: ignore[misc]
    """peft.tuners.lora.bnb.Linear4bit."""

    _stock_class = bnb.Linear4bit
    _promotes = True


FUSED: dict[type, type] = {fused._stock_class: fused for fused in (Linear8bitLt, Linear4bit)}
