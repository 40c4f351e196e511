"""fastjepa: fast, trustworthy pretraining of V-JEPA 2.1 (arXiv 2603.14482).

Reading order: `config/schema.py` (what a recipe says), `build.py` (recipe to objects),
`train/step.py` (the method on one screen), `model/`, `objective/`, `masking/`, `data/`.
"""

__version__ = "0.1.0"
