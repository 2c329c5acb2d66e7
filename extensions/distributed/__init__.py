"""Ranks, collectives, and the DeepSpeed engine around a trained module."""
