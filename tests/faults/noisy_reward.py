"""A reward that draws from every generator that a user's code may draw from: a resumed run must draw the same."""

import random

import numpy as np
import torch


def reward(text: str, label: str) -> float:
    return (len(text) % 3) + random.random() + float(np.random.rand()) + float(torch.rand(()))
