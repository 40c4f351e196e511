"""The passes over rows between the products of a transformer block."""
