"""Whole detectors and a segmenter of transformers, before and after `accelerate(model)`.

In the sizes that their configurations have by default, which are the published ones, with random weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import OURS, Call, Contestant, Setting, exact, require_agreement, times_ours
from torch import Tensor, nn

NAME = "detectors"
COLUMNS = {
    "cpu": """`before ms` is the model as it is, `ms` the
same model after `accelerate(model)`; `before / after` is their ratio. A training step is forward, backward and SGD, in
training mode; its loss is the mean of the squares of what the model returns."""
}
THEIRS: Contestant = ("transformers", "NCHW")
CONTESTANTS: dict[str, list[Contestant]] = {"cpu": [(OURS, "NCHW"), THEIRS]}


class Shape(NamedTuple):
    name: str
    kind: str  # of the model and its configuration, before `Config` and `For...`
    use: str
    height: int
    width: int
    task: str = "inference"
    options: tuple[tuple[str, Any], ...] = ()  # of the configuration

    def __str__(self) -> str:
        return f"{self.name}, 1x3x{self.height}x{self.width}"


_SMALL = (("encoder_layers", 1), ("decoder_layers", 2))
SHAPES = {
    "cpu": [
        Shape("Deformable DETR", "DeformableDetr", "ObjectDetection", 800, 1200),
        Shape("Deformable DETR", "DeformableDetr", "ObjectDetection", 640, 960, "training step"),
        Shape("RT-DETR", "RTDetr", "ObjectDetection", 640, 640),
        Shape("Grounding DINO", "GroundingDino", "ObjectDetection", 800, 1200),
        Shape("Mask2Former", "Mask2Former", "UniversalSegmentation", 800, 1200),
    ]
}
QUICK = {
    "cpu": [
        Shape("Deformable DETR of few layers", "DeformableDetr", "ObjectDetection", 256, 384, task, _SMALL)
        for task in ("inference", "training step")
    ]
}


def about(setting: Setting) -> str:
    return "random weights, the default configurations"


def build(shape: Shape) -> nn.Module:
    import transformers  # takes seconds, which the other families need not wait for

    torch.manual_seed(0)
    config = getattr(transformers, f"{shape.kind}Config")(**dict(shape.options))
    return getattr(transformers, f"{shape.kind}For{shape.use}")(config)


def inputs(shape: Shape, model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images = {"pixel_values": torch.randn(1, 3, shape.height, shape.width)}
    if not hasattr(model.config, "text_config"):
        return images
    # "a cat. a remote control.", as BERT's tokenizer has it.
    text = torch.tensor([[101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102]])
    return {**images, "input_ids": text, "attention_mask": torch.ones_like(text), "token_type_ids": 0 * text}


def results(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    out = model(**given)
    names = ["logits", "pred_boxes", "class_queries_logits", "masks_queries_logits"]
    if "enc_outputs_class" in out and not model.training:
        # Queries are chosen by score, and of scores that are nearly equal rounding decides: what they are chosen from.
        names = ["encoder_last_hidden_state", "encoder_last_hidden_state_vision"]
    # Scores of words that a text has not are -inf.
    found = [torch.where(out[name].isinf(), 0, out[name]) for name in names if name in out]
    assert found, f"nothing to compare in {list(out)}"
    return found


def make(shape: Shape, setting: Setting, name: str, layout: str) -> dict[str, Call]:
    model = build(shape)
    given = inputs(shape, model)
    if name == OURS:
        from dcn_plugin.integrations.transformers import accelerate

        accelerate(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)  # so small that every round computes the same

    @torch.no_grad()
    def infer() -> list[Tensor]:
        model.eval()
        return results(model, given)

    def train() -> list[Tensor]:
        torch.manual_seed(0)  # of what is dropped out
        model.train()
        optimizer.zero_grad()
        out = results(model, given)
        sum(t.square().mean() for t in out).backward()
        optimizer.step()
        return out

    calls: dict[str, Callable[[], list[Tensor]]] = {"inference": infer, "training step": train}
    return {shape.task: calls[shape.task]}


def verify(shape: Shape, setting: Setting, made: dict[Contestant, dict[str, Call]]) -> None:
    require_agreement(shape, made, (OURS,), THEIRS, 1e-3 if exact(setting) else 5e-2)


def extras(shape: Shape, setting: Setting, call: Call, layout: str, task: str) -> dict:
    return {}


def figures(row: dict) -> dict[str, str]:
    """What the table shows of a row, after shape, layout and task."""
    ours, before = row[OURS][row["layout"]], row["transformers"][row["layout"]]
    return {
        "before ms": f"{before['ms']:.0f}",
        "ms": f"{ours['ms']:.0f}",
        "before / after": times_ours(row, "transformers"),
        "spread": f"{ours['spread']:.0%}",
    }
