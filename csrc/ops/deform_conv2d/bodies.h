// Deformable convolution, element by element: the arithmetic that CPU and CUDA share. Each struct is one task; index i
// runs over its elements in any order. No torch here: host and device compile the same source, so a test on the CPU
// proves the arithmetic of the GPU.
#pragma once

#include "../../core/conv_geometry.h"
#include "../../core/view.h"

namespace dcn {

// Output pixels [first, first + count) of the flattened (n, y, x) order are worked on at a time.
struct PixelRange {
  int64_t first, count;
};

struct Pixel {
  int64_t n, y, x;
  Pixel() = default;
  DCN_HOST_DEVICE Pixel(const ConvGeometry& g, int64_t flat)
      : n(flat / g.out_pixels()), y(flat % g.out_pixels() / g.out_width), x(flat % g.out_width) {}
};

// Offsets and mask of a call; `F` is float, or the type of the input.
template <typename A, typename F>
struct Displacement {
  View<const F> offset, mask;  // mask.data may be null

  DCN_HOST_DEVICE Sample<A> sample(const ConvGeometry& g, const Pixel& p, int64_t offset_group, int64_t tap) const {
    const int64_t k = offset_group * g.taps() + tap;
    return g.sample(g.start_y(p.y), g.start_x(p.x), tap / g.kernel_w, tap % g.kernel_w,
                    static_cast<A>(offset.at(p.n, 2 * k, p.y, p.x)),
                    static_cast<A>(offset.at(p.n, 2 * k + 1, p.y, p.x)));
  }
  DCN_HOST_DEVICE A modulation(const ConvGeometry& g, const Pixel& p, int64_t offset_group, int64_t tap) const {
    return mask.data ? static_cast<A>(mask.at(p.n, offset_group * g.taps() + tap, p.y, p.x)) : A(1);
  }
};

// columns[c * K + k, p] = mask * bilinear(input[n, c], position). One element: all taps of (c, p).
template <typename A, typename S, typename F, typename M>
struct FillColumns {
  ConvGeometry g;
  PixelRange range;
  View<const S> input;
  Displacement<A, F> where;
  M* columns;

  DCN_HOST_DEVICE int64_t size() const { return g.channels * range.count; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i / range.count, q = i % range.count;
    const Pixel p(g, range.first + q);
    const int64_t og = c / g.offset_group_channels();
    for (int64_t k = 0; k < g.taps(); ++k) {
      const A value = interpolate(where.sample(g, p, og, k),
                                  [&](int64_t y, int64_t x) { return static_cast<A>(input.at(p.n, c, y, x)); });
      columns[(c * g.taps() + k) * range.count + q] = static_cast<M>(where.modulation(g, p, og, k) * value);
    }
  }
};

// output[n, o, y, x] = products[o, p] + bias[o]
template <typename A, typename S, typename M>
struct StoreOutput {
  ConvGeometry g;
  PixelRange range;
  const M* products;
  const S* bias;  // may be null
  View<S> output;

  DCN_HOST_DEVICE int64_t size() const { return g.out_channels * range.count; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t o = i / range.count;
    const Pixel p(g, range.first + i % range.count);
    const A sum = static_cast<A>(products[i]) + (bias ? static_cast<A>(bias[o]) : A(0));
    output.at(p.n, o, p.y, p.x) = static_cast<S>(sum);
  }
};

// gathered[o, p] = grad_output[n, o, y, x]: the right-hand side of both gradient products.
template <typename S, typename M>
struct GatherGradOutput {
  ConvGeometry g;
  PixelRange range;
  View<const S> grad_output;
  M* gathered;

  DCN_HOST_DEVICE int64_t size() const { return g.out_channels * range.count; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const Pixel p(g, range.first + i % range.count);
    gathered[i] = static_cast<M>(grad_output.at(p.n, i / range.count, p.y, p.x));
  }
};

// grad_offset, grad_mask: sums over the channels of one offset group. One element: (offset group, tap, p).
template <typename A, typename S, typename F, typename M>
struct DisplacementGradient {
  ConvGeometry g;
  PixelRange range;
  View<const S> input;
  Displacement<A, F> where;
  const M* grad_columns;
  View<F> grad_offset, grad_mask;  // either may be null

  DCN_HOST_DEVICE int64_t size() const { return g.offset_groups * g.taps() * range.count; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t q = i % range.count, k = i / range.count % g.taps(), og = i / range.count / g.taps();
    const Pixel p(g, range.first + q);
    const Sample<A> s = where.sample(g, p, og, k);
    A value = 0, dy = 0, dx = 0;
    for (int64_t c = og * g.offset_group_channels(); c < (og + 1) * g.offset_group_channels(); ++c) {
      const A grad = static_cast<A>(grad_columns[(c * g.taps() + k) * range.count + q]);
      const Gradient<A> at =
          interpolate_gradient(s, [&](int64_t y, int64_t x) { return static_cast<A>(input.at(p.n, c, y, x)); });
      value += grad * at.value;
      dy += grad * at.dy;
      dx += grad * at.dx;
    }
    const A m = where.modulation(g, p, og, k);
    const int64_t plane = og * g.taps() + k;
    if (grad_offset.data) {
      grad_offset.at(p.n, 2 * plane, p.y, p.x) = static_cast<F>(m * dy);
      grad_offset.at(p.n, 2 * plane + 1, p.y, p.x) = static_cast<F>(m * dx);
    }
    if (grad_mask.data) grad_mask.at(p.n, plane, p.y, p.x) = static_cast<F>(value);
  }
};

// grad_weight += one range's product [O, C / groups, K]. Sums are kept in `A` whatever a product is stored in.
template <typename A, typename M>
struct AddWeightGradient {
  ConvGeometry g;
  const M* product;
  View<A> grad_weight;

  DCN_HOST_DEVICE int64_t size() const { return g.out_channels * g.group_channels() * g.taps(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t k = i % g.taps(), c = i / g.taps() % g.group_channels(), o = i / g.taps() / g.group_channels();
    grad_weight.at(o, c, k / g.kernel_w, k % g.kernel_w) += static_cast<A>(product[i]);
  }
};

}  // namespace dcn
