// Deformable aggregation on the CPU, where the taps of some pixels lie and what their corners weigh: found in vectors
// over the pixels, tap by tap. What is given for a pixel lies side by side in memory, so it is transposed first.
#pragma once

#include "map.h"

namespace dcn::tiles::aggregate {

// A tap of each pixel of a chunk. What follows `offset` is for the backward, and for what is not finite.
template <typename A>
struct alignas(64) Tap {
  A weight[4][lanes];                      // of each corner: bilinear times that of the tap
  Index offset[lanes];                     // of the upper left corner from the map's pixel (0, 0), in bytes
  A fraction_y[lanes], fraction_x[lanes];  // of the position between two pixels
  Index corners[lanes];                    // those on the map and, from bit 4 on, those read
  A dot[4 * lanes];                        // [pixel, corner]: gradient of the result times the corner's channels

  DCN_HOST_DEVICE bool reads(int64_t p, int corner) const { return corners[p] >> (4 + corner) & 1; }
};

// Where number `first` of each pixel lies; of those that a chunk has not, the last one's.
template <typename T>
struct PixelRows {
  const T* data;
  int64_t step, count;

  DCN_HOST_DEVICE const T* at(int64_t p) const { return data + (p < count ? p : count - 1) * step; }
};

// Calls f(first) for fours that cover 4 numbers or more: the last may overlap those before it.
template <typename F>
DCN_HOST_DEVICE void for_each_four(int64_t numbers, const F& f) {
  for (int64_t k = 0; k + 4 <= numbers; k += 4) f(k);
  if (numbers % 4) f(numbers - 4);
}

#if defined(DCN_QUADS)
template <typename T>
DCN_HOST_DEVICE Quad load_four(const T* from) {
  float four[4];
#pragma omp simd
  for (int i = 0; i < 4; ++i) four[i] = widen(from[i]);
  return *reinterpret_cast<const StoredQuad*>(four);
}
template <typename T>
DCN_HOST_DEVICE void store_four(const Quad& quad, T* to) {
  float four[4];
  *reinterpret_cast<StoredQuad*>(four) = quad;
#pragma omp simd
  for (int i = 0; i < 4; ++i) to[i] = narrow<T>(four[i]);
}
#endif

// `numbers` numbers of each pixel, `apart` from each other, as planes: to[number][pixel].
template <typename A, typename T>
DCN_HOST_DEVICE void to_planes(const PixelRows<T>& from, int64_t apart, int64_t numbers, int64_t plane_step, A* to) {
#if defined(DCN_QUADS)
  if constexpr (std::is_same_v<A, float>) {
    if (apart == 1 && numbers >= 4) {
      for (int64_t p = 0; p < lanes; p += 4) {
        const T* const row[4] = {from.at(p), from.at(p + 1), from.at(p + 2), from.at(p + 3)};
        for_each_four(numbers, [&](int64_t k) DCN_INLINE_LAMBDA {
          Quad q[4];
          for (int i = 0; i < 4; ++i) q[i] = load_four(row[i] + k);
          transpose_quads(q);
          for (int i = 0; i < 4; ++i) store_four(q[i], to + (k + i) * plane_step + p);
        });
      }
      return;
    }
  }
#endif
  for (int64_t p = 0; p < lanes; ++p) {
    const T* const row = from.at(p);
    for (int64_t k = 0; k < numbers; ++k) to[k * plane_step + p] = widen(row[k * apart]);
  }
}

// The way back, side by side.
template <typename A, typename T>
DCN_HOST_DEVICE void from_planes(const A* from, int64_t pixels, int64_t numbers, int64_t step, T* to) {
  int64_t p = 0;
#if defined(DCN_QUADS)
  if constexpr (std::is_same_v<A, float>) {
    for (; numbers >= 4 && p + 4 <= pixels; p += 4)
      for_each_four(numbers, [&](int64_t k) DCN_INLINE_LAMBDA {
        Quad q[4];
        for (int i = 0; i < 4; ++i) q[i] = load_four(from + (k + i) * lanes + p);
        transpose_quads(q);
        for (int i = 0; i < 4; ++i) store_four(q[i], to + (p + i) * step + k);
      });
  }
#endif
  for (; p < pixels; ++p)
    for (int64_t k = 0; k < numbers; ++k) to[p * step + k] = narrow<T>(from[k * lanes + p]);
}

template <typename A>
DCN_HOST_DEVICE bool all_finite(const A* planes, int64_t count) {
  A zeros[lanes] = {}, sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    keep_iterations_apart();
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) zeros[p] += planes[k * lanes + p] * 0;
  }
  for (int64_t p = 0; p < lanes; ++p) sum += zeros[p];
  return sum == 0;
}

