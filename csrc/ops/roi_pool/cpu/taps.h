// What the bins of a region read on the CPU: the samples of a bin lie on a grid, so the weight of a pixel is that of
// its row times that of its column, and each row and column is listed once with the sum over the samples that read it.
#pragma once

#include <vector>

#include "../../../core/roi_geometry.h"

namespace dcn::tiles::regions {

// Rows and columns, as wide as float so that loops over them become vectors.
using Index = int32_t;

inline bool fits_index(const RoiGeometry& g) {
  constexpr int64_t most = int64_t{1} << 30;
  return g.height < most && g.width < most;
}

// Bits of what a bin's samples are along an axis: some are on the map, change with their position, are NaN.
enum Along : Index { kRead = 1, kMoves = 2, kBroken = 4 };

// The rows (or columns) of one bin: number i < count is at[i * stride], and so on.
template <typename A>
struct TapList {
  const Index* at;
  const A *weight, *slope;  // sums of weights and of their derivatives by the position of the samples
  const Index* moves;       // whether some sample changes with its position
  int64_t stride;
  Index count, along;
  A samples;  // what the average is over

  DCN_HOST_DEVICE bool is(Along bit) const { return along & bit; }
};

template <typename A>
struct BinTaps {
  TapList<A> y, x;

  DCN_HOST_DEVICE A share() const { return sample_share(y.samples, x.samples); }
  // NaN where a sample has no position, else 0, for the value and its derivatives.
  DCN_HOST_DEVICE A value_origin() const { return origin(kRead, kRead); }
  DCN_HOST_DEVICE A dy_origin() const { return origin(kMoves, kRead); }
  DCN_HOST_DEVICE A dx_origin() const { return origin(kRead, kMoves); }

 private:
  DCN_HOST_DEVICE A origin(Along of_y, Along of_x) const {
    const bool broken = (y.is(kBroken) && x.is(of_x)) || (x.is(kBroken) && y.is(of_y));
    return broken ? static_cast<A>(NAN) : A(0);
  }
};

// Where the bins lie in offset, mask and groups of channels: looked up, since it takes divisions.
struct BinTable {
  struct Entry {
    int64_t along[2], part, cell;
  };
  std::vector<Entry> bins;

  explicit BinTable(const RoiGeometry& g) {
    bins.reserve(g.bins());
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t x = 0; x < g.out_width; ++x) bins.push_back({{y, x}, g.part_index(y, x), g.cell_of(y, x)});
  }
};

// The taps of all bins of a region along one axis (0: rows, 1: columns). Bins that share their samples are one list.
template <typename A>
class AxisTaps {
 public:
  DCN_HOST_DEVICE void find(const RoiPlaces<A>& where, const BinTable& table, const RoiFrame<A>& f, int64_t r,
                            int axis) {
    const RoiGeometry& g = where.g;
    // Without offsets the bins of a row of bins read the same rows.
    const int64_t classes = where.offset ? g.classes : 1, bins = where.offset ? g.bins() : g.bins_along(axis);
    const auto for_each_list = [&](const auto& f) DCN_INLINE_LAMBDA {
      for (int64_t c = 0, i = 0; c < classes; ++c)
        for (int64_t b = 0; b < bins; ++b, ++i) {
          if (where.offset)
            f(i, table.bins[b].along[axis], where.displacement(r, c, table.bins[b].part, axis));
          else
            f(i, b, A(0));
        }
    };
    make_room(classes * bins);
    // Compared as they are: there may be any number of samples, or NaN.
    if (g.rule != RoiRule::kPixels && f.samples[axis] <= most_at_once) {
      for_each_list([&](int64_t i, int64_t bin, A offset)
                        DCN_INLINE_LAMBDA { first_[i] = g.start(f, bin, offset, axis); });
      find_few(g, g.shared_axis(f, axis), static_cast<int64_t>(f.samples[axis]), static_cast<Index>(g.extent(axis)));
    } else {
      int64_t used = 0;
      for_each_list([&](int64_t i, int64_t bin, A offset) DCN_INLINE_LAMBDA {
        used += find_many(i, g.axis(f, bin, offset, axis), static_cast<Index>(g.extent(axis)), used);
      });
    }
  }
  DCN_HOST_DEVICE TapList<A> list(int64_t i) const {
    const int64_t at = start_[i];
    return {at_.data() + at, weight_.data() + at, slope_.data() + at, moves_.data() + at,
            stride_,         count_[i],           along_[i],          samples_[i]};
  }

