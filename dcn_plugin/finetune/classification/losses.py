"""What a classifier is trained on: losses by name or of one's own, the targets they take, the metrics that fit."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import timm.loss
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision, MultilabelF1Score

from ..._config import check_keys, plain, unknown

# The losses that have a name of their own, and the weights they take.
NAMED = {"cross_entropy": ("weight",), "binary_cross_entropy": ("weight", "pos_weight")}
_TIMM = {name for name, value in vars(timm.loss).items() if inspect.isclass(value)}
# Losses of torch and timm whose targets are independent labels, by the last part of their names.
_MULTI_LABEL = {
    "binary_cross_entropy", "BCEWithLogitsLoss", "binary_cross_entropy_with_logits", "MultiLabelSoftMarginLoss",
    "multilabel_soft_margin_loss", "AsymmetricLossMultiLabel", "DistributionBalancedLoss", "PolyBinaryCrossEntropy",
    "TwoWayLoss", "ZlprLoss",
}  # fmt: skip
# Where a loss may come from that a checkpoint names: importing runs code, and the file's author chose the name.
_KNOWN_PACKAGES = ("timm.loss.", "torch.nn.")
_NOT_STORED = "not stored"


class Criterion(nn.Module):
    """A loss over logits [N, K], which checks its targets and says whether an image may have several labels.

    Args:
        spec: `FinetuneModule`'s argument `loss`.
        num_classes: K.
        label_smoothing: smoothing of the targets of `'cross_entropy'` in training.
        mixed: training targets are probabilities [N, K], which Mixup makes of class indices.
        multi_label: whether targets are multi-hot; None follows the loss.

    Raises:
        ValueError: an unknown loss or option, one that does not fit the others, or that does not take such targets.
    """

    def __init__(
        self, spec: Any, num_classes: int, label_smoothing: float, mixed: bool, multi_label: bool | None
    ) -> None:
        super().__init__()
        self.num_classes, self.label_smoothing, self.mixed = num_classes, label_smoothing, mixed
        self.function, self.name = _function(spec, num_classes)
        usual = self.name.rpartition(".")[2] in _MULTI_LABEL
        if multi_label is not None and self.name in NAMED and multi_label != usual:
            raise ValueError(
                f"multi_label: expected {usual} with loss={self.name!r}, got {multi_label} ('cross_entropy' is for "
                "images of one class each, 'binary_cross_entropy' for images with any number of labels)"
            )
        self.multi_label = usual if multi_label is None else multi_label
        if label_smoothing and self.name != "cross_entropy":
            raise ValueError(
                f"label_smoothing: expected 0 unless loss='cross_entropy', got {label_smoothing} with "
                f"loss={self.name!r} (give a loss its own smoothing among its arguments)"
            )
        if mixed and self.multi_label:
            raise ValueError(
                f"mixup: expected None with several labels an image (loss={self.name!r}), got Mixup, which takes one"
            )
        self._try()

    def _try(self) -> None:
        """Call the loss once on a stand-in, so that one that does not fit shows before any data is read."""
        if isinstance(self.function, nn.Module):
            own = [name for name, _ in self.function.named_parameters()]
            if own:
                raise ValueError(
                    f"loss: expected a loss without parameters, got {self.name} with {', '.join(own)}: the optimizer "
                    "trains the model's alone"
                )
        target = torch.zeros(2, dtype=torch.int64)
        if self.multi_label or self.mixed:
            target = torch.full((2, self.num_classes), 1 / self.num_classes)
        if self.multi_label:
            target = torch.eye(2, self.num_classes)
        kind = "multi-hot targets" if self.multi_label else "probabilities" if self.mixed else "class indices"
        try:
            with torch.no_grad():
                value = self(torch.zeros(2, self.num_classes), target, training=True)
        except Exception as error:
            raise ValueError(
                f"loss: expected one that takes logits [N, {self.num_classes}] and {kind} {list(target.shape)}, got "
                f"{self.name}, which says: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected one that returns a single number, got {self.name}, which returns {got}")

    def check(self, target: Any, images: int) -> Tensor:
        """Return the targets of so many images as the loss takes them; raise ValueError for those of another kind."""
        k = self.num_classes
        if self.multi_label:
            wanted = f"multi-hot [{images}, {k}] in 0..1 with loss={self.name!r}"
        else:
            wanted = f"class indices [{images}] in 0..{k - 1} with loss={self.name!r}"
        if not isinstance(target, Tensor):
            raise ValueError(f"target: expected {wanted}, got {type(target).__name__}")
        got = f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
        if self.multi_label:
            if target.shape != (images, k) or target.is_complex():
                more = " (loss='cross_entropy' takes class indices)" if target.ndim == 1 else ""
                raise ValueError(f"target: expected {wanted}, got {got}{more}")
            target = target.float()
            if not ((target >= 0) & (target <= 1)).all():
                raise ValueError(
                    f"target: expected {wanted}, got values in {float(target.min())}..{float(target.max())}"
                )
            return target
        if target.shape == (images, k) and not self.mixed:
            # Probabilities, as a collate function with Mixup gives them.
            total = target.float().sum(1)
            odd = ((total - 1).abs() > 1e-2) | (target < 0).any(1)
            if odd.any() or not target.is_floating_point():
                row = int(odd.nonzero()[0]) if odd.any() else 0
                raise ValueError(
                    f"target: expected {wanted}, or probabilities [{images}, {k}] whose rows sum to 1, got {got} with "
                    f"row {target[row].tolist()}: for several labels an image, loss='binary_cross_entropy'"
                )
            return target
        if target.shape != (images,) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"target: expected {wanted}, got {got}")
        # On another device torch itself looks at the values, and looking at them here would mean waiting for it.
        if target.device.type == "cpu" and images and not 0 <= int(target.min()) <= int(target.max()) < k:
            odd_one = target.min() if int(target.min()) < 0 else target.max()
            raise ValueError(f"target: expected {wanted}, got {int(odd_one)}")
        return target.long()

    def forward(self, logits: Tensor, target: Tensor, training: bool) -> Tensor:
        """Return the loss of checked targets; `training` smooths them."""
        if self.name == "cross_entropy":
            smoothing = self.label_smoothing if training else 0.0
            return self.function(logits, target, label_smoothing=smoothing)
        if self.mixed and target.ndim == 1:  # what was trained on rows may take nothing else
            target = F.one_hot(target, self.num_classes)
        if target.is_floating_point() or self.mixed:
            target = target.to(logits.dtype)
        return self.function(logits, target)

    def metrics(self, prefix: str) -> MetricCollection:
        """Return the metrics that fit: top-1 and top-5 accuracy, or mean average precision and F1 over the labels."""
        k = self.num_classes
        found: dict[str, Any]
        if self.multi_label:
            found = dict(map=MultilabelAveragePrecision(k, average="macro"), f1=MultilabelF1Score(k, average="macro"))
        else:
            top = {f"top{n}": n for n in (1, min(5, k))}
            found = {name: MulticlassAccuracy(k, top_k=n, average="micro") for name, n in top.items()}
        return MetricCollection(found, prefix=prefix)

    def labels(self, target: Tensor) -> Tensor:
        """Return checked targets as the metrics take them: whole numbers."""
        if self.multi_label:
            return (target >= 0.5).long()
        return target.argmax(1) if target.ndim == 2 else target

    def scores(self, logits: Tensor) -> Tensor:
        """Return scores in 0..1: softmax, or for several labels an image sigmoid."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(dim=-1)


