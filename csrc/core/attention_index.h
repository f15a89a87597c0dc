// The gradient of attention's value, gathered through the index of each level's samples (input_index.h): the adjoint of
// Attend, always in the same order.
#pragma once

#include "attention_bodies.h"
#include "chunk_sums.h"

namespace dcn {

// What a sample gives the pixels that it reads (chunk_sums.h): the gradient of its query's result. A part is some
// channels of the head.
template <typename P, typename S>
struct ResultGather {
  using Accumulator = typename P::Accumulator;
  using A = Accumulator;
  static constexpr int kSums = 8;  // channels that share one walk over the entries

  LevelPositions<P> positions;
  InputIndex<A> index;
  View<const S> grad_output;

  struct Place {
    int64_t n, m, first, channels;
  };
  struct Values {
    A of[kSums];
  };

  DCN_HOST_DEVICE int64_t parts() const { return (positions.all.g.channels + kSums - 1) / kSums; }
  DCN_HOST_DEVICE Place place(int64_t map, int64_t part) const {
    const AttentionGeometry& g = positions.all.g;
    return {positions.range.first_image(g) + map / g.heads, map % g.heads, part * kSums, g.channels - part * kSums};
  }
  DCN_HOST_DEVICE Values load(const Place& p, int32_t sample) const {
    const int64_t q = positions.query_head(sample).q;
    Values values{};
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < kSums; ++j)
      if (j < p.channels) values.of[j] = static_cast<A>(grad_output.at(p.n, q, p.m, p.first + j));
    return values;
  }
  DCN_HOST_DEVICE static void add(A (&sums)[kSums], A weight, const Values& values) {
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < kSums; ++j) sums[j] += weight * values.of[j];
  }
};

// grad_value[n, pixel, m, d] += sum of corner weight * weight * grad_output over the samples that read the pixel. One
// element: a pixel of the level, in some channels of one head.
template <typename P, typename S>
struct GatherValueGradient {
  using A = typename P::Accumulator;
  using Gather = ResultGather<P, S>;

  Gather gather;
  const SumsOf<Gather>* chunk_sums;
  View<A> grad_value;

  DCN_HOST_DEVICE int64_t size() const {
    const LevelPositions<P>& positions = gather.positions;
    return positions.maps() * positions.height() * positions.width() * gather.parts();
  }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const LevelPositions<P>& positions = gather.positions;
    const int64_t part = i % gather.parts(), pixels = positions.height() * positions.width();
    const int64_t pixel = i / gather.parts() % pixels, map = i / gather.parts() / pixels;
    SumsOf<Gather> sums;
    if (!gather_pixel(gather, chunk_sums, map, part, pixel / positions.width(), pixel % positions.width(), sums))
      return;
    const typename Gather::Place p = gather.place(map, part);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < Gather::kSums; ++j)
      if (j < p.channels) grad_value.at(p.n, positions.level().first_row + pixel, p.m, p.first + j) += sums.of[j];
  }
};

}  // namespace dcn
