// Images on the CPU as rows: [N, H, W, C] in the accumulator type, so that vectors run over channels. The tuned paths
// of all operators read and write them.
#pragma once

#include <algorithm>

#include "../core/view.h"
#include "cpu_values.h"

namespace dcn::tiles {

DCN_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixel (n, y, x) starts at data + n * this->n + y * h + x * w.
template <typename A>
struct Rows {
  A* data;
  int64_t n, h, w;
  DCN_HOST_DEVICE A* at(int64_t in, int64_t y, int64_t x) const { return data + in * n + y * h + x * w; }
};

struct ImageSize {
  int64_t channels, height, width;
  int64_t elements() const { return channels * height * width; }
};

// Whether a tensor's channels lie together, in the accumulator type: then it is rows as it stands.
template <typename S>
bool is_rows(const Tensor& t) {
  return std::is_same_v<S, Accumulate<S>> && (t.stride(1) == 1 || t.size(1) == 1);
}

// to[i] = from[i], widened to the accumulator type or rounded from it.
template <typename To, typename From>
DCN_HOST_DEVICE void convert(const From* __restrict from, int64_t count, To* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(To) == 2)
      to[i] = narrow<To>(from[i]);
    else
      to[i] = widen(from[i]);
  }
}

#if defined(__GNUC__)
// Vectors of four floats, which every 64-bit processor has; the stored one may lie at any float.
typedef float Quad __attribute__((vector_size(16)));
typedef float StoredQuad __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define DCN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int QuadOfInts __attribute__((vector_size(16)));
#define DCN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadOfInts{__VA_ARGS__})
#endif

DCN_HOST_DEVICE void transpose_quads(Quad (&q)[4]) {
  const Quad a = DCN_SHUFFLE(q[0], q[1], 0, 4, 1, 5), b = DCN_SHUFFLE(q[2], q[3], 0, 4, 1, 5);
  const Quad c = DCN_SHUFFLE(q[0], q[1], 2, 6, 3, 7), d = DCN_SHUFFLE(q[2], q[3], 2, 6, 3, 7);
  q[0] = DCN_SHUFFLE(a, b, 0, 1, 4, 5);
  q[1] = DCN_SHUFFLE(a, b, 2, 3, 6, 7);
  q[2] = DCN_SHUFFLE(c, d, 0, 1, 4, 5);
  q[3] = DCN_SHUFFLE(c, d, 2, 3, 6, 7);
}
#undef DCN_SHUFFLE
#define DCN_QUADS

template <int64_t Count>
DCN_HOST_DEVICE Quad sum_quads(const StoredQuad* quads) {
  if constexpr (Count == 1)
    return quads[0];
  else
    return sum_quads<Count / 2>(quads) + sum_quads<Count / 2>(quads + Count / 2);
}
#endif

// sums[c] += sum of part c's lanes, as a tree: the compiler by itself would add one lane after the other.
template <typename A, int64_t Lanes>
DCN_HOST_DEVICE void add_lanes(const A (&parts)[4][Lanes], A* sums) {
#if defined(DCN_QUADS)
  if constexpr (std::is_same_v<A, float> && (Lanes == 16 || Lanes == 8 || Lanes == 4)) {
    Quad q[4];
    for (int c = 0; c < 4; ++c) q[c] = sum_quads<Lanes / 4>(reinterpret_cast<const StoredQuad*>(parts[c]));
    transpose_quads(q);
    StoredQuad* const to = reinterpret_cast<StoredQuad*>(sums);
    *to = *to + ((q[0] + q[1]) + (q[2] + q[3]));
    return;
  }
#endif
  for (int c = 0; c < 4; ++c) {
    A sum = 0;
    for (int64_t i = 0; i < Lanes; ++i) sum += parts[c][i];
    sums[c] += sum;
  }
}

enum class Transpose { kToRows, kFromRows, kAddFromRows };

// Moves one line of an image, [C, W] of any type and layout, to rows, [W, C] in the accumulator type; or back, which
// overwrites the image (kFromRows) or adds to it (kAddFromRows).
template <typename A, typename S, Transpose Direction>
struct TransposeRow {
  S* image;
  int64_t channel_stride, column_stride, channels, width;
  A* row;
  int64_t pixel_stride;

  DCN_HOST_DEVICE void operator()() const {
    if (channel_stride == 1) return copy();
    int64_t done = 0;
#if defined(DCN_QUADS)
    if constexpr (std::is_same_v<A, float>) {
      if (column_stride == 1) done = transpose_planes();
    }
#endif
    for (int64_t x = 0; x < width; ++x) move(x, done, channels);
  }

