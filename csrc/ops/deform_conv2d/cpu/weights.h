// Deformable convolution on the CPU: weights of any layout brought into panels, and their gradients back.
#pragma once

#include "../../../runtime/cpu_product.h"
#include "plan.h"

namespace dcn::tiles {

// Weights that are used as they are stored, for layers with few output pixels: packing would cost more than everything
// else that is done with the weights.
template <typename A>
struct StoredWeights {
  enum Order { kNone, kTapsInside, kTapsOutside };  // not used; OIHW; OHWI
  Order order = kNone;
  A* data = nullptr;
  int64_t output = 0, tap = 0, channel = 0;  // strides

  explicit operator bool() const { return order != kNone; }
  A* at(int64_t o, int64_t c) const { return data + o * output + c * channel; }
  // The terms of a product with a block's weights: `segments` of `depth` terms that lie without gaps.
  int64_t segments(int64_t taps) const { return order == kTapsInside ? 1 : taps; }
  int64_t depth(int64_t taps, int64_t channels) const { return order == kTapsInside ? taps * channels : channels; }

  StoredWeights() = default;
  StoredWeights(const ConvGeometry& g, const Tensor& weight)
      : data(static_cast<A*>(weight.data_ptr())), output(g.taps() * g.group_channels()) {
    const int64_t channels = g.group_channels();
    // Products read whole vectors of channels, which must not reach beyond a group; and with more pixels packing pays.
    if (channels % 16 != 0 || 4 * g.batch * g.out_pixels() > g.group_outputs()) return;
    if (is_stored(weight, {output, g.taps(), g.kernel_w, 1}))
      order = kTapsInside, tap = 1, channel = g.taps();
    else if (is_stored(weight, {output, 1, g.kernel_w * channels, channels}))
      order = kTapsOutside, tap = channels, channel = 1;
  }
};

// Weights as the forward's products read them: [block][group][panel of outputs][tap][channel][output of the panel].
// Depthwise: [tap][channel].
template <typename A>
struct ForwardWeights {
  const ConvGeometry& g;
  A* data;
  int64_t width = product::panel_width<A>();

  int64_t panels() const { return divide_up(g.group_outputs(), width); }
  int64_t panel_size(const Block& b) const { return g.taps() * b.group_channels() * width; }
  int64_t size(const Block& b) const { return b.depthwise ? g.taps() * b.count : b.groups * panels() * panel_size(b); }
  // Where a block's weights start: every channel before it takes as much.
  int64_t start(const Block& b) const { return b.first * (b.depthwise ? 1 : panels() * width) * g.taps(); }
  // The weights of a block's i-th group, as the right side of a product over its taps and channels.
  product::Right<A> of(const Block& b, int64_t i) const {
    return {data + start(b) + i * panels() * panel_size(b), panel_size(b), width, b.group_channels() * width};
  }
};

// One panel: from weights of any layout, of up to `width` outputs, to [tap][channel][output]. Outputs that the panel
// has beyond these are zeros.
template <typename A, typename S>
struct PackPanel {
  const S* weight;
  int64_t output_stride, channel_stride, y_stride, x_stride;
  int64_t outputs, channels, kernel_h, kernel_w;
  A* panel;
  int64_t width;

  DCN_HOST_DEVICE void operator()() const {
    const int64_t taps = kernel_h * kernel_w;
    for (int64_t i = 0; outputs < width && i < taps * channels; ++i)
      for (int64_t o = outputs; o < width; ++o) panel[i * width + o] = 0;
#if defined(DCN_QUADS)
    if constexpr (std::is_same_v<S, float>) {
      if (x_stride == 1 && y_stride == kernel_w && channel_stride == taps) return pack_taps_inside();
    }
#endif
    for (int64_t y = 0; y < kernel_h; ++y)
      for (int64_t x = 0; x < kernel_w; ++x)
        TransposeRow<A, const S, Transpose::kToRows>{
            weight + y * y_stride + x * x_stride,          output_stride, channel_stride, outputs, channels,
            panel + (y * kernel_w + x) * channels * width, width}();
  }

#if defined(DCN_QUADS)
  // For weights stored as [output][channel][tap], read in that order: four outputs at a time, `stretch` terms of each.
  DCN_HOST_DEVICE void pack_taps_inside() const {
    constexpr int64_t stretch = 144;
    const int64_t taps = kernel_h * kernel_w, depth = channels * taps;
    for (int64_t first = 0; first < depth; first += stretch)
      for (int64_t o = 0; o < outputs; o += 4) {
        const int64_t rows = outputs - o < 4 ? outputs - o : 4;
        const int64_t last = first + stretch < depth ? first + stretch : depth;
        int64_t tap = first % taps;
        A* to = panel + (tap * channels + first / taps) * width + o;
        for (int64_t m = first; m < last; m += 4) {
          const int64_t count = last - m < 4 ? last - m : 4;
          Quad q[4] = {};
          for (int64_t i = 0; i < rows; ++i) {
            const S* const from = weight + (o + i) * output_stride + m;
            if (count == 4)
              q[i] = *reinterpret_cast<const StoredQuad*>(from);
            else
              for (int64_t j = 0; j < count; ++j) q[i][j] = from[j];
          }
          transpose_quads(q);
          for (int64_t j = 0; j < count; ++j) {
            *reinterpret_cast<StoredQuad*>(to) = q[j];
            to += channels * width;
            if (++tap == taps) tap = 0, to -= depth * width - width;
          }
        }
      }
  }
#endif
};

template <typename A, typename S>
void pack_forward(const ForwardWeights<A>& packed, const std::vector<Block>& blocks, const View<const S>& weight) {
  const ConvGeometry& g = packed.g;
  if (is_depthwise(g)) {
    for (int64_t k = 0; k < g.taps(); ++k)
      for (int64_t c = 0; c < g.channels; ++c)
        packed.data[k * g.channels + c] = static_cast<A>(weight.at(c, 0, k / g.kernel_w, k % g.kernel_w));
    return;
  }
  const int64_t panels = packed.panels();
  // No block has more groups than the first.
  const int64_t max_groups = blocks.front().groups, tasks = max_groups * panels;
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()) * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block& b = blocks[i / tasks];
      const int64_t group = i / panels % max_groups, first = i % panels * packed.width;
      if (group >= b.groups) continue;
      const int64_t channel = b.groups > 1 ? 0 : b.first - b.group * g.group_channels();
      run_vectorised(PackPanel<A, S>{
          &weight.at((b.group + group) * g.group_outputs() + first, channel, 0, 0), weight.n, weight.c, weight.h,
          weight.w, std::min(packed.width, g.group_outputs() - first), b.group_channels(), g.kernel_h, g.kernel_w,
          packed.data + packed.start(b) + (group * panels + i % panels) * packed.panel_size(b), packed.width});
    }
  });
}

