// Which samples read a pixel of the input: an inverted index, so that the gradient of the input is gathered in a fixed
// order and nothing is added atomically. It is a counting sort of samples by the cell they lie in: count, running sum
// (torch's), fill, sort each cell. Bodies as in bodies.h; build_input_index (portable.h) runs them.
#pragma once

#include "../../core/accumulate.h"
#include "bodies.h"

namespace dcn {

// A sample with a corner on the map. Its weights are kept, not found again from the offsets: a pixel is visited once
// for every few channels, through four cells, and would divide and look up offsets each time. One 16-byte access.
template <typename A>
struct alignas(4 * sizeof(A)) IndexEntry {
  A ly, lx, modulation;
  // tap * range.count + pixel of the range: its row where columns of an offset group are [K * pixels, channels], its
  // place in each channel where they are [channels, K * pixels].
  int32_t sample;

  DCN_HOST_DEVICE A weight(int corner) const {
    Sample<A> s{};
    s.ly = ly;
    s.lx = lx;
    return s.weight(corner);
  }
};

// Samples of a range by image, offset group and cell. A cell is where a sample's top left corner lies, from (-1, -1) to
// the last pixel; cells lie row by row.
template <typename A>
struct InputIndex {
  ConvGeometry g;
  PixelRange range;
  int64_t first_image, images;  // that the range has pixels of
  int32_t* begin;               // [cells + 1]
  IndexEntry<A>* entries;       // by cell, then by sample

  InputIndex(const ConvGeometry& geometry, const PixelRange& pixels)
      : g(geometry),
        range(pixels),
        first_image(pixels.first / geometry.out_pixels()),
        images((pixels.first + pixels.count - 1) / geometry.out_pixels() + 1 - first_image),
        begin(nullptr),
        entries(nullptr) {}

  DCN_HOST_DEVICE int64_t samples() const { return g.offset_groups * g.taps() * range.count; }
  DCN_HOST_DEVICE int64_t cells() const { return images * g.offset_groups * (g.height + 1) * (g.width + 1); }
  DCN_HOST_DEVICE int64_t cell(int64_t n, int64_t offset_group, int64_t y0, int64_t x0) const {
    const int64_t map = (n - first_image) * g.offset_groups + offset_group;
    return (map * (g.height + 1) + y0 + 1) * (g.width + 1) + x0 + 1;
  }

  // Calls f(sample, corner weight * mask) for every sample that reads pixel (y, x), always in the same order.
  template <typename F>
  DCN_HOST_DEVICE void for_each_entry(int64_t n, int64_t offset_group, int64_t y, int64_t x, const F& f) const {
    for (int corner = 3; corner >= 0; --corner) {
      const int64_t from = cell(n, offset_group, y - (corner >> 1), x - (corner & 1));
      const int32_t end = begin[from + 1];
      for (int32_t i = begin[from]; i < end; ++i) {
        const IndexEntry<A> entry = entries[i];
        const A w = entry.weight(corner);
        if (w != 0) f(entry.sample, w * entry.modulation);
      }
    }
  }
};

// Calls visit(cell, entry) for sample i of the index if it has a corner on the map: those outside and at NaN positions
// give no gradient to any pixel.
template <typename A, typename F, typename Visit>
DCN_HOST_DEVICE void visit_sample(const InputIndex<A>& index, const Displacement<A, F>& where, int64_t i,
                                  const Visit& visit) {
  const ConvGeometry& g = index.g;
  const int64_t per_group = g.taps() * index.range.count, og = i / per_group, sample = i % per_group;
  const int64_t k = sample / index.range.count;
  const Pixel p(g, index.range.first + sample % index.range.count);
  const Sample<A> s = where.sample(g, p, og, k);
  if (s.corners)
    visit(index.cell(p.n, og, s.y0, s.x0),
          IndexEntry<A>{s.ly, s.lx, where.modulation(g, p, og, k), static_cast<int32_t>(sample)});
}

// counts[cell] = how many samples lie in it.
template <typename A, typename F>
struct CountSamples {
  InputIndex<A> index;
  Displacement<A, F> where;
  int32_t* counts;  // zeros

