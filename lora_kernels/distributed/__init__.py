"""Rules for LoRA layers whose parameters, or whose batch, are spread over processes.

Data parallel (DistributedDataParallel, fully_shard) needs nothing of this: a `LoRALinear` is a module like any other.
What needs rules is a weight that no rank ever holds whole, and a dropout mask that several ranks share.
"""

from lora_kernels.distributed.dropout import shard_dropout as shard_dropout
from lora_kernels.distributed.tensor_parallel import (
    LoRAColwiseParallel as LoRAColwiseParallel,
    LoRARowwiseParallel as LoRARowwiseParallel,
)
