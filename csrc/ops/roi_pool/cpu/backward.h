// The backward of RoI pooling on the CPU.
#pragma once

#include "../arguments.h"
#include "regions.h"
#include "rows.h"

namespace dcn::tiles::regions {

// The adjoint of PoolRegion, for the channels [first, last) of the rows.
template <typename A>
struct ScatterRegion {
  const RegionsOfCall<A>& regions;
  int64_t r;
  CellRows<A> rows;
  const RegionTaps<A>& taps;
  PooledRows<const A> grad;
  int64_t first, last;

  DCN_HOST_DEVICE void operator()() const {
    const RoiPlaces<A>& where = regions.where;
    const int64_t count = where.g.class_outputs();
    regions.for_each_bin(
        taps, [&](int64_t c, int64_t index, const BinTaps<A>& bin, const BinTable::Entry& entry) DCN_INLINE_LAMBDA {
          const int64_t start = entry.cell * where.g.outputs + c * count, end = start + count;
          const int64_t from = (start > first ? start : first) - start, to = (end < last ? end : last) - start;
          if (from >= to) return;
          scatter_pixels(bin, rows.at(entry.cell) + c * count + from, rows.h, rows.w, to - from,
                         grad.at(index) + c * count + from, where.modulation(r, c, entry.part) * bin.share());
        });
  }
};

// Gradients of a region's offset and mask.
template <typename A>
struct RegionPartGradient {
  const RegionsOfCall<A>& regions;
  int64_t r;
  CellRows<const A> rows;
  const RegionTaps<A>& taps;
  PooledRows<const A> grad;
  A *grad_offset, *grad_mask;  // of all regions; either may be null

  DCN_HOST_DEVICE void operator()() const {
    const RoiPlaces<A>& where = regions.where;
    const RoiGeometry& g = where.g;
    const int64_t count = g.class_outputs(), parts = g.parts();
    A* const offsets = grad_offset ? grad_offset + 2 * r * g.classes * parts : nullptr;
    A* const masks = grad_mask ? grad_mask + r * g.classes * parts : nullptr;
    for (int64_t i = 0; offsets && i < 2 * g.classes * parts; ++i) offsets[i] = 0;
    for (int64_t i = 0; masks && i < g.classes * parts; ++i) masks[i] = 0;
    const A size_y = where.size(regions.frames[r], 0), size_x = where.size(regions.frames[r], 1);
    regions.for_each_bin(
        taps, [&](int64_t c, int64_t index, const BinTaps<A>& bin, const BinTable::Entry& entry) DCN_INLINE_LAMBDA {
          const Gradient<A> sum =
              bin_gradient(bin, rows.at(entry.cell) + c * count, rows.h, rows.w, count, grad.at(index) + c * count);
          const A share = bin.share(), m = where.modulation(r, c, entry.part);
          if (offsets) {
            offsets[2 * c * parts + entry.part] += m * (sum.dy * (share * size_y));
            offsets[(2 * c + 1) * parts + entry.part] += m * (sum.dx * (share * size_x));
          }
          if (masks) masks[c * parts + entry.part] += sum.value * share;
        });
  }
};

// The gradient of a region's result as rows, and where its bins read.
template <typename S>
class RegionGradient {
 public:
  using A = Accumulate<S>;
  RegionGradient(const RegionsOfCall<A>& regions, const Tensor& grad_output)
      : regions_(regions),
        result_(view<const S>(grad_output)),
        direct_(is_pooled_rows<S>(regions.where.g, grad_output)),
        stride_(direct_ ? regions.where.g.outputs : pooled_stride(regions.where.g)) {}

  // For the channels [first, last) alone.
  void find(int64_t r, int64_t first, int64_t last) {
    const RoiGeometry& g = regions_.where.g;
    run_vectorised(FindTaps<A>{regions_, r, taps_});
    if (direct_) {
      rows_ = reinterpret_cast<const A*>(&result_.at(r, 0, 0, 0));
    } else {
      const PooledRows<A> rows{thread_scratch<A, 0>(g.bins() * stride_), stride_};
      transpose_region<Turn::kToRows>(g, result_, r, first, last, rows);
      rows_ = rows.data;
    }
  }
  const RegionTaps<A>& taps() const { return taps_; }
  PooledRows<const A> rows() const { return {rows_, stride_}; }

