// Where a tile of output pixels reads. A sample becomes a record in shared memory: four corner weights, with the mask
// in them, and the place of the first corner.
#pragma once

#include "../../../runtime/gpu_values.h"
#include "../bodies.h"

namespace dcn {

// Offsets or mask, or their gradients: float, or the type of the input.
template <typename Half, typename Full>
struct EitherView {
  View<Half> half;  // one of the two has data, or neither
  View<Full> full;

  DCN_DEVICE bool given() const { return half.data || full.data; }
  DCN_DEVICE float at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return full.data ? full.at(n, c, y, x) : static_cast<float>(half.at(n, c, y, x));
  }
  DCN_DEVICE void set(int64_t n, int64_t c, int64_t y, int64_t x, float value) const {
    if (full.data)
      full.at(n, c, y, x) = value;
    else
      half.at(n, c, y, x) = static_cast<Half>(value);
  }
};
template <typename S>
using ReadEither = EitherView<const S, const float>;
template <typename S>
using WriteEither = EitherView<S, float>;

struct TilePixel {
  int64_t n;  // -1: beyond the last pixel
  int y, x;
};

// How many samples of a pixel a block keeps at a time: what fits into shared memory beside the operands.
constexpr int kSamplesPerPixel = 9;

struct SampleRecord {
  float weight[4];  // mask * bilinear, 0 for corners that are not read
  int64_t where;    // 16 * place + bits: place of the first corner in the input; bit c is set if corner c is read
};

// Sizes that kernels ask for again and again, computed on the host: ConvGeometry would divide, in 64 bits, each time.
struct ConvSizes {
  int taps, kernel_w, out_width;
  int groups, group_channels, group_outputs, depth;  // depth = taps * group_channels
  int offset_groups, offset_group_channels;
  int64_t out_pixels, pixels;  // of an image, of the batch
  int out_height, strip;       // rows of pixels that tiles go through column by column

  ConvSizes(const ConvGeometry& g, int rows_of_strip)
      : taps(static_cast<int>(g.taps())),
        kernel_w(static_cast<int>(g.kernel_w)),
        out_width(static_cast<int>(g.out_width)),
        groups(static_cast<int>(g.groups)),
        group_channels(static_cast<int>(g.group_channels())),
        group_outputs(static_cast<int>(g.group_outputs())),
        depth(taps * group_channels),
        offset_groups(static_cast<int>(g.offset_groups)),
        offset_group_channels(static_cast<int>(g.offset_group_channels())),
        out_pixels(g.out_pixels()),
        pixels(g.batch * out_pixels),
        out_height(static_cast<int>(g.out_height)),
        strip(rows_of_strip) {}

  DCN_HOST_DEVICE int vectors() const { return group_channels / 8; }  // of eight channels, in a group
};

// In which order the vectors of some taps' columns are taken. Taps read nearly the same pixels, so `Together` vectors
// of every tap come before the next ones of any: their pixels are then still in the first-level cache. Where the number
// of a tap's vectors is no multiple of that, tap by tap.
template <int Together>
struct VectorOrder {
  int taps, vectors;  // how many taps, and vectors of each

  struct At {
    int tap, vector;  // the tap counts from the first of these
  };
  DCN_DEVICE int count() const { return taps * vectors; }
  DCN_DEVICE At at(int number) const {
    if (vectors % Together) return {number / vectors, number % vectors};
    const int step = number / Together;
    return {step % taps, step / taps * Together + number % Together};
  }
};

template <typename S>
struct Sampler {
  ConvGeometry g;
  ConvSizes sizes;
  View<const S> input;
  ReadEither<S> offset, mask;

  // Pixel `number` of the batch: in strips of some rows, and column by column within a strip, so that the pixels of a
  // tile lie close together in both directions and read the same part of the input. An image's last strip may be lower.
  DCN_DEVICE TilePixel pixel(int64_t number) const {
    if (number >= sizes.pixels) return {-1, 0, 0};
    const int64_t n = number / sizes.out_pixels;
    const int rest = static_cast<int>(number - n * sizes.out_pixels), whole = sizes.strip * sizes.out_width;
    const int top = rest / whole * sizes.strip, within = rest % whole;
    const int rows = sizes.out_height - top < sizes.strip ? sizes.out_height - top : sizes.strip;
    return {n, top + within % rows, within / rows};
  }

  // The same pixel's number row by row, as in a PixelRange.
  DCN_DEVICE int64_t number_by_rows(const TilePixel& p) const {
    return p.n * sizes.out_pixels + static_cast<int64_t>(p.y) * sizes.out_width + p.x;
  }

  DCN_DEVICE float modulation(const TilePixel& p, int plane) const {
    return mask.given() ? mask.at(p.n, plane, p.y, p.x) : 1.0f;
  }

