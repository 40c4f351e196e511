"""Dense L1-type loss against gathered, per-level normalised targets."""
