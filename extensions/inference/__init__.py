"""Answers to new rows: `Predictor` in Python, `nlu predict` on the command line."""

from extensions.inference.predictor import Answer, Predictor

__all__ = ["Answer", "Predictor"]
