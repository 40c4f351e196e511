"""Rows of visible tokens, and the predictor's sequences of context rows and mask tokens."""
