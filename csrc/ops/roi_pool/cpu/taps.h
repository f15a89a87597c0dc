// What the bins of a region read on the CPU. The samples of a bin lie on a grid, so the weight of a pixel is that of
// its row times that of its column: each row and each column is listed once, with its weight summed over the samples
// that read it.
#pragma once

#include <vector>

#include "../../../core/roi_positions.h"
#include "../../../runtime/cpu_taps.h"

namespace dcn::tiles::regions {

// Why the tuned path does not serve a call: an Index does not reach everywhere on the map. Null: it does.
inline const char* why_portable(const RoiGeometry& g) {
  constexpr int64_t max = int64_t{1} << 30;
  return g.height < max && g.width < max ? nullptr : "input: expected fewer than 2^30 rows and columns";
}

// What is true of some samples of a bin along an axis: they are on the map; their values vary with their position; they
// have no position, because the offset is NaN.
enum Some : Index { kOnMap = 1, kVary = 2, kNaN = 4 };

// The rows, or the columns, that a bin reads. Number i < count is index[i * stride], and so on.
template <typename A>
struct TapList {
  const Index* index;
  const A *weight, *slope;  // sums over the samples: weights, and their derivatives by the samples' position
  const Index* varies;      // whether a sample's value varies with its position here
  int64_t stride;
  Index count, some;
  A samples;  // how many samples the mean is over

  DCN_HOST_DEVICE bool has(Some which) const { return some & which; }
};

template <typename A>
struct BinTaps {
  TapList<A> y, x;

  DCN_HOST_DEVICE A inverse_count() const { return inverse_sample_count(y.samples, x.samples); }
  // What the sums for a bin's value and its derivatives begin with: NaN where a sample has no position, else 0.
  DCN_HOST_DEVICE A value_origin() const { return origin(kOnMap, kOnMap); }
  DCN_HOST_DEVICE A dy_origin() const { return origin(kVary, kOnMap); }
  DCN_HOST_DEVICE A dx_origin() const { return origin(kOnMap, kVary); }

 private:
  DCN_HOST_DEVICE A origin(Some of_y, Some of_x) const {
    const bool nan = (y.has(kNaN) && x.has(of_x)) || (x.has(kNaN) && y.has(of_y));
    return nan ? static_cast<A>(NAN) : A(0);
  }
};

// Where each bin lies in the output, in offset and mask, and in the groups of channels: a table, since it takes
// divisions.
struct BinTable {
  struct Entry {
    int64_t along[2], part, cell;  // row and column of the bin
  };
  std::vector<Entry> bins;

  explicit BinTable(const RoiGeometry& g) {
    bins.reserve(g.bins());
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t x = 0; x < g.out_width; ++x) bins.push_back({{y, x}, g.part_index(y, x), g.cell_of(y, x)});
  }
};

// The lists of some bins of a region along one axis (0: rows, 1: columns). Bins whose samples lie alike share a list.
template <typename A>
class AxisTaps {
 public:
  DCN_HOST_DEVICE void find(const Regions<A>& regions, const BinTable& table, const RoiFrame<A>& f, int64_t r, int axis,
                            const Span& of) {
    const RoiGeometry& g = regions.g;
    // Without offsets all bins of one row read the same rows.
    const int64_t classes = regions.offset ? g.classes : 1,
                  bins = regions.offset ? of.last - of.first : g.bins_along(axis);
    const BinTable::Entry* const entries = table.bins.data() + of.first;
    const auto for_each_list = [&](const auto& f) DCN_INLINE_LAMBDA {
      for (int64_t c = 0, i = 0; c < classes; ++c)
        for (int64_t b = 0; b < bins; ++b, ++i) {
          if (regions.offset)
            f(i, entries[b].along[axis], regions.displacement(r, c, entries[b].part, axis));
          else
            f(i, b, A(0));
        }
    };
    make_room_for_lists(classes * bins);
    // Compared before it is converted: there may be any number of samples, or NaN.
    if (g.rule != RoiRule::kPixels && f.samples[axis] <= max_at_once) {
      for_each_list([&](int64_t i, int64_t bin, A offset)
                        DCN_INLINE_LAMBDA { first_[i] = g.start(f, bin, offset, regions.size(f, axis), axis); });
      find_few(g, g.shared_axis(f, axis), static_cast<int64_t>(f.samples[axis]), static_cast<Index>(g.extent(axis)));
    } else {
      int64_t used = 0;
      for_each_list([&](int64_t i, int64_t bin, A offset) DCN_INLINE_LAMBDA {
        used +=
            find_many(i, g.axis(f, bin, offset, regions.size(f, axis), axis), static_cast<Index>(g.extent(axis)), used);
      });
    }
  }
  DCN_HOST_DEVICE TapList<A> list(int64_t i) const {
    const int64_t at = start_[i];
    return {index_.data() + at, weight_.data() + at, slope_.data() + at, varies_.data() + at, stride_, count_[i],
            some_[i],           samples_[i]};
  }

