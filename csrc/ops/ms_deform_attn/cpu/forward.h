// The forward of multi-scale deformable attention on the CPU: threads share out the queries. The points of all heads of
// a query are found, then each head's channels gathered, so that a pixel's heads, which lie side by side, are read
// together.
#pragma once

#include "../../../runtime/cpu_gather.h"
#include "points.h"

namespace dcn::tiles::attention {

// How many heads are found at once.
inline int64_t heads_at_once(const AttentionGeometry& g) {
  return std::clamp<int64_t>(points_at_once / g.points, 1, g.heads);
}

// Some visits to the queries of one image.
template <typename S>
struct AttendQueries {
  PointFinder<S, false> finder;
  const Visits& visits;
  int64_t step, n, first, last;
  S* out;  // [N, Q, M, D]

  DCN_HOST_DEVICE void operator()() const {
    const AttentionGeometry& g = finder.call.g;
    finder.prepare(step);
    visits.for_each(first, last, [&](int64_t q) DCN_INLINE_LAMBDA {
      S* const to = out + (n * g.queries + q) * g.heads * g.channels;
      for (int64_t m = 0; m < g.heads; m += step) {
        const HeadRange heads{m, g.heads - m < step ? g.heads - m : step};
        finder.find(n, q, heads);
        for (int64_t i = 0; i < heads.count; ++i)
          gather(finder.points, ListedCorners{finder.points.value}, i * g.points, g.points, g.channels,
                 to + (m + i) * g.channels);
      }
    });
  }
};

template <typename S>
void forward(const AttentionArguments& a, const AttentionGeometry& g, const Tensor& output) {
  using A = Accumulate<S>;
  const Call<S> call(a, g);
  const PointTable table(call);
  const Visits visits(g);
  const Tensor zeros = torch::stable::new_zeros(a.value, {g.channels});
  constexpr int64_t grain = 16;
  torch::stable::parallel_for(0, g.batch * g.queries, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(sizeof(Points<A>));
    const PointFinder<S, false> finder{call, table, *scratch.take<Points<A>>(1),
                                       reinterpret_cast<int64_t>(zeros.data_ptr())};
    for (int64_t n = begin / g.queries; n * g.queries < end; ++n)
      run_vectorised(AttendQueries<S>{finder, visits, heads_at_once(g), n, std::max<int64_t>(begin - n * g.queries, 0),
                                      std::min(end - n * g.queries, g.queries), static_cast<S*>(output.data_ptr())});
  });
}

}  // namespace dcn::tiles::attention
