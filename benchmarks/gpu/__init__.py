"""The parts of `benchmarks/gpu_suite.py`. Each runs in a process of its own and writes its results as it goes."""
