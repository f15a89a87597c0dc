// The sampler: where the four corners of a position lie, what they weigh, and how the weights change with the position.
// Every operator of this package reads and scatters through it; there is no second bilinear.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DCN_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DCN_HOST_DEVICE inline __attribute__((always_inline))
#else
#define DCN_HOST_DEVICE inline
#endif

// After a lambda's parameters: inlined, so that it is compiled for the instruction set of the loop that calls it.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define DCN_INLINE_LAMBDA __attribute__((always_inline))
#else
#define DCN_INLINE_LAMBDA
#endif

namespace dcn {

// Corner c = 2 * (row is y0 + 1) + (column is x0 + 1). `A` is the accumulator type: float or double. `I`
// holds rows and columns; loops that are to become vectors use one as wide as float.
template <typename A, typename I = int64_t>
struct Sample {
  I y0, x0;          // top left corner; may be -1
  A ly, lx;          // fraction towards y0 + 1 and x0 + 1; NaN for a NaN position, 0 outside
  unsigned corners;  // bit c: corner c lies on the map
  I inside;          // 1: some do, else 0

  DCN_HOST_DEVICE bool has(int corner) const { return (corners >> corner) & 1u; }
  DCN_HOST_DEVICE I row(int corner) const { return y0 + (corner >> 1); }
  DCN_HOST_DEVICE I column(int corner) const { return x0 + (corner & 1); }
  DCN_HOST_DEVICE A weight(int corner) const { return (corner & 2 ? ly : 1 - ly) * (corner & 1 ? lx : 1 - lx); }
  DCN_HOST_DEVICE A weight_dy(int corner) const { return (corner & 2 ? A(1) : A(-1)) * (corner & 1 ? lx : 1 - lx); }
  DCN_HOST_DEVICE A weight_dx(int corner) const { return (corner & 1 ? A(1) : A(-1)) * (corner & 2 ? ly : 1 - ly); }
  // 0, or NaN for a NaN position: the start of every sum, so that a diverged offset shows in what reads it.
  DCN_HOST_DEVICE A origin() const { return ly * 0; }
};

// Zeros outside; bilinear within one pixel of the edge; y <= -1, y >= height (likewise x) and +-inf are outside: no
// corner. Without branches, so that a loop over positions can become vectors.
template <typename A, typename I>
DCN_HOST_DEVICE Sample<A, I> make_sample(A y, A x, I height, I width) {
  const bool inside = (y > -1) & (y < static_cast<A>(height)) & (x > -1) & (x < static_cast<A>(width));
  // Comparisons come before the conversion to integers: a huge or NaN position must never be converted.
  const A yi = inside ? y : A(0), xi = inside ? x : A(0);
  const A fy = std::floor(yi), fx = std::floor(xi);
  const A outside = ((y != y) | (x != x)) ? y + x : A(0);
  Sample<A, I> s;
  s.y0 = static_cast<I>(fy);
  s.x0 = static_cast<I>(fx);
  s.ly = inside ? yi - fy : outside;
  s.lx = inside ? xi - fx : outside;
  const unsigned rows = (s.y0 >= 0 ? 0x3u : 0u) | (s.y0 + 1 < height ? 0xCu : 0u);
  const unsigned columns = (s.x0 >= 0 ? 0x5u : 0u) | (s.x0 + 1 < width ? 0xAu : 0u);
  s.corners = inside ? rows & columns : 0u;
  s.inside = inside ? I(1) : I(0);
  return s;
}

// sum_c weight_c * read(row, column); a corner without weight is not read, so 0 * inf cannot arise.
template <typename A, typename Read>
DCN_HOST_DEVICE A interpolate(const Sample<A>& s, const Read& read) {
  A sum = s.origin();
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int c = 0; c < 4; ++c) {
    const A w = s.weight(c);
    if (s.has(c) && w != 0) sum += w * read(s.row(c), s.column(c));
  }
  return sum;
}

// Value and its derivatives by y and x in one pass over the corners.
template <typename A>
struct Gradient {
  A value, dy, dx;
};

// From value(corner), which may be a sum over channels; only corners on the map are asked for.
template <typename A, typename I, typename Value>
DCN_HOST_DEVICE Gradient<A> combine_corners(const Sample<A, I>& s, const Value& value) {
  Gradient<A> g{s.origin(), s.origin(), s.origin()};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int c = 0; c < 4; ++c) {
    if (!s.has(c)) continue;
    const A v = value(c), w = s.weight(c);
    if (w != 0) g.value += w * v;
    g.dy += s.weight_dy(c) * v;
    g.dx += s.weight_dx(c) * v;
  }
  return g;
}

template <typename A, typename I, typename Read>
DCN_HOST_DEVICE Gradient<A> interpolate_gradient(const Sample<A, I>& s, const Read& read) {
  return combine_corners(s, [&](int c) { return read(s.row(c), s.column(c)); });
}

}  // namespace dcn
