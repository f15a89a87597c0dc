// Pooling over regions of interest on the CPU: vectors run over the channels of a bin, threads over regions, and in the
// scatter over channels, so that no thread adds to what another adds to.
#pragma once

#include <vector>

#include "image_rows.h"
#include "roi_pool.h"

namespace dcn::tiles {

// Channels of a bin in the rows: [cell * D + class * D / classes, + D / classes).
DCN_HOST_DEVICE int64_t first_channel(const RoiGeometry& g, int64_t cell, int64_t c) {
  return cell * g.outputs + c * g.class_outputs();
}

// pooled[bin, d] = mask * mean of the bin's samples, for one region.
template <typename A>
struct PoolRegion {
  RoiPlaces<A> where;
  int64_t r;
  RoiFrame<A> frame;
  Rows<const A> image;  // its own
  const A* zeros;
  A* pooled;

  DCN_HOST_DEVICE void operator()() const {
    const RoiGeometry& g = where.g;
    A* sums = pooled;
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t x = 0; x < g.out_width; ++x)
        for (int64_t c = 0; c < g.classes; ++c, sums += g.class_outputs()) {
          const RoiBin<A> bin = where.bin(frame, r, c, y, x);
          const int64_t count = g.class_outputs(), first = first_channel(g, bin.cell, c);
          for (int64_t d = 0; d < count; ++d) sums[d] = 0;
          for_each_sample(g, bin,
                          [&](const Sample<A>& s, bool, bool) DCN_INLINE_LAMBDA { add(s, first, count, sums); });
          const A m = where.modulation(r, c, y, x);
          for (int64_t d = 0; d < count; ++d) sums[d] = m * (sums[d] * bin.share);
        }
  }
  // A corner that is not to be read points at zeros, so that 0 * inf cannot arise.
  DCN_HOST_DEVICE void add(const Sample<A>& s, int64_t first, int64_t count, A* __restrict sums) const {
    A w[4];
    const A* from[4];
    for (int corner = 0; corner < 4; ++corner) {
      w[corner] = s.has(corner) ? s.weight(corner) : s.origin();
      from[corner] = s.has(corner) && w[corner] != 0 ? image.at(0, s.row(corner), s.column(corner)) + first : zeros;
    }
    const A *p0 = from[0], *p1 = from[1], *p2 = from[2], *p3 = from[3];
    const A w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
#pragma omp simd
    for (int64_t d = 0; d < count; ++d) sums[d] += w0 * p0[d] + w1 * p1[d] + w2 * p2[d] + w3 * p3[d];
  }
};

// The adjoint of PoolRegion, for the channels [first, last) of the rows.
template <typename A>
struct ScatterRegion {
  RoiPlaces<A> where;
  int64_t r;
  RoiFrame<A> frame;
  Rows<A> image;
  int64_t first, last;
  const A* grad;  // [bins, D]
  A* scaled;      // room for D

  DCN_HOST_DEVICE void operator()() const {
    const RoiGeometry& g = where.g;
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t x = 0; x < g.out_width; ++x)
        for (int64_t c = 0; c < g.classes; ++c) {
          const int64_t cell = g.cell_of(y, x), start = first_channel(g, cell, c), end = start + g.class_outputs();
          const int64_t from = start > first ? start : first, to = end < last ? end : last;
          if (from >= to) continue;
          const RoiBin<A> bin = where.bin(frame, r, c, y, x);
          const A factor = where.modulation(r, c, y, x) * bin.share;
          const A* const of_bin = grad + (y * g.out_width + x) * g.outputs + (from - cell * g.outputs);
          for (int64_t d = 0; d < to - from; ++d) scaled[d] = factor * of_bin[d];
          for_each_sample(g, bin, [&](const Sample<A>& s, bool, bool) DCN_INLINE_LAMBDA {
            for (int corner = 0; corner < 4; ++corner)
              if (s.has(corner) && s.weight(corner) != 0)
                add(s.weight(corner), to - from, image.at(0, s.row(corner), s.column(corner)) + from);
          });
        }
  }
  DCN_HOST_DEVICE void add(A w, int64_t count, A* __restrict to) const {
#pragma omp simd
    for (int64_t d = 0; d < count; ++d) to[d] += w * scaled[d];
  }
};

// Gradients of a region's offset and mask: dot products of the output's gradient with the corners of each sample.
template <typename A>
struct RegionPartGradient {
  RoiPlaces<A> where;
  int64_t r;
  RoiFrame<A> frame;
  Rows<const A> image;
  const A* grad;               // [bins, D]
  A *grad_offset, *grad_mask;  // of this region; either may be null

