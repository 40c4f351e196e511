"""Exact attention within sequences of any lengths that lie packed behind one another."""
