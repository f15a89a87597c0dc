// Deformable aggregation on the CPU: an image of one group, brought together from the channels of all. There its rows
// fill few lines of the nearest cache, and a border of zeros takes what lies off the map, so that loops over taps have
// no branch.
#pragma once

#include "call.h"

namespace dcn::tiles::aggregate {

template <int N>
using Width = std::integral_constant<int, N>;

// Calls f(width, first) for blocks that cover the channels of a map's pixel.
template <typename F>
DCN_HOST_DEVICE void for_each_vector(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) f(Width<32>(), c);
  if (channels & 16) f(Width<16>(), c), c += 16;
  if (channels & 8) f(Width<8>(), c);
}

// The same for channels that are not padded: what is left of them is a channel at a time.
template <typename F>
DCN_HOST_DEVICE void for_each_piece(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) f(Width<16>(), c);
  if (channels & 8) f(Width<8>(), c), c += 8;
  for (; c < channels; ++c) f(Width<1>(), c);
}

// N channels of a row of pixels, `step` apart, to a map's. What is not finite is told by sums that are not 0.
template <int N, typename S, typename A>
DCN_HOST_DEVICE void pack_row(const S* from, int64_t step, int64_t pixels, int64_t channels, A* to, A& sum) {
  A zeros[N] = {};
  for (int64_t x = 0; x < pixels; ++x) {
    keep_iterations_apart();
#pragma omp simd
    for (int c = 0; c < N; ++c) {
      const A value = widen(from[x * step + c]);
      to[x * channels + c] = value;
      zeros[c] += value * 0;
    }
  }
  for (int c = 0; c < N; ++c) sum += zeros[c];
}

// A group's image, whose pixels are `step` apart, to a map that is 0 around it. Returns whether all of it is finite.
template <typename S, typename A>
DCN_HOST_DEVICE bool pack(const S* image, int64_t step, int64_t channels, const MapShape& shape, A* map) {
  A sum = 0;
  for (int64_t y = 0; y < shape.height; ++y) {
    const S* const from = image + y * shape.width * step;
    A* const to = map + shape.origin() + y * shape.row();
    for_each_piece(channels, [&](auto width, int64_t c) DCN_INLINE_LAMBDA {
      pack_row<decltype(width)::value>(from + c, step, shape.width, shape.channels, to + c, sum);
    });
  }
  return sum == 0;
}

// `channels` numbers of a row, from vectors.
template <typename S, typename A>
DCN_HOST_DEVICE void store_channels(const A* from, int64_t channels, S* to) {
  for_each_piece(channels, [&](auto width, int64_t c) DCN_INLINE_LAMBDA {
    constexpr int n = decltype(width)::value;
#pragma omp simd
    for (int i = 0; i < n; ++i) to[c + i] = narrow<S>(from[c + i]);
  });
}

// The way back.
template <typename S, typename A>
DCN_HOST_DEVICE void unpack(const A* map, const MapShape& shape, int64_t channels, int64_t step, S* image) {
  for (int64_t y = 0; y < shape.height; ++y)
    for (int64_t x = 0; x < shape.width; ++x)
      store_channels(map + shape.origin() + y * shape.row() + x * shape.channels, channels,
                     image + (y * shape.width + x) * step);
}

// The four corners of a tap on a map, from some channel on, by the bytes that a tap's offset counts.
struct Corners {
  int64_t first, right, below;  // upper left of pixel (0, 0); how far the others are

  template <typename A>
  DCN_HOST_DEVICE static Corners of(const MapShape& shape, const A* map, int64_t channel = 0) {
    const int64_t size = sizeof(A);
    return {reinterpret_cast<int64_t>(map + shape.origin() + channel), shape.channels * size, shape.row() * size};
  }
  template <typename A>
  DCN_HOST_DEVICE A* at(int64_t offset, int corner) const {
    return reinterpret_cast<A*>(first + offset + (corner & 1 ? right : 0) + (corner & 2 ? below : 0));
  }
};

// Memory for maps, zeros at first: of the thread where they are small, else of its own.
template <typename A>
class MapMemory {
 public:
  MapMemory(const MapShape& shape, int64_t maps, const Tensor& like)
      : held_(
            torch::stable::new_empty(like, {is_large(shape, maps) ? maps * shape.numbers() : 0}, scalar_type_of<A>())),
        count_(maps * shape.numbers()) {
    data_ = is_large(shape, maps) ? static_cast<A*>(held_.data_ptr()) : thread_scratch<A, -2>(count_);
    std::fill_n(data_, count_, A(0));
  }
  A* data() const { return data_; }

 private:
  static bool is_large(const MapShape& shape, int64_t maps) {
    return maps * shape.numbers() * static_cast<int64_t>(sizeof(A)) > (1 << 20);
  }
  Tensor held_;
  int64_t count_;
  A* data_;
};

}  // namespace dcn::tiles::aggregate
