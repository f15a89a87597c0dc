// Bodies whose elements need sums over many values: some threads side by side, within a warp, share an element.
#pragma once

#include "gpu_values.h"

namespace dcn {

// Body has, instead of operator(), place(i), what is at hand for all threads of an element; add_up(place, lane, lanes),
// the sums `of[]` of one of them; and finish(place, sums) with those of all. These are added in pairs, lane and lane +
// lanes / 2 first, on the host by the first lane alone.
template <typename Body>
struct SharedSums {
  Body body;
  int shift;  // 2^shift lanes, up to 32

  // Whole warps, since all threads of a warp take part in an exchange.
  DCN_HOST_DEVICE int64_t size() const { return ((body.size() << shift) + 31) / 32 * 32; }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int lanes = 1 << shift, lane = static_cast<int>(i) & (lanes - 1);
    const bool exists = i >> shift < body.size();
#if defined(__CUDA_ARCH__)
    const auto place = body.place(exists ? i >> shift : 0);
    auto sums = body.add_up(place, lane, lanes);
    for (int distance = lanes >> 1; distance; distance >>= 1)
      for (auto& sum : sums.of) sum += __shfl_xor_sync(~0u, sum, distance);
    if (exists && lane == 0) body.finish(place, sums);
#else
    if (!exists || lane != 0) return;
    const auto place = body.place(i >> shift);
    body.finish(place, add_lanes(place, 0, 1));
#endif
  }

 private:
  // Of the lanes first, first + step, ...
  template <typename Place>
  auto add_lanes(const Place& place, int first, int step) const {
    if (step == 1 << shift) return body.add_up(place, first, step);
    auto sums = add_lanes(place, first, 2 * step);
    const auto others = add_lanes(place, first + step, 2 * step);
    auto* sum = sums.of;
    for (const auto& other : others.of) *sum++ += other;
    return sums;
  }
};

}  // namespace dcn
