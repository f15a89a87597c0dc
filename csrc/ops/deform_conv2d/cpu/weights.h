// Deformable convolution on the CPU: weights of any layout brought into panels, and their gradients back.
#pragma once

#include "../../../runtime/cpu_pairs.h"
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
// Depthwise: [tap][channel]. Or as they are stored, where their outputs lie side by side. W: the accumulator type, or
// pairs of channels.
template <typename W>
struct ForwardWeights {
  static constexpr int64_t terms = product::terms_of<W>;
  const ConvGeometry& g;
  W* data;
  int64_t width = product::panel_width<W>();
  int narrow = terms == 1 ? narrow_groups<product::SumOf<W>>(g) : 0;
  bool in_place = false;
  int64_t tap = 0, channel = 0;  // strides in place

  int64_t panels() const { return divide_up(g.group_outputs(), width); }
  int64_t panel_size(const Block& b) const { return g.taps() * b.group_channels() / terms * width; }
  int64_t size(const Block& b) const {
    if (b.depthwise || narrow) return g.taps() * b.count * g.group_channels();
    return b.groups * panels() * panel_size(b);
  }
  // Where a block's weights start: every channel before it takes as much.
  int64_t start(const Block& b) const {
    return b.first / terms * (b.depthwise || narrow ? g.group_channels() : panels() * width) * g.taps();
  }
  // The weights of a block's i-th group, as the right side of a product over its taps and channels.
  product::Right<W> of(const Block& b, int64_t i) const {
    if (in_place) {
      const int64_t group = b.group + i, first = b.groups > 1 ? 0 : b.first - group * g.group_channels();
      return {data + group * g.group_outputs() + first * channel, width, channel, tap};
    }
    return {data + start(b) + i * panels() * panel_size(b), panel_size(b), width, b.group_channels() / terms * width};
  }
};

// Uses weights as they are stored, if their outputs lie side by side (dcn_plugin.prepare_for_inference) and the call
// has few pixels: packing would then cost more than reading them in longer steps.
template <typename A>
void use_in_place(ForwardWeights<A>& weights, const Tensor& weight) {
  const ConvGeometry& g = weights.g;
  constexpr int64_t few = 256;
  // Whole vectors of outputs are read, and what a stride of a size of 1 is does not matter.
  const auto stride = [&](int64_t d) { return weight.size(d) > 1 ? weight.stride(d) : 0; };
  const bool even = g.kernel_h == 1 || g.kernel_w == 1 || stride(2) == g.kernel_w * stride(3);
  if (g.is_depthwise() || weights.narrow || g.batch * g.out_pixels() > few || !even || stride(0) != 1 ||
      g.group_outputs() % (weights.width / 2) != 0)
    return;
  weights.in_place = true, weights.data = static_cast<A*>(weight.data_ptr());
  weights.tap = g.kernel_w > 1 ? stride(3) : stride(2), weights.channel = stride(1);
}

// Weights of narrow groups (runtime/cpu_narrow.h), or their gradient back: [block][tap][member][channel]. In the
// forward channels are outputs and members inputs of their group (`Outputs`), in the backward the other way round.
template <bool Pack, bool Outputs, typename A, typename S>
void repack_narrow(const ConvGeometry& g, const std::vector<Block>& blocks, const View<S>& weight, A* data) {
  const int64_t width = g.group_channels();
  for (const Block& b : blocks)
    for (int64_t k = 0; k < g.taps(); ++k)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t c = b.first; c < b.first + b.count; ++c) {
          S& from =
              weight.at(Outputs ? c : c / width * width + i, Outputs ? i : c % width, k / g.kernel_w, k % g.kernel_w);
          if constexpr (Pack)
            *data++ = static_cast<A>(from);
          else
            from = static_cast<S>(*data++);
        }
}

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
      for (int64_t x = 0; x < kernel_w; ++x) {
        const S* const tap = weight + y * y_stride + x * x_stride;
        // Stretches of a few channels, which the processor does not foresee, are fetched a tap before they are read.
        if (channel_stride == 1 && y + 1 + x + 1 < kernel_h + kernel_w)
          fetch(x + 1 < kernel_w ? tap + x_stride : weight + (y + 1) * y_stride);
        TransposeRow<A, const S, Transpose::kToRows>{
            tap,  output_stride, channel_stride, outputs, channels, panel + (y * kernel_w + x) * channels * width,
            width}();
      }
  }
  DCN_HOST_DEVICE void fetch(const S* tap) const {
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t c = 0; c < channels; c += 64 / sizeof(S)) prefetch(tap + o * output_stride + c);
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

