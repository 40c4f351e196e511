"""Files to clips: manifest -> clip plan -> decoder -> augment -> batches, in that order."""
