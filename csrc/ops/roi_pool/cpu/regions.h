// The regions of a call on the CPU, by image.
#pragma once

#include "taps.h"

namespace dcn::tiles::regions {

// What all regions of a call share.
template <typename A>
struct RegionsOfCall {
  RoiPlaces<A> where;
  BinTable table;
  std::vector<RoiFrame<A>> frames;  // by region
  std::vector<int64_t> order;       // of their images; those that name none come last
  std::vector<int64_t> starts;      // image n has order[starts[n]] to order[starts[n + 1] - 1]

  explicit RegionsOfCall(const RoiPlaces<A>& places)
      : where(places), table(places.g), frames(places.g.rois), order(places.g.rois), starts(places.g.batch + 2) {
    const int64_t none = where.g.batch;
    const auto image = [&](int64_t r) { return frames[r].image < 0 ? none : frames[r].image; };
    for (int64_t r = 0; r < where.g.rois; ++r) {
      frames[r] = where.g.frame(where.rois + 5 * r);
      ++starts[image(r) + 1];
    }
    for (int64_t n = 0; n <= none; ++n) starts[n + 1] += starts[n];
    std::vector<int64_t> next(starts);
    for (int64_t r = 0; r < where.g.rois; ++r) order[next[image(r)]++] = r;
  }

  // Calls f(class, bin, its taps, where it lies) for the bins of a region.
  template <typename F>
  DCN_HOST_DEVICE void for_each_bin(const RegionTaps<A>& taps, const F& f) const {
    for (int64_t bin = 0; bin < where.g.bins(); ++bin)
      for (int64_t c = 0; c < where.g.classes; ++c) f(c, bin, taps.bin(c, bin, table.bins[bin]), table.bins[bin]);
  }
};

template <typename A>
struct FindTaps {
  const RegionsOfCall<A>& regions;
  int64_t r;
  RegionTaps<A>& taps;
  DCN_HOST_DEVICE void operator()() const { taps.find(regions.where, regions.table, regions.frames[r], r); }
};

}  // namespace dcn::tiles::regions
