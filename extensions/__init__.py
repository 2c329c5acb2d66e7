"""PPO with LoRA for language understanding, as an extension of OpenRLHF and DeepSpeed."""

__version__ = "0.1.0"