  DCN_HOST_DEVICE void operator()() const {
    const RoiGeometry& g = where.g;
    const int64_t parts = g.part_height * g.part_width;
    for (int64_t i = 0; grad_offset && i < 2 * g.classes * parts; ++i) grad_offset[i] = 0;
    for (int64_t i = 0; grad_mask && i < g.classes * parts; ++i) grad_mask[i] = 0;
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t x = 0; x < g.out_width; ++x)
        for (int64_t c = 0; c < g.classes; ++c) {
          const RoiBin<A> bin = where.bin(frame, r, c, y, x);
          const int64_t count = g.class_outputs(), first = first_channel(g, bin.cell, c);
          const A* const of_bin = grad + (y * g.out_width + x) * g.outputs + c * count;
          BinGradient<A> sum;
          for_each_sample(g, bin, [&](const Sample<A>& s, bool y_moves, bool x_moves) DCN_INLINE_LAMBDA {
            const auto corner = [&](int64_t row, int64_t column)
                                    DCN_INLINE_LAMBDA { return dot(of_bin, image.at(0, row, column) + first, count); };
            sum.add(interpolate_gradient(s, corner), y_moves, x_moves);
          });
          const A m = where.modulation(r, c, y, x);
          const int64_t part = g.part_of(y, 0) * g.part_width + g.part_of(x, 1);
          if (grad_offset) {
            grad_offset[2 * c * parts + part] += m * (sum.dy * (bin.share * bin.size_y));
            grad_offset[(2 * c + 1) * parts + part] += m * (sum.dx * (bin.share * bin.size_x));
          }
          if (grad_mask) grad_mask[c * parts + part] += sum.value * bin.share;
        }
  }
  DCN_HOST_DEVICE static A dot(const A* a, const A* b, int64_t count) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < count; ++d) sum += a[d] * b[d];
    return sum;
  }
};

// Regions in the order of their images; those that name none come last.
template <typename A>
struct RegionList {
  std::vector<RoiFrame<A>> frames;  // by region
  std::vector<int64_t> order;
  std::vector<int64_t> starts;  // image n has order[starts[n]] to order[starts[n + 1] - 1]

  explicit RegionList(const RoiPlaces<A>& where)
      : frames(where.g.rois), order(where.g.rois), starts(where.g.batch + 2) {
    const int64_t none = where.g.batch;
    const auto image = [&](int64_t r) { return frames[r].image < 0 ? none : frames[r].image; };
    for (int64_t r = 0; r < where.g.rois; ++r) {
      frames[r] = where.g.frame(where.rois + 5 * r);
      ++starts[image(r) + 1];
    }
    for (int64_t n = 0; n <= none; ++n) starts[n + 1] += starts[n];
    std::vector<int64_t> next(starts);
    for (int64_t r = 0; r < where.g.rois; ++r) order[next[image(r)]++] = r;
  }
};

// One region of the result between [D, P_h, P_w] of any type and layout and [P_h, P_w, D] in the type of sums.
template <Turn Direction, typename A, typename S>
void transpose_region(const RoiGeometry& g, const View<S>& result, int64_t r, A* rows) {
  for (int64_t y = 0; y < g.out_height; ++y)
    run_vectorised(TransposeRow<A, S, Direction>{&result.at(r, 0, y, 0), result.c, result.w, g.outputs, g.out_width,
                                                 rows + y * g.out_width * g.outputs, g.outputs});
}

template <typename S>
void roi_forward(const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where, const Tensor& output) {
  using A = Accumulate<S>;
  const RoiGeometry& g = where.g;
  const RegionList<A> regions(where);
  const View<const S> input = view<const S>(a.input);
  const View<S> out = view<S>(output);
  const ImageSize size{g.channels, g.height, g.width};
  const int64_t cells = g.groups * g.groups, pooled_size = g.bins() * g.outputs;
  const bool direct = cells == 1 && is_rows<S>(a.input);
  const int64_t held = direct ? g.batch : images_at_a_time<A>(size, g.batch);
  const Tensor buffer = torch::stable::new_empty(a.input, {direct ? 0 : held * size.elements()}, scalar_type_of<A>());
  const Tensor zero_row = torch::stable::new_zeros(a.input, {g.outputs}, scalar_type_of<A>());
  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    const int64_t begin = regions.starts[image], end = regions.starts[image + images];
    if (begin == end) continue;
    const Rows<const A> rows = input_rows(direct, input, size, image, images, buffer, cells);
    torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
      A* const pooled = thread_scratch<A, 0>(pooled_size);
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = regions.order[i];
        const RoiFrame<A>& frame = regions.frames[r];
        run_vectorised(PoolRegion<A>{where,
                                     r,
                                     frame,
                                     {rows.at(frame.image - image, 0, 0), rows.n, rows.h, rows.w},
                                     static_cast<const A*>(zero_row.data_ptr()),
                                     pooled});
        transpose_region<Turn::kFromRows>(g, out, r, pooled);
      }
    });
  }
  const std::vector<A> refused(pooled_size, static_cast<A>(NAN));
  for (int64_t i = regions.starts[g.batch]; i < g.rois; ++i)
    transpose_region<Turn::kFromRows>(g, out, regions.order[i], const_cast<A*>(refused.data()));
}

