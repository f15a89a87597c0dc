"""Look inside deformable layers: where convolutions (`convolutions`) and regions (`regions`) sample; and `masks`.

`pages` has the pictures of convolutions as a page to point at. What returns tensors needs torch alone; what returns a
figure or writes a page needs matplotlib.
"""

from .convolutions import (
    LayerRecord,
    dilation_by_layer,
    dilation_plot,
    effective_dilation,
    offset_field,
    record,
    sampling_points,
    trace,
)
from .masks import class_colours, draw_masks, paint_mask
from .pages import explore
from .regions import BinRecord, bin_shifts, draw_detections, record_bins

__all__ = [
    "BinRecord",
    "LayerRecord",
    "bin_shifts",
    "class_colours",
    "dilation_by_layer",
    "dilation_plot",
    "draw_detections",
    "draw_masks",
    "effective_dilation",
    "explore",
    "offset_field",
    "paint_mask",
    "record",
    "record_bins",
    "sampling_points",
    "trace",
]
