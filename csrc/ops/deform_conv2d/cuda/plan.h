// Which calls the fused kernels serve; the portable path serves all.
#pragma once

#include "../arguments.h"
#include "samples.h"

namespace dcn {

// Whether eight channels of any pixel are one aligned 16-byte access.
inline bool has_aligned_vectors(const Tensor& t) {
  if (t.stride(1) != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16) return false;
  for (int d : {0, 2, 3})
    if (t.size(d) > 1 && t.stride(d) % 8) return false;
  return true;
}

// How many offset groups a group of the convolution meets at most.
inline int64_t offset_groups_of_group(const ConvGeometry& g) {
  const int64_t group = g.group_channels(), offset_group = g.offset_group_channels();
  if (group % offset_group == 0) return group / offset_group;
  return offset_group % group == 0 ? 1 : group / offset_group + 2;
}

// Whether rows and columns of all positions fit into int, with room to add.
inline bool has_int_positions(const ConvGeometry& g) {
  constexpr int64_t limit = 1 << 29;
  return g.height < limit && g.width < limit && g.pad_top < limit && g.pad_left < limit &&
         g.out_height * g.stride_h + g.kernel_h * g.dilation_h < limit &&
         g.out_width * g.stride_w + g.kernel_w * g.dilation_w < limit && g.out_pixels() < 2 * limit;
}

// Whether a sample reads its channels in whole vectors of eight half values.
inline bool can_sample_vectors(const ConvArguments& a, const ConvGeometry& g) {
  const ScalarType type = a.input.scalar_type();
  return (type == ScalarType::Half || type == ScalarType::BFloat16) && g.offset_group_channels() % 8 == 0 &&
         (a.input.stride(1) != 1 || has_aligned_vectors(a.input)) && g.batch * g.out_pixels() > 0 &&
         has_int_positions(g) && g.channels <= (1 << 24) && a.offset.size(1) <= std::numeric_limits<int>::max();
}

// Whether the fused forward serves a call: groups are whole vectors too, and a pixel's samples fit into shared memory.
inline bool can_fuse(const ConvArguments& a, const ConvGeometry& g) {
  return can_sample_vectors(a, g) && g.group_channels() % 8 == 0 && offset_groups_of_group(g) <= kSamplesPerPixel &&
         g.out_channels <= (1 << 24) && g.taps() * g.group_channels() <= std::numeric_limits<int>::max() / 2;
}

// Whether depthwise.h serves a call: one group and one output for each channel.
inline bool can_fuse_depthwise(const ConvArguments& a, const ConvGeometry& g) {
  return can_sample_vectors(a, g) && g.groups == g.channels && g.out_channels == g.channels;
}

// Its backward keeps the index of an image's samples in memory, which may take 2 GiB; the portable path cuts it up.
inline bool can_fuse_depthwise_backward(const ConvGeometry& g) {
  return g.out_pixels() <= (1 << 27) / (g.offset_groups * g.taps());
}

// Whether the fused backward serves a call that the forward serves: a block keeps the samples of all offset groups,
// those of an image are numbered in 32 bits, and the gradient of its columns, in memory, takes at most 2 GiB. The
// portable path cuts images up.
inline bool can_fuse_backward(const ConvGeometry& g) {
  return g.offset_groups <= kSamplesPerPixel &&
         g.out_pixels() <= std::numeric_limits<int32_t>::max() / (g.offset_groups * g.taps()) &&
         g.out_pixels() <= (int64_t{1} << 30) / (g.channels * g.taps());
}

// Images that the backward takes at a time, so that the gradient of their columns stays within the device's budget.
template <typename Device>
int64_t images_together(const ConvGeometry& g) {
  const int64_t countable = std::numeric_limits<int32_t>::max() / (g.offset_groups * g.taps()) / g.out_pixels();
  const int64_t fitting = Device::column_gradient_bytes / (2 * g.taps() * g.out_pixels() * g.channels);
  return std::max<int64_t>(1, std::min(fitting, countable));
}

// A view in the type that the tensor has; of nothing, if it is not wanted.
template <typename S>
ReadEither<S> read_either(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return {{}, view<const float>(t)};
  return {view<const S>(t), {}};
}
template <typename S>
WriteEither<S> write_either(const Tensor& t, bool wanted) {
  if (!wanted) return {};
  if (t.scalar_type() == ScalarType::Float) return {{}, view<float>(t)};
  return {view<S>(t), {}};
}

template <typename S>
Sampler<S> sampler(const ConvArguments& a, const ConvGeometry& g) {
  // Where threads side by side take pixels side by side, in NCHW, these are to lie side by side in memory.
  const int strip = a.input.stride(1) == 1 ? 8 : 1;
  return {g, ConvSizes(g, strip), view<const S>(a.input), read_either<S>(a.offset),
          a.mask ? read_either<S>(*a.mask) : ReadEither<S>{}};
}

// Weights as [O, taps, C / groups]; those that are channels_last are not copied.
inline Tensor taps_first(const Tensor& weight) {
  return torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Calls f(S{}) with the half type of a tensor.
template <typename F>
auto dispatch_half(ScalarType type, const F& f) {
  if (type == ScalarType::Half) return f(Half{});
  return f(BFloat16{});
}

}  // namespace dcn
