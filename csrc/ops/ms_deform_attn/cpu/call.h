// Multi-scale deformable attention on the CPU, a call as its loops see it: pointers and strides, and the order in which
// queries are visited.
#pragma once

#include <vector>

#include "../../../runtime/cpu_points.h"
#include "../arguments.h"

namespace dcn::tiles::attention {

// Why the tuned path does not serve a call: the tables of points are to be small, and an Index is to reach everywhere
// on the maps. Null: it does.
inline const char* why_portable(const AttentionGeometry& g) {
  static_assert(points_at_once == 1024, "the words below");
  if (g.points > points_at_once) return "points: expected at most 1024 together";
  if (g.heads * g.points > 64 * points_at_once) return "points: expected at most 65536 of all heads together";
  for (int64_t l = 0; l < g.levels; ++l)
    if (g.level[l].height * g.level[l].width >= int64_t{1} << 30)
      return "spatial_shapes: expected fewer than 2^30 pixels of a level";
  return nullptr;
}

// Locations, weights or reference points by their strides, as View has them: stored like the value or, where they are
// `wide`, in the accumulator type.
struct Stored {
  const void* data = nullptr;  // null: there are none
  bool wide = true;
  int64_t n = 0, q = 0, m = 0, k = 0;
  int64_t axis = 0;  // from one number of a position to the next

  Stored() = default;
  Stored(const Tensor& t, ScalarType accumulator)
      : data(t.data_ptr()),
        wide(t.scalar_type() == accumulator),
        n(t.stride(0)),
        q(t.stride(1)),
        m(t.stride(2)),
        k(t.stride(3)),
        axis(t.dim() == 5 ? t.stride(4) : 0) {}

  template <typename T>
  DCN_HOST_DEVICE const T* at(int64_t in, int64_t iq, int64_t im) const {
    return static_cast<const T*>(data) + in * n + iq * q + im * m;
  }
  // Calls f with a number of the type that is stored.
  template <typename S, typename F>
  DCN_HOST_DEVICE void with_type(const F& f) const {
    if constexpr (!std::is_same_v<S, Accumulate<S>>) {
      if (!wide) return f(S());
    }
    f(Accumulate<S>());
  }
};

template <typename S>
struct Call {
  AttentionGeometry g;
  Tensor held;          // what `value` points into: the argument, or a copy whose channels lie together
  View<const S> value;  // [N, S, M, D]
  Stored locations, weights, reference;

  Call(const AttentionArguments& a, const AttentionGeometry& geometry)
      : g(geometry),
        held(a.value.stride(3) == 1 || g.channels == 1 ? a.value : torch::stable::contiguous(a.value)),
        value(view<const S>(held)),
        locations(a.locations, type) {
    if (a.weights) weights = Stored(*a.weights, type);
    if (a.reference) reference = Stored(*a.reference, type);
  }

 private:
  static constexpr ScalarType type = scalar_type_of<Accumulate<S>>();
};

// Visits to queries, numbered: where there is a query for each pixel of the maps, as in an encoder, in strips of some
// columns from top to bottom, level by level, so that what a row of a strip reads is still in the cache when the next
// one comes. Elsewhere one after the other. A matter of speed alone.
class Visits {
 public:
  explicit Visits(const AttentionGeometry& g) {
    if (g.queries != g.rows) {
      strip_ = g.queries;
      levels_.push_back({1, g.queries, 0});
    } else {
      for (int64_t l = 0; l < g.levels; ++l)
        levels_.push_back({g.level[l].height, g.level[l].width, g.level[l].first_row});
    }
  }

  // Calls f(query) for the visits [first, last).
  template <typename F>
  DCN_HOST_DEVICE void for_each(int64_t first, int64_t last, const F& f) const {
    for (const Map& map : levels_)
      for (int64_t x = 0; x < map.width; x += strip_) {
        const int64_t width = map.width - x < strip_ ? map.width - x : strip_;
        const int64_t begin = map.first + x * map.height, end = begin + width * map.height;
        for (int64_t i = first > begin ? first : begin; i < (last < end ? last : end); ++i)
          f(map.first + (i - begin) / width * map.width + x + (i - begin) % width);
      }
  }

 private:
  struct Map {
    int64_t height, width, first;
  };
  std::vector<Map> levels_;
  int64_t strip_ = 16;
};

}  // namespace dcn::tiles::attention
