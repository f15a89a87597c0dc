// Gathering through an index (input_index.h) in which any number of samples may lie in one cell: chunks of a large cell
// are summed up first, by threads of their own. So a thread walks over as many entries, or chunks, as are the root of
// the number of a map's samples, not over all of them.
//
// A gather G says what is added up. One element has a part, such as some channels, of a pixel of a map:
//
//   InputIndex<A> index;
//   static constexpr int kSums;                    how many sums an element has
//   int64_t parts() const;                         of one map
//   Place place(int64_t map, int64_t part) const;  what all samples of an element share
//   Values load(const Place&, int32_t sample) const;
//   static void add(A (&sums)[kSums], A weight, const Values&);
#pragma once

#include "input_index.h"

namespace dcn {

template <typename A, int N>
struct alignas(16) GatheredSums {
  A of[N] = {};
};
template <typename G>
using SumsOf = GatheredSums<typename G::Accumulator, G::kSums>;

// The sums of chunks for each of the four pixels of their cell.
template <typename G>
struct SumChunks {
  static constexpr int64_t kGrain = 16;  // an element walks over tens of entries: few of them are work for a thread
  G gather;
  int64_t chunks;
  SumsOf<G>* sums;  // [chunks of the index, 4 corners, parts]

  DCN_HOST_DEVICE int64_t size() const { return chunks * 4 * gather.parts(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const auto& index = gather.index;
    const int64_t parts = gather.parts(), of = i / parts;
    const auto chunk = index.chunk(static_cast<int32_t>(of / 4));
    if (chunk.cell < 0) return;
    const auto place = gather.place(chunk.cell / ((index.height + 1) * (index.width + 1)), i - of * parts);
    SumsOf<G> found;
    index.for_each_entry(chunk, static_cast<int>(of % 4), [&](int32_t sample, typename G::Accumulator weight) {
      G::add(found.of, weight, gather.load(place, sample));
    });
    sums[i] = found;
  }
};

// Adds to `sums` what all samples that read a pixel give it, in an order that does not vary. Returns whether any does.
template <typename G>
DCN_HOST_DEVICE bool gather_pixel(const G& gather, const SumsOf<G>* chunk_sums, int64_t map, int64_t part, int64_t y,
                                  int64_t x, SumsOf<G>& sums) {
  const auto place = gather.place(map, part);
  bool any = false;
  gather.index.for_each_part(
      map, y, x,
      [&](int32_t sample, typename G::Accumulator weight) {
        any = true;
        G::add(sums.of, weight, gather.load(place, sample));
      },
      [&](int32_t chunk, int corner) {
        any = true;
        const SumsOf<G> more = chunk_sums[(chunk * int64_t{4} + corner) * gather.parts() + part];
        for (int e = 0; e < G::kSums; ++e) sums.of[e] += more.of[e];
      });
  return any;
}

}  // namespace dcn
