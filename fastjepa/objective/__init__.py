"""The dense predictive objective (docs/method.md section 5), its schedule, and its health."""
