"""The benchmark harness: what `make bench` runs, and what this package is compared with."""
