"""What a run on many GPUs costs and how its ranks share the work, from plain numbers."""
