"""Models that other libraries made. The only place that imports them, and only when one of its functions is called."""

from lora_kernels.interop.peft import (
    PatchReport as PatchReport,
    PatchRow as PatchRow,
    patch_peft as patch_peft,
    unpatch_peft as unpatch_peft,
)
