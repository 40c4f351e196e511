"""Exponential moving average of many tensors."""
