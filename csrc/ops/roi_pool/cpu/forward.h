// The forward of RoI pooling on the CPU.
#pragma once

#include "../arguments.h"
#include "regions.h"
#include "rows.h"

namespace dcn::tiles::regions {

// pooled[bin, d] = mask * mean of the bin's samples, for one region.
template <typename A>
struct PoolRegion {
  const RegionsOfCall<A>& regions;
  int64_t r;
  CellRows<const A> rows;  // of its image
  RegionTaps<A>& taps;
  PooledRows<A> pooled;

  DCN_HOST_DEVICE void operator()() const {
    const RoiPlaces<A>& where = regions.where;
    const int64_t count = where.g.class_outputs();
    taps.find(where, regions.table, regions.frames[r], r);
    regions.for_each_bin(
        taps, [&](int64_t c, int64_t index, const BinTaps<A>& bin, const BinTable::Entry& entry) DCN_INLINE_LAMBDA {
          A* const sums = pooled.at(index) + c * count;
          sum_pixels(bin, rows.at(entry.cell) + c * count, rows.h, rows.w, count, sums,
                     where.modulation(r, c, entry.part) * bin.share());
          if (bin.value_origin() != 0)
            for (int64_t d = 0; d < count; ++d) sums[d] = bin.value_origin();
        });
  }
};

template <typename S>
void roi_forward(const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where, const Tensor& output) {
  using A = Accumulate<S>;
  const RoiGeometry& g = where.g;
  const RegionsOfCall<A> regions(where);
  const View<const S> input = view<const S>(a.input);
  const View<S> out = view<S>(output);
  const ImageSize size{g.channels, g.height, g.width};
  const bool direct = is_cells<S>(g, a.input), direct_output = is_pooled_rows<S>(g, output);
  const int64_t stride = direct_output ? g.outputs : pooled_stride(g);
  const int64_t held = direct ? g.batch : images_at_a_time<A>(size, g.batch);
  const Tensor buffer = torch::stable::new_empty(a.input, {direct ? 0 : held * size.elements()}, scalar_type_of<A>());
  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    const int64_t begin = regions.starts[image], end = regions.starts[image + images];
    if (begin == end) continue;
    const CellRows<const A> rows = input_cells(g, direct, input, image, images, buffer);
    torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
      RegionTaps<A> taps;
      A* const scratch = thread_scratch<A, 0>(direct_output ? 0 : g.bins() * stride);
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = regions.order[i];
        const PooledRows<A> pooled{direct_output ? reinterpret_cast<A*>(&out.at(r, 0, 0, 0)) : scratch, stride};
        run_vectorised(PoolRegion<A>{regions, r, rows.of(regions.frames[r].image - image), taps, pooled});
        if (!direct_output) transpose_region<Turn::kFromRows>(g, out, r, 0, g.outputs, pooled);
      }
    });
  }
  std::vector<A> refused(g.outputs * g.bins(), static_cast<A>(NAN));
  for (int64_t i = regions.starts[g.batch]; i < g.rois; ++i)
    transpose_region<Turn::kFromRows>(g, out, regions.order[i], 0, g.outputs, PooledRows<A>{refused.data(), g.outputs});
}

}  // namespace dcn::tiles::regions