  // `plane` = offset group * taps + tap
  DCN_DEVICE Sample<float, int> sample(const TilePixel& p, int plane) const {
    const int tap = plane % sizes.taps, width = sizes.kernel_w;
    return g.sample<float, int>(static_cast<int>(g.start_y(p.y)), static_cast<int>(g.start_x(p.x)), tap / width,
                                tap % width, offset.at(p.n, 2 * plane, p.y, p.x),
                                offset.at(p.n, 2 * plane + 1, p.y, p.x));
  }

  DCN_DEVICE SampleRecord record(const TilePixel& p, int plane) const {
    SampleRecord r{{0, 0, 0, 0}, 0};
    if (p.n < 0) return r;
    const Sample<float, int> s = sample(p, plane);
    const float m = modulation(p, plane);
    int64_t read = 0;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float w = s.weight(c);
      if (!s.has(c) || w == 0) continue;
      r.weight[c] = m * w;
      read |= 1 << c;
    }
    if (read) {
      r.where = (p.n * input.n + s.y0 * input.h + s.x0 * input.w) * 16 + read;
    } else {
      // Nothing is read. A NaN position or infinite mask is to show: its NaN is multiplied with the image's first
      // pixel.
      r.weight[0] = m * s.origin();
      r.where = p.n * input.n * 16 + (r.weight[0] != 0 ? 1 : 0);
    }
    return r;
  }

  // As SampleRecord::where, with the bits of all corners on the map: derivatives read those without weight too.
  DCN_DEVICE int64_t place(const TilePixel& p, int plane) const {
    if (p.n < 0) return 0;
    const Sample<float, int> s = sample(p, plane);
    return (p.n * input.n + s.y0 * input.h + s.x0 * input.w) * 16 + s.corners;
  }

  DCN_DEVICE bool channels_together() const { return input.c == 1; }

  // How far corner c lies behind the first one.
  DCN_DEVICE int64_t corner_step(int c) const { return (c & 2 ? input.h : 0) + (c & 1 ? input.w : 0); }

  // Eight channels, which lie together, of each corner; zeros for corners that are not read.
  DCN_DEVICE void fetch(Vector8<S> (&corners)[4], int64_t where, int channel) const {
    const S* const first = input.data + (where >> 4) + channel;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c)
      corners[c] = where >> c & 1 ? *reinterpret_cast<const Vector8<S>*>(first + corner_step(c)) : zeros<S>();
  }

  // sums[c] = sum over eight channels of grad * corner c, 0 for corners that are not on the map.
  DCN_DEVICE void multiply_corners(float (&sums)[4], int64_t where, int channel, const float (&grad)[8]) const {
    const S* const first = input.data + (where >> 4) + channel * input.c;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) {
      sums[c] = 0;
      if (!(where >> c & 1)) continue;
      const S* const from = first + corner_step(c);
      if (channels_together()) {
        sums[c] = dot(grad, *reinterpret_cast<const Vector8<S>*>(from));
      } else {
        DCN_UNROLL
        for (int i = 0; i < 8; ++i) sums[c] += grad[i] * static_cast<float>(from[i * input.c]);
      }
    }
  }

  // Eight channels that lie apart, interpolated at once: unlike `fetch`, it need not keep the corners.
  DCN_DEVICE Vector8<S> interpolate_apart(int64_t where, const float (&weight)[4], int channel) const {
    const S* const first = input.data + (where >> 4) + channel * input.c;
    float sums[8];
    DCN_UNROLL
    for (int i = 0; i < 8; ++i) sums[i] = 0;
    DCN_KEEP_LOOP
    for (int c = 0; c < 4; ++c) {
      if (!(where >> c & 1)) continue;
      const S* const from = first + corner_step(c);
      DCN_UNROLL
      for (int i = 0; i < 8; ++i) sums[i] += weight[c] * static_cast<float>(from[i * input.c]);
    }
    return pack<S>(sums);
  }
};

// Writes the gradients of a sample's offset and mask, which follow from sums[c] = sum over its channels of the column's
// gradient times corner c.
template <typename S>
DCN_DEVICE void write_displacement_gradient(const Sampler<S>& sampler, const TilePixel& p, int plane,
                                            const float (&sums)[4], const WriteEither<S>& grad_offset,
                                            const WriteEither<S>& grad_mask) {
  const Sample<float, int> s = sampler.sample(p, plane);
  const Gradient<float> at = interpolate_gradient(s, [&](int y, int x) { return sums[2 * (y - s.y0) + (x - s.x0)]; });
  if (grad_mask.given()) grad_mask.set(p.n, plane, p.y, p.x, at.value);
  if (!grad_offset.given()) return;
  const float m = sampler.modulation(p, plane);
  grad_offset.set(p.n, 2 * plane, p.y, p.x, m * at.dy);
  grad_offset.set(p.n, 2 * plane + 1, p.y, p.x, m * at.dx);
}

template <typename S>
DCN_DEVICE Vector8<S> combine(const Vector8<S> (&corners)[4], const float (&weight)[4]) {
  float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  DCN_UNROLL
  for (int c = 0; c < 4; ++c) add_scaled(sums, weight[c], corners[c]);
  return pack<S>(sums);
}

}  // namespace dcn
