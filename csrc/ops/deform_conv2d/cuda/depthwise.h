// Depthwise deformable convolution of half types, as in DCNv3: with one weight for each channel and tap there are no
// matrices to multiply. A thread has one or two vectors of eight channels; two share their samples, because finding a
// sample costs as much as reading eight channels of it. Sums stay in registers, in float and in a fixed order.
#pragma once

#include "../../../core/chunk_sums.h"
#include "../../../runtime/gpu_values.h"
#include "samples.h"

namespace dcn {

// Eight channels that lie `step` apart.
template <typename S>
DCN_HOST_DEVICE Vector8<S> read_apart(const S* from, int64_t step) {
  Vector8<S> found;
  DCN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const S pair[2] = {from[2 * i * step], from[(2 * i + 1) * step]};
    std::memcpy(&found.words[i], pair, sizeof(pair));
  }
  return found;
}

// sums += a * b
template <typename S>
DCN_HOST_DEVICE void add_product(float (&sums)[8], const float (&a)[8], Vector8<S> b) {
  float factors[8];
  unpack(factors, b);
  DCN_UNROLL
  for (int i = 0; i < 8; ++i) sums[i] += a[i] * factors[i];
}

// A tensor that is read and written eight channels of a pixel at a time.
template <typename T>
struct VectorView {
  using S = std::remove_const_t<T>;
  View<T> data;
  bool aligned;  // has_aligned_vectors(tensor)

  DCN_HOST_DEVICE Vector8<S> read(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const S* const from = &data.at(n, c, y, x);
    return aligned ? *reinterpret_cast<const Vector8<S>*>(from) : read_apart(from, data.c);
  }
  DCN_DEVICE void write(const float (&values)[8], int64_t n, int64_t c, int64_t y, int64_t x) const {
    S* const to = &data.at(n, c, y, x);
    if (aligned) {
      store_vector<S>(to, pack<S>(values));
    } else {
      DCN_UNROLL
      for (int i = 0; i < 8; ++i) to[i * data.c] = static_cast<S>(values[i]);
    }
  }
};

// Weights as [taps, C]: eight channels of a tap are one access.
template <typename S>
struct TapWeights {
  const S* data;
  int64_t channels;

  DCN_HOST_DEVICE Vector8<S> at(int tap, int channel) const {
    return *reinterpret_cast<const Vector8<S>*>(data + tap * channels + channel);
  }
};

// Which pixel, and which part of it, element i is. Threads side by side take parts side by side, or pixels.
struct PixelPart {
  int64_t pixel, part;

  DCN_DEVICE PixelPart(int64_t i, int64_t pixels, int64_t parts, bool parts_together)
      : pixel(parts_together ? i / parts : i % pixels), part(parts_together ? i % parts : i / pixels) {}
};

// The four corners of eight channels of a sample; zeros for those that are not read.
template <typename S>
DCN_DEVICE void fetch_corners(Vector8<S> (&corners)[4], const Sampler<S>& sampler, int64_t where, int channel) {
  if (sampler.channels_together()) {
    sampler.fetch(corners, where, channel);
  } else {
    const S* const first = sampler.input.data + (where >> 4) + channel * sampler.input.c;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c)
      corners[c] = where >> c & 1 ? read_apart(first + sampler.corner_step(c), sampler.input.c) : zeros<S>();
  }
}

// values = the sample, with the mask in it.
template <typename S>
DCN_DEVICE void interpolate_vector(float (&values)[8], const Vector8<S> (&corners)[4], const float (&weight)[4]) {
  DCN_UNROLL
  for (int i = 0; i < 8; ++i) values[i] = 0;
  DCN_UNROLL
  for (int c = 0; c < 4; ++c) add_scaled(values, weight[c], corners[c]);
}

// One element: `Vectors` vectors of channels, of one offset group, of an output pixel.
template <typename S, int Vectors>
struct DepthwiseForward {
  Sampler<S> sampler;
  TapWeights<S> weight;
  const S* bias;  // may be null
  VectorView<S> output;

