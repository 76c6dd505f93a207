"""The parts of `gpu_check.py` and `cuda_static.py`: checks, timings, machine code."""
