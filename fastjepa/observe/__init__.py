"""What a run shows of itself: console, metric files, throughput, memory, cost estimates, curves."""
