"""Responses of the policy, by itself or by vLLM, and their rewards."""
