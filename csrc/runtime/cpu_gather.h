// The weighted sum over the points of a head on the CPU, in vectors over its channels. Where the corners of a point lie
// is told by an object: its at(i, corner) is the address of channel 0.
#pragma once

#include "cpu_points.h"

namespace dcn::tiles::attention {

template <int N>
using Width = std::integral_constant<int, N>;

// Calls f(width, first) for blocks of channels that cover [0, count), as wide as fit.
template <typename F>
DCN_HOST_DEVICE void for_each_block(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + 64 <= count; c += 64) f(Width<64>(), c);
  if (count & 32) f(Width<32>(), c), c += 32;
  if (count & 16) f(Width<16>(), c), c += 16;
  if (count & 8) f(Width<8>(), c), c += 8;
  for (; c < count; ++c) f(Width<1>(), c);
}

// Channels from number `channel` on, as T: of the type S that is stored, or as pairs of half values.
template <typename S, typename T>
DCN_HOST_DEVICE T* channels_at(int64_t address, int64_t channel) {
  return reinterpret_cast<T*>(address + channel * static_cast<int64_t>(sizeof(S)));
}

// An address for each corner: that of a row of zeros where it is not read.
struct ListedCorners {
  const int64_t (&address)[4][points_room];

  DCN_HOST_DEVICE int64_t at(int64_t i, int corner) const { return address[corner][i]; }
};

// Corners are fetched this many points before they are read, into the cache that holds the points of several heads.
constexpr int64_t fetch_ahead = 16;

template <int N, typename S, typename Corners>
DCN_HOST_DEVICE void fetch_corners(const Corners& corners, int64_t point, int64_t channel) {
  constexpr int line = 64, bytes = N * static_cast<int>(sizeof(S));
  for (int c = 0; c < 4; ++c)
    for (int at = 0; at < bytes; at += line)
      prefetch_nearby(channels_at<S, const char>(corners.at(point + fetch_ahead, c), channel) + at);
}

// out = sum over the points [first, first + count) of weight * value at their corners, N channels from `channel` on.
template <int N, typename S, typename A, typename Corners>
DCN_HOST_DEVICE void gather_channels(const Points<A>& p, const Corners& corners, int64_t first, int64_t count,
                                     int64_t channel, S* out) {
  A sum[N], lower[N];  // of the upper and lower corners: two short chains of sums instead of a long one
#pragma omp simd
  for (int c = 0; c < N; ++c) {
    sum[c] = A(0);
    lower[c] = A(0);
  }
  for (int64_t i = first; i < first + count; ++i) {
    keep_iterations_apart();
    fetch_corners<N, S>(corners, i, channel);
    const S* const v0 = channels_at<S, const S>(corners.at(i, 0), channel);
    const S* const v1 = channels_at<S, const S>(corners.at(i, 1), channel);
    const S* const v2 = channels_at<S, const S>(corners.at(i, 2), channel);
    const S* const v3 = channels_at<S, const S>(corners.at(i, 3), channel);
    const A w0 = p.weight[0][i], w1 = p.weight[1][i], w2 = p.weight[2][i], w3 = p.weight[3][i];
#pragma omp simd
    for (int c = 0; c < N; ++c) {
      sum[c] = w1 * widen(v1[c]) + (w0 * widen(v0[c]) + sum[c]);
      lower[c] = w3 * widen(v3[c]) + (w2 * widen(v2[c]) + lower[c]);
    }
  }
#pragma omp simd
  for (int c = 0; c < N; ++c) out[c] = narrow<S>(sum[c] + lower[c]);
}

// The same for half values, read and written in pairs.
template <int N, typename S, typename A, typename Corners>
DCN_HOST_DEVICE void gather_pairs(const Points<A>& p, const Corners& corners, int64_t first, int64_t count,
                                  int64_t channel, S* out) {
  constexpr int pairs = N / 2;
  A sum[pairs], second[pairs];
#pragma omp simd
  for (int c = 0; c < pairs; ++c) {
    sum[c] = A(0);
    second[c] = A(0);
  }
  for (int64_t i = first; i < first + count; ++i) {
    keep_iterations_apart();
    fetch_corners<N, S>(corners, i, channel);
    const Pair* const v0 = channels_at<S, const Pair>(corners.at(i, 0), channel);
    const Pair* const v1 = channels_at<S, const Pair>(corners.at(i, 1), channel);
    const Pair* const v2 = channels_at<S, const Pair>(corners.at(i, 2), channel);
    const Pair* const v3 = channels_at<S, const Pair>(corners.at(i, 3), channel);
    const A w0 = p.weight[0][i], w1 = p.weight[1][i], w2 = p.weight[2][i], w3 = p.weight[3][i];
#pragma omp simd
    for (int c = 0; c < pairs; ++c) {
      const uint32_t p0 = v0[c], p1 = v1[c], p2 = v2[c], p3 = v3[c];
      sum[c] += w0 * first_of<S>(p0) + w1 * first_of<S>(p1) + w2 * first_of<S>(p2) + w3 * first_of<S>(p3);
      second[c] += w0 * second_of<S>(p0) + w1 * second_of<S>(p1) + w2 * second_of<S>(p2) + w3 * second_of<S>(p3);
    }
  }
  Pair* const to = reinterpret_cast<Pair*>(out);
#pragma omp simd
  for (int c = 0; c < pairs; ++c) to[c] = narrow_bits(sum[c], S()) | narrow_bits(second[c], S()) << 16;
}

template <typename S, typename A, typename Corners>
DCN_HOST_DEVICE void gather(const Points<A>& p, const Corners& corners, int64_t first, int64_t count, int64_t channels,
                            S* out) {
  for_each_block(channels, [&](auto width, int64_t c) DCN_INLINE_LAMBDA {
    constexpr int n = decltype(width)::value;
    if constexpr (sizeof(S) == 2 && n > 1)
      gather_pairs<n>(p, corners, first, count, c, out + c);
    else
      gather_channels<n>(p, corners, first, count, c, out + c);
  });
}

}  // namespace dcn::tiles::attention
