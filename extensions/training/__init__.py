"""The training loops: PPO and SFT."""
