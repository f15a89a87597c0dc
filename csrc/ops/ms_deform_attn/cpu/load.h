// Multi-scale deformable attention on the CPU, what is given for the points of a query: locations or offsets, weights
// and reference points, brought side by side in the accumulator type.
#pragma once

#include "../../../runtime/cpu_points.h"
#include "call.h"

namespace dcn::tiles::attention {

// to_x, to_y = the pairs of query (n, q).
template <typename T, typename A>
DCN_HOST_DEVICE void load_pairs(const Stored& from, int64_t n, int64_t q, HeadRange heads, int64_t points, A* to_x,
                                A* to_y) {
  const bool joined = from.axis == 1 && from.k == 2 && from.m == 2 * points;
  const int64_t rows = joined ? 1 : heads.count, count = joined ? heads.count * points : points;
  for (int64_t m = 0; m < rows; ++m) {
    const T* const row = from.at<T>(n, q, heads.first + m);
    A *x = to_x + m * points, *y = to_y + m * points;
    if (joined) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        x[i] = widen(row[2 * i]);
        y[i] = widen(row[2 * i + 1]);
      }
    } else {
      const int64_t k = from.k, axis = from.axis;
      for (int64_t i = 0; i < count; ++i) {
        x[i] = widen(row[i * k]);
        y[i] = widen(row[i * k + axis]);
      }
    }
  }
}

template <typename T, typename A>
DCN_HOST_DEVICE void load_weights(const Stored& from, int64_t n, int64_t q, HeadRange heads, int64_t points, A* to) {
  const bool joined = from.k == 1 && from.m == points;
  const int64_t rows = joined ? 1 : heads.count, count = joined ? heads.count * points : points;
  for (int64_t m = 0; m < rows; ++m) {
    const T* const row = from.at<T>(n, q, heads.first + m);
    A* const out = to + m * points;
    if (joined) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = widen(row[i]);
    } else {
      const int64_t k = from.k;
      for (int64_t i = 0; i < count; ++i) out[i] = widen(row[i * k]);
    }
  }
}

// The frames of the points of query (n, q) from its reference points: those of one head, and copies for the others.
template <typename T, typename A>
DCN_HOST_DEVICE void load_frames(const AttentionPoints<A, T>& all, int64_t n, int64_t q, int64_t heads, Points<A>& p) {
  const bool boxes = all.g.reference_numbers == 4;  // else an offset is in pixels, for all queries
  for (int64_t l = 0; l < all.g.levels; ++l) {
    const AttentionFrame<A> frame = all.frame(n, q, l);
    const int64_t first = all.g.level[l].first_point, last = first + all.g.level[l].points;
    for (int64_t k = first; k < last; ++k) {
      p.start_x[k] = frame.start[0];
      p.start_y[k] = frame.start[1];
    }
    for (int64_t k = first; boxes && k < last; ++k) {
      p.unit_x[k] = frame.unit[0];
      p.unit_y[k] = frame.unit[1];
    }
  }
  const int64_t points = all.g.points, all_points = heads * points;
  for (int64_t done = points; done < all_points; done *= 2) {
    const size_t bytes = (2 * done < all_points ? done : all_points - done) * sizeof(A);
    std::memcpy(p.start_x + done, p.start_x, bytes);
    std::memcpy(p.start_y + done, p.start_y, bytes);
    if (!boxes) continue;
    std::memcpy(p.unit_x + done, p.unit_x, bytes);
    std::memcpy(p.unit_y + done, p.unit_y, bytes);
  }
}

}  // namespace dcn::tiles::attention
