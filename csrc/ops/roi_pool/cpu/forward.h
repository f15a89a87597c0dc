// The forward of RoI pooling on the CPU: threads share out the regions, vectors run over the channels of a bin.
#pragma once

#include "../arguments.h"
#include "regions.h"
#include "rows.h"

namespace dcn::tiles::regions {

// pooled[bin, d] = mask * mean of the bin's samples, for some bins of one region.
template <typename A>
struct PoolRegion {
  const RegionsByImage<A>& all;
  int64_t r;
  Span bins;
  CellRows<const A> rows;  // of its image
  RegionTaps<A>& taps;
  PooledRows<A> pooled;

  DCN_HOST_DEVICE void operator()() const {
    const Regions<A>& regions = all.regions;
    const int64_t count = regions.g.class_outputs();
    taps.find(regions, all.table, all.frames[r], r, bins);
    all.for_each_bin(taps, bins,
                     [&](int64_t c, int64_t index, const BinTaps<A>& bin, const BinTable::Entry& entry)
                         DCN_INLINE_LAMBDA {
                           A* const sums = pooled.at(index) + c * count;
                           sum_pixels(bin, rows.at(entry.cell) + c * count, rows.h, rows.w, count, sums,
                                      regions.modulation(r, c, entry.part) * bin.inverse_count());
                           if (bin.value_origin() != 0)
                             for (int64_t d = 0; d < count; ++d) sums[d] = bin.value_origin();
                         });
  }
};

template <typename S>
void roi_forward(const RoiArguments& a, const Regions<Accumulate<S>>& regions, const Tensor& output) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  const RegionsByImage<A> all(regions);
  const View<const S> input = view<const S>(a.input);
  const View<S> out = view<S>(output);
  const bool direct = is_cells<S>(g, a.input), direct_output = is_pooled_rows<S>(g, output);
  const int64_t stride = direct_output ? g.outputs : pooled_stride(g);
  const Portions portions = portions_of<A>(g, direct);
  const CellBuffer<A, 1> buffer(a.input, direct ? 0 : portions.elements(g));
  portions.for_each(g, [&](const Portion& portion) {
    const Span present = all.of_images(portion.image, portion.images), bins = portion.bins(g);
    if (present.first == present.last || bins.first == bins.last) return;
    const CellRows<const A> rows = input_cells(g, direct, input, portion, buffer.data());
    torch::stable::parallel_for(present.first, present.last, 1, [&](int64_t begin, int64_t end) {
      RegionTaps<A> taps;
      A* const scratch = thread_scratch<A, 0>(direct_output ? 0 : g.bins() * stride);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = all.order[i];
        const PooledRows<A> pooled{direct_output ? reinterpret_cast<A*>(&out.at(r, 0, 0, 0)) : scratch, stride};
        run_vectorised(PoolRegion<A>{all, r, bins, rows.of(all.frames[r].image - portion.image), taps, pooled});
        if (!direct_output) transpose_region<Transpose::kFromRows>(g, out, r, bins, {0, g.outputs}, pooled);
      }
    });
  });
  std::vector<A> nan(g.outputs * g.bins(), static_cast<A>(NAN));
  for (int64_t i = all.invalid().first; i < all.invalid().last; ++i)
    transpose_region<Transpose::kFromRows>(g, out, all.order[i], {0, g.bins()}, {0, g.outputs},
                                           PooledRows<A>{nan.data(), g.outputs});
}

}  // namespace dcn::tiles::regions
