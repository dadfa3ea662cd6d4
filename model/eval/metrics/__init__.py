"""Scores of predictions: the published numbers (``published``) and, beside them, the standard ones (``scores``)."""
