// The backward of RoI pooling on the CPU: vectors run over the channels of a bin. For the gradients of offset and mask
// threads share out the regions. For that of the input they share out the channels, since regions overlap: no thread
// adds to what another adds to.
#pragma once

#include "../arguments.h"
#include "regions.h"
#include "rows.h"

namespace dcn::tiles::regions {

// The adjoint of PoolRegion, for some channels of the rows.
template <typename A>
struct ScatterRegion {
  const RegionsByImage<A>& all;
  int64_t r;
  Span bins;
  CellRows<A> rows;  // of its image
  const RegionTaps<A>& taps;
  PooledRows<const A> grad;
  Span channels;

  DCN_HOST_DEVICE void operator()() const {
    const Regions<A>& regions = all.regions;
    const int64_t count = regions.g.class_outputs();
    all.for_each_bin(
        taps, bins,
        [&](int64_t c, int64_t index, const BinTaps<A>& bin, const BinTable::Entry& entry) DCN_INLINE_LAMBDA {
          const int64_t start = entry.cell * regions.g.outputs + c * count, end = start + count;
          const int64_t from = (start > channels.first ? start : channels.first) - start,
                        to = (end < channels.last ? end : channels.last) - start;
          if (from >= to) return;
          scatter_pixels(bin, rows.at(entry.cell) + c * count + from, rows.h, rows.w, to - from,
                         grad.at(index) + c * count + from, regions.modulation(r, c, entry.part) * bin.inverse_count());
        });
  }
};

// Adds what some bins of a region give to the gradients of its offset and mask.
template <typename A>
struct RegionPartGradient {
  const RegionsByImage<A>& all;
  int64_t r;
  Span bins;
  CellRows<const A> rows;
  const RegionTaps<A>& taps;
  PooledRows<const A> grad;
  A *grad_offset, *grad_mask;  // of all regions; either may be null

  DCN_HOST_DEVICE void operator()() const {
    const Regions<A>& regions = all.regions;
    const RoiGeometry& g = regions.g;
    const int64_t count = g.class_outputs(), parts = g.parts();
    A* const offsets = grad_offset ? grad_offset + 2 * r * g.classes * parts : nullptr;
    A* const masks = grad_mask ? grad_mask + r * g.classes * parts : nullptr;
    const A size_y = regions.size(all.frames[r], 0), size_x = regions.size(all.frames[r], 1);
    all.for_each_bin(
        taps, bins,
        [&](int64_t c, int64_t index, const BinTaps<A>& bin, const BinTable::Entry& entry) DCN_INLINE_LAMBDA {
          const Gradient<A> sum =
              bin_gradient(bin, rows.at(entry.cell) + c * count, rows.h, rows.w, count, grad.at(index) + c * count);
          const A inverse = bin.inverse_count(), m = regions.modulation(r, c, entry.part);
          if (offsets) {
            offsets[2 * c * parts + entry.part] += m * (sum.dy * (inverse * size_y));
            offsets[(2 * c + 1) * parts + entry.part] += m * (sum.dx * (inverse * size_x));
          }
          if (masks) masks[c * parts + entry.part] += sum.value * inverse;
        });
  }
};

// What the two above need of a region: where its bins read, and the gradient of its result as rows.
template <typename S>
class RegionGradient {
 public:
  using A = Accumulate<S>;
  RegionGradient(const RegionsByImage<A>& all, const Tensor& grad_output)
      : all_(all),
        result_(view<const S>(grad_output)),
        direct_(is_pooled_rows<S>(all.regions.g, grad_output)),
        stride_(direct_ ? all.regions.g.outputs : pooled_stride(all.regions.g)) {}

  // Of region r, and of these bins and outputs alone.
  void find(int64_t r, const Span& bins, const Span& outputs) {
    const RoiGeometry& g = all_.regions.g;
    run_vectorised(FindRegionTaps<A>{all_, r, bins, taps_});
    if (direct_) {
      rows_ = reinterpret_cast<const A*>(&result_.at(r, 0, 0, 0));
    } else {
      const PooledRows<A> rows{thread_scratch<A, 0>(g.bins() * stride_), stride_};
      transpose_region<Transpose::kToRows>(g, result_, r, bins, outputs, rows);
      rows_ = rows.data;
    }
  }
  const RegionTaps<A>& taps() const { return taps_; }
  PooledRows<const A> rows() const { return {rows_, stride_}; }

 private:
  const RegionsByImage<A>& all_;
  View<const S> result_;
  bool direct_;
  int64_t stride_;
  RegionTaps<A> taps_;
  const A* rows_ = nullptr;
};

// The channels of an image's portion, in the order of cells, in `count` shares, for as many threads at most: whole
// group cells where there are enough of them, else blocks of 16 channels.
struct ChannelShares {
  Span channels;
  int64_t count, each;

