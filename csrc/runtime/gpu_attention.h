// Weighted sums of samples on the fused path: which calls its kernels serve, and how they run. The portable path
// (attention.h) serves all. `P` is AttentionPoints or what takes their place.
#pragma once

#include "attention.h"
#include "gpu_attend.h"
#include "gpu_attend_gradient.h"

namespace dcn {

template <typename S>
bool has_aligned_rows(const View<const S>& rows, const std::vector<int64_t>& sizes) {
  const int64_t strides[] = {rows.n, rows.c, rows.h};
  for (int d = 0; d < 3; ++d)
    if (sizes[d] > 1 && strides[d] % kVectorValues<S>) return false;
  return rows.w == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

// Why the kernels do not serve values of a type: a head's channels are to be whole vectors of 16 bytes, and rows and
// their bytes are counted in 32 bits (a kernel finds their addresses in 64). Null: they do.
inline const char* why_not_attended(ScalarType type, const AttentionGeometry& g) {
  constexpr int64_t limit = 1 << 30;
  if (type == ScalarType::Double) return "value: expected Float, Half or BFloat16";
  if (type == ScalarType::Float && g.channels % kVectorValues<float>)
    return "value: expected a multiple of 4 channels of a head or group in Float";
  if (type != ScalarType::Float && g.channels % kVectorValues<torch::headeronly::Half>)
    return "value: expected a multiple of 8 channels of a head or group in Half or BFloat16";
  if (g.query_heads() == 0) return "value: expected a result that is not empty";
  if (g.rows > limit) return "value: expected at most 2^30 pixels";
  if (g.channels > limit / 4 / g.heads) return "value: expected at most 2^28 channels of all heads or groups";
  return nullptr;
}

// A value, or the gradient of a result, or a dense copy where 16 bytes of a head's channels are not one access anywhere
// in it. It has so many `rows` in each image, and `rows_of` gives its view.
template <typename S, typename F>
Tensor with_aligned_rows(const Tensor& t, const AttentionGeometry& g, int64_t rows, const F& rows_of) {
  const View<const S> as_given = rows_of(t);
  if (has_aligned_rows(as_given, {g.batch, rows, g.heads}) && as_given.c <= (1 << 30) / static_cast<int64_t>(sizeof(S)))
    return t;
  Tensor copy = new_gradient(t, true, t.scalar_type(), t);
  torch::stable::copy_(copy, t);
  return copy;
}

template <typename S>
AttentionLanes lanes_of(const AttentionGeometry& g) {
  return {g.query_heads(), g.channels / kVectorValues<S>};
}

// False where the device cannot run it. The output is contiguous.
template <typename Device, typename S, typename P>
bool attend_fused(const P& points, const View<const S>& value, const Tensor& output) {
  const FusedAttend<P, S> kernel{points, lanes_of<S>(points.g), value, static_cast<S*>(output.data_ptr())};
  return Device::launch(kernel, kernel.lanes.blocks(), output);
}

// As find_gradients, of rows that are aligned vectors; those of the value are contiguous. False where the device cannot
// run it.
template <typename Device, typename S, typename P>
bool find_gradients_fused(const char* too_many, const View<const S>& value, const View<const S>& grad_output,
                          const P& points, bool ordered, PointGradient<float>* found, const AttentionResults<P>& to,
                          const Tensor& like) {
  float* const adds_to = ordered ? nullptr : to.value.data;
  const FusedAttendGradient<P, S> kernel{points, lanes_of<S>(points.g), value, grad_output, found, adds_to};
  if ((adds_to || found) && !Device::launch(kernel, kernel.lanes.blocks(), like)) return false;
  if (to.value.data && ordered) gather_values<Device, S>(too_many, grad_output, points, to.value, like);
  finish_gradients<Device>(points, found, to, like);
  return true;
}

}  // namespace dcn
