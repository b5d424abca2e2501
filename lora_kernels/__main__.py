"""`python -m lora_kernels`: the command line."""

from lora_kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
