"""The parts of `benchmarks/checkpointing.py`."""
