// Deformable aggregation on the CPU, what is given for the taps of some pixels of a row: offsets and weights, brought
// side by side.
#pragma once

#include <cstring>

#include "call.h"

namespace dcn::tiles::aggregate {

// Copies `rows` pieces of `size` numbers, which lie `step` apart, side by side. Those of a 3 x 3 kernel get a loop of
// their own: a piece is a few instructions there.
template <int64_t Size, typename T>
DCN_HOST_DEVICE void join_pieces(const T* from, int64_t step, int64_t rows, int64_t size, T* to) {
  const int64_t count = Size ? Size : size;
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (Size != 0)
      std::memcpy(to + r * Size, from + r * step, Size * sizeof(T));
    else
      for (int64_t i = 0; i < count; ++i) to[r * count + i] = from[r * step + i];
  }
}

template <typename T>
DCN_HOST_DEVICE void join(const T* from, int64_t step, int64_t rows, int64_t size, T* to) {
  if (size == 9) return join_pieces<9>(from, step, rows, size, to);
  if (size == 18) return join_pieces<18>(from, step, rows, size, to);
  join_pieces<0>(from, step, rows, size, to);
}

// The numbers of the taps of `pixels` pixels from q on, in some groups: `each` of a tap, the second one `axis` behind
// the first. Where they lie, if that is side by side, else in `room`.
template <typename T>
DCN_HOST_DEVICE const T* side_by_side(const Given<T>& given, int64_t n, int64_t q, int64_t pixels, HeadRange groups,
                                      int64_t taps, int64_t each, T* room) {
  const T* const from = given.at(n, q, groups.first);
  const int64_t of_group = taps * each, of_pixel = groups.count * of_group;
  if (given.tap != each || (each > 1 && given.axis != 1)) {
    T* to = room;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t m = 0; m < groups.count; ++m)
        for (int64_t k = 0; k < taps; ++k)
          for (int64_t a = 0; a < each; ++a)
            *to++ = from[p * given.pixel + m * given.group + k * given.tap + a * given.axis];
    return room;
  }
  if (given.group == of_group || groups.count == 1) {
    if (given.pixel == of_pixel || pixels == 1) return from;
    join(from, given.pixel, pixels, of_pixel, room);
    return room;
  }
  for (int64_t p = 0; p < pixels; ++p)
    join(from + p * given.pixel, given.group, groups.count, of_group, room + p * of_pixel);
  return room;
}

// The other way round, for gradients, which are dense: pieces of `size` numbers go `step` apart.
template <typename T>
DCN_HOST_DEVICE void spread(const T* from, int64_t rows, int64_t size, int64_t step, T* to) {
  if (size == 9) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * step, from + r * 9, 9 * sizeof(T));
  } else if (size == 18) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * step, from + r * 18, 18 * sizeof(T));
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < size; ++i) to[r * step + i] = from[r * size + i];
  }
}

}  // namespace dcn::tiles::aggregate
