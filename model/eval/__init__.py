"""Evaluation: answers to whole data files, their scores and reports."""
