// Which calls the fused kernels serve; the portable path serves all.
#pragma once

#include "../arguments.h"
#include "forward_reads.h"

namespace dcn {

// Whether 16 bytes of channels of any pixel are one aligned access.
inline bool has_aligned_vectors(const Tensor& t) {
  if (t.stride(1) != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16) return false;
  for (int d : {0, 2, 3})
    if (t.size(d) > 1 && t.stride(d) * static_cast<int64_t>(t.element_size()) % 16) return false;
  return true;
}

// With an input whose channels, where they lie together, are aligned vectors: that of a slice may begin anywhere, and
// is copied, in the layout that results take over.
inline ConvArguments with_aligned_input(ConvArguments a) {
  if (a.input.stride(1) != 1 || has_aligned_vectors(a.input)) return a;
  const Tensor& t = a.input;
  Tensor copy = new_image(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type(), is_channels_last(t));
  torch::stable::copy_(copy, t);
  a.input = copy;
  return a;
}

// A copy for which that is so, unless it is already; its channels are whole vectors.
inline Tensor with_vectors(const Tensor& t) {
  if (has_aligned_vectors(t)) return t;
  const Tensor stored = torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
  return has_aligned_vectors(stored) ? stored : torch::stable::clone(stored);
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

// Whether the pixels that a tile reads can be numbered in 27 bits, where rows and images are so many pixels long.
inline bool can_number_pixels(const ConvGeometry& g, int64_t image, int64_t row) {
  constexpr int64_t limit = 1 << 27;
  const int64_t images = std::min(g.batch - 1, kMostPixels / g.out_pixels() + 1);
  return image <= limit && row <= limit && image * images + row * (g.height + 1) + g.width < limit;
}

// The input as pixels a fixed step apart, if it is stored so.
template <typename S>
std::optional<InputPixels<S>> input_pixels(const Tensor& t, const ConvGeometry& g) {
  if (!has_aligned_vectors(t)) return std::nullopt;
  const int64_t step = g.width > 1 ? t.stride(3) : g.height > 1 ? t.stride(2) : g.batch > 1 ? t.stride(0) : g.channels;
  const int64_t row = g.height > 1 ? t.stride(2) : 0, image = g.batch > 1 ? t.stride(0) : 0;
  const int64_t bytes = step * static_cast<int64_t>(sizeof(S));
  if (step < 1 || row % step || image % step || bytes > std::numeric_limits<int>::max() ||
      !can_number_pixels(g, image / step, row / step))
    return std::nullopt;
  return InputPixels<S>{static_cast<const S*>(t.data_ptr()), image / step, row / step, static_cast<int>(bytes)};
}

// The functions below say why kernels do not serve a call, or return null if they do.

// A sample reads its channels in whole vectors of 16 bytes, by numbers of 32 bits.
inline const char* why_no_vectors(const ConvArguments& a, const ConvGeometry& g) {
  const ScalarType type = a.input.scalar_type();
  if (type == ScalarType::Double) return "input: expected Float, Half or BFloat16";
  if (type == ScalarType::Float && g.offset_group_channels() % 4)
    return "offset: expected offset groups of a multiple of 4 channels in Float";
  if (type != ScalarType::Float && g.offset_group_channels() % 8)
    return "offset: expected offset groups of a multiple of 8 channels in Half or BFloat16";
  if (!has_int_positions(g)) return "input: expected fewer than 2^29 rows and columns, with padding, and 2^30 outputs";
  if (g.channels > (1 << 24)) return "input: expected at most 2^24 channels";
  if (g.taps() > (1 << 24)) return "weight: expected at most 2^24 taps";
  if (a.offset.size(1) > std::numeric_limits<int>::max()) return "offset: expected fewer than 2^31 channels";
  return nullptr;
}

inline const char* why_not_depthwise(const ConvArguments& a, const ConvGeometry& g) {
  if (a.input.scalar_type() == ScalarType::Float) return "input: expected Half or BFloat16 with one weight a channel";
  return g.batch * g.out_pixels() == 0 ? "input: expected images" : nullptr;
}

// Groups are whole vectors too.
inline const char* why_no_groups(const ConvArguments& a, const ConvGeometry& g) {
  const bool floats = a.input.scalar_type() == ScalarType::Float;
  if (floats && g.group_channels() % 4) return "weight: expected groups of a multiple of 4 channels in Float";
  if (!floats && g.group_channels() % 8)
    return "weight: expected groups of a multiple of 8 channels, or one channel and output";
  return g.out_channels > (1 << 24) ? "weight: expected at most 2^24 output channels" : nullptr;
}

// In the forward a pixel's samples fit into shared memory. `tf32()` is asked of float32 alone.
template <typename F>
const char* why_not_fused(const ConvArguments& a, const ConvGeometry& g, const F& tf32) {
  if (const char* const reason = why_no_vectors(a, g)) return reason;
  if (g.is_depthwise()) return why_not_depthwise(a, g);
  if (const char* const reason = why_no_groups(a, g)) return reason;
  if (g.batch * g.out_pixels() == 0) return "input: expected images";
  if (offset_groups_of_group(g) > kSamplesPerPixel) return "offset: expected at most 9 offset groups for a group";
  if (g.taps() * g.group_channels() > std::numeric_limits<int>::max() / 64)
    return "weight: expected fewer than 2^25 values of an output";
  if (!can_number_pixels(g, g.height * g.width, g.width))
    return "input: expected tiles that read from fewer than 2^27 pixels";
  if (a.input.scalar_type() == ScalarType::Float && !tf32())
    return "input: expected Half or BFloat16, or Float where torch lets convolutions use TF32";
  return nullptr;
}

// In the backward the samples of an image are numbered in 32 bits, and the gradient of its columns, which is kept until
// the input's is gathered from it, or the index of a depthwise call, takes at most 2 GiB. The portable path cuts images
// up.
inline const char* why_not_fused_backward(const ConvArguments& a, const ConvGeometry& g) {
  if (const char* const reason = why_no_vectors(a, g)) return reason;
  const int64_t planes = g.offset_groups * g.taps();
  if (g.is_depthwise()) {
    if (const char* const reason = why_not_depthwise(a, g)) return reason;
    return g.out_pixels() <= (1 << 27) / planes ? nullptr : "offset: expected at most 2^27 samples of an image";
  }
  if (const char* const reason = why_no_groups(a, g)) return reason;
  if (g.out_pixels() > std::numeric_limits<int32_t>::max() / planes)
    return "offset: expected fewer than 2^31 samples of an image";
  if (g.out_pixels() > (int64_t{1} << 31) / (static_cast<int64_t>(a.input.element_size()) * g.channels * g.taps()))
    return "input: expected columns of an image of at most 2 GiB";
  return nullptr;
}

// Images that the backward takes at a time, so that the gradient of their columns stays within the device's budget.
template <typename Device>
int64_t images_together(const ConvGeometry& g, int64_t bytes) {
  const int64_t countable = std::numeric_limits<int32_t>::max() / (g.offset_groups * g.taps()) / g.out_pixels();
  const int64_t fitting = Device::column_gradient_bytes / (bytes * g.taps() * g.out_pixels() * g.channels);
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

// Of arguments with_aligned_input.
template <typename S>
Sampler<S> sampler(const ConvArguments& a, const ConvGeometry& g) {
  // Where threads side by side take pixels side by side, in NCHW, these are to lie side by side in memory.
  const int strip = a.input.stride(1) == 1 ? 8 : 1;
  return {g, ConvSizes(g, strip), view<const S>(a.input), read_either<S>(a.offset),
          a.mask ? read_either<S>(*a.mask) : ReadEither<S>{}};
}

// Weights as [O, taps, C / groups] that begin on 16 bytes; those that are channels_last and do so are not copied.
inline Tensor taps_first(const Tensor& weight) {
  const Tensor stored = torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast);
  return reinterpret_cast<uintptr_t>(stored.data_ptr()) % 16 ? torch::stable::clone(stored) : stored;
}

// Calls f(S{}) with the half type of a tensor.
template <typename F>
auto dispatch_half(ScalarType type, const F& f) {
  if (type == ScalarType::Half) return f(Half{});
  return f(BFloat16{});
}

}  // namespace dcn