  DCN_HOST_DEVICE int64_t size() const { return index.samples(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    visit_sample(index, where, i, [&](int64_t cell, const IndexEntry<A>&) { fetch_add(counts + cell, 1); });
  }
};

// begin[cell] is where the cell's entries end, and comes down to where they begin. Last sample first, so that lists
// come out nearly sorted where threads start in order.
template <typename A, typename F>
struct FillIndex {
  InputIndex<A> index;
  Displacement<A, F> where;

  DCN_HOST_DEVICE int64_t size() const { return index.samples(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    visit_sample(index, where, size() - 1 - i, [&](int64_t cell, const IndexEntry<A>& entry) {
      index.entries[fetch_add(index.begin + cell, -1) - 1] = entry;
    });
  }
};

// Ascending by sample, which is below 2^bits. Short lists by insertion. Long ones (offsets that all point at one place)
// bit by bit from the highest, in place: within a run of equal higher bits the zeros go before the ones.
template <typename A>
DCN_HOST_DEVICE void sort_by_sample(IndexEntry<A>* list, int32_t size, int bits) {
  if (size <= 32) {
    for (int32_t i = 1; i < size; ++i) {
      const IndexEntry<A> moved = list[i];
      int32_t to = i;
      for (; to > 0 && list[to - 1].sample > moved.sample; --to) list[to] = list[to - 1];
      if (to < i) list[to] = moved;
    }
    return;
  }
  for (int bit = bits - 1; bit >= 0; --bit) {
    for (int32_t first = 0; first < size;) {
      const int64_t run = static_cast<int64_t>(list[first].sample) >> (bit + 1);
      int32_t zeros = first, end = first;
      for (; end < size && static_cast<int64_t>(list[end].sample) >> (bit + 1) == run; ++end) {
        if (list[end].sample >> bit & 1) continue;
        if (zeros < end) {
          const IndexEntry<A> one = list[zeros];
          list[zeros] = list[end];
          list[end] = one;
        }
        ++zeros;
      }
      first = end;
    }
  }
}

// Slots are taken in any order; after this the index depends on its samples alone.
template <typename A>
struct SortCells {
  InputIndex<A> index;

  DCN_HOST_DEVICE int64_t size() const { return index.cells(); }
  DCN_HOST_DEVICE void operator()(int64_t cell) const {
    int bits = 0;
    while ((index.g.taps() * index.range.count - 1) >> bits) ++bits;
    const int32_t first = index.begin[cell];
    sort_by_sample(index.entries + first, index.begin[cell + 1] - first, bits);
  }
};

// grad_input[n, c, y, x] += sum of weight_corner * mask * grad_columns over the samples that read the pixel: the
// adjoint of FillColumns. One element: a pixel, in some channels of one offset group.
template <typename A, typename M>
struct GatherInputGradient {
  InputIndex<A> index;
  const M* grad_columns;
  View<A> grad_input;

  static constexpr int together = 8;  // channels that share one walk over the entries
  DCN_HOST_DEVICE int64_t blocks() const { return (index.g.offset_group_channels() + together - 1) / together; }
  DCN_HOST_DEVICE int64_t size() const {
    return index.images * index.g.offset_groups * blocks() * index.g.height * index.g.width;
  }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const ConvGeometry& g = index.g;
    const int64_t x = i % g.width, y = i / g.width % g.height, block = i / g.width / g.height;
    const int64_t n = index.first_image + block / blocks() / g.offset_groups;
    const int64_t og = block / blocks() % g.offset_groups, first = block % blocks() * together;
    const int64_t channels = g.offset_group_channels() - first, c = og * g.offset_group_channels() + first;
    const int64_t stride = g.taps() * index.range.count;
    const M* const from = grad_columns + c * stride;
    A sums[together] = {};
    bool any = false;
    index.for_each_entry(n, og, y, x, [&](int32_t sample, A weight) {
      any = true;
#if defined(__CUDACC__)
#pragma unroll
#endif
      for (int j = 0; j < together; ++j)
        if (j < channels) sums[j] += weight * static_cast<A>(from[j * stride + sample]);
    });
    if (!any) return;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int j = 0; j < together; ++j)
      if (j < channels) grad_input.at(n, c + j, y, x) += sums[j];
  }
};

}  // namespace dcn
