// Fused backward on the host: torch's matrix products over ranges of pixels whose columns stay in the second-level
// cache, and between them one pass over memory (sweep.h).
#pragma once

#include "../../../runtime/input_index.h"
#include "input_gradient.h"
#include "plan.h"
#include "sweep.h"
#include "weight_sums.h"

namespace dcn {

// Columns and their gradient are [groups, pixels, taps, C / groups], so that no product has a dimension of pixels for
// its leading one. `S`, `F`: as in csrc/README.md.
template <typename Device, typename S, typename F>
class FusedBackward {
 public:
  static ConvGradients run(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g, int64_t wanted) {
    const ConvGradients gradients = new_gradients(a, wanted, a.input.scalar_type());
    const auto& [grad_input, grad_offset, grad_weight, grad_mask] = gradients;
    FusedBackward of(a, g, wanted);
    for (int64_t first = 0; first < g.batch; first += of.images_) {
      const int64_t count = std::min(of.images_, g.batch - first);
      const auto part = [&](const Tensor& t, bool there = true) { return there ? images(t, first, count) : t; };
      ConvArguments some{part(a.input), part(a.offset), a.weight, std::nullopt, std::nullopt};
      if (a.mask) some.mask = part(*a.mask);
      ConvGeometry of_some = g;
      of_some.batch = count;
      of.add_images(part(grad_output), some, of_some,
                    {part(grad_input, wanted & kInput), part(grad_offset, wanted & kOffset), grad_weight,
                     part(grad_mask, wanted & kMask)});
    }
    if (wanted & kWeight)
      Device::for_each(AddWeightShares<S>{g, 1, pointer<float>(of.sums_), view<S>(grad_weight)}, a.input);
    return gradients;
  }

 private:
  FusedBackward(const ConvArguments& a, const ConvGeometry& g, int64_t wanted)
      : wanted_(wanted),
        depth_(g.taps() * g.group_channels()),
        images_(images_together<Device>(g, sizeof(S))),
        range_(pixels_of_range(g, std::min(g.batch, images_) * g.out_pixels())),
        weight_(taps_first(a.weight)),
        columns_(a.input),
        grad_columns_(a.input),
        sums_(a.input) {
    const int64_t together = std::min(g.batch, images_) * g.out_pixels(), columns = g.groups * depth_;
    const int64_t kept = wanted & kInput ? together : wanted & (kOffset | kMask) ? range_ : 0;
    columns_ = torch::stable::new_empty(a.input, {wanted & kWeight ? range_ * columns : 0});
    grad_columns_ = torch::stable::new_empty(a.input, {kept * columns});
    // The sum so far, and what a range adds.
    sums_ = torch::stable::new_empty(a.input, {wanted & kWeight ? 2 * g.out_channels * depth_ : 0}, ScalarType::Float);
    if (g.batch == 0) torch::stable::zero_(sums_);
  }

  // The gradients that the pass over memory serves.
  int64_t swept() const { return wanted_ & (kOffset | kMask | kWeight); }
  bool multiplies_weight() const { return wanted_ & (kInput | kOffset | kMask); }

  // Pixels whose columns, and as much again for their gradient, fit the device's budget: in multiples of 64, so that
  // sums over them have no remainder, and with the last of the ranges as large as the others.
  static int64_t pixels_of_range(const ConvGeometry& g, int64_t total) {
    const int64_t bytes = g.channels * g.taps() * static_cast<int64_t>(sizeof(S));
    const int64_t fitting = std::max<int64_t>(64, Device::column_bytes / 2 / bytes);
    const int64_t ranges = std::max<int64_t>(1, (total + fitting - 1) / fitting);
    return ((total + ranges - 1) / ranges + 63) / 64 * 64;
  }

  static Tensor images(Tensor t, int64_t first, int64_t count) {
    return count == t.size(0) ? t : torch::stable::narrow(t, 0, first, count);
  }

  template <typename T>
  static T* pointer(const Tensor& t) {
    return static_cast<T*>(t.data_ptr());
  }

