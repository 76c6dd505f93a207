"""What belongs to the paper's three benchmarks alone: data, networks, recipes."""
