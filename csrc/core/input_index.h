// Which samples read a pixel of the input: an inverted index, so that the gradient of the input is gathered in a fixed
// order and nothing is added atomically. It is a counting sort of samples by the cell they lie in: count, running sum
// (torch's), fill, sort each cell. Each struct is one of these tasks, element by element; build_input_index
// (runtime/input_index.h) runs them.
#pragma once

#include "accumulate.h"
#include "positions.h"

namespace dcn {

// A sample with a corner on the map. Its fractions are kept, not found again from its position: a pixel is visited once
// for every few channels, through four cells, and would divide and look up offsets each time. One 16-byte access.
template <typename A>
struct alignas(4 * sizeof(A)) IndexEntry {
  A ly, lx, modulation;
  int32_t sample;  // its number among the positions

  DCN_HOST_DEVICE A weight(int corner) const {
    Sample<A> s{};
    s.ly = ly;
    s.lx = lx;
    return s.weight(corner);
  }
};

// Samples by map and cell. A cell is where a sample's top left corner lies, from (-1, -1) to the map's last pixel; the
// cells of a map lie row by row.
template <typename A>
struct InputIndex {
  int64_t maps, height, width;
  int32_t* begin;          // [cells + 1]
  IndexEntry<A>* entries;  // by cell, then by sample

  DCN_HOST_DEVICE int64_t cells() const { return maps * (height + 1) * (width + 1); }
  DCN_HOST_DEVICE int64_t cell(int64_t map, int64_t y0, int64_t x0) const {
    return (map * (height + 1) + y0 + 1) * (width + 1) + x0 + 1;
  }

  // Calls f(sample, corner weight * modulation) for every sample that reads pixel (y, x), always in the same order.
  template <typename F>
  DCN_HOST_DEVICE void for_each_entry(int64_t map, int64_t y, int64_t x, const F& f) const {
    for (int corner = 3; corner >= 0; --corner) {
      const int64_t from = cell(map, y - (corner >> 1), x - (corner & 1));
      const int32_t end = begin[from + 1];
      for (int32_t i = begin[from]; i < end; ++i) {
        const IndexEntry<A> entry = entries[i];
        const A w = entry.weight(corner);
        if (w != 0) f(entry.sample, w * entry.modulation);
      }
    }
  }
};

// Calls visit(cell, entry) for sample i if it has a corner on its map: those outside and at NaN positions give no
// gradient to any pixel.
template <typename A, typename P, typename Visit>
DCN_HOST_DEVICE void visit_sample(const InputIndex<A>& index, const P& positions, int64_t i, const Visit& visit) {
  static_assert(IsMapPositions<P>::value, "see positions.h");
  const Sample<A> s = positions.sample(i);
  if (s.corners)
    visit(index.cell(positions.map(i), s.y0, s.x0),
          IndexEntry<A>{s.ly, s.lx, positions.modulation(i), static_cast<int32_t>(i)});
}

// counts[cell] = how many samples lie in it.
template <typename A, typename P>
struct CountSamples {
  InputIndex<A> index;
  P positions;
  int32_t* counts;  // zeros

  DCN_HOST_DEVICE int64_t size() const { return positions.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    visit_sample(index, positions, i, [&](int64_t cell, const IndexEntry<A>&) { fetch_add(counts + cell, 1); });
  }
};

// begin[cell] is where the cell's entries end, and comes down to where they begin. Last sample first, so that lists
// come out nearly sorted where threads start in order.
template <typename A, typename P>
struct FillIndex {
  InputIndex<A> index;
  P positions;

  DCN_HOST_DEVICE int64_t size() const { return positions.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    visit_sample(index, positions, size() - 1 - i, [&](int64_t cell, const IndexEntry<A>& entry) {
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
  int64_t samples;

  DCN_HOST_DEVICE int64_t size() const { return index.cells(); }
  DCN_HOST_DEVICE void operator()(int64_t cell) const {
    int bits = 0;
    while ((samples - 1) >> bits) ++bits;
    const int32_t first = index.begin[cell];
    sort_by_sample(index.entries + first, index.begin[cell + 1] - first, bits);
  }
};

}  // namespace dcn
