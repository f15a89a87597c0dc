"""Models made ready for inference on a CPU."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .layers import SamplingModule

__all__ = ["prepare_for_inference"]

Model = TypeVar("Model", bound=nn.Module)


def prepare_for_inference(model: Model) -> Model:
    """Store the weights of a model's deformable convolutions in the order that the CPU's products read, and return it.

        address of weight[o, c, y, x] = ((y * kernel_w + x) * C / groups + c) * O + o

    A call on few pixels, such as a map of 7x7, then reads its weights where they are; otherwise each call brings them
    into that order first. There is no second copy: `layer.weight` stays the same `Parameter`, with the values, shape,
    type and name it had, and other strides, as after `model.to(memory_format=torch.channels_last)`. So whatever
    changes it, in whichever way, is what the next call computes with, and nothing can be outdated.

    It pays on small maps, and more for models in channels_last than in NCHW, where weights of the smallest are used as
    stored anyway. Call it last, on a model that is where it will run. What brings memory into another order, such as
    `.to(memory_format=torch.channels_last)` or the assignment of another weight, leaves a layer that is right and as
    fast as before. Views made before, such as NumPy arrays, are of the memory that the weights have left. Some code
    wants contiguous weights and refuses others, those in channels_last as well: `safetensors.torch.save_file`, torch's
    unstructured pruning. For it, `parameter.data = parameter.data.contiguous()` takes the preparation back.

    Args:
        model: an `nn.Module`, in any mode and type, changed in place. Left as they are: depthwise weights, which are
            small; weights that are not on a CPU, that a parametrisation computes, or of a class that stores them in
            fewer bits.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: it has no weights to prepare.

    Example:
        >>> import torch
        >>> from dcn_plugin import DCNv2, prepare_for_inference
        >>> model, x = torch.nn.Sequential(DCNv2(32, 32, 3, padding=1)).eval(), torch.rand(1, 32, 7, 7)
        >>> before = model(x)
        >>> torch.allclose(prepare_for_inference(model)(x), before, atol=1e-5)
        True
        >>> model[0].weight.shape, model[0].weight.stride()
        (torch.Size([32, 32, 3, 3]), (1, 32, 3072, 1024))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, SamplingModule)]
    if not any([layer.store_for_inference() for layer in layers]):  # all of them, not up to the first
        raise ValueError("model: expected deformable convolutions with weights of their own on a CPU, got none")
    return model