 private:
  static constexpr int64_t max_at_once = 8;  // samples
  // Of each list. `padded_` is their number, rounded up to a multiple of 16: so loops over lists are whole vectors.
  int64_t padded_ = 0, stride_ = 0;
  std::vector<int64_t> start_;
  std::vector<Index> count_, some_;
  std::vector<A> samples_, first_;
  // Of each tap of the lists.
  std::vector<Index> index_, varies_;
  std::vector<A> weight_, slope_;
  // Of each list, while it is found: of the present sample the row above it, that row's place in the list, whether it
  // is valid (on the map, and not NaN) and varies, and the weights of the rows above and below it.
  std::vector<Index> row_, place_, valid_, varying_;
  std::vector<A> above_, below_;

  DCN_HOST_DEVICE void make_room_for_lists(int64_t lists) {
    padded_ = (lists + 15) / 16 * 16;
    if (padded_ <= static_cast<int64_t>(start_.size())) return;
    start_.resize(padded_);
    for (std::vector<Index>* v : {&count_, &some_, &row_, &place_, &valid_, &varying_}) v->resize(padded_);
    for (std::vector<A>* v : {&samples_, &first_, &above_, &below_}) v->resize(padded_);
  }
  DCN_HOST_DEVICE void make_room_for_taps(int64_t taps) {
    if (taps <= static_cast<int64_t>(index_.size())) return;
    for (std::vector<Index>* v : {&index_, &varies_}) v->resize(2 * taps);
    for (std::vector<A>* v : {&weight_, &slope_}) v->resize(2 * taps);
  }

  // All lists at once, sample by sample: tap t of list b is number t * padded_ + b. Loops over lists become vectors,
  // so they have no branches.
  DCN_HOST_DEVICE void find_few(const RoiGeometry& g, const BinAxis<A>& axis, int64_t samples, Index extent) {
    const int64_t lists = padded_;
    stride_ = lists;
    make_room_for_taps(2 * samples * lists);
    const A fixed = axis.samples;
    Index *row = row_.data(), *place = place_.data(), *count = count_.data(), *some = some_.data();
    A* number = samples_.data();
    int64_t* start = start_.data();
#pragma omp simd
    for (int64_t b = 0; b < lists; ++b) {
      start[b] = b;
      number[b] = fixed;
      place[b] = -1;
      row[b] = some[b] = 0;
    }
    for (int64_t i = 0; i < samples; ++i) {
      const A distance = axis.distance(axis.ascending(i, 0, samples));
      place_sample(axis, distance, extent, g.rule == RoiRule::kPart ? A(1) : A(0));
      for (int64_t t = 2 * i; t < 2 * i + 2; ++t) clear_taps(t);
      for (int64_t t = 0; t < 2 * i + 2; ++t) add_sample(t);
    }
#pragma omp simd
    for (int64_t b = 0; b < lists; ++b) {
      const Index any = place[b] >= 0, below = row[b] + 1 < extent;
      count[b] = any * (place[b] + 1 + below);
    }
  }

