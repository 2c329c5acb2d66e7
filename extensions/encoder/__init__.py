"""Encoder baselines: BERT and similar models, fine-tuned by transformers' Trainer."""
