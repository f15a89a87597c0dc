// Which samples read a pixel of the input: an inverted index, so that the gradient of the input is gathered in a fixed
// order and nothing is added atomically. It is a counting sort of samples by the cell they lie in: count, running sum
// (torch's), fill, sort each cell; a large cell is divided into bins. Each struct is one of these tasks, element by
// element; build_input_index (runtime/input_index.h) runs them.
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
  int32_t chunk_bits;
  int32_t* begin;          // [cells + 1]
  IndexEntry<A>* entries;  // by cell, then by sample

  DCN_HOST_DEVICE int64_t cells() const { return maps * (height + 1) * (width + 1); }
  DCN_HOST_DEVICE int64_t cell(int64_t map, int64_t y0, int64_t x0) const {
    return (map * (height + 1) + y0 + 1) * (width + 1) + x0 + 1;
  }

  // A cell of at least 2^chunk_bits entries is cut evenly into chunks of at least as many, and fewer than twice as
  // many, which are summed up before pixels are (chunk_sums.h). Chunks are numbered by entries: a cell takes numbers
  // that no other has, whose end and size tell which.
  DCN_HOST_DEVICE int32_t chunks(int32_t entries) const { return entries >> chunk_bits; }
  DCN_HOST_DEVICE int32_t first_chunk(int32_t begins) const { return ((begins - 1) >> chunk_bits) + 1; }

  // Calls f(sample, corner weight * modulation) for the samples that read pixel (y, x), but of_chunk(chunk, corner) for
  // those that lie in chunks; always in the same order.
  template <typename F, typename G>
  DCN_HOST_DEVICE void for_each_part(int64_t map, int64_t y, int64_t x, const F& f, const G& of_chunk) const {
    for (int corner = 3; corner >= 0; --corner) {
      const int64_t from = cell(map, y - (corner >> 1), x - (corner & 1));
      const int32_t first = begin[from], last = begin[from + 1], count = chunks(last - first);
      if (count == 0) visit_entries(first, last, corner, f);
      for (int32_t i = 0; i < count; ++i) of_chunk(first_chunk(first) + i, corner);
    }
  }

  // The cell that a chunk is of, or -1 where no cell takes this number, and its entries.
  struct Chunk {
    int64_t cell;
    int32_t first, last;
  };
  DCN_HOST_DEVICE Chunk chunk(int32_t number) const {
    int64_t low = 0, high = cells();
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begin[middle] <= number << chunk_bits ? low : high) = middle;
    }
    const int32_t first = begin[low], size = begin[low + 1] - first, count = chunks(size);
    const int32_t i = number - first_chunk(first);
    if (i >= count) return {-1, 0, 0};
    const int32_t each = size / count, more = size % count;  // the first chunks have one more
    return {low, first + i * each + (i < more ? i : more), first + (i + 1) * each + (i < more ? i + 1 : more)};
  }
  template <typename F>
  DCN_HOST_DEVICE void for_each_entry(const Chunk& chunk, int corner, const F& f) const {
    visit_entries(chunk.first, chunk.last, corner, f);
  }

 private:
  template <typename F>
  DCN_HOST_DEVICE void visit_entries(int32_t i, int32_t end, int corner, const F& f) const {
    for (; i < end; ++i) {
      const IndexEntry<A> entry = entries[i];
      const A w = entry.weight(corner);
      if (w != 0) f(entry.sample, w * entry.modulation);
    }
  }
};

