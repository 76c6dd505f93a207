"""The parts of benchmarks/gpu_check.py: a run with a deadline, its checks and its timings."""
