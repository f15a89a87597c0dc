// The positions of a convolution's taps as points of attention: a pixel of the result is a query, a group of channels a
// head, and a tap a point of the only level. What is given are offsets. Symbols as in docs/operators.md.
#pragma once

#include <type_traits>

#include "attention_positions.h"

namespace dcn {

// Which taps there are, and where they lie without offsets: by axis, 0 is x.
struct TapGrid {
  int64_t out_width;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t centre[2];               // of the kernel, from its first tap
  int64_t origin[2];               // of the centre, for the first pixel of the result
  double scale;                    // what the kernel, offsets included, is stretched by about its centre
  int64_t missing;                 // number of the tap that is left out, or one beyond the last
  bool columns;                    // numbers run down the columns, else along the rows
  bool x_first;                    // of the pairs as they are stored, with their gradients
  int64_t offset_row, weight_row;  // from one group to the next, where gradients are stored

  // `I` holds rows and columns, as in sampling.h: int32_t will do where the map with its padding has no more of them.
  // A GPU divides in many steps, fewer of them without signs; both axes share one division.
  template <typename I>
  struct Divided {
    I quotient, remainder;
    DCN_HOST_DEVICE Divided(I value, I by)
        : quotient(static_cast<I>(std::make_unsigned_t<I>(value) / std::make_unsigned_t<I>(by))),
          remainder(value - quotient * by) {}
  };
  template <typename I>
  DCN_HOST_DEVICE I number(I k) const {
    return k < static_cast<I>(missing) ? k : k + 1;
  }
  // Of the centre from the map's first pixel.
  template <typename A, typename I = int64_t>
  DCN_HOST_DEVICE A start(I q, int along) const {
    const Divided<I> pixel(q, static_cast<I>(out_width));
    const I at = along ? pixel.quotient : pixel.remainder;
    return static_cast<A>(at * static_cast<I>(stride[along]) + static_cast<I>(origin[along]));
  }
  // Of tap k from the centre.
  template <typename A, typename I = int64_t>
  DCN_HOST_DEVICE A place(I k, int along) const {
    const Divided<I> tap(number(k), static_cast<I>(kernel[columns ? 1 : 0]));
    const I at = (along == 1) == columns ? tap.remainder : tap.quotient;
    return static_cast<A>(scale) * static_cast<A>(at * static_cast<I>(dilation[along]) - static_cast<I>(centre[along]));
  }
};

// AttentionPoints that lie on this grid: position = start + place of the tap + scale * offset.
template <typename A, typename F>
struct TapPoints : AttentionPoints<A, F> {
  using Base = AttentionPoints<A, F>;
  static constexpr bool has_one_level = true;

  TapGrid taps;

  DCN_HOST_DEVICE TapPoints(const Base& points, const TapGrid& grid) : Base(points), taps(grid) {}

  template <typename I = int64_t>
  DCN_HOST_DEVICE AttentionFrame<A> frame(int64_t, int64_t q, int64_t) const {
    AttentionFrame<A> f;
    for (int along = 0; along < 2; ++along) {
      f.start[along] = taps.template start<A>(static_cast<I>(q), along);
      f.unit[along] = static_cast<A>(taps.scale);
    }
    return f;
  }
  template <typename I = int64_t>
  DCN_HOST_DEVICE Sample<A, I> sample(const AttentionFrame<A>& f, const QueryHead& h, int64_t, int64_t k) const {
    const AttentionLevel& map = this->g.level[0];
    return make_sample<A, I>(
        f.start[1] + taps.template place<A>(static_cast<I>(k), 1) + this->given(h, k, 1) * f.unit[1],
        f.start[0] + taps.template place<A>(static_cast<I>(k), 0) + this->given(h, k, 0) * f.unit[0],
        static_cast<I>(map.height), static_cast<I>(map.width));
  }
  DCN_HOST_DEVICE int64_t location_at(int64_t head, int64_t k, int along) const {
    return head * taps.offset_row + 2 * k + (taps.x_first ? along : 1 - along);
  }
  DCN_HOST_DEVICE int64_t weight_at(int64_t head, int64_t k) const { return head * taps.weight_row + k; }
};

static_assert(IsMapPositions<LevelPositions<TapPoints<float, float>>>::value, "see positions.h");

}  // namespace dcn
