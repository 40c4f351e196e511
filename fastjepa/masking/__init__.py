"""Multi-block masks: which tokens of a clip are context, which are predicted (docs/method.md
section 3)."""
