// What the fused forward reads: pixels of the input, whose channels lie together, by a number in 32 bits; and in which
// order it takes the terms of its sum.
#pragma once

#include "../../../core/division.h"
#include "samples.h"

namespace dcn {

// As many as the largest tile has.
constexpr int64_t kMostPixels = 128;

// The input as pixels that lie a fixed step apart: rows and images are whole numbers of pixels long.
template <typename S>
struct InputPixels {
  const S* data;
  int64_t image, row;  // in pixels
  int bytes;           // from one pixel to the next

  // Number (times 16) and read corners of a sample's first pixel, counted from image n0.
  DCN_DEVICE SampleRecord record(const Sampler<S>& sampler, const TilePixel& p, const Plane& plane, int64_t n0) const {
    return sampler.record(p, plane, (p.n - n0) * image, row, 1);
  }

  // A vector of channels of each corner; zeros for corners that are not read. `first` is where image n0 has the
  // channels.
  DCN_DEVICE void fetch(ChannelVector<S> (&corners)[4], const char* first, int where) const {
    const char* const from = first + static_cast<int64_t>(where >> 4) * bytes;
    const int64_t down = row * bytes;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c)
      corners[c] = where >> c & 1 ? load_global<S>(from + (c & 2 ? down : 0) + (c & 1) * bytes) : ChannelVector<S>{};
  }
};

// Weights as [O, taps, C / groups], rounded to what tensor cores multiply.
struct RoundWeights {
  ConvGeometry g;
  View<const float> weight;
  float* rounded;

  DCN_HOST_DEVICE int64_t size() const { return g.out_channels * g.taps() * g.group_channels(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t c = i % g.group_channels(), tap = i / g.group_channels() % g.taps();
    rounded[i] = to_tf32(weight.at(i / g.group_channels() / g.taps(), c, tap / g.kernel_w, tap % g.kernel_w));
  }
};

// The place of a thread's vector among the columns of some taps, which steps of eight vectors take in turn. Taps read
// nearly the same pixels, so eight vectors of every tap come before the next ones of any: their pixels are then still
// in the first-level cache. Where the number of a tap's vectors is no multiple of that, tap by tap.
struct ColumnCursor {
  static constexpr int kTogether = 8;
  int tap, vector;  // the tap counts from the first of these

  // Vector number `number` < kTogether of the first step.
  DCN_DEVICE ColumnCursor(int number, int vectors) {
    const bool together = vectors % kTogether == 0;
    tap = together ? 0 : number / vectors;
    vector = together ? number : number % vectors;
  }
  DCN_DEVICE bool there(int taps, int vectors) const { return tap < taps && vector < vectors; }
  // To the next step. `whole`, `rest`: kTogether / vectors, and what remains.
  DCN_DEVICE void advance(int taps, int vectors, int whole, int rest) {
    if (vectors % kTogether == 0) {
      if (++tap < taps) return;
      tap = 0;
      vector += kTogether;
    } else {
      tap += whole;
      vector += rest;
      if (vector < vectors) return;
      vector -= vectors;
      ++tap;
    }
  }
};

}  // namespace dcn