template <typename S>
Tensor roi_backward(const Tensor& grad_output, const RoiArguments& a, const RoiPlaces<Accumulate<S>>& where,
                    int64_t needs, const PartGradients<Accumulate<S>>& parts) {
  using A = Accumulate<S>;
  const RoiGeometry& g = where.g;
  const RegionList<A> regions(where);
  const bool scatter = needs & kRoiInput, displaced = needs & (kRoiOffset | kRoiMask);
  const View<const S> input = view<const S>(a.input), grad_out = view<const S>(grad_output);
  const ImageSize size{g.channels, g.height, g.width};
  const int64_t cells = g.groups * g.groups, pooled_size = g.bins() * g.outputs;
  const int64_t part_count = g.classes * g.part_height * g.part_width;

  Tensor grad_input = new_roi_gradient(a.input, scatter, scalar_type_of<S>());
  const bool direct = cells == 1 && is_rows<S>(a.input), direct_grad = scatter && cells == 1 && is_rows<S>(grad_input);
  const bool staged = (displaced && !direct) || (scatter && !direct_grad);
  const int64_t held = staged ? images_at_a_time<A>(size, g.batch) : g.batch;
  const auto buffer = [&](bool wanted) {
    return torch::stable::new_empty(a.input, {wanted ? held * size.elements() : 0}, scalar_type_of<A>());
  };
  const Tensor input_buffer = buffer(displaced && !direct);
  Tensor grad_buffer = buffer(scatter && !direct_grad);
  if (scatter) torch::stable::zero_(grad_input);

  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    const int64_t begin = regions.starts[image], end = regions.starts[image + images];
    if (begin == end) continue;
    if (displaced) {
      const Rows<const A> rows = input_rows(direct, input, size, image, images, input_buffer, cells);
      torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
        A* const grad = thread_scratch<A, 0>(pooled_size);
        for (int64_t i = first; i < last; ++i) {
          const int64_t r = regions.order[i];
          const RoiFrame<A>& frame = regions.frames[r];
          transpose_region<Turn::kToRows>(g, grad_out, r, grad);
          run_vectorised(RegionPartGradient<A>{where,
                                               r,
                                               frame,
                                               {rows.at(frame.image - image, 0, 0), rows.n, rows.h, rows.w},
                                               grad,
                                               parts.offset_data ? parts.offset_data + r * 2 * part_count : nullptr,
                                               parts.mask_data ? parts.mask_data + r * part_count : nullptr});
        }
      });
    }
    if (!scatter) continue;
    const View<S> grad_view = view<S>(grad_input);
    Rows<A> rows{reinterpret_cast<A*>(grad_view.data) + image * grad_view.n, grad_view.n, grad_view.h, grad_view.w};
    if (!direct_grad) {
      torch::stable::zero_(grad_buffer);
      rows = dense_rows(size, static_cast<A*>(grad_buffer.data_ptr()));
    }
    // A lane owns channels of an image: regions overlap, and nobody else may add to the same numbers.
    const int64_t lanes = std::min<int64_t>(torch::stable::get_num_threads(), divide_up(g.channels, 16));
    const int64_t lane_channels = divide_up(divide_up(g.channels, lanes), 16) * 16;
    torch::stable::parallel_for(0, images * lanes, 1, [&](int64_t first, int64_t last) {
      A* const grad = thread_scratch<A, 0>(pooled_size);
      A* const scaled = thread_scratch<A, 1>(g.outputs);
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = image + task / lanes, channel = task % lanes * lane_channels;
        for (int64_t i = regions.starts[n]; i < regions.starts[n + 1]; ++i) {
          const int64_t r = regions.order[i];
          transpose_region<Turn::kToRows>(g, grad_out, r, grad);
          run_vectorised(ScatterRegion<A>{where,
                                          r,
                                          regions.frames[r],
                                          {rows.at(n - image, 0, 0), rows.n, rows.h, rows.w},
                                          channel,
                                          std::min(g.channels, channel + lane_channels),
                                          grad,
                                          scaled});
        }
      }
    });
    if (!direct_grad) transpose_images<Turn::kFromRows>(size, grad_view, image, images, rows, cells);
  }
  for (int64_t i = regions.starts[g.batch]; i < g.rois; ++i) {
    const int64_t r = regions.order[i];
    if (parts.offset_data) std::fill_n(parts.offset_data + r * 2 * part_count, 2 * part_count, static_cast<A>(NAN));
    if (parts.mask_data) std::fill_n(parts.mask_data + r * part_count, part_count, static_cast<A>(NAN));
  }
  return grad_input;
}

}  // namespace dcn::tiles
