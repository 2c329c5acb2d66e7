"""Scores and finished runs for readers: console table, model card, and the report that compares runs as the paper does."""