// Weights, or their gradient, as the backward's products read and write them: [block][group][segment of columns][panel
// of the segment][output][column of the panel]. Depthwise: [block][tap][channel].
template <typename A>
struct BackwardWeights {
  const ConvGeometry& g;
  A* data;
  int64_t width = product::panel_width<A>();

  int64_t panels(const Block& b) const { return divide_up(ColumnLayout(g, b, 0).width, width); }
  int64_t panel_size() const { return g.group_outputs() * width; }
  int64_t size(const Block& b) const {
    if (b.depthwise) return g.taps() * b.count;
    return b.groups * ColumnLayout(g, b, 0).segments * panels(b) * panel_size();
  }
  int64_t size(const std::vector<Block>& blocks) const {
    int64_t sum = 0;
    for (const Block& b : blocks) sum += size(b);
    return sum;
  }
};

// Moves the weights of one output and block from their own layout into panels (`Pack`), or their gradient back.
template <typename A, typename S, bool Pack>
struct RepackOutput {
  S* weight;
  int64_t channel_stride, y_stride, x_stride, kernel_h, kernel_w, channels;
  bool ragged;  // one segment holds all taps and channels (ColumnLayout)
  A* panel;     // of this output
  int64_t width, panel_size, panels;

  DCN_HOST_DEVICE void operator()() const {
    const int64_t taps = kernel_h * kernel_w;
    if (ragged) {
      for (int64_t i = 0; i < taps * channels; ++i) {
        const int64_t k = i / channels;
        S& from = weight[i % channels * channel_stride + k / kernel_w * y_stride + k % kernel_w * x_stride];
        A& to = panel[i / width * panel_size + i % width];
        if constexpr (Pack)
          to = static_cast<A>(from);
        else
          from = static_cast<S>(to);
      }
      return;
    }
    constexpr Transpose direction = Pack ? Transpose::kToRows : Transpose::kFromRows;
    // Taps that lie evenly spaced are moved as one row.
    const bool even = y_stride == kernel_w * x_stride;
    const int64_t rows = even ? 1 : kernel_h, columns = even ? taps : kernel_w;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t y = 0; y < rows; ++y) {
        const int64_t first = p * width, count = channels - first < width ? channels - first : width;
        TransposeRow<A, S, direction>{
            weight + first * channel_stride + y * y_stride,   channel_stride,     x_stride, count, columns,
            panel + (y * kernel_w * panels + p) * panel_size, panels * panel_size}();
      }
  }
};

template <bool Pack, typename A, typename S>
void repack_backward(const BackwardWeights<A>& packed, const std::vector<Block>& blocks, const View<S>& weight) {
  const ConvGeometry& g = packed.g;
  A* data = packed.data;
  for (const Block& b : blocks) {
    if (b.depthwise) {
      for (int64_t k = 0; k < g.taps(); ++k)
        for (int64_t c = 0; c < b.count; ++c) {
          S& from = weight.at(b.first + c, 0, k / g.kernel_w, k % g.kernel_w);
          if constexpr (Pack)
            data[k * b.count + c] = static_cast<A>(from);
          else
            from = static_cast<S>(data[k * b.count + c]);
        }
    } else {
      const ColumnLayout columns(g, b, 0);
      const int64_t outputs = g.group_outputs(), panels = packed.panels(b);
      torch::stable::parallel_for(0, b.groups * outputs, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t group = i / outputs, o = i % outputs;
          const int64_t channel = b.groups > 1 ? 0 : b.first - b.group * g.group_channels();
          run_vectorised(RepackOutput<A, S, Pack>{
              &weight.at(b.group * outputs + i, channel, 0, 0), weight.c, weight.h, weight.w, g.kernel_h, g.kernel_w,
              b.group_channels(), columns.segments == 1 && g.taps() > 1,
              data + group * columns.segments * panels * packed.panel_size() + o * packed.width, packed.width,
              packed.panel_size(), panels});
        }
      });
    }
    data += packed.size(b);
  }
}

}  // namespace dcn::tiles