// The softmax over the planes, in vectors over the pixels.
template <typename A>
DCN_HOST_DEVICE void softmax_planes(int64_t points, A* planes) {
  A most[lanes], sum[lanes];
#pragma omp simd
  for (int64_t p = 0; p < lanes; ++p) {
    most[p] = planes[p];
    sum[p] = 0;
  }
  for (int64_t k = 1; k < points; ++k) {
    keep_iterations_apart();
    const A* const plane = planes + k * lanes;
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) most[p] = plane[p] > most[p] ? plane[p] : most[p];
  }
  for (int64_t k = 0; k < points; ++k) {
    keep_iterations_apart();
    A* const plane = planes + k * lanes;
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) {
      const A power = attention::exp_below_zero(plane[p] - most[p]);
      plane[p] = power;
      sum[p] += power;
    }
  }
#pragma omp simd
  for (int64_t p = 0; p < lanes; ++p) sum[p] = 1 / sum[p];
  for (int64_t k = 0; k < points; ++k) {
    keep_iterations_apart();
    A* const plane = planes + k * lanes;
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) plane[p] *= sum[p];
  }
}

// Finds the taps of one chunk after the other.
template <typename S, typename T, bool Backward>
struct TapFinder {
  using A = Accumulate<S>;
  const Call<S, T>& call;
  Tap<A>* taps;        // [tap]
  A *pairs, *weights;  // planes: of offsets, [tap, axis, pixel], and of weights after their softmax, [tap, pixel]

  template <typename Memory>
  static TapFinder take(const Call<S, T>& call, Memory& scratch) {
    Tap<A>* const taps = scratch.template take<Tap<A>>(call.g.points);
    A* const pairs = scratch.template take<A>(2 * call.g.points * lanes);
    return {call, taps, pairs, scratch.template take<A>(call.g.points * lanes)};
  }

  // The weights where none are given.
  DCN_HOST_DEVICE void prepare() const {
    for (int64_t i = 0; i < call.g.points * lanes; ++i) weights[i] = 1;
  }

  // Loads what is given for a chunk; returns whether find<false> may serve it.
  DCN_HOST_DEVICE bool load(int64_t n, const PixelRange& pixels, int64_t m) const {
    const int64_t points = call.g.points;
    const PixelRows<T> rows{call.pairs.at(n, pixels.first, m), call.pairs.pixel, pixels.count};
    if (call.pairs.tap == 2 * call.pairs.axis) {
      to_planes(rows, call.pairs.axis, 2 * points, lanes, pairs);
    } else {
      to_planes(rows, call.pairs.tap, points, 2 * lanes, pairs);
      const PixelRows<T> second{rows.data + call.pairs.axis, rows.step, rows.count};
      to_planes(second, call.pairs.tap, points, 2 * lanes, pairs + lanes);
    }
    // A position that is not finite shows in the result by itself; the backward must keep it from the value's gradient.
    const bool finite = !Backward || all_finite(pairs, 2 * points);
    if (!call.weights.data) return finite;
    to_planes(PixelRows<T>{call.weights.at(n, pixels.first, m), call.weights.pixel, pixels.count}, call.weights.tap,
              points, lanes, weights);
    if (call.g.softmax) softmax_planes(points, weights);
    return finite & all_finite(weights, points);
  }