 private:
  static constexpr int64_t most_at_once = 8;
  // By list; those up to the next multiple of 16 are nobody's, so that vectors are whole.
  int64_t lanes_ = 0, stride_ = 0;
  std::vector<int64_t> start_;
  std::vector<Index> count_, along_;
  std::vector<A> samples_, first_;
  // By tap.
  std::vector<Index> at_, moves_;
  std::vector<A> weight_, slope_;
  // By list, of the sample at hand: the row above it, the place of that row in the list, and the weights of it and the
  // row below.
  std::vector<Index> row_, place_, sound_, moving_;
  std::vector<A> above_, below_;

  DCN_HOST_DEVICE void make_room(int64_t lists) {
    lanes_ = (lists + 15) / 16 * 16;
    if (lanes_ <= static_cast<int64_t>(start_.size())) return;
    start_.resize(lanes_);
    for (std::vector<Index>* v : {&count_, &along_, &row_, &place_, &sound_, &moving_}) v->resize(lanes_);
    for (std::vector<A>* v : {&samples_, &first_, &above_, &below_}) v->resize(lanes_);
  }
  DCN_HOST_DEVICE void make_taps(int64_t taps) {
    if (taps <= static_cast<int64_t>(at_.size())) return;
    for (std::vector<Index>* v : {&at_, &moves_}) v->resize(2 * taps);
    for (std::vector<A>* v : {&weight_, &slope_}) v->resize(2 * taps);
  }

  // Sample by sample, for all lists at once. Loops over lists become vectors: no branches, nothing but what is in them.
  DCN_HOST_DEVICE void find_few(const RoiGeometry& g, const BinAxis<A>& axis, int64_t samples, Index extent) {
    const int64_t lanes = lanes_;
    stride_ = lanes;
    make_taps(2 * samples * lanes);
    const A fixed = axis.samples;
    Index *row = row_.data(), *place = place_.data(), *count = count_.data(), *along = along_.data();
    A* number = samples_.data();
    int64_t* start = start_.data();
#pragma omp simd
    for (int64_t b = 0; b < lanes; ++b) {
      start[b] = b;
      number[b] = fixed;
      place[b] = -1;
      row[b] = along[b] = 0;
    }
    for (int64_t i = 0; i < samples; ++i) {
      const A distance = axis.distance(axis.rising(i, 0, samples));
      place_sample(axis, distance, extent, g.rule == RoiRule::kPart ? A(1) : A(0));
      for (int64_t t = 2 * i; t < 2 * i + 2; ++t) clear_taps(t);
      for (int64_t t = 0; t < 2 * i + 2; ++t) add_sample(t);
    }
#pragma omp simd
    for (int64_t b = 0; b < lanes; ++b) {
      const Index any = place[b] >= 0, below = row[b] + 1 < extent;
      count[b] = any * (place[b] + 1 + below);
    }
  }