  DCN_HOST_DEVICE int64_t parts() const { return sampler.g.channels / (8 * Vectors); }
  DCN_HOST_DEVICE int64_t size() const { return sampler.sizes.pixels * parts(); }
  DCN_DEVICE void operator()(int64_t i) const {
    const PixelPart here(i, sampler.sizes.pixels, parts(), sampler.channels_together());
    const TilePixel p = pixel_by_rows(sampler.sizes, here.pixel);
    const int channel = static_cast<int>(here.part) * 8 * Vectors, taps = sampler.sizes.taps;
    const int plane = channel / sampler.sizes.offset_group_channels * taps;
    float sums[Vectors][8];
    DCN_UNROLL
    for (int e = 0; e < 8 * Vectors; ++e) sums[e / 8][e % 8] = bias ? static_cast<float>(bias[channel + e]) : 0.0f;
    SampleRecord next = sampler.record(p, plane);
    for (int tap = 0; tap < taps; ++tap) {
      const SampleRecord now = next;
      Vector8<S> corners[Vectors][4];
      DCN_UNROLL
      for (int k = 0; k < Vectors; ++k) fetch_corners(corners[k], sampler, now.where, channel + 8 * k);
      // The next sample is computed while the loads of this one's corners are in flight.
      if (tap + 1 < taps) next = sampler.record(p, plane + tap + 1);
      DCN_UNROLL
      for (int k = 0; k < Vectors; ++k) {
        float values[8];
        interpolate_vector(values, corners[k], now.weight);
        add_product(sums[k], values, weight.at(tap, channel + 8 * k));
      }
    }
    DCN_UNROLL
    for (int k = 0; k < Vectors; ++k) output.write(sums[k], p.n, channel + 8 * k, p.y, p.x);
  }
};

// grad_offset, grad_mask: sums over the channels of one offset group. One element: a sample.
template <typename S>
struct DepthwiseDisplacementGradient {
  Sampler<S> sampler;
  VectorView<const S> grad_output;
  TapWeights<S> weight;
  WriteEither<S> grad_offset, grad_mask;
  bool planes_together;  // the planes of offset and mask lie side by side

  DCN_HOST_DEVICE int64_t planes() const { return sampler.sizes.offset_groups * sampler.sizes.taps; }
  DCN_HOST_DEVICE int64_t size() const { return sampler.sizes.pixels * planes(); }
  DCN_DEVICE void operator()(int64_t i) const {
    const PixelPart here(i, sampler.sizes.pixels, planes(), planes_together);
    const TilePixel p = pixel_by_rows(sampler.sizes, here.pixel);
    const int plane = static_cast<int>(here.part), tap = plane % sampler.sizes.taps;
    const int channels = sampler.sizes.offset_group_channels, first = plane / sampler.sizes.taps * channels;
    const int64_t place = sampler.place(p, plane);
    // Sums of the column's gradient times each corner hold the gradients of offset and mask.
    float sums[4] = {0, 0, 0, 0};
    for (int channel = first; channel < first + channels; channel += 8) {
      float grad[8], column[8] = {0, 0, 0, 0, 0, 0, 0, 0}, more[4];
      unpack(grad, grad_output.read(p.n, channel, p.y, p.x));
      add_product(column, grad, weight.at(tap, channel));
      sampler.multiply_corners(more, place, channel, column);
      DCN_UNROLL
      for (int c = 0; c < 4; ++c) sums[c] += more[c];
    }
    write_displacement_gradient(sampler, p, plane, sums, grad_offset, grad_mask);
  }
};

// What a sample gives the pixels that it reads (core/chunk_sums.h): the gradient of its output pixel times the weight
// of its tap. A part is eight channels of an offset group.
template <typename S>
struct DepthwiseGather {
  using Accumulator = float;
  static constexpr int kSums = 8;

  ConvGeometry g;
  PixelRange range;
  ImageRange images;
  InputIndex<float> index;
  VectorView<const S> grad_output;  // whose pixels are evenly spaced
  TapWeights<S> weight;

  // The samples of a range are numbered in 32 bits; those of an offset group follow those of the one before.
  struct Place {
    int64_t n, channel;
    uint32_t first_pixel, first_sample;
  };
  struct Values {
    float of[kSums];
  };

  DCN_HOST_DEVICE int64_t parts() const { return g.offset_group_channels() / kSums; }
  DCN_HOST_DEVICE Place place(int64_t map, int64_t part) const {
    const int64_t image = map / g.offset_groups, og = map % g.offset_groups;
    return {images.first + image, og * g.offset_group_channels() + part * kSums,
            static_cast<uint32_t>(image * g.out_pixels()),
            static_cast<uint32_t>(og * g.taps()) * static_cast<uint32_t>(range.count)};
  }
  DCN_HOST_DEVICE Values load(const Place& p, int32_t sample) const {
    const uint32_t count = static_cast<uint32_t>(range.count);
    const uint32_t at = static_cast<uint32_t>(sample) - p.first_sample, tap = at / count;
    float grad[kSums];
    unpack(grad, grad_output.read(p.n, p.channel, 0, at - tap * count - p.first_pixel));
    Values values{};
    add_product(values.of, grad, weight.at(static_cast<int>(tap), static_cast<int>(p.channel)));
    return values;
  }
  DCN_HOST_DEVICE static void add(float (&sums)[kSums], float weight, const Values& values) {
    DCN_UNROLL
    for (int e = 0; e < kSums; ++e) sums[e] += weight * values.of[e];
  }
};

