"""Adapters as things: put into a model, merged, switched, saved, loaded."""

from lora_kernels.adapters.inject import add_lora as add_lora
from lora_kernels.adapters.load import load_lora as load_lora
from lora_kernels.adapters.report import AdaptedModule as AdaptedModule, AdapterReport as AdapterReport
from lora_kernels.adapters.save import save_lora as save_lora
from lora_kernels.adapters.switch import (
    delete_adapter as delete_adapter,
    merge_lora as merge_lora,
    set_adapter as set_adapter,
    unload_lora as unload_lora,
    unmerge_lora as unmerge_lora,
)
