// The loops of RoI pooling on the CPU, in vectors over channels: the sum over the pixels of a bin, its adjoint, and the
// gradients of a bin's position. `N`, `n`: channels of a block.
#pragma once

#include <utility>

#include "../../../runtime/cpu_rows.h"
#include "taps.h"

namespace dcn::tiles::regions {

template <int N>
using Width = std::integral_constant<int, N>;

// Calls f(width, first, done) for blocks of N channels that cover [begin, end). Where the last one would reach beyond
// the end, it begins earlier: its first `done` channels belong to the block before, too.
template <int N, typename F>
DCN_HOST_DEVICE void for_each_block_of(int64_t begin, int64_t end, const F& f) {
  for (; begin + N <= end; begin += N) f(Width<N>{}, begin, 0);
  if (begin < end) f(Width<N>{}, end - N, N - static_cast<int>(end - begin));
}

// The same for [0, count), with blocks as wide as fit, up to 16.
template <typename F>
DCN_HOST_DEVICE void for_each_block(int64_t count, const F& f) {
  if (count >= 16) return for_each_block_of<16>(0, count, f);
  if (count >= 8) return for_each_block_of<8>(0, count, f);
  if (count >= 4) return for_each_block_of<4>(0, count, f);
  for_each_block_of<1>(0, count, f);
}

// The same with blocks of 64 first, as many sums as stay in registers.
template <typename F>
DCN_HOST_DEVICE void for_each_wide_block(int64_t count, const F& f) {
  const int64_t wide = count / 64 * 64;
  for_each_block_of<64>(0, wide, f);
  if (wide == 0) return for_each_block(count, f);
  for_each_block_of<16>(wide, count, f);
}

// Calls f(distance from the map's first pixel, weight) for the pixels of a bin that have weight. Others are not read,
// so that 0 * inf cannot arise.
template <typename A, typename F>
DCN_HOST_DEVICE void for_each_pixel(const BinTaps<A>& bin, int64_t row_stride, int64_t column_stride, const F& f) {
  for (int64_t i = 0; i < bin.y.count; ++i) {
    const int64_t row = bin.y.index[i * bin.y.stride] * row_stride;
    const A wy = bin.y.weight[i * bin.y.stride];
    for (int64_t j = 0; j < bin.x.count; ++j) {
      keep_iterations_apart();
      const A w = wy * bin.x.weight[j * bin.x.stride];
      if (w != 0) f(row + bin.x.index[j * bin.x.stride] * column_stride, w);
    }
  }
}

// sums = factor * sum of weight * pixel
template <typename A>
DCN_HOST_DEVICE void sum_pixels(const BinTaps<A>& bin, const A* image, int64_t row_stride, int64_t column_stride,
                                int64_t count, A* sums, A factor) {
  for_each_wide_block(count, [&](auto width, int64_t d, int) DCN_INLINE_LAMBDA {
    constexpr int n = decltype(width)::value;
    A block[n];
#pragma omp simd
    for (int l = 0; l < n; ++l) block[l] = A(0);
    for_each_pixel(bin, row_stride, column_stride, [&](int64_t at, A w) DCN_INLINE_LAMBDA {
      const A* const pixel = image + at + d;
#pragma omp simd
      for (int l = 0; l < n; ++l) block[l] += w * pixel[l];
    });
#pragma omp simd
    for (int l = 0; l < n; ++l) sums[d + l] = block[l] * factor;
  });
}

// pixel += weight * factor * grad, the adjoint of sum_pixels.
template <typename A>
DCN_HOST_DEVICE void scatter_pixels(const BinTaps<A>& bin, A* image, int64_t row_stride, int64_t column_stride,
                                    int64_t count, const A* grad, A factor) {
  for_each_wide_block(count, [&](auto width, int64_t d, int done) DCN_INLINE_LAMBDA {
    constexpr int n = decltype(width)::value;
    A block[n];
#pragma omp simd
    for (int l = 0; l < n; ++l) block[l] = l < done ? A(0) : factor * grad[d + l];
    for_each_pixel(bin, row_stride, column_stride, [&](int64_t at, A w) DCN_INLINE_LAMBDA {
      A* const pixel = image + at + d;
#pragma omp simd
      for (int l = 0; l < n; ++l) pixel[l] += w * block[l];
    });
  });
}

// The value of a bin and its derivatives by the position of its samples, each times `grad` and summed over channels:
// into N sums at first, which are added up at the end.
template <int N, typename A>
DCN_HOST_DEVICE Gradient<A> bin_gradient(const BinTaps<A>& bin, const A* image, int64_t row_stride,
                                         int64_t column_stride, int64_t count, const A* grad) {
  // What whole blocks leave are the last of the N channels from `rest` on; `tail` is their gradient, and 0 for the
  // others.
  const int64_t whole = count / N * N, rest = count - N;
  A tail[N], value[N], dy[N], dx[N];
#pragma omp simd
  for (int l = 0; l < N; ++l) {
    tail[l] = rest + l < whole ? A(0) : grad[rest + l];
    value[l] = dy[l] = dx[l] = 0;
  }
  for (int64_t i = 0; i < bin.y.count; ++i)
    for (int64_t j = 0; j < bin.x.count; ++j) {
      const int64_t row = i * bin.y.stride, column = j * bin.x.stride;
      const A* const pixel = image + bin.y.index[row] * row_stride + bin.x.index[column] * column_stride;
      A dots[N];
#pragma omp simd
      for (int l = 0; l < N; ++l) dots[l] = 0;
      for (int64_t d = 0; d < whole; d += N) {
        keep_iterations_apart();
#pragma omp simd
        for (int l = 0; l < N; ++l) dots[l] += grad[d + l] * pixel[d + l];
      }
      if (whole < count)
#pragma omp simd
        for (int l = 0; l < N; ++l) dots[l] += tail[l] * pixel[rest + l];
      const A w = bin.y.weight[row] * bin.x.weight[column];
      const A wy = bin.y.slope[row] * bin.x.weight[column], wx = bin.y.weight[row] * bin.x.slope[column];
      // A pixel that no sample reads may be infinite, and must not be multiplied with 0.
      if (w != 0)
#pragma omp simd
        for (int l = 0; l < N; ++l) value[l] += w * dots[l];
      if (bin.y.varies[row])
#pragma omp simd
        for (int l = 0; l < N; ++l) dy[l] += wy * dots[l];
      if (bin.x.varies[column])
#pragma omp simd
        for (int l = 0; l < N; ++l) dx[l] += wx * dots[l];
    }
  Gradient<A> sum{bin.value_origin(), bin.dy_origin(), bin.dx_origin()};
  for (int l = 0; l < N; ++l) {
    sum.value += value[l];
    sum.dy += dy[l];
    sum.dx += dx[l];
  }
  return sum;
}

template <typename A>
DCN_HOST_DEVICE Gradient<A> bin_gradient(const BinTaps<A>& bin, const A* image, int64_t row_stride,
                                         int64_t column_stride, int64_t count, const A* grad) {
  if (count >= 16) return bin_gradient<16>(bin, image, row_stride, column_stride, count, grad);
  if (count >= 8) return bin_gradient<8>(bin, image, row_stride, column_stride, count, grad);
  if (count >= 4) return bin_gradient<4>(bin, image, row_stride, column_stride, count, grad);
  return bin_gradient<1>(bin, image, row_stride, column_stride, count, grad);
}

}  // namespace dcn::tiles::regions
