"""The prefix tree: packed samples, attention, decoding and logprobs; tensors and token ids only."""
