// The index of the input (core/input_index.h) on a device: its memory, and its tasks one after the other.
#pragma once

#include <algorithm>

#include "../core/chunk_sums.h"
#include "tensor.h"

namespace dcn {

// An index with its memory.
template <typename A>
struct BuiltIndex {
  Tensor begin, entries;
  InputIndex<A> index;
};

// Of the chunks of an index (core/chunk_sums.h): were all samples of a map in one cell, some thread would walk over the
// entries of a chunk, another over the cell's chunks, two of which take the time of an entry. 32 are too few to divide.
inline int32_t chunk_bits(int64_t samples_of_map) {
  int32_t bits = 5;
  while (int64_t{2} << 2 * bits < samples_of_map) ++bits;
  return bits;
}

// Of all positions, whose number must fit 32 bits. Nothing is read back on the host.
template <typename Device, typename P, typename A = PositionType<P>>
BuiltIndex<A> build_input_index(const P& positions, const Tensor& like) {
  InputIndex<A> index{positions.maps(), positions.height(), positions.width(), 0, nullptr, nullptr};
  index.chunk_bits = chunk_bits(positions.size() / std::max<int64_t>(1, positions.maps()));
  const auto counts_of = [](const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); };
  const int64_t samples = positions.size();
  const Tensor counts = torch::stable::new_zeros(like, {index.cells() + 1}, ScalarType::Int);
  Device::for_each(CountSamples<A, P>{index, positions, counts_of(counts)}, like);
  const Tensor begin = Device::running_sum(counts);
  const Tensor bin_counts = torch::stable::new_zeros(like, {CellBins::bins(samples)}, ScalarType::Int);
  const Tensor entries = torch::stable::new_empty(like, {4 * samples}, scalar_type_of<A>());
  index.begin = counts_of(begin);
  index.entries = static_cast<IndexEntry<A>*>(entries.data_ptr());
  CellBins cells{counts_of(counts), counts_of(bin_counts), nullptr};
  Device::for_each(FillIndex<A, P>{index, positions, cells}, like);
  const Tensor bin_ends = Device::running_sum(bin_counts);
  cells.bin_ends = counts_of(bin_ends);
  Device::for_each(FillBins<A, P>{{index, positions, cells}}, like);
  Device::for_each(SortCells<A>{index, cells, samples}, like);
  Device::for_each(SortBins<A>{index, cells, samples}, like);
  return {begin, entries, index};
}

// The sums of the chunks of its large cells, for a gather (core/chunk_sums.h), with their memory.
struct SummedChunks {
  Tensor memory;

  template <typename G>
  const SumsOf<G>* of(const G&) const {
    return static_cast<const SumsOf<G>*>(memory.data_ptr());
  }
};
template <typename Device, typename G>
SummedChunks sum_chunks(const G& gather, int64_t samples, const Tensor& like) {
  const int64_t chunks = gather.index.first_chunk(static_cast<int32_t>(samples));  // the number after all others
  using A = typename G::Accumulator;
  const int64_t values = sizeof(SumsOf<G>) / sizeof(A);
  const SummedChunks found{torch::stable::new_empty(like, {chunks * 4 * gather.parts() * values}, scalar_type_of<A>())};
  Device::for_each(SumChunks<G>{gather, chunks, static_cast<SumsOf<G>*>(found.memory.data_ptr())}, like);
  return found;
}

}  // namespace dcn
