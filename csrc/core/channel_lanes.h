// How elements share the channels of a group, such as an offset group or the outputs of a class.
#pragma once

#include "division.h"

namespace dcn {

constexpr int kElementChannels = 8;

// `lanes` elements side by side have a group's channels, in turns of V: neighbouring elements have neighbouring
// channels, each has eight, or fewer where a group ends. `I` is the type of numbers of elements.
template <typename I, int V>
struct ChannelLanes {
  static constexpr int kTurns = V < kElementChannels ? kElementChannels / V : 1;

  I turns;  // of a group
  Divisor<I> by_lanes, by_groups;

  ChannelLanes(int64_t group_channels, int64_t groups)
      : turns(static_cast<I>(group_channels / V)),
        by_lanes((group_channels / V + kTurns - 1) / kTurns),
        by_groups(groups) {}

  DCN_HOST_DEVICE I lanes() const { return by_lanes.divisor; }
  DCN_HOST_DEVICE int64_t of_groups() const { return static_cast<int64_t>(lanes()) * by_groups.divisor; }

  // Of element i: number among all elements of its lane and group, group, lane, which is its first turn.
  struct Place {
    I number, group, lane;
  };
  DCN_HOST_DEVICE Place place(int64_t i) const {
    const Quotient<I> of_lane = by_lanes(static_cast<I>(i)), of_group = by_groups(of_lane.quotient);
    return {of_group.quotient, of_group.remainder, of_lane.remainder};
  }
};

}  // namespace dcn