// grad_input[n, c, y, x] = sum of weight_corner * mask * weight * grad_output over the samples that read the pixel. One
// element: eight channels of a pixel. The range holds whole images, so no other range adds to the same pixels.
template <typename S>
struct DepthwiseInputGradient {
  using Gather = DepthwiseGather<S>;

  Gather gather;
  const SumsOf<Gather>* chunk_sums;
  VectorView<S> grad_input;

  DCN_HOST_DEVICE int64_t pixels() const { return gather.images.count * gather.g.height * gather.g.width; }
  DCN_HOST_DEVICE int64_t vectors() const { return gather.g.channels / 8; }
  DCN_HOST_DEVICE int64_t size() const { return pixels() * vectors(); }
  DCN_DEVICE void operator()(int64_t i) const {
    const ConvGeometry& g = gather.g;
    const PixelPart here(i, pixels(), vectors(), gather.grad_output.data.c == 1);
    const int64_t image = here.pixel / (g.height * g.width);
    const int64_t y = here.pixel / g.width % g.height, x = here.pixel % g.width, og = here.part / gather.parts();
    SumsOf<Gather> sums;
    gather_pixel(gather, chunk_sums, image * g.offset_groups + og, here.part - og * gather.parts(), y, x, sums);
    grad_input.write(sums.of, gather.images.first + image, 8 * here.part, y, x);
  }
};

// grad_weight, a sum over pixels. One element: `Vectors` vectors of channels, of one offset group, of a tap, over a
// share of the pixels.
template <typename S, int Vectors>
struct DepthwiseWeightGradient {
  Sampler<S> sampler;
  VectorView<const S> grad_output;
  int64_t shares, pixels_of_share;
  float* sums;  // [shares, C, taps]

  DCN_HOST_DEVICE int tap_parts() const { return static_cast<int>(sampler.g.channels) / (8 * Vectors); }
  DCN_HOST_DEVICE int64_t parts() const { return static_cast<int64_t>(sampler.sizes.taps) * tap_parts(); }
  DCN_HOST_DEVICE int64_t size() const { return shares * parts(); }
  DCN_DEVICE void operator()(int64_t i) const {
    const bool together = sampler.channels_together();
    const PixelPart here(i, shares, parts(), together);
    const int64_t share = here.pixel;
    const int tap = static_cast<int>(here.part / tap_parts());
    const int channel = static_cast<int>(here.part % tap_parts()) * 8 * Vectors;
    const int plane = channel / sampler.sizes.offset_group_channels * sampler.sizes.taps + tap;
    // Threads side by side that have different shares read pixels side by side; else each reads its own one by one.
    const int64_t total = sampler.sizes.pixels, step = together ? 1 : shares;
    const int64_t first = together ? share * pixels_of_share : share, left = (total - first + step - 1) / step;
    const TilePixel by = pixel_by_rows(sampler.sizes, step);
    TilePixel p = pixel_by_rows(sampler.sizes, first);
    SampleRecord next = sampler.record(p, plane);
    float found[Vectors][8];
    DCN_UNROLL
    for (int e = 0; e < 8 * Vectors; ++e) found[e / 8][e % 8] = 0;
    for (int64_t more = (left < pixels_of_share ? left : pixels_of_share) - 1; more >= 0; --more) {
      const SampleRecord now = next;
      Vector8<S> corners[Vectors][4], grad[Vectors];
      DCN_UNROLL
      for (int k = 0; k < Vectors; ++k) {
        fetch_corners(corners[k], sampler, now.where, channel + 8 * k);
        grad[k] = grad_output.read(p.n, channel + 8 * k, p.y, p.x);
      }
      p = moved(p, by);
      if (more > 0) next = sampler.record(p, plane);
      DCN_UNROLL
      for (int k = 0; k < Vectors; ++k) {
        float values[8];
        interpolate_vector(values, corners[k], now.weight);
        add_product(found[k], values, grad[k]);
      }
    }
    float* const to = sums + (share * sampler.g.channels + channel) * sampler.sizes.taps + tap;
    DCN_UNROLL
    for (int e = 0; e < 8 * Vectors; ++e) to[e * sampler.sizes.taps] = found[e / 8][e % 8];
  }

 private:
  // The pixel that lies `by` after p, without a division.
  DCN_DEVICE TilePixel moved(TilePixel p, const TilePixel& by) const {
    p.x += by.x;
    const bool next_row = p.x >= sampler.g.out_width;
    p.x -= next_row ? static_cast<int>(sampler.g.out_width) : 0;
    p.y += by.y + next_row;
    const bool next_image = p.y >= sampler.g.out_height;
    p.y -= next_image ? static_cast<int>(sampler.g.out_height) : 0;
    p.n += by.n + next_image;
    return p;
  }
};

}  // namespace dcn
