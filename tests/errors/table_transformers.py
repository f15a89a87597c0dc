"""transformers' models: what `accelerate` refuses."""

from functools import partial

import transformers
from torch import nn

from dcn_plugin.integrations.transformers import accelerate, installed, uninstall
from errors.case import Case


class DeformSampler(nn.Module):
    def __init__(self):
        super().__init__()
        self.sampling_offsets, self.attention_weights = nn.Linear(4, 4), nn.Linear(4, 2)


def without_attention():
    config = transformers.BertConfig(
        vocab_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    accelerate(transformers.BertModel(config))


CASES = [
    *(
        Case(partial(call, "detr"), TypeError, "model:", "expected a torch.nn.Module", "got str")
        for call in (accelerate, installed, uninstall)
    ),
    Case(
        without_attention,
        ValueError, "model:", "expected multi-scale deformable attention of transformers", "got BertModel without it",
    ),
    Case(
        lambda: accelerate(nn.Sequential(DeformSampler())),
        ValueError, "model:", "expected multi-scale deformable attention of transformers",
        "got Sequential, whose DeformSampler is not known",
    ),
]  # fmt: skip
"""A call that must be refused, and what its message must say."""
