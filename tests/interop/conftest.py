"""What interop tests share."""

import pytest

from lora_kernels.interop import _peft_layers


@pytest.fixture(autouse=True)
def small_calls_fused(monkeypatch):
    """Layers of a test's size would run PEFT's forward; the rule that says so has tests of its own."""
    monkeypatch.setattr(_peft_layers, "is_small", lambda layer, x: False)