class _Named(nn.Module):
    """Cross-entropy, softmax or binary, with weights that follow the device but stay out of the state dict."""

    def __init__(self, name: str, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.name = name
        self.function: Any = F.cross_entropy if name == "cross_entropy" else F.binary_cross_entropy_with_logits
        for key, value in weights.items():
            self.register_buffer(key, value, persistent=False)

    def forward(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return self.function(logits, target, **dict(self.named_buffers()), **options)


def _function(spec: Any, num_classes: int) -> tuple[Callable[..., Tensor], str]:
    """Return the function of logits and targets that `loss` describes, and its name."""
    if isinstance(spec, str):
        spec = dict(type=spec)
    if not isinstance(spec, Mapping):
        if not callable(spec):
            raise ValueError(f"loss: expected a name, dict(type=..., ...) or a callable, got {spec!r}")
        function: Any = spec() if inspect.isclass(spec) else spec
        return function, path_of(spec) or str(getattr(spec, "__name__", type(spec).__name__))
    kwargs = plain(spec)
    name = kwargs.pop("type", None)
    if not isinstance(name, str):
        raise ValueError(f"loss: expected dict(type=<name or import path>, ...), got {spec!r}")
    if name == _NOT_STORED:
        raise ValueError(
            f"loss: expected the callable that was trained with, got a checkpoint, which cannot hold it "
            f"({kwargs.get('what')}): pass it again as loss=..."
        )
    if name in NAMED:
        check_keys(f"loss ({name})", kwargs, NAMED[name])
        weights = {key: _weights(key, value, num_classes) for key, value in kwargs.items() if value is not None}
        return _Named(name, weights), name
    found = _look_up(name)
    if str(getattr(found, "__module__", "")).partition(".")[0] in ("torch", "timm"):
        for key in ("weight", "pos_weight"):
            if isinstance(kwargs.get(key), list):
                kwargs[key] = _weights(key, kwargs[key], num_classes)
    if not inspect.isclass(found):
        return (functools.partial(found, **kwargs) if kwargs else found), name
    try:
        made = found(**kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"loss: {name} does not take {kwargs!r}: {error}") from error
    if not callable(made):
        raise ValueError(f"loss: expected the path of a callable, or of a class of callables, got {name}")
    return made, name


def _weights(key: str, value: Any, num_classes: int) -> Tensor:
    numbers = value if isinstance(value, list) else [value]
    single = not isinstance(value, list) and key == "pos_weight"
    wanted = f"{num_classes} non-negative numbers, one a class" + (", or one for all" if key == "pos_weight" else "")
    fits = all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf for x in numbers)
    if not fits or not (single or (isinstance(value, list) and len(value) == num_classes)):
        raise ValueError(f"loss.{key}: expected {wanted}, got {value!r}")
    return torch.tensor(value, dtype=torch.float32)


def _look_up(name: str) -> Any:
    """Return the class or function that a name of `timm.loss` or an import path stands for."""
    if name in _TIMM:
        return getattr(timm.loss, name)
    module, _, rest = name.rpartition(".")
    if not module:
        raise ValueError(unknown("loss", name, [*NAMED, *_TIMM], "loss") + ", or an import path such as 'package.name'")
    try:
        found = getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss: expected an import path of a callable, got {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"loss: expected an import path of a callable, got {name!r}, a {type(found).__name__}")
    return found


def path_of(function: Any) -> str | None:
    """Return the import path of a function or class, None where importing it would not give it back."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or not name.isidentifier() or module == "__main__":
        return None
    try:
        return f"{module}.{name}" if getattr(importlib.import_module(module), name, None) is function else None
    except ImportError:
        return None


def stored(spec: Any) -> Any:
    """Return the argument `loss` as plain types, which a checkpoint can hold and give back without running code."""
    if isinstance(spec, (str, Mapping)) or not callable(spec):
        return plain(spec)
    path = path_of(spec)
    return dict(type=_NOT_STORED, what=repr(spec)) if path is None else dict(type=path)


def check_saved_loss(spec: Any) -> None:
    """Raise ValueError where a checkpoint names a loss that would have to be imported from who knows where."""
    name = spec.get("type") if isinstance(spec, Mapping) else spec
    if isinstance(name, str) and "." in name and not name.startswith(_KNOWN_PACKAGES):
        raise ValueError(
            f"loss: expected it as restore(path, loss=...), got {name!r} from the checkpoint: importing what a file "
            "names would run code"
        )
