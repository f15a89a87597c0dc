// Fused backward: the gradient of the input, gathered from the gradient of the columns by the inverted index.
#pragma once

#include "../../../core/chunk_sums.h"
#include "../../../runtime/gpu_values.h"
#include "../bodies.h"

namespace dcn {

// The samples of whole images, fewer than 2^31, in the order of their columns: by offset group, then pixel, then tap.
template <typename F>
struct ColumnPositions {
  ConvPositions<float, F> positions;

  ColumnPositions(const ConvGeometry& g, const Displacement<F>& displacement)
      : positions(g, {0, g.batch * g.out_pixels()}, displacement) {}

  struct Place {
    Pixel pixel;
    uint32_t offset_group, tap;
  };
  DCN_HOST_DEVICE Place place(int64_t i) const {
    const ConvGeometry& g = positions.g;
    const uint32_t taps = static_cast<uint32_t>(g.taps()), pixels = static_cast<uint32_t>(positions.range.count);
    const uint32_t of_image = static_cast<uint32_t>(g.out_pixels()), width = static_cast<uint32_t>(g.out_width);
    const uint32_t row = static_cast<uint32_t>(i) / taps, og = row / pixels, number = row - og * pixels;
    const uint32_t n = number / of_image, rest = number - n * of_image;
    Place p;
    p.pixel.n = n;
    p.pixel.y = rest / width;
    p.pixel.x = rest % width;
    p.offset_group = og;
    p.tap = static_cast<uint32_t>(i) - row * taps;
    return p;
  }

  DCN_HOST_DEVICE int64_t size() const { return positions.size(); }
  DCN_HOST_DEVICE Sample<float> sample(int64_t i) const {
    const Place p = place(i);
    return positions.sample(p.pixel, p.offset_group, p.tap);
  }
  DCN_HOST_DEVICE float modulation(int64_t i) const {
    const Place p = place(i);
    return positions.modulation(p.pixel, p.offset_group, p.tap);
  }
  DCN_HOST_DEVICE int64_t height() const { return positions.height(); }
  DCN_HOST_DEVICE int64_t width() const { return positions.width(); }
  DCN_HOST_DEVICE int64_t maps() const { return positions.maps(); }
  DCN_HOST_DEVICE int64_t map(int64_t i) const {
    const Place p = place(i);
    return p.pixel.n * positions.g.offset_groups + p.offset_group;
  }
};

// What a sample gives the pixels that it reads (core/chunk_sums.h): its gradient of the columns. A part is 16 bytes of
// channels of an offset group.
template <typename S>
struct ColumnVectors {
  using Accumulator = float;
  static constexpr int kSums = kVectorValues<S>;

  ConvGeometry g;
  InputIndex<float> index;  // of ColumnPositions
  const S* grad_columns;    // [groups, pixels, taps, C / groups]

  DCN_HOST_DEVICE int64_t parts() const { return g.offset_group_channels() / kSums; }
  // Samples are numbered by offset group, rows of columns by group; within these both go by pixel and tap.
  DCN_HOST_DEVICE const S* place(int64_t map, int64_t part) const {
    const int64_t og = map % g.offset_groups, c = og * g.offset_group_channels() + part * kSums;
    const int64_t group = c / g.group_channels(), rows = g.batch * g.out_pixels() * g.taps();
    return grad_columns + (((group - og) * rows - group) * g.group_channels() + c);
  }
  DCN_HOST_DEVICE ChannelVector<S> load(const S* place, int32_t sample) const {
    return *reinterpret_cast<const ChannelVector<S>*>(place + sample * g.group_channels());
  }
  DCN_HOST_DEVICE static void add(float (&sums)[kSums], float weight, const ChannelVector<S>& values) {
    add_scaled(sums, weight, values);
  }
};

// grad_input[n, c, y, x] = sum of weight_corner * mask * grad_columns over the samples that read the pixel, in the
// index's order. One element: 16 bytes of channels of a pixel; threads side by side have channels side by side, and
// read the same entries.
template <typename S>
struct GatherVectors {
  using Gather = ColumnVectors<S>;

  Gather gather;
  const SumsOf<Gather>* chunk_sums;
  View<S> grad_input;  // of aligned vectors

  DCN_HOST_DEVICE int64_t vectors() const { return gather.g.channels / Gather::kSums; }
  DCN_HOST_DEVICE int64_t size() const { return gather.g.batch * gather.g.height * gather.g.width * vectors(); }
  DCN_HOST_DEVICE void operator()(int64_t i) const {
    const ConvGeometry& g = gather.g;
    const int64_t vector = i % vectors(), pixel = i / vectors(), x = pixel % g.width, y = pixel / g.width % g.height;
    const int64_t n = pixel / g.width / g.height, og = vector / gather.parts();
    SumsOf<Gather> sums;
    gather_pixel(gather, chunk_sums, n * g.offset_groups + og, vector - og * gather.parts(), y, x, sums);
    store_vector<S>(&grad_input.at(n, vector * Gather::kSums, y, x), pack<S>(sums.of));
  }
};

}  // namespace dcn