 private:
  const RegionsOfCall<A>& regions_;
  View<const S> result_;
  bool direct_;
  int64_t stride_;
  RegionTaps<A> taps_;
  const A* rows_ = nullptr;
};

template <typename S>
Tensor roi_backward(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                    int64_t needs, const PartGradients<Accumulate<S>>& parts) {
  using A = Accumulate<S>;
  const RoiGeometry& g = where.g;
  const RegionsOfCall<A> regions(where);
  const bool scatter = needs & kRoiInput, displaced = needs & (kRoiOffset | kRoiMask);
  const View<const S> input = view<const S>(a.input);
  const ImageSize size{g.channels, g.height, g.width};

  Tensor grad_input = new_roi_gradient(a.input, scatter, scalar_type_of<S>());
  const bool direct = is_cells<S>(g, a.input), direct_grad = scatter && is_cells<S>(g, grad_input);
  const bool staged = (displaced && !direct) || (scatter && !direct_grad);
  const int64_t held = staged ? images_at_a_time<A>(size, g.batch) : g.batch;
  const auto buffer = [&](bool wanted) {
    return torch::stable::new_empty(a.input, {wanted ? held * size.elements() : 0}, scalar_type_of<A>());
  };
  const Tensor input_buffer = buffer(displaced && !direct);
  Tensor grad_buffer = buffer(scatter && !direct_grad);
  if (direct_grad) torch::stable::zero_(grad_input);

  // A lane owns channels of an image, those of whole cells where there are enough: regions overlap, and nobody else may
  // add to the same numbers.
  const int64_t threads = torch::stable::get_num_threads(), cells = g.groups * g.groups;
  const int64_t unit = cells > 1 && cells >= threads ? g.outputs : 16;
  const int64_t lanes = std::min<int64_t>(threads, divide_up(g.channels, unit));
  const int64_t lane_channels = divide_up(divide_up(g.channels, lanes), unit) * unit;
  const bool together = threads == 1;

  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    const int64_t begin = regions.starts[image], end = regions.starts[image + images];
    CellRows<const A> values{};
    CellRows<A> rows{};
    if (displaced && begin < end) values = input_cells(g, direct, input, image, images, input_buffer);
    if (direct_grad) {
      rows = rows_in_place<S, A>(view<S>(grad_input), image);
    } else if (scatter) {
      torch::stable::zero_(grad_buffer);
      rows = dense_cells(g, static_cast<A*>(grad_buffer.data_ptr()));
    }
    const auto add_parts = [&](int64_t r, const RegionGradient<S>& grad) {
      run_vectorised(RegionPartGradient<A>{regions, r, values.of(regions.frames[r].image - image), grad.taps(),
                                           grad.rows(), parts.offset_data, parts.mask_data});
    };
    // One thread does everything while it has the region at hand; several share out the regions here, and then lanes.
    if (displaced && !together)
      torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
        RegionGradient<S> grad(regions, grad_output);
        for (int64_t i = first; i < last; ++i) {
          grad.find(regions.order[i], 0, g.outputs);
          add_parts(regions.order[i], grad);
        }
      });
    if (scatter || together)
      torch::stable::parallel_for(0, images * lanes, 1, [&](int64_t first, int64_t last) {
        RegionGradient<S> grad(regions, grad_output);
        for (int64_t task = first; task < last; ++task) {
          const int64_t n = image + task / lanes, channel = task % lanes * lane_channels;
          const int64_t end_channel = std::min(g.channels, channel + lane_channels);
          for (int64_t i = regions.starts[n]; i < regions.starts[n + 1]; ++i) {
            const int64_t r = regions.order[i];
            grad.find(r, cells == 1 ? channel : 0, cells == 1 ? end_channel : g.outputs);
            if (displaced && together) add_parts(r, grad);
            if (scatter)
              run_vectorised(
                  ScatterRegion<A>{regions, r, rows.of(n - image), grad.taps(), grad.rows(), channel, end_channel});
          }
        }
      });
    if (scatter && !direct_grad) transpose_cells<Turn::kFromRows>(g, view<S>(grad_input), image, images, rows);
  }
  // In a region that is refused every bin is NaN, and so is what its bins take their offset and mask from.
  const auto refuse = [&](A* gradients, int64_t planes, int64_t r) {
    if (!gradients) return;
    for (int64_t i = 0; i < planes * g.parts(); ++i) {
      const int64_t part = i % g.parts();
      const bool has_bins = g.has_bins(part / g.part_width, 0) && g.has_bins(part % g.part_width, 1);
      gradients[r * planes * g.parts() + i] = has_bins ? static_cast<A>(NAN) : A(0);
    }
  };
  for (int64_t i = regions.starts[g.batch]; i < g.rois; ++i) {
    refuse(parts.offset_data, 2 * g.classes, regions.order[i]);
    refuse(parts.mask_data, g.classes, regions.order[i]);
  }
  return grad_input;
}

}  // namespace dcn::tiles::regions
