// The forward of deformable aggregation on the CPU: threads share out the rows of strips of pixels.
#pragma once

#include "../../../runtime/cpu_gather.h"
#include "../../../runtime/cpu_rows.h"
#include "taps.h"

namespace dcn::tiles::aggregate {

// Some rows of the strips of one image.
template <typename S, typename T>
struct AggregateRows {
  TapFinder<S, T, false> finder;
  Chunk chunk;
  int64_t out_height, n, first, last;
  S* out;  // [N, H' W', G, D]

  DCN_HOST_DEVICE void operator()() const {
    const AttentionGeometry& g = finder.call.g;
    finder.prepare(chunk.pixels * chunk.groups * g.points);
    for_each_row_of_strips(finder.call.taps, out_height, chunk.pixels, first, last,
                           [&](int64_t q, int64_t pixels) DCN_INLINE_LAMBDA {
                             for (int64_t m = 0; m < g.heads; m += chunk.groups)
                               sum_groups(q, pixels, {m, g.heads - m < chunk.groups ? g.heads - m : chunk.groups});
                           });
  }

  // Several pixels only with all groups: then results lie side by side, too.
  DCN_HOST_DEVICE void sum_groups(int64_t q, int64_t pixels, HeadRange groups) const {
    const AttentionGeometry& g = finder.call.g;
    finder.find(n, q, pixels, groups);
    S* const to = out + ((n * g.queries + q) * g.heads + groups.first) * g.channels;
    const attention::CornersOnMap corners = finder.corners(n, groups.first, 4);
    const Ahead<S, T> ahead(finder.call, n, q, groups.first);
    int64_t i = 0;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t m = 0; m < groups.count; ++m, ++i) {
        ahead.fetch(p, m);
        attention::gather(finder.points, corners, i * g.points, g.points, g.channels, to + i * g.channels);
      }
  }
};

template <typename S, typename T>
void forward(const AggregateArguments& a, const AggregateGeometry& geometry, const Tensor& output) {
  using A = Accumulate<S>;
  const AttentionGeometry& g = geometry.g;
  const Call<S, T> call(a, geometry);
  const Chunk chunk(g, call.taps, g.heads);
  const TapTable<S> table(g, call.taps, chunk, call.value);
  const int64_t rows = divide_up(call.taps.out_width, chunk.pixels) * geometry.out_height;
  constexpr int64_t grain = 4;
  torch::stable::parallel_for(0, g.batch * rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t room = 3 * attention::points_room;
    Scratch scratch(sizeof(Points<A>) + (room + lanes) * static_cast<int64_t>(sizeof(T)));
    Points<A>& points = *scratch.take<Points<A>>(1);
    const TapFinder<S, T, false> finder{call, table, points, scratch.take<T>(room)};
    for (int64_t n = begin / rows; n * rows < end; ++n)
      run_vectorised(AggregateRows<S, T>{finder, chunk, geometry.out_height, n, std::max<int64_t>(begin - n * rows, 0),
                                         std::min(end - n * rows, rows), static_cast<S*>(output.data_ptr())});
  });
}

}  // namespace dcn::tiles::aggregate
