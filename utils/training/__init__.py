"""Training: the loop, a run's folder and state, its records, optimisers, AWP, averages."""