  DCN_HOST_DEVICE void move(int64_t x, int64_t first, int64_t last) const {
    for (int64_t c = first; c < last; ++c) {
      S& pixel = image[c * channel_stride + x * column_stride];
      A& value = row[x * pixel_stride + c];
      if constexpr (Direction == Transpose::kToRows)
        value = static_cast<A>(pixel);
      else if constexpr (Direction == Transpose::kFromRows)
        pixel = static_cast<S>(value);
      else
        pixel = static_cast<S>(static_cast<A>(pixel) + value);
    }
  }

  // Channels lie together on both sides.
  DCN_HOST_DEVICE void copy() const {
    for (int64_t x = 0; x < width; ++x) {
      S* const pixel = image + x * column_stride;
      A* const value = row + x * pixel_stride;
      if constexpr (Direction == Transpose::kToRows) convert(pixel, channels, value);
      if constexpr (Direction == Transpose::kFromRows) convert(value, channels, pixel);
      if constexpr (Direction == Transpose::kAddFromRows) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) pixel[c] = static_cast<S>(static_cast<A>(pixel[c]) + value[c]);
      }
    }
  }

#if defined(DCN_QUADS)
  // For channels whose pixels lie together: four channels at a time, `part` pixels of half types converted at once.
  // Returns how many channels it has moved.
  DCN_HOST_DEVICE int64_t transpose_planes() const {
    constexpr int64_t part = 64;
    constexpr bool same = std::is_same_v<std::remove_const_t<S>, float>;
    float buffer[same ? 1 : 4 * part];
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4)
      for (int64_t first = 0; first < width; first += part) {
        const int64_t count = width - first < part ? width - first : part;
        float* plane[4];
        for (int i = 0; i < 4; ++i) {
          S* const from = image + (c + i) * channel_stride + first;
          if constexpr (same) {
            plane[i] = const_cast<float*>(from);
          } else {
            plane[i] = buffer + i * part;
            if constexpr (Direction != Transpose::kFromRows) convert(from, count, plane[i]);
          }
        }
        transpose_part(plane, count, row + first * pixel_stride + c);
        if constexpr (!same && Direction != Transpose::kToRows)
          for (int i = 0; i < 4; ++i) convert(plane[i], count, image + (c + i) * channel_stride + first);
      }
    return c;
  }

  DCN_HOST_DEVICE void transpose_part(float* const (&plane)[4], int64_t count, float* pixels) const {
    const auto load = [](const float* at)
                          DCN_INLINE_LAMBDA -> Quad { return *reinterpret_cast<const StoredQuad*>(at); };
    const auto store = [](float* at, Quad q) DCN_INLINE_LAMBDA { *reinterpret_cast<StoredQuad*>(at) = q; };
    int64_t x = 0;
    for (; x + 4 <= count; x += 4) {
      Quad q[4];
      for (int i = 0; i < 4; ++i)
        q[i] = load(Direction == Transpose::kToRows ? plane[i] + x : pixels + (x + i) * pixel_stride);
      transpose_quads(q);
      for (int i = 0; i < 4; ++i) {
        if constexpr (Direction == Transpose::kToRows) store(pixels + (x + i) * pixel_stride, q[i]);
        if constexpr (Direction == Transpose::kFromRows) store(plane[i] + x, q[i]);
        if constexpr (Direction == Transpose::kAddFromRows) store(plane[i] + x, load(plane[i] + x) + q[i]);
      }
    }
    for (; x < count; ++x)
      for (int i = 0; i < 4; ++i) {
        if constexpr (Direction == Transpose::kToRows) pixels[x * pixel_stride + i] = plane[i][x];
        if constexpr (Direction == Transpose::kFromRows) plane[i][x] = pixels[x * pixel_stride + i];
        if constexpr (Direction == Transpose::kAddFromRows) plane[i][x] += pixels[x * pixel_stride + i];
      }
  }
#endif
};

// How many of `batch` images are held as rows at a time.
template <typename A>
int64_t images_at_a_time(const ImageSize& size, int64_t batch) {
  constexpr int64_t budget = 16 << 20;
  return std::max<int64_t>(1, std::min(batch, budget / (size.elements() * static_cast<int64_t>(sizeof(A)))));
}

}  // namespace dcn::tiles
