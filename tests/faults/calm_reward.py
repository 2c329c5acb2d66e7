"""A reward of several values without random numbers."""


def reward(text: str, label: str) -> float:
    return float(len(text) % 3)
