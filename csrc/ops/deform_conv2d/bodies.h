// Deformable convolution, element by element: the arithmetic that CPU and CUDA share. Each struct is one task; index i
// runs over its elements in any order. No torch here: host and device compile the same source, so a test on the CPU
// proves the arithmetic of the GPU.
#pragma once

#include "../../core/conv_positions.h"
#include "../../core/view.h"

namespace dcn {

// columns[c * K + k, p] = mask * bilinear(input[n, c], position). One element: all taps of (c, p).
template <typename A, typename S, typename F, typename M>
struct FillColumns {
  ConvPositions<A, F> positions;
  View<const S> input;
  M* columns;

  DCN_HOST_DEVICE int64_t size() const { return positions.g.channels * positions.range.count; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const ConvGeometry& g = positions.g;
    const PixelRange& range = positions.range;
    const int64_t c = i / range.count, q = i % range.count;
    const Pixel p(g, range.first + q);
    const int64_t og = c / g.offset_group_channels();
    for (int64_t k = 0; k < g.taps(); ++k) {
      const A value = interpolate(positions.sample(p, og, k),
                                  [&](int64_t y, int64_t x) { return static_cast<A>(input.at(p.n, c, y, x)); });
      columns[(c * g.taps() + k) * range.count + q] = static_cast<M>(positions.modulation(p, og, k) * value);
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
  ConvPositions<A, F> positions;
  View<const S> input;
  const M* grad_columns;
  View<F> grad_offset, grad_mask;  // either may be null

  DCN_HOST_DEVICE int64_t size() const { return positions.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const ConvGeometry& g = positions.g;
    const PixelRange& range = positions.range;
    const int64_t q = i % range.count, k = i / range.count % g.taps(), og = i / range.count / g.taps();
    const Pixel p(g, range.first + q);
    const Sample<A> s = positions.sample(p, og, k);
    A value = 0, dy = 0, dx = 0;
    for (int64_t c = og * g.offset_group_channels(); c < (og + 1) * g.offset_group_channels(); ++c) {
      const A grad = static_cast<A>(grad_columns[(c * g.taps() + k) * range.count + q]);
      const Gradient<A> at =
          interpolate_gradient(s, [&](int64_t y, int64_t x) { return static_cast<A>(input.at(p.n, c, y, x)); });
      value += grad * at.value;
      dy += grad * at.dy;
      dx += grad * at.dx;
    }
    const A m = positions.modulation(p, og, k);
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
