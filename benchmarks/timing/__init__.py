"""The parts of `throughput.py`: turns, candidates of each subject, tables and plots."""
