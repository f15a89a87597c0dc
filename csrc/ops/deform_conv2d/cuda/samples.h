// Where a tile of output pixels reads. A sample becomes a record in shared memory: four corner weights, with the mask
// in them, and the place of the first corner.
#pragma once

#include <algorithm>

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

// An offset group and tap: offset group * taps + tap, and where in the kernel the tap is.
struct Plane {
  int number, ky, kx;
};

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
  int out_height, strip;       // rows of pixels that tiles go through column by column, no more than there are

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
        strip(std::min(rows_of_strip, out_height)) {}
};

// Output pixel `number` of the batch, row by row: pixels side by side read offsets side by side.
DCN_DEVICE TilePixel pixel_by_rows(const ConvSizes& sizes, int64_t number) {
  const int64_t n = number / sizes.out_pixels;
  const int rest = static_cast<int>(number - n * sizes.out_pixels);
  return {n, rest / sizes.out_width, rest % sizes.out_width};
}

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

  DCN_DEVICE float modulation(const TilePixel& p, int plane) const {
    return mask.given() ? mask.at(p.n, plane, p.y, p.x) : 1.0f;
  }

  // `number` = offset group * taps + tap
  DCN_DEVICE Plane plane(int number) const {
    const int tap = number % sizes.taps;
    return {number, tap / sizes.kernel_w, tap % sizes.kernel_w};
  }
  DCN_DEVICE Sample<float, int> sample(const TilePixel& p, int number) const { return sample(p, plane(number)); }
  DCN_DEVICE Sample<float, int> sample(const TilePixel& p, const Plane& of) const {
    return g.sample<float, int>(static_cast<int>(g.start_y(p.y)), static_cast<int>(g.start_x(p.x)), of.ky, of.kx,
                                offset.at(p.n, 2 * of.number, p.y, p.x), offset.at(p.n, 2 * of.number + 1, p.y, p.x));
  }

  DCN_DEVICE SampleRecord record(const TilePixel& p, int number) const {
    return record(p, plane(number), p.n * input.n, input.h, input.w);
  }
  // Where `image` is the place of the pixel's image, and places of rows and columns lie so far apart.
  DCN_DEVICE SampleRecord record(const TilePixel& p, const Plane& of, int64_t image, int64_t row,
                                 int64_t column) const {
    SampleRecord r{{0, 0, 0, 0}, 0};
    if (p.n < 0) return r;
    const Sample<float, int> s = sample(p, of);
    const float m = modulation(p, of.number);
    int64_t read = 0;
    DCN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float w = s.weight(c);
      if (!s.has(c) || w == 0) continue;
      r.weight[c] = m * w;
      read |= 1 << c;
    }
    if (read) {
      r.where = (image + s.y0 * row + s.x0 * column) * 16 + read;
    } else {
      // Nothing is read. A NaN position or infinite mask is to show: its NaN is multiplied with the image's first
      // pixel.
      r.weight[0] = m * s.origin();
      r.where = image * 16 + (r.weight[0] != 0 ? 1 : 0);
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
};

// Writes the gradients of a sample's offset and mask, which follow from sums[c] = sum over its channels of the column's
// gradient times corner c.
template <typename S>
DCN_DEVICE void write_displacement_gradient(const Sampler<S>& sampler, const TilePixel& p, int plane,
                                            const float (&sums)[4], const WriteEither<S>& grad_offset,
                                            const WriteEither<S>& grad_mask) {
  const Sample<float, int> s = sampler.sample(p, plane);
  const Gradient<float> at = combine_corners(s, [&](int c) { return sums[c]; });
  if (grad_mask.given()) grad_mask.set(p.n, plane, p.y, p.x, at.value);
  if (!grad_offset.given()) return;
  const float m = sampler.modulation(p, plane);
  grad_offset.set(p.n, 2 * plane, p.y, p.x, m * at.dy);
  grad_offset.set(p.n, 2 * plane + 1, p.y, p.x, m * at.dx);
}

}  // namespace dcn
