// Positions: the one way in which every operator says where it samples. A type of positions is a small struct with
//
//   int64_t size() const;                   how many samples there are
//   Sample<A, I> sample(int64_t i) const;   where number i lies on the map that it reads (sampling.h)
//   A modulation(int64_t i) const;          what the value found there is multiplied with
//
// The taps of a convolution are positions (conv_positions.h), and so are the samples of a region's bin, and the points
// of a level of multi-scale attention. Code that is the same for all of them takes the type as a template parameter P.
//
// Positions on several maps of one size, such as the images and offset groups of a convolution, also have
//
//   int64_t height() const, width() const;  of every map
//   int64_t maps() const;                   how many maps there are
//   int64_t map(int64_t i) const;           which of them sample number i reads
//
// which is what the index of the input needs (input_index.h). They may have
//
//   int64_t first_of_map(int64_t map) const, last_of_map(int64_t map) const;
//
// too: between which numbers the samples of a map lie, the last excluded, where that is less than all. A pyramid of
// maps has positions and an index per level.
#pragma once

#include <type_traits>
#include <utility>

#include "sampling.h"

namespace dcn {

// The type of the coordinates and modulations of P: float or double.
template <typename P>
using PositionType = std::decay_t<decltype(std::declval<const P&>().modulation(int64_t{0}))>;

template <typename P, typename = void>
struct IsPositions : std::false_type {};
template <typename P>
struct IsPositions<P, std::void_t<PositionType<P>, decltype(std::declval<const P&>().size()),
                                  decltype(std::declval<const P&>().sample(int64_t{0}).corners)>> : std::true_type {};

template <typename P, typename = void>
struct IsMapPositions : std::false_type {};
template <typename P>
struct IsMapPositions<P,
                      std::void_t<decltype(std::declval<const P&>().height() + std::declval<const P&>().width()),
                                  decltype(std::declval<const P&>().maps() + std::declval<const P&>().map(int64_t{0}))>>
    : IsPositions<P> {};

}  // namespace dcn
