"""One frozen base model as actor, critic and reference; loading, adapters, the proof that its forward is exact."""
