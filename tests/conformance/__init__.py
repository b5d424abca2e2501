"""PEFT's own tests, run with `patch_peft` active: `make conformance`."""
