// The forward of deformable aggregation on the CPU: threads share out chunks of pixels, of all groups of all images.
#pragma once

#include "taps.h"

namespace dcn::tiles::aggregate {

// sums = sum over the taps of pixel p of weight * channels at their corners, N of them.
template <int N, typename A>
DCN_HOST_DEVICE void gather(const Tap<A>* taps, int64_t points, const Corners& corners, int64_t p, A (&sums)[N]) {
  // Sums of their own for each corner, or for two of them: short chains where the processor would wait for one sum.
  constexpr int chains = N <= 16 ? 4 : 2;
  A s0[N], s1[N], s2[N], s3[N];
#pragma omp simd
  for (int c = 0; c < N; ++c) {
    s0[c] = A(0);
    s1[c] = A(0);
    s2[c] = A(0);
    s3[c] = A(0);
  }
  const Tap<A>*t = taps, *const end = taps + points;
  do {
    keep_iterations_apart();
    const int64_t offset = t->offset[p];
    const A* const v0 = corners.at<const A>(offset, 0);
    const A* const v1 = corners.at<const A>(offset, 1);
    const A* const v2 = corners.at<const A>(offset, 2);
    const A* const v3 = corners.at<const A>(offset, 3);
    const A w0 = t->weight[0][p], w1 = t->weight[1][p], w2 = t->weight[2][p], w3 = t->weight[3][p];
#pragma omp simd
    for (int c = 0; c < N; ++c) {
      s0[c] += w0 * v0[c];
      s1[c] += w1 * v1[c];
      if (chains == 4) {
        s2[c] += w2 * v2[c];
        s3[c] += w3 * v3[c];
      } else {
        s0[c] += w2 * v2[c];
        s1[c] += w3 * v3[c];
      }
    }
  } while (++t != end);
#pragma omp simd
  for (int c = 0; c < N; ++c) sums[c] = chains == 4 ? (s0[c] + s1[c]) + (s2[c] + s3[c]) : s0[c] + s1[c];
}

// The same sum where something is not finite: of one channel, only from the corners that are read.
template <typename A>
DCN_HOST_DEVICE A gather_exactly(const Tap<A>* taps, int64_t points, const Corners& corners, int64_t p, int chains) {
  A sums[4] = {};
  for (const Tap<A>* t = taps; t != taps + points; ++t)
    for (int corner = 0; corner < 4; ++corner) {
      A& sum = sums[corner % chains];
      const A w = t->weight[corner][p];
      if (t->reads(p, corner))
        sum += w * *corners.at<const A>(t->offset[p], corner);
      else if (corner == 0)
        sum += w;  // 0, but for a position or weight that is not finite
    }
  return chains == 4 ? (sums[0] + sums[1]) + (sums[2] + sums[3]) : sums[0] + sums[1];
}

// Some chunks of one group of one image.
template <typename S, typename T>
struct AggregateChunks {
  using A = Accumulate<S>;
  TapFinder<S, T, false> finder;
  A* map;  // zeros around the image
  int64_t n, m, first, last;
  S* out;  // [N, H' W', G, D]

  DCN_HOST_DEVICE void operator()() const {
    const Call<S, T>& call = finder.call;
    finder.prepare();
    const bool finite = pack(&call.value.at(n, 0, m, 0), call.value.c, call.g.channels, call.map, map);
    for (int64_t i = first; i < last; ++i) {
      const PixelRange pixels = call.visits.at(i);
      if (pixels.count == 0) continue;
      const PixelRange next = call.visits.at(i + 1 < last ? i + 1 : i);
      if (finder.load(n, pixels, m) & finite)
        sum<false>(pixels, next);
      else
        sum<true>(pixels, next);
    }
  }

  template <bool Exact>
  DCN_HOST_DEVICE void sum(const PixelRange& pixels, const PixelRange& next) const {
    const AttentionGeometry& g = finder.call.g;
    const MapShape& shape = finder.call.map;
    finder.template find<Exact>(pixels);
    S* const to = out + ((n * g.queries + pixels.first) * g.heads + m) * g.channels;
    const int64_t step = g.heads * g.channels;
    for (int64_t p = 0; p < pixels.count; ++p) {
      finder.fetch(n, next, m, p);
      prefetch(to + (next.first - pixels.first + p) * step);
      if constexpr (Exact) {
        for (int64_t c = 0; c < g.channels; ++c)
          to[p * step + c] = narrow<S>(gather_exactly(finder.taps, g.points, Corners::of(shape, map, c), p,
                                                      c < shape.channels / 32 * 32 ? 2 : 4));
        continue;
      }
      for_each_vector(shape.channels, [&](auto width, int64_t c) DCN_INLINE_LAMBDA {
        constexpr int N = decltype(width)::value;
        A sums[N];
        gather<N>(finder.taps, g.points, Corners::of(shape, map, c), p, sums);
        if (c + N <= g.channels) {
#pragma omp simd
          for (int i = 0; i < N; ++i) to[p * step + c + i] = narrow<S>(sums[i]);
        } else {
          for (int64_t i = 0; c + i < g.channels; ++i) to[p * step + c + i] = narrow<S>(sums[i]);
        }
      });
    }
  }
};

template <typename S, typename T>
void forward(const AggregateArguments& a, const AggregateGeometry& geometry, const Tensor& output) {
  using A = Accumulate<S>;
  const Call<S, T> call(a, geometry);
  const AttentionGeometry& g = call.g;
  const int64_t chunks = call.visits.count(), grain = std::max<int64_t>(1, std::min<int64_t>(chunks, 16));
  torch::stable::parallel_for(0, g.batch * g.heads * chunks, grain, [&](int64_t begin, int64_t end) {
    Scratch needed;
    TapFinder<S, T, false>::take(call, needed);
    Scratch scratch(needed.counted());
    const auto finder = TapFinder<S, T, false>::take(call, scratch);
    const MapMemory<A> map(call.map, 1, output);
    for (int64_t i = begin / chunks; i * chunks < end; ++i)
      run_vectorised(AggregateChunks<S, T>{finder, map.data(), i / g.heads, i % g.heads,
                                           std::max<int64_t>(begin - i * chunks, 0), std::min(end - i * chunks, chunks),
                                           static_cast<S*>(output.data_ptr())});
  });
}

}  // namespace dcn::tiles::aggregate
