// RoI pooling on any device, from the bodies: which of them run, in what order, and the memory that they share.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "bodies.h"
#include "index.h"

namespace dcn {

template <typename Device>
Tensor roi_pool_portable(const RoiArguments& a, const RoiGeometry& g) {
  const Tensor output = new_pooled(a, g);
  dispatch_floating(a.input.scalar_type(), [&](auto s) {
    using S = decltype(s);
    using A = Accumulate<S>;
    const DenseRegions<A> dense(a, g);
    Device::for_each(PoolBins<A, S>{dense.regions(), view<const S>(a.input), view<S>(output)}, a.input);
  });
  return output;
}

// Adds to `sums` in an order that does not vary.
template <typename Device, typename S>
void gather_bins(const Tensor& grad_output, const Regions<Accumulate<S>>& regions, const Tensor& sums) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  const int64_t bins_of_region = g.classes * g.bins();
  const Tensor memory = torch::stable::new_empty(
      sums, {g.rois * (bins_of_region + 1), static_cast<int64_t>(sizeof(Extent) / sizeof(int64_t))}, ScalarType::Long);
  Extent* const of_bins = static_cast<Extent*>(memory.data_ptr());
  Extent* const of_regions = of_bins + g.rois * bins_of_region;
  Device::for_each(FindBinExtents<A>{regions, of_bins}, sums);
  Device::for_each(FindRegionExtents{g.rois, bins_of_region, of_bins, of_regions}, sums);
  Device::for_each(GatherBins<A, S>{regions, view<const S>(grad_output), view<A>(sums), of_regions, of_bins}, sums);
}

template <typename Device, typename S>
Tensor roi_input_gradient(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                          int64_t wanted) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  Tensor grad_input = new_roi_gradient(a.input, wanted & kInput, scalar_type_of<S>());
  if (!(wanted & kInput)) return grad_input;
  // Gathered sums lie by channel, whatever the layout of the input: so do the elements of GatherBins.
  const bool ordered = wanted & kOrdered, by_channel = ordered || is_channels_last(a.input);
  const bool in_place = std::is_same_v<S, A> && by_channel == is_channels_last(a.input);
  Tensor sums = in_place
                    ? grad_input
                    : new_image(grad_input, {g.batch, g.channels, g.height, g.width}, scalar_type_of<A>(), by_channel);
  torch::stable::zero_(sums);
  if (ordered)
    gather_bins<Device, S>(grad_output, regions, sums);
  else
    Device::for_each(ScatterBins<A, S>{regions, view<const S>(grad_output), view<A>(sums)}, a.input);
  if (!in_place) torch::stable::copy_(grad_input, sums);
  return grad_input;
}

template <typename Device, typename S>
void roi_part_gradients(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                        const PartGradients<Accumulate<S>>& parts) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  // One thread for each part would leave a GPU idle. Sixteen neighbouring channels of a half type are a whole sector.
  const int64_t slices = std::min<int64_t>(g.class_outputs(), 16), places = g.rois * g.classes * g.parts();
  const Tensor memory = torch::stable::new_empty(
      a.input, {slices * places, static_cast<int64_t>(sizeof(PartSums<A>) / sizeof(A))}, scalar_type_of<A>());
  PartSums<A>* const sums = static_cast<PartSums<A>*>(memory.data_ptr());
  Device::for_each(PartGradient<A, S>{regions, view<const S>(a.input), view<const S>(grad_output), slices, sums},
                   a.input);
  Device::for_each(AddSlices<A>{places, g.parts(), slices, sums, parts.offset_data, parts.mask_data}, a.input);
}

// Returns the gradient of the input; those of offset and mask are written to `parts`.
template <typename Device, typename S>
Tensor roi_pool_backward_portable(const Tensor& grad_output, const RoiArguments& a,
                                  const Regions<Accumulate<S>>& regions, int64_t wanted,
                                  const PartGradients<Accumulate<S>>& parts) {
  if (wanted & (kOffset | kMask)) roi_part_gradients<Device, S>(grad_output, a, regions, parts);
  return roi_input_gradient<Device, S>(grad_output, a, regions, wanted);
}

}  // namespace dcn
