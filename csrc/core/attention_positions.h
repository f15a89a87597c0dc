// The positions of multi-scale attention: the points of each level. They are given as locations in units of the map, or
// made here from reference points and raw offsets, which costs less than reading them would. Symbols as in
// docs/operators.md; pairs of positions are (x, y), axis 0 is x.
#pragma once

#include "attention_geometry.h"
#include "positions.h"
#include "view.h"

namespace dcn {

// What makes weights of logits: exp(logit - largest) * inverse_sum, over the K points of a query's head.
template <typename A>
struct SoftmaxScale {
  A largest, inverse_sum;
  DCN_HOST_DEVICE A weight(A logit) const { return std::exp(logit - largest) * inverse_sum; }
};

// Where the points of a query lie on a level, by axis: start + given * unit, in pixels.
template <typename A>
struct AttentionFrame {
  A start[2], unit[2];
};

// Positions and weights of a call, as the caller stores them: in F, which is float or the type of the value. Computed
// in A, the type of coordinates.
template <typename A, typename F>
struct AttentionPoints {
  using Accumulator = A;
  using Given = F;
  static constexpr bool has_one_level = false;  // known before a call

  AttentionGeometry g;
  View<const F> locations;         // [N, Q, M, K], each a pair
  int64_t axis;                    // from x to y of a pair
  View<const F> weights;           // [N, Q, M, K]; data may be null: all ones
  View<const F> reference;         // [N, Q, L or 1, numbers]; data may be null
  const SoftmaxScale<A>* softmax;  // by query and head; null: weights are used as they are

  DCN_HOST_DEVICE A given(const QueryHead& h, int64_t k, int along) const {
    return static_cast<A>((&locations.at(h.n, h.q, h.m, k))[along * axis]);
  }
  // As it is stored: a weight, or a logit.
  DCN_HOST_DEVICE A stored_weight(const QueryHead& h, int64_t k) const {
    return weights.data ? static_cast<A>(weights.at(h.n, h.q, h.m, k)) : A(1);
  }
  DCN_HOST_DEVICE A weight(const QueryHead& h, int64_t k) const {
    const A stored = stored_weight(h, k);
    return softmax ? softmax[(h.n * g.queries + h.q) * g.heads + h.m].weight(stored) : stored;
  }

  // Where the gradients of point k of a query's head are stored: densely.
  DCN_HOST_DEVICE int64_t location_at(int64_t head, int64_t k, int along) const {
    return 2 * (head * g.points + k) + along;
  }
  DCN_HOST_DEVICE int64_t weight_at(int64_t head, int64_t k) const { return head * g.points + k; }

  DCN_HOST_DEVICE A size(int64_t l, int along) const {
    return static_cast<A>(along ? g.level[l].height : g.level[l].width);
  }
  // The part of a box's side that an offset of 1 on this level reaches.
  DCN_HOST_DEVICE A box_unit(int64_t l) const { return static_cast<A>(g.level[l].box_unit); }
  DCN_HOST_DEVICE AttentionFrame<A> frame(int64_t n, int64_t q, int64_t l) const {
    AttentionFrame<A> f;
    for (int along = 0; along < 2; ++along) {
      const A pixels = size(l, along);
      if (!reference.data) {
        f.start[along] = A(-0.5);
        f.unit[along] = pixels;
        continue;
      }
      const int64_t r = g.reference_level(l);
      f.start[along] = static_cast<A>(reference.at(n, q, r, along)) * pixels - A(0.5);
      f.unit[along] =
          g.reference_numbers == 4 ? static_cast<A>(reference.at(n, q, r, 2 + along)) * pixels * box_unit(l) : A(1);
    }
    return f;
  }
  // Point p of level l, and its number k among all. `I` holds rows and columns, as in sampling.h.
  template <typename I = int64_t>
  DCN_HOST_DEVICE Sample<A, I> sample(const AttentionFrame<A>& f, const QueryHead& h, int64_t l, int64_t k) const {
    return make_sample<A, I>(f.start[1] + given(h, k, 1) * f.unit[1], f.start[0] + given(h, k, 0) * f.unit[0],
                             static_cast<I>(g.level[l].height), static_cast<I>(g.level[l].width));
  }
};

// Queries [first, first + count) of the flattened (n, q) order.
struct QueryRange {
  int64_t first, count;

  DCN_HOST_DEVICE int64_t first_image(const AttentionGeometry& g) const { return first / g.queries; }
  DCN_HOST_DEVICE int64_t images(const AttentionGeometry& g) const {
    return (first + count - 1) / g.queries + 1 - first_image(g);
  }
};

// The samples of a range of queries on one level, ordered by query, then head, then point: positions on several maps
// (positions.h). A map is what a head reads of an image; maps are ordered by image, then head. P is AttentionPoints, or
// what takes their place (tap_positions.h).
template <typename P>
struct LevelPositions {
  using A = typename P::Accumulator;

  P all;
  int64_t l;
  QueryRange range;

  DCN_HOST_DEVICE const AttentionLevel& level() const { return all.g.level[l]; }
  DCN_HOST_DEVICE int64_t size() const { return range.count * all.g.heads * level().points; }
  DCN_HOST_DEVICE int64_t height() const { return level().height; }
  DCN_HOST_DEVICE int64_t width() const { return level().width; }
  DCN_HOST_DEVICE int64_t maps() const { return range.images(all.g) * all.g.heads; }
  DCN_HOST_DEVICE int64_t map(int64_t i) const {
    const QueryHead h = query_head(i);
    return (h.n - range.first_image(all.g)) * all.g.heads + h.m;
  }
  // The samples of a map have numbers from first_of_map to before last_of_map, as do those of the image's other heads.
  DCN_HOST_DEVICE int64_t first_of_map(int64_t map) const {
    const int64_t query = image_of(map) * all.g.queries - range.first;
    return (query > 0 ? query : 0) * all.g.heads * level().points;
  }
  DCN_HOST_DEVICE int64_t last_of_map(int64_t map) const {
    const int64_t query = (image_of(map) + 1) * all.g.queries - range.first;
    return (query < range.count ? query : range.count) * all.g.heads * level().points;
  }
  DCN_HOST_DEVICE Sample<A> sample(int64_t i) const {
    const QueryHead h = query_head(i);
    return all.sample(all.frame(h.n, h.q, l), h, l, point(i));
  }
  DCN_HOST_DEVICE A modulation(int64_t i) const { return all.weight(query_head(i), point(i)); }
  DCN_HOST_DEVICE QueryHead query_head(int64_t i) const {
    return {all.g, range.first * all.g.heads + i / level().points};
  }

 private:
  DCN_HOST_DEVICE int64_t image_of(int64_t map) const { return range.first_image(all.g) + map / all.g.heads; }
  DCN_HOST_DEVICE int64_t point(int64_t i) const { return level().first_point + i % level().points; }
};

static_assert(IsMapPositions<LevelPositions<AttentionPoints<float, float>>>::value, "see positions.h");

}  // namespace dcn
