"""Scores and finished runs for readers: console table, model card, plots, and the report that compares runs."""
