"""For all tests: what somebody tuned on this machine must not change what is tested."""

import os

os.environ["LORA_KERNELS_CACHE"] = ""