  // Of what was loaded for the chunk. `Exact` is for calls with something that is not finite: there a corner without
  // weight is not to be read.
  template <bool Exact>
  DCN_HOST_DEVICE void find(const PixelRange& pixels) const {
    const TapGrid& grid = call.taps;
    A start_y[lanes], start_x[lanes];
    for (int64_t p = 0, x = pixels.first % grid.out_width, y = pixels.first / grid.out_width; p < lanes; ++p) {
      start_y[p] = static_cast<A>(y * grid.stride[1] + grid.origin[1]);
      start_x[p] = static_cast<A>(x * grid.stride[0] + grid.origin[0]);
      if (++x == grid.out_width) x = 0, ++y;
    }
    const A scale = static_cast<A>(grid.scale);
    const Index height = static_cast<Index>(call.map.height), width = static_cast<Index>(call.map.width);
    const Index row = static_cast<Index>(call.map.width + 2), bytes = static_cast<Index>(call.map.channels * sizeof(A));
    const Index border = -(row + 1) * bytes;  // a pixel whose corners are 0, or have no weight
    for (int64_t k = 0; k < call.g.points; ++k) {
      keep_iterations_apart();
      const A place_y = grid.template place<A>(k, 1), place_x = grid.template place<A>(k, 0);
      const A *const plane = pairs + 2 * k * lanes, *const weight = weights + k * lanes;
      const A *const given_x = grid.x_first ? plane : plane + lanes, *const given_y =
                                                                         grid.x_first ? plane + lanes : plane;
      Tap<A>& t = taps[k];
#pragma omp simd
      for (int64_t p = 0; p < lanes; ++p) {
        const A m = weight[p];
        const Sample<A, Index> s = make_sample<A, Index>(start_y[p] + place_y + given_y[p] * scale,
                                                         start_x[p] + place_x + given_x[p] * scale, height, width);
        t.offset[p] = s.inside ? (s.y0 * row + s.x0) * bytes : border;
        const A a0 = s.weight(0), a1 = s.weight(1), a2 = s.weight(2), a3 = s.weight(3);
        if constexpr (!Exact) {
          t.weight[0][p] = a0 * m;
          t.weight[1][p] = a1 * m;
          t.weight[2][p] = a2 * m;
          t.weight[3][p] = a3 * m;
        } else {
          const Index r0 = s.has(0) & (a0 != 0), r1 = s.has(1) & (a1 != 0), r2 = s.has(2) & (a2 != 0),
                      r3 = s.has(3) & (a3 != 0);
          // A position or weight that is not finite shows even where nothing is read.
          t.weight[0][p] = r0 ? a0 * m : s.origin() + (s.corners ? A(0) : 0 * m);
          t.weight[1][p] = a1 * m;
          t.weight[2][p] = a2 * m;
          t.weight[3][p] = a3 * m;
          t.corners[p] = static_cast<Index>(s.corners) | r0 << 4 | r1 << 5 | r2 << 6 | r3 << 7;
        }
        if constexpr (Backward) {
          t.fraction_y[p] = s.ly;
          t.fraction_x[p] = s.lx;
        }
      }
    }
  }

  // Asks for what is given for pixel p of a chunk, and for that pixel of the value's next group. A fetch may reach
  // beyond the end: it is no access.
  DCN_HOST_DEVICE void fetch(int64_t n, const PixelRange& pixels, int64_t m, int64_t p) const {
    const T* const own = call.pairs.at(n, pixels.first + p, m);
    prefetch(own);
    prefetch(own + 64 / sizeof(T));
    if (call.weights.data) prefetch(call.weights.at(n, pixels.first + p, m));
    const bool last = m + 1 == call.g.heads;
    prefetch_nearby(call.value.data + (last ? n + 1 : n) * call.value.n + (pixels.first + p) * call.value.c +
                    (last ? 0 : m + 1) * call.value.h);
  }
};

}  // namespace dcn::tiles::aggregate
