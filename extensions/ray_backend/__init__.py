"""The same recipes on OpenRLHF's own Ray + vLLM classes: groups of actor, critic and reference, and vLLM engines."""
