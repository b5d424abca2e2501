"""patch_peft against stock PEFT: what is fused computes the same, what is not runs PEFT's own forward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import patch_peft, unpatch_peft


def test_patched_and_unpatched():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 16)), LoraConfig(r=4, target_modules=["0"])).eval()
    stock, x = type(model.base_model.model[0]), torch.randn(5, 24)
    expected = model(x)
    report = patch_peft(model)
    assert [row.operation for row in report.rows] == ["lora_linear"]
    assert type(model.base_model.model[0]) is not stock
    torch.testing.assert_close(model(x), expected)
    unpatch_peft(model)
    assert type(model.base_model.model[0]) is stock


def test_a_model_without_lora_layers_is_an_error():
    with pytest.raises(ValueError, match="found none in Linear"):
        patch_peft(nn.Linear(2, 2))
