"""Multi-block masks: which tokens of a clip are context, which are predicted (SPEC section 3)."""