  // For each list the sample that lies `distance` from the first: its rows, and their places in the list. Samples come
  // by ascending position, so the rows of one are those of the one before, or lie one or two places further on.
  // `counted`: 1 where the mean is over the samples on the map.
  DCN_HOST_DEVICE void place_sample(const BinAxis<A>& axis, A distance, Index extent, A counted) {
    const A* first = first_.data();
    A *number = samples_.data(), *position = above_.data(), *above = position, *below = below_.data();
    Index *row = row_.data(), *place = place_.data(), *varying = varying_.data(), *valid = valid_.data(),
          *some = some_.data();
    const BinAxis<A> shared = axis;
    const int64_t lists = padded_;
#pragma omp simd
    for (int64_t b = 0; b < lists; ++b) {
      const A p = first[b] + distance;
      const Index on_map = shared.is_on_map(p) ? 1 : 0, varies = shared.varies(p) ? on_map : 0;
      valid[b] = p == p ? on_map : 0;
      varying[b] = varies & valid[b];
      some[b] |= on_map * kOnMap | varies * kVary | (on_map - valid[b]) * kNaN;
      number[b] += static_cast<A>(on_map) * counted;
      position[b] = valid[b] != 0 ? shared.clamp(p) : A(0);
    }
    // A loop of its own, since GCC makes no vectors of it where it sees that positions were clamped.
#pragma omp simd
    for (int64_t b = 0; b < lists; ++b) {
      const Sample<A, Index> s = make_sample<A, Index>(position[b], A(0), extent, Index(1));
      const Index on = s.y0 - row[b], steps = on < 2 ? on : 2, none = place[b] < 0 ? 1 : 0;
      place[b] += valid[b] * (none + (1 - none) * steps);
      row[b] += valid[b] * on;
      above[b] = static_cast<A>(valid[b]) * s.weight(0);
      below[b] = static_cast<A>(valid[b]) * s.weight(2);
    }
  }
  // Tap t of all lists.
  DCN_HOST_DEVICE void clear_taps(int64_t t) {
    Index *index = index_.data() + t * padded_, *varies = varies_.data() + t * padded_;
    A *weight = weight_.data() + t * padded_, *slope = slope_.data() + t * padded_;
    for (int64_t b = 0; b < padded_; ++b) index[b] = varies[b] = 0, weight[b] = slope[b] = A(0);
  }
  // Adds the placed samples to tap t of those lists where they read it.
  DCN_HOST_DEVICE void add_sample(int64_t t) {
    Index *index = index_.data() + t * padded_, *varies = varies_.data() + t * padded_;
    A *weight = weight_.data() + t * padded_, *slope = slope_.data() + t * padded_;
    const Index *row = row_.data(), *place = place_.data(), *varying = varying_.data(), here = static_cast<Index>(t);
    const A *above = above_.data(), *below = below_.data();
    const int64_t lists = padded_;
#pragma omp simd
    for (int64_t b = 0; b < lists; ++b) {
      const Index upper = place[b] == here, lower = place[b] + 1 == here, y = row[b] + lower;
      index[b] += (upper | lower) * (y - index[b]);
      weight[b] += static_cast<A>(upper) * above[b] + static_cast<A>(lower) * below[b];
      slope[b] += static_cast<A>((lower - upper) * varying[b]);
      varies[b] |= (upper | lower) & varying[b];
    }
  }

  // One list, of any number of samples. Returns how many taps it took, from `start` on.
  DCN_HOST_DEVICE int64_t find_many(int64_t list, const BinAxis<A>& axis, Index extent, int64_t start) {
    // With kPixels the pixels of a bin outside of the map may end before they begin.
    const int64_t samples = axis.end > axis.begin ? axis.end - axis.begin : 0;
    stride_ = 1;
    make_room_for_taps(start + 2 * samples + 2);
    Index *const index = index_.data() + start, *const varies = varies_.data() + start;
    A *const weight = weight_.data() + start, *const slope = slope_.data() + start;
    Index place = -1, row = 0, some = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const A p = axis.at(axis.ascending(i, axis.begin, axis.end));
      if (!axis.is_on_map(p)) continue;
      const bool varying = axis.varies(p);
      some |= kOnMap | (varying ? kVary : 0);
      const Sample<A, Index> s = make_sample<A, Index>(axis.clamp(p), A(0), extent, Index(1));
      if (!s.has(0)) {
        some |= kNaN;
        continue;
      }
      const Index next = place + (place < 0 ? 1 : (s.y0 - row < 2 ? s.y0 - row : 2));
      for (Index t = place < 0 ? 0 : place + 2; t < next + 2; ++t) weight[t] = slope[t] = A(0), varies[t] = 0;
      place = next;
      row = s.y0;
      for (int corner = 0; corner < 4; corner += 2) {
        const Index t = place + corner / 2;
        index[t] = s.row(corner);
        weight[t] += s.weight(corner);
        slope[t] += varying ? s.weight_dy(corner) : A(0);
        varies[t] |= varying;
      }
    }
    start_[list] = start;
    samples_[list] = axis.samples;
    some_[list] = some;
    return count_[list] = place < 0 ? 0 : place + (row + 1 < extent ? 2 : 1);
  }
};

// The lists of some bins of one region, found once for all its channels.
template <typename A>
class RegionTaps {
 public:
  DCN_HOST_DEVICE void find(const Regions<A>& regions, const BinTable& table, const RoiFrame<A>& f, int64_t r,
                            const Span& bins) {
    displaced_ = regions.offset != nullptr;
    bins_ = bins;
    rows_.find(regions, table, f, r, 0, bins);
    columns_.find(regions, table, f, r, 1, bins);
  }
  DCN_HOST_DEVICE BinTaps<A> bin(int64_t c, int64_t bin, const BinTable::Entry& entry) const {
    const int64_t own = c * (bins_.last - bins_.first) + bin - bins_.first;
    return {rows_.list(displaced_ ? own : entry.along[0]), columns_.list(displaced_ ? own : entry.along[1])};
  }

 private:
  AxisTaps<A> rows_, columns_;
  Span bins_{0, 0};
  bool displaced_ = false;
};

}  // namespace dcn::tiles::regions
