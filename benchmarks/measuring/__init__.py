"""How `benchmarks/throughput.py` measures: turns, candidates of each subject, tables and plots."""
