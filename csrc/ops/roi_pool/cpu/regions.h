// The regions of a call on the CPU, by image.
#pragma once

#include "taps.h"

namespace dcn::tiles::regions {

template <typename A>
struct RegionsByImage {
  Regions<A> regions;
  BinTable table;
  std::vector<RoiFrame<A>> frames;  // of each region
  std::vector<int64_t> order;       // regions by image, the invalid ones last
  std::vector<int64_t> starts;      // those of image n are order[starts[n]] to order[starts[n + 1] - 1]

  explicit RegionsByImage(const Regions<A>& all)
      : regions(all), table(all.g), frames(all.g.rois), order(all.g.rois), starts(all.g.batch + 2) {
    const int64_t none = all.g.batch;
    const auto image = [&](int64_t r) { return frames[r].image < 0 ? none : frames[r].image; };
    for (int64_t r = 0; r < all.g.rois; ++r) {
      frames[r] = all.frame(r);
      ++starts[image(r) + 1];
    }
    for (int64_t n = 0; n <= none; ++n) starts[n + 1] += starts[n];
    std::vector<int64_t> next(starts);
    for (int64_t r = 0; r < all.g.rois; ++r) order[next[image(r)]++] = r;
  }

  // The regions of `count` images from `image` on are order[range.first] to order[range.last - 1].
  Span of_images(int64_t image, int64_t count) const { return {starts[image], starts[image + count]}; }
  Span invalid() const { return {starts[regions.g.batch], regions.g.rois}; }

  // Calls f(class, bin, taps of the bin, entry in the table) for some bins of a region.
  template <typename F>
  DCN_HOST_DEVICE void for_each_bin(const RegionTaps<A>& taps, const Span& bins, const F& f) const {
    for (int64_t bin = bins.first; bin < bins.last; ++bin)
      for (int64_t c = 0; c < regions.g.classes; ++c) f(c, bin, taps.bin(c, bin, table.bins[bin]), table.bins[bin]);
  }
};

template <typename A>
struct FindRegionTaps {
  const RegionsByImage<A>& all;
  int64_t r;
  Span bins;
  RegionTaps<A>& taps;
  DCN_HOST_DEVICE void operator()() const { taps.find(all.regions, all.table, all.frames[r], r, bins); }
};

}  // namespace dcn::tiles::regions
