"""Honest measurements: interleaved timing, cases from real models, a correctness gate, records on disk."""
