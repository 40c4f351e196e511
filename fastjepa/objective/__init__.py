"""The dense predictive objective (SPEC section 5), its schedule, and its health."""