  ChannelShares(const RoiGeometry& g, const Portion& portion, int64_t threads)
      : channels{portion.cells(g).first * g.outputs, portion.cells(g).last * g.outputs} {
    const int64_t cells = portion.cell_count(g), unit = cells > 1 && cells >= threads ? g.outputs : 16,
                  all = channels.last - channels.first;
    count = std::min<int64_t>(threads, divide_up(all, unit));
    each = divide_up(divide_up(all, count), unit) * unit;
  }
  Span of(int64_t i) const {
    return {channels.first + i * each, std::min(channels.last, channels.first + (i + 1) * each)};
  }
};

// In an invalid region every bin is NaN, and so are the gradients of the parts that have bins.
template <typename A>
void set_invalid_part_gradients(const RoiGeometry& g, int64_t r, int64_t planes, A* gradients) {
  if (!gradients) return;
  for (int64_t i = 0; i < planes * g.parts(); ++i) {
    const int64_t part = i % g.parts();
    const bool has_bins = g.has_bins(part / g.part_width, 0) && g.has_bins(part % g.part_width, 1);
    gradients[r * planes * g.parts() + i] = has_bins ? static_cast<A>(NAN) : A(0);
  }
}

// Returns the gradient of the input; those of offset and mask are written to `parts`.
template <typename S>
Tensor roi_backward(const Tensor& grad_output, const RoiArguments& a, const Regions<Accumulate<S>>& regions,
                    int64_t wanted, const PartGradients<Accumulate<S>>& parts) {
  using A = Accumulate<S>;
  const RoiGeometry& g = regions.g;
  const RegionsByImage<A> all(regions);
  const bool scatter = wanted & kInput, displaced = wanted & (kOffset | kMask);
  const View<const S> input = view<const S>(a.input);

  Tensor grad_input = new_roi_gradient(a.input, scatter, scalar_type_of<S>());
  const bool direct = is_cells<S>(g, a.input), direct_grad = scatter && is_cells<S>(g, grad_input);
  const bool transposed = (displaced && !direct) || (scatter && !direct_grad);
  const Portions portions = portions_of<A>(g, !transposed);
  const CellBuffer<A, 1> input_buffer(a.input, displaced && !direct ? portions.elements(g) : 0);
  const CellBuffer<A, 2> grad_buffer(a.input, scatter && !direct_grad ? portions.elements(g) : 0);
  if (direct_grad) torch::stable::zero_(grad_input);
  // Portions add to them.
  for (Tensor part : {parts.offset, parts.mask}) torch::stable::zero_(part);

  const int64_t threads = torch::stable::get_num_threads();
  const bool one_thread = threads == 1, one_cell = g.groups == 1;

  portions.for_each(g, [&](const Portion& portion) {
    const ChannelShares shares(g, portion, threads);
    const int64_t image = portion.image;
    const Span present = all.of_images(image, portion.images), bins = portion.bins(g);
    CellRows<const A> values{};
    CellRows<A> rows{};
    if (displaced && present.first < present.last) values = input_cells(g, direct, input, portion, input_buffer.data());
    if (direct_grad) {
      rows = rows_in_place<S, A>(view<S>(grad_input), image);
    } else if (scatter) {
      grad_buffer.clear();
      rows = dense_cells(g, portion, is_by_pixel(g, view<S>(grad_input)), grad_buffer.data());
    }
    const auto add_parts = [&](int64_t r, const RegionGradient<S>& grad) {
      run_vectorised(RegionPartGradient<A>{all, r, bins, values.of(all.frames[r].image - image), grad.taps(),
                                           grad.rows(), parts.offset_data, parts.mask_data});
    };
    // One thread does both for a region while it is in the cache; several do one after the other.
    if (displaced && !one_thread)
      torch::stable::parallel_for(present.first, present.last, 1, [&](int64_t begin, int64_t end) {
        RegionGradient<S> grad(all, grad_output);
        for (int64_t i = begin; i < end; ++i) {
          grad.find(all.order[i], bins, {0, g.outputs});
          add_parts(all.order[i], grad);
        }
      });
    if (scatter || one_thread)
      torch::stable::parallel_for(0, portion.images * shares.count, 1, [&](int64_t begin, int64_t end) {
        RegionGradient<S> grad(all, grad_output);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / shares.count;
          const Span channels = shares.of(task % shares.count), of_image = all.of_images(image + n, 1);
          for (int64_t i = of_image.first; i < of_image.last; ++i) {
            const int64_t r = all.order[i];
            grad.find(r, bins, one_cell ? channels : Span{0, g.outputs});
            if (displaced && one_thread) add_parts(r, grad);
            if (scatter) run_vectorised(ScatterRegion<A>{all, r, bins, rows.of(n), grad.taps(), grad.rows(), channels});
          }
        }
      });
    if (scatter && !direct_grad) transpose_cells<Transpose::kFromRows>(g, view<S>(grad_input), portion, rows);
  });
  for (int64_t i = all.invalid().first; i < all.invalid().last; ++i) {
    set_invalid_part_gradients(g, all.order[i], 2 * g.classes, parts.offset_data);
    set_invalid_part_gradients(g, all.order[i], g.classes, parts.mask_data);
  }
  return grad_input;
}

}  // namespace dcn::tiles::regions
