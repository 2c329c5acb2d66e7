"""Reward files: plain functions of (text, label), named in a recipe by `reward:`."""
