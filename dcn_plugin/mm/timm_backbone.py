"""Any timm model as a backbone in an MMEngine config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._config import require_timm_model
from ..checkpoint import refuse_others


class TimmBackbone(nn.Module):
    """A timm model that returns a tuple of feature maps, or with `features_only=False` its logits.

    Input [N, C, H, W]; output the maps `out_indices`, [N, C_i, H_i, W_i] each, whose channels and strides are in
    `channels` and `reductions`. `pretrained` takes timm's weights for the model, `checkpoint_path` a local file
    in their place; a head that does not fit is left out. All other arguments are those of `timm.create_model`.

    Raises:
        ImportError: timm is missing.
        ValueError: timm does not know the name, with those close to it.
        RuntimeError: timm does not know the weights.
        FileNotFoundError, ValueError: there is no such file, or it is something else (a Git LFS pointer, an HTML page).

    Example:
        >>> from dcn_plugin.mm import TimmBackbone
        >>> TimmBackbone("resnet18_dcn", out_indices=(2, 3, 4)).channels
        [128, 256, 512]
    """

    def __init__(
        self,
        model_name: str,
        features_only: bool = True,
        out_indices: Sequence[int] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | Path = "",
        **kwargs: Any,
    ) -> None:
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"TimmBackbone needs timm, which cannot be imported here: {error}") from error
        super().__init__()
        require_timm_model("model_name", model_name)
        if features_only:
            kwargs["features_only"] = True
            if out_indices is not None:
                kwargs["out_indices"] = tuple(out_indices)
        elif out_indices is not None:
            raise ValueError(f"out_indices: expected None with features_only=False, got {out_indices!r}")
        if checkpoint_path:
            if not Path(checkpoint_path).is_file():
                raise FileNotFoundError(f"checkpoint_path: expected a file, got {str(checkpoint_path)!r}")
            refuse_others(checkpoint_path)
            # timm's own checkpoint_path takes nothing but a file with every key of this very model.
            overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "file": str(checkpoint_path)}
            kwargs["pretrained_cfg_overlay"], pretrained = overlay, True
        self.model = timm.create_model(model_name, pretrained=pretrained, **kwargs)
        self.features_only = features_only
        info: Any = self.model.feature_info if features_only else None
        self.channels: list[int] = info.channels() if features_only else []
        self.reductions: list[int] = info.reduction() if features_only else []

    def init_weights(self) -> None:
        """Do nothing: timm has initialised or loaded the weights, and MMEngine's Runner must not draw them again."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Return the feature maps, finest first, or the logits."""
        out = self.model(x)
        return tuple(out) if self.features_only else out