// Calls visit(cell, entry) for sample i if it has a corner on its map: those outside and at NaN positions give no
// gradient to any pixel.
template <typename A, typename P, typename Visit>
DCN_HOST_DEVICE void visit_sample(const InputIndex<A>& index, const P& positions, int64_t i, const Visit& visit) {
  static_assert(IsMapPositions<P>::value, "see positions.h");
  const auto s = positions.sample(i);
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

// Cells with many samples (offsets that all point at one place) are divided into bins by the samples' numbers, so that
// no thread has to sort, and no counter to count, more than a few. Bins are numbered by entries, kEntries for each: a
// cell takes those that lie inside its own part of the list, whose end and size tell where that is.
struct CellBins {
  static constexpr int32_t kEntries = 8, kSmall = 32;  // a cell of up to kSmall is not divided

  int32_t* counts;      // of cells
  int32_t* bin_counts;  // zeros at first
  int32_t* bin_ends;    // running sums of bin_counts

  DCN_HOST_DEVICE static int64_t bins(int64_t samples) { return samples / kEntries + 1; }
  DCN_HOST_DEVICE bool is_large(int64_t cell) const { return counts[cell] > kSmall; }
  DCN_HOST_DEVICE bool any_large(int64_t samples) const { return bin_ends[bins(samples) - 1] > 0; }
  DCN_HOST_DEVICE int32_t entries_of(int64_t bin) const { return bin_ends[bin] - (bin > 0 ? bin_ends[bin - 1] : 0); }
  DCN_HOST_DEVICE static int32_t first_bin(int32_t begin) { return begin / kEntries + 1; }
  // Of sample i; the numbers of its map are from `first` to before `last`. Rounding does not change the order of bins.
  DCN_HOST_DEVICE static int32_t bin(int32_t begin, int32_t size, int64_t first, int64_t last, int64_t i) {
    const int32_t each = size / kEntries - 1;
    const float share = static_cast<float>(each) / static_cast<float>(last - first);
    const int32_t found = static_cast<int32_t>(static_cast<float>(i - first) * share);
    return first_bin(begin) + (found < each ? found : each - 1);
  }
};

// Between which numbers the samples of a map lie: what P tells, or all.
template <typename P, typename = void>
struct NumbersOfMap {
  DCN_HOST_DEVICE static int64_t first(const P&, int64_t) { return 0; }
  DCN_HOST_DEVICE static int64_t last(const P& positions, int64_t) { return positions.size(); }
};
template <typename P>
struct NumbersOfMap<P, std::void_t<decltype(std::declval<const P&>().first_of_map(int64_t{0}))>> {
  DCN_HOST_DEVICE static int64_t first(const P& positions, int64_t map) { return positions.first_of_map(map); }
  DCN_HOST_DEVICE static int64_t last(const P& positions, int64_t map) { return positions.last_of_map(map); }
};

// begin[cell] is where the cell's entries end, and comes down to where they begin; of a large one only its bins are
// counted. Last sample first, so that lists come out nearly sorted where threads start in order.
template <typename A, typename P>
struct FillIndex {
  InputIndex<A> index;
  P positions;
  CellBins cells;

  DCN_HOST_DEVICE int64_t size() const { return positions.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t sample = size() - 1 - i;
    visit_sample(index, positions, sample, [&](int64_t cell, const IndexEntry<A>& entry) {
      if (cells.is_large(cell))
        fetch_add(cells.bin_counts + bin_of(cell, sample), 1);
      else
        index.entries[fetch_add(index.begin + cell, -1) - 1] = entry;
    });
  }
  DCN_HOST_DEVICE int32_t bin_of(int64_t cell, int64_t sample) const {
    const int64_t map = positions.map(sample);
    return CellBins::bin(index.begin[cell] - cells.counts[cell], cells.counts[cell],
                         NumbersOfMap<P>::first(positions, map), NumbersOfMap<P>::last(positions, map), sample);
  }
};

// The entries of large cells, bin after bin. Each bin's count comes down to 0, and then says where its entries begin.
template <typename A, typename P>
struct FillBins {
  FillIndex<A, P> fill;

  DCN_HOST_DEVICE int64_t size() const { return fill.size(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const CellBins& cells = fill.cells;
    if (!cells.any_large(size())) return;
    visit_sample(fill.index, fill.positions, i, [&](int64_t cell, const IndexEntry<A>& entry) {
      if (!cells.is_large(cell)) return;
      const int32_t begin = fill.index.begin[cell] - cells.counts[cell], bin = fill.bin_of(cell, i);
      const int32_t left = fetch_add(cells.bin_counts + bin, -1);
      const int32_t end = begin + cells.bin_ends[bin] - cells.bin_ends[CellBins::first_bin(begin) - 1];
      fill.index.entries[end - left] = entry;
      if (left == 1) fetch_add(cells.bin_counts + bin, end - cells.entries_of(bin));
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

// How many bits numbers below `samples` have.
DCN_HOST_DEVICE int bits_of(int64_t samples) {
  int bits = 0;
  while ((samples - 1) >> bits) ++bits;
  return bits;
}

// Slots are taken in any order; after this and SortBins the index depends on its samples alone.
template <typename A>
struct SortCells {
  InputIndex<A> index;
  CellBins cells;
  int64_t samples;

  DCN_HOST_DEVICE int64_t size() const { return index.cells(); }
  DCN_HOST_DEVICE void operator()(int64_t cell) const {
    if (cells.is_large(cell))
      index.begin[cell] -= cells.counts[cell];
    else if (cells.counts[cell] > 1)
      sort_by_sample(index.entries + index.begin[cell], cells.counts[cell], bits_of(samples));
  }
};

template <typename A>
struct SortBins {
  InputIndex<A> index;
  CellBins cells;
  int64_t samples;

  DCN_HOST_DEVICE int64_t size() const { return CellBins::bins(samples); }
  DCN_HOST_DEVICE void operator()(int64_t bin) const {
    const int32_t entries = cells.entries_of(bin);
    if (entries > 1) sort_by_sample(index.entries + cells.bin_counts[bin], entries, bits_of(samples));
  }
};

}  // namespace dcn