template <typename W, typename S>
void pack_forward(const ForwardWeights<W>& packed, const std::vector<Block>& blocks, const View<const S>& weight) {
  using A = product::SumOf<W>;
  const ConvGeometry& g = packed.g;
  if constexpr (packed.terms == 1) {
    if (packed.narrow) return repack_narrow<true, true>(g, blocks, weight, packed.data);
    if (g.is_depthwise()) {
      for (int64_t k = 0; k < g.taps(); ++k)
        for (int64_t c = 0; c < g.channels; ++c)
          packed.data[k * g.channels + c] = static_cast<A>(weight.at(c, 0, k / g.kernel_w, k % g.kernel_w));
      return;
    }
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
      W* const panel = packed.data + packed.start(b) + (group * panels + i % panels) * packed.panel_size(b);
      const auto pack = [&](A* to) {
        run_vectorised(PackPanel<A, S>{&weight.at((b.group + group) * g.group_outputs() + first, channel, 0, 0),
                                       weight.n, weight.c, weight.h, weight.w,
                                       std::min(packed.width, g.group_outputs() - first), b.group_channels(),
                                       g.kernel_h, g.kernel_w, to, packed.width});
      };
      if constexpr (packed.terms == 1) {
        pack(panel);
      } else {  // the rows of two channels become one of pairs
        A* const rows = thread_scratch<A, -3>(2 * packed.panel_size(b));
        pack(rows);
        for (int64_t c = 0; c < packed.panel_size(b) / packed.width; ++c)
          pair_rows(rows + 2 * c * packed.width, rows + (2 * c + 1) * packed.width, packed.width,
                    panel + c * packed.width);
      }
    }
  });
}

// Weights, or their gradient, as the backward's products read and write them: [block][group][segment of columns][panel
// of the segment][output][column of the panel]. Depthwise: [block][tap][channel]. W: the accumulator type, or pairs of
// outputs.
template <typename W>
struct BackwardWeights {
  static constexpr int64_t terms = product::terms_of<W>;
  const ConvGeometry& g;
  W* data;
  int64_t width = product::panel_width<W>();
  int narrow = terms == 1 ? narrow_groups<product::SumOf<W>>(g) : 0;

  int64_t panels(const Block& b) const { return divide_up(ColumnLayout(g, b, 0).width, width); }
  int64_t panel_size() const { return g.group_outputs() / terms * width; }
  int64_t size(const Block& b) const {
    if (b.depthwise || narrow) return g.taps() * b.count * g.group_channels();
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

template <bool Pack, typename W, typename S>
void repack_backward(const BackwardWeights<W>& packed, const std::vector<Block>& blocks, const View<S>& weight) {
  using A = product::SumOf<W>;
  const ConvGeometry& g = packed.g;
  W* data = packed.data;
  if constexpr (packed.terms == 1)
    if (packed.narrow) return repack_narrow<Pack, false>(g, blocks, weight, data);
  for (const Block& b : blocks) {
    if (b.depthwise) {
      if constexpr (packed.terms == 1)
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
      const int64_t outputs = g.group_outputs(), panels = packed.panels(b), rows = columns.segments * panels;
      const int64_t channel = b.groups > 1 ? 0 : b.first - b.group * g.group_channels();
      const auto repack = [&](int64_t output, A* panel, int64_t panel_size) {
        run_vectorised(RepackOutput<A, S, Pack>{
            &weight.at(b.group * outputs + output, channel, 0, 0), weight.c, weight.h, weight.w, g.kernel_h, g.kernel_w,
            b.group_channels(), columns.segments == 1 && g.taps() > 1, panel, packed.width, panel_size, panels});
      };
      torch::stable::parallel_for(0, b.groups * outputs / packed.terms, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t group = i * packed.terms / outputs, o = i * packed.terms % outputs;
          W* const panel = data + group * rows * packed.panel_size() + o / packed.terms * packed.width;
          if constexpr (packed.terms == 1) {
            repack(i, panel, packed.panel_size());
          } else {  // the rows of two outputs become one of pairs
            static_assert(Pack, "gradients are summed in float");
            A* const two = thread_scratch<A, -3>(2 * rows * packed.width);
            for (int64_t j = 0; j < 2; ++j) repack(2 * i + j, two + j * packed.width, 2 * packed.width);
            for (int64_t r = 0; r < rows; ++r)
              pair_rows(two + 2 * r * packed.width, two + (2 * r + 1) * packed.width, packed.width,
                        panel + r * packed.panel_size());
          }
        }
      });
    }
    data += packed.size(b);
  }
}

}  // namespace dcn::tiles
