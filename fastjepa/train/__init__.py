"""Training: the method (step.py), the device arithmetic (engine.py), the run around them
(loop.py)."""
