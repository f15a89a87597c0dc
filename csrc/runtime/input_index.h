// The index of the input (core/input_index.h) on a device: its memory, and its tasks one after the other.
#pragma once

#include "../core/input_index.h"
#include "tensor.h"

namespace dcn {

// An index with its memory.
template <typename A>
struct BuiltIndex {
  Tensor begin, entries;
  InputIndex<A> index;
};

// Of all positions, whose number must fit 32 bits. Nothing is read back on the host.
template <typename Device, typename P, typename A = PositionType<P>>
BuiltIndex<A> build_input_index(const P& positions, const Tensor& like) {
  InputIndex<A> index{positions.maps(), positions.height(), positions.width(), nullptr, nullptr};
  Tensor begin = torch::stable::new_zeros(like, {index.cells() + 1}, ScalarType::Int);
  Device::for_each(CountSamples<A, P>{index, positions, static_cast<int32_t*>(begin.data_ptr())}, like);
  begin = Device::running_sum(begin);
  const Tensor entries = torch::stable::new_empty(like, {4 * positions.size()}, scalar_type_of<A>());
  index.begin = static_cast<int32_t*>(begin.data_ptr());
  index.entries = static_cast<IndexEntry<A>*>(entries.data_ptr());
  Device::for_each(FillIndex<A, P>{index, positions}, like);
  Device::for_each(SortCells<A>{index, positions.size()}, like);
  return {begin, entries, index};
}

}  // namespace dcn