  // A matrix of each group. Of one group it is not a batch: torch has more kernels to choose from for a matrix.
  template <typename T>
  static Tensor matrices(T* data, const ConvGeometry& g, int64_t group_step, int64_t rows, int64_t columns,
                         int64_t row_step, int64_t column_step, const Tensor& like) {
    if (g.groups == 1) return matrix(data, rows, columns, row_step, column_step, like);
    return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(data), {g.groups, rows, columns},
                                    {group_step, row_step, column_step}, like.device(),
                                    scalar_type_of<std::remove_const_t<T>>());
  }

  // The gradients of some images: all that is wanted of each, and what they add to the sums for the weight's.
  void add_images(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g, const ConvGradients& to) {
    const auto& [grad_input, grad_offset, grad_weight, grad_mask] = to;
    const int64_t total = g.batch * g.out_pixels(), outputs = g.group_outputs();
    // Pixels of these are rows of a matrix, and 16-byte vectors.
    const Tensor pixels = torch::stable::contiguous(grad_output, torch::headeronly::MemoryFormat::ChannelsLast);
    ConvArguments from = a;
    if (swept()) from.input = with_vectors(a.input);
    const Sampler<S> sampler = dcn::sampler<S>(from, g);
    for (PixelRange range{0, 0}; range.first < total; range.first += range.count) {
      range.count = std::min(range_, total - range.first);
      S* const grad_columns = pointer<S>(grad_columns_) + (wanted_ & kInput ? range.first * depth_ : 0);
      const int64_t kept = (wanted_ & kInput ? total : range.count) * depth_, filled = range.count * depth_;
      const S* const grad = pointer<const S>(pixels) + range.first * g.out_channels;
      if (multiplies_weight())
        Device::multiply_groups(
            matrices(grad_columns, g, kept, range.count, depth_, depth_, 1, a.input),
            matrices(grad, g, outputs, range.count, outputs, g.out_channels, 1, a.input),
            matrices(pointer<const S>(weight_), g, outputs * depth_, outputs, depth_, depth_, 1, a.input));
      if (swept()) {
        const SweepColumns<S> kernel{sampler,
                                     range,
                                     SweepLanes(g.offset_group_channels() / kVectorValues<S>),
                                     {wanted_ & (kOffset | kMask) ? grad_columns : nullptr, kept},
                                     {wanted_ & kWeight ? pointer<S>(columns_) : nullptr, filled},
                                     write_either<S>(grad_offset, wanted_ & kOffset),
                                     write_either<S>(grad_mask, wanted_ & kMask)};
        // No device has too little for it, since samples are numbered in 32 bits.
        Device::launch(kernel, kernel.blocks(), a.input);
      }
      if (wanted_ & kWeight) {
        const int64_t size = g.out_channels * depth_;
        float* const sums = pointer<float>(sums_);
        Device::multiply_groups(
            matrices(has_sums_ ? sums + size : sums, g, outputs * depth_, outputs, depth_, depth_, 1, a.input),
            matrices(grad, g, outputs, outputs, range.count, 1, g.out_channels, a.input),
            matrices(pointer<const S>(columns_), g, filled, range.count, depth_, depth_, 1, a.input));
        if (has_sums_) Device::for_each(AddSharesTogether{2, 2, size, sums, sums}, a.input);
        has_sums_ = true;
      }
    }
    if (wanted_ & kInput) gather(a, g, grad_input);
  }

  void gather(const ConvArguments& a, const ConvGeometry& g, Tensor grad_input) const {
    const ColumnPositions<F> positions(g, displacement<F>(a));
    const BuiltIndex<float> built = build_input_index<Device>(positions, a.input);
    const bool direct = has_aligned_vectors(grad_input);
    const Tensor found =
        direct ? grad_input
               : new_image(a.input, {g.batch, g.channels, g.height, g.width}, grad_input.scalar_type(), true);
    const ColumnVectors<S> columns{g, built.index, pointer<const S>(grad_columns_)};
    const SummedChunks chunks = sum_chunks<Device>(columns, positions.size(), a.input);
    Device::for_each(GatherVectors<S>{columns, chunks.of(columns), view<S>(found)}, a.input);
    if (!direct) torch::stable::copy_(grad_input, found);
  }

  int64_t wanted_;
  int64_t depth_;           // taps and channels of a group
  int64_t images_, range_;  // images that are taken together, pixels of a range of theirs
  bool has_sums_ = false;   // of the ranges before
  Tensor weight_, columns_, grad_columns_, sums_;
};

}  // namespace dcn
