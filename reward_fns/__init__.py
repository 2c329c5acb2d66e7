"""Reward functions of (text, label), named in a recipe by `reward:`."""
