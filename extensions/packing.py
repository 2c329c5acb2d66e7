"""The shared-prefix form of a batch: one row, no padding.

All prompts of a task begin with the same tokens. A pack holds that prefix once, then the rest of each sample; a mask
lets each sample see the prefix and itself, and positions restart after the prefix. One ordinary forward then computes
what a forward over each whole sample would. Samples of several tasks may stand in one pack, each task with its own
prefix; a batch that shares nothing is a pack with an empty prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Token ids of one sample: a prompt and what was (or should be) written after it."""

    prompt: Sequence[int]
    response: Sequence[int]
    group: str  # samples of one group (a task) share their common prefix


@dataclass(frozen=True)
class Pack:
    """One packed row of L tokens holding B samples with N response tokens."""

    input_ids: Tensor  # (1, L)
    position_ids: Tensor  # (1, L) place of each token in its own sample
    mask: Tensor  # (1, 1, L, L) bool, true where a query (row) may see a key (column)
    predicting: Tensor  # (N,) places in the pack whose next token is a target: a response token, sample by sample
    targets: Tensor  # (N,) those tokens
    weights: Tensor  # (N,) float32, how many samples each target stands for: 1 for response tokens
    lengths: list[int]  # B numbers of response tokens; of the targets these come first, and mostly they are all
    places: list[Tensor]  # B tensors: the places in the pack of each sample's tokens, prefix included
    prefix_tokens: int  # tokens that stand once for several samples


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix that leaves every row at least one token of its own."""
    first, last = min(map(list, rows)), max(map(list, rows))  # the two that differ most
    limit = min(len(row) for row in rows) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Pack:
    """Pack samples in the given order; those of one group are best kept together, but need not be.

    The last response token predicts nothing that is wanted, so it is a target but no input. With empty responses each
    sample's last prompt token is its one predicting place, and its target is 0.

    Splitting ids at the longest common prefix, not text, keeps the tokenization that of the whole prompt.
    """
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(i)
    prefix_of: dict[str, tuple[int, int]] = {}  # group -> (first place, length)
    tokens: list[int] = []
    positions: list[int] = []
    group_ids: list[int] = []
    sample_ids: list[int] = []  # -1: the prefix of the group
    places: list[list[int]] = [[]] * len(samples)
    predicting: list[int] = []
    targets: list[int] = []

    for group_id, (group, members) in enumerate(groups.items()):
        prefix = common_prefix([samples[i].prompt for i in members])
        prefix_of[group] = (len(tokens), prefix)
        tokens += samples[members[0]].prompt[:prefix]
        positions += range(prefix)
        group_ids += [group_id] * prefix
        sample_ids += [-1] * prefix
        for i in members:
            sample = samples[i]
            own = [*sample.prompt[prefix:], *sample.response[:-1]]
            start, shared = len(tokens), prefix_of[group][0]
            places[i] = [*range(shared, shared + prefix), *range(start, start + len(own))]
            tokens += own
            positions += range(prefix, prefix + len(own))
            group_ids += [group_id] * len(own)
            sample_ids += [i] * len(own)
    for sample, at in zip(samples, places, strict=True):
        predicting += at[len(sample.prompt) - 1 :]
        targets += sample.response or [0]

    group_of, sample_of = torch.tensor(group_ids, device=device), torch.tensor(sample_ids, device=device)
    same_sample = (sample_of.unsqueeze(1) == sample_of) | (sample_of == -1)
    same_group = group_of.unsqueeze(1) == group_of
    earlier = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=device).tril()
    return Pack(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        mask=(same_sample & same_group & earlier)[None, None],
        predicting=torch.tensor(predicting, device=device),
        targets=torch.tensor(targets, device=device),
        weights=torch.ones(len(targets), device=device),
        lengths=[len(sample.response) or 1 for sample in samples],
        places=[torch.tensor(at, device=device) for at in places],
        prefix_tokens=sum(length for _, length in prefix_of.values()),
    )


def with_sequence_targets(packed: Pack, samples: Sequence[Sample]) -> Pack:
    """The same pack with every token of each sample but its first as a target, for the loss on whole sequences.

    A prefix token stands once in the pack but in each sample of its group, so its weight is their number: the weighted
    sum over the targets is the sum over all samples' own tokens. After the last prefix token each sample goes its own
    way; there the targets are one for each different continuation. The response tokens stay the first targets.

    Args:
        samples: those that were packed, in that order.
    """
    responses = zip(packed.predicting.tolist(), packed.targets.tolist(), strict=True)
    counts = Counter(dict.fromkeys(responses, 0))  # (place, token that follows it) -> samples
    for sample, at in zip(samples, packed.places, strict=True):
        counts.update(zip(at.tolist(), [*sample.prompt, *sample.response][1:], strict=True))
    device = packed.input_ids.device
    return replace(
        packed,
        predicting=torch.tensor([place for place, _ in counts], device=device),
        targets=torch.tensor([token for _, token in counts], device=device),
        weights=torch.tensor(list(counts.values()), dtype=torch.float32, device=device),
    )