  // The sample that lies `distance` behind the first: its rows, and their places in the list. Samples come in the order
  // of their positions: the rows of one are those of the one before, or one or two places on.
  DCN_HOST_DEVICE void place_sample(const BinAxis<A>& axis, A distance, Index extent, A counts) {
    const A* first = first_.data();
    A *number = samples_.data(), *position = above_.data(), *above = position, *below = below_.data();
    Index *row = row_.data(), *place = place_.data(), *moving = moving_.data(), *sound = sound_.data(),
          *along = along_.data();
    const BinAxis<A> shared = axis;
    const int64_t lanes = lanes_;
#pragma omp simd
    for (int64_t b = 0; b < lanes; ++b) {
      const A p = first[b] + distance;
      const Index read = shared.reads(p) ? 1 : 0, moves = shared.moves(p) ? read : 0;
      sound[b] = p == p ? read : 0;
      moving[b] = moves & sound[b];
      along[b] |= read * kRead | moves * kMoves | (read - sound[b]) * kBroken;
      number[b] += static_cast<A>(read) * counts;
      position[b] = sound[b] != 0 ? shared.on_map(p) : A(0);
    }
    // By itself: GCC finds no vectors where it sees that positions have been moved onto the map.
#pragma omp simd
    for (int64_t b = 0; b < lanes; ++b) {
      const Sample<A, Index> s = make_sample<A, Index>(position[b], A(0), extent, Index(1));
      const Index on = s.y0 - row[b], steps = on < 2 ? on : 2, none = place[b] < 0 ? 1 : 0;
      place[b] += sound[b] * (none + (1 - none) * steps);
      row[b] += sound[b] * on;
      above[b] = static_cast<A>(sound[b]) * s.weight(0);
      below[b] = static_cast<A>(sound[b]) * s.weight(2);
    }
  }
  DCN_HOST_DEVICE void clear_taps(int64_t t) {
    Index *at = at_.data() + t * lanes_, *moves = moves_.data() + t * lanes_;
    A *weight = weight_.data() + t * lanes_, *slope = slope_.data() + t * lanes_;
    for (int64_t b = 0; b < lanes_; ++b) at[b] = moves[b] = 0, weight[b] = slope[b] = A(0);
  }
  // Adds the sample to number t of the lists in which it reads that.
  DCN_HOST_DEVICE void add_sample(int64_t t) {
    Index *at = at_.data() + t * lanes_, *moves = moves_.data() + t * lanes_;
    A *weight = weight_.data() + t * lanes_, *slope = slope_.data() + t * lanes_;
    const Index *row = row_.data(), *place = place_.data(), *moving = moving_.data(), here = static_cast<Index>(t);
    const A *above = above_.data(), *below = below_.data();
    const int64_t lanes = lanes_;
#pragma omp simd
    for (int64_t b = 0; b < lanes; ++b) {
      const Index upper = place[b] == here, lower = place[b] + 1 == here, y = row[b] + lower;
      at[b] += (upper | lower) * (y - at[b]);
      weight[b] += static_cast<A>(upper) * above[b] + static_cast<A>(lower) * below[b];
      slope[b] += static_cast<A>((lower - upper) * moving[b]);
      moves[b] |= (upper | lower) & moving[b];
    }
  }

  // The samples of one list, any number of them. Returns how many taps they took, from `start` on.
  DCN_HOST_DEVICE int64_t find_many(int64_t list, const BinAxis<A>& axis, Index extent, int64_t start) {
    // The range of a bin far outside the map may end before it begins.
    const int64_t samples = axis.end > axis.begin ? axis.end - axis.begin : 0;
    stride_ = 1;
    make_taps(start + 2 * samples + 2);
    Index *const at = at_.data() + start, *const moving = moves_.data() + start;
    A *const weight = weight_.data() + start, *const slope = slope_.data() + start;
    Index place = -1, row = 0, along = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const A p = axis.at(axis.rising(i, axis.begin, axis.end));
      if (!axis.reads(p)) continue;
      const bool moves = axis.moves(p);
      along |= kRead | (moves ? kMoves : 0);
      const Sample<A, Index> s = make_sample<A, Index>(axis.on_map(p), A(0), extent, Index(1));
      if (!s.has(0)) {
        along |= kBroken;
        continue;
      }
      const Index next = place + (place < 0 ? 1 : (s.y0 - row < 2 ? s.y0 - row : 2));
      for (Index t = place < 0 ? 0 : place + 2; t < next + 2; ++t) weight[t] = slope[t] = A(0), moving[t] = 0;
      place = next;
      row = s.y0;
      for (int corner = 0; corner < 4; corner += 2) {
        const Index t = place + corner / 2;
        at[t] = s.row(corner);
        weight[t] += s.weight(corner);
        slope[t] += moves ? s.weight_dy(corner) : A(0);
        moving[t] |= moves;
      }
    }
    start_[list] = start;
    samples_[list] = axis.samples;
    along_[list] = along;
    return count_[list] = place < 0 ? 0 : place + (row + 1 < extent ? 2 : 1);
  }
};

// The taps of all bins of one region, found once for everything that reads or scatters through them.
template <typename A>
class RegionTaps {
 public:
  DCN_HOST_DEVICE void find(const RoiPlaces<A>& where, const BinTable& table, const RoiFrame<A>& f, int64_t r) {
    displaced_ = where.offset != nullptr;
    bins_ = where.g.bins();
    rows_.find(where, table, f, r, 0);
    columns_.find(where, table, f, r, 1);
  }
  DCN_HOST_DEVICE BinTaps<A> bin(int64_t c, int64_t bin, const BinTable::Entry& entry) const {
    const int64_t own = c * bins_ + bin;
    return {rows_.list(displaced_ ? own : entry.along[0]), columns_.list(displaced_ ? own : entry.along[1])};
  }

 private:
  AxisTaps<A> rows_, columns_;
  int64_t bins_ = 0;
  bool displaced_ = false;
};

}  // namespace dcn::tiles::regions
