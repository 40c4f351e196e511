"""Rotary positions in three axes, applied to the packed q and k."""
