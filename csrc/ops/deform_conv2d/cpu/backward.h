// Deformable convolution on the CPU, backward: how a call is shared out to threads. No thread adds to what another adds
// to: a share owns channels, and a split owns images. What they sum apart is added up in a fixed order afterwards, so
// equal numbers of threads give equal bits.
#pragma once

#include "backward_tile.h"

namespace dcn::tiles {

// Gives each of at most `threads` shares as many blocks as the others, or one more.
template <typename A>
std::vector<Share> make_shares(const ConvGeometry& g, const std::vector<Block>& blocks,
                               const BackwardWeights<A>& gradient, int64_t threads) {
  const int64_t count = static_cast<int64_t>(blocks.size()), shares = std::min(threads, count);
  std::vector<Share> found;
  int64_t first_weight = 0;
  for (int64_t i = 0; i < shares; ++i) {
    const size_t first = i * count / shares, end = (i + 1) * count / shares;
    const Block &from = blocks[first], &to = blocks[end - 1];
    const int64_t last_group = to.depthwise ? to.first + to.count : to.group + to.groups;
    const int64_t first_group = from.depthwise ? from.first : from.group;
    found.push_back({first, end - first, first_group * g.group_outputs(),
                     (last_group - first_group) * g.group_outputs(), from.first_offset_group(),
                     to.first_offset_group() + to.offset_groups() - from.first_offset_group(), first_weight});
    for (size_t b = first; b < end; ++b) first_weight += gradient.size(blocks[b]);
  }
  return found;
}

// Adds what the shares have found, in their order: `parts` is [shares, images, channels, height, width].
template <typename A, typename T>
void add_parts(const Tensor& parts, int64_t shares, int64_t images, int64_t image, const View<T>& result,
               int64_t channels, int64_t height, int64_t width) {
  const A* const data = static_cast<const A*>(parts.data_ptr());
  const int64_t share_size = parts.numel() / shares;
  torch::stable::parallel_for(0, images * channels * height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (channels * height), c = i / height % channels, y = i % height;
      for (int64_t x = 0; x < width; ++x) {
        A sum = 0;
        for (int64_t share = 0; share < shares; ++share) sum += data[share * share_size + i * width + x];
        result.at(image + n, c, y, x) = static_cast<T>(sum);
      }
    }
  });
}

// As many blocks as threads, as long as each keeps two vectors' worth of channels.
inline std::vector<Block> make_backward_blocks(const ConvGeometry& g, int64_t threads) {
  const std::vector<Block> blocks = make_blocks(g, block_channels);
  if (static_cast<int64_t>(blocks.size()) >= threads) return blocks;
  const int64_t share = divide_up(divide_up(g.channels, threads), 16) * 16;
  return make_blocks(g, std::clamp<int64_t>(share, 32, block_channels));
}

template <typename S, typename F, typename P>
void backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g, int64_t wanted,
              const Tensor& grad_input, const Tensor& grad_offset, const Tensor& grad_weight, const Tensor& grad_mask,
              const std::vector<Block>& blocks) {
  using A = Accumulate<S>;
  using W = ProductOf<P>;
  const int64_t threads = torch::stable::get_num_threads();
  const auto zeroed = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(a.input, sizes, scalar_type_of<A>());
  };
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };

  BackwardWeights<W> weights{g, nullptr};
  BackwardWeights<A> gradient{g, nullptr};
  const int64_t weight_size = gradient.size(blocks);
  StoredWeights<const A> stored;
  StoredWeights<A> stored_gradient;
  if constexpr (std::is_same_v<S, A>) {
    // The gradient of the weights is made in place only if a single split adds to it.
    const bool alone = g.batch == 1 || threads <= static_cast<int64_t>(blocks.size());
    if (alone && blocks.front().groups == 1 && !g.is_depthwise()) {
      stored = StoredWeights<const A>(g, a.weight);
      if (wanted & kWeight) stored_gradient = StoredWeights<A>(g, grad_weight);
      if ((wanted & kWeight) && static_cast<int>(stored_gradient.order) != static_cast<int>(stored.order)) stored = {};
    }
  }
  weights.data = stored ? nullptr : thread_scratch<W, -2>(weights.size(blocks));
  if (!stored) repack_backward<true>(weights, blocks, view<const S>(a.weight));
  const std::vector<Share> shares = make_shares(g, blocks, gradient, threads);
  const Tensor zeros = zeroed({g.channels});

  Backward<S, F, P> job{a, g, grad_output, wanted, blocks, weights, stored, stored_gradient};
  job.zeros = data(zeros);
  const bool in_place = reads_in_place<S>(g, a.input);
  const bool grad_in_place = job.scatter() && reads_in_place<S>(g, grad_input);
  const bool windows = !in_place || (job.scatter() && !grad_in_place && std::is_same_v<S, A>);
  const Reading reading = choose_reading<S, F>(a, g, windows);
  job.max_pixels = reading.max_pixels;
  if (in_place) job.rows = rows_in_place<A>(view<const S>(a.input));
  // Half types are summed in float. What is copied or summed apart is so for as many images at a time as are held.
  const bool staged = job.scatter() && !grad_in_place && (reading.copies || !std::is_same_v<S, A>);
  const bool copied = reading.copies && !in_place;
  const int64_t share_count = static_cast<int64_t>(shares.size());
  const int64_t splits = std::min(g.batch, divide_up(threads, share_count));
  const int64_t held = staged || copied ? images_held<A>(g, splits) : g.batch;
  const Tensor copies = new_copies<A>(a.input, g, copied ? held : 0);
  const Tensor staging = zeroed({staged ? held * g.channels * g.height * g.width : 0});
  if (copied) job.rows = rows_of_copies(g, data(copies));
  if (staged)
    job.grad_rows = rows_of_copies(g, data(staging));
  else if (job.scatter()) {
    Tensor whole = grad_input;
    torch::stable::zero_(whole);
    job.grad_input = view<A>(grad_input);
    if (grad_in_place) job.grad_rows = rows_in_place<A>(job.grad_input);
  }

  // Shares that meet in an offset group sum apart, and their parts are added afterwards.
  const int64_t planes = g.offset_groups * g.taps();
  bool shared = false;
  for (size_t i = 1; i < shares.size(); ++i)
    shared |= shares[i].first_offset_group < shares[i - 1].first_offset_group + shares[i - 1].offset_groups;
  const auto parts = [&](bool wanted, int64_t channels) {
    return zeroed({shared && wanted ? share_count * held : 0, channels, g.out_height, g.out_width});
  };
  const Tensor offset_parts = parts(wanted & kOffset, 2 * planes), mask_parts = parts(wanted & kMask, planes);
  DisplacementGradients<F> result{};
  if (!shared && (wanted & kOffset)) result.offset = view<F>(grad_offset);
  if (!shared && (wanted & kMask)) result.mask = view<F>(grad_mask);

  const Tensor weight_parts = zeroed({(wanted & kWeight) && !stored ? splits * weight_size : 0});

  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    if (copied) {
      transpose_blocks<Transpose::kToRows>(g, blocks, view<const S>(a.input), image, images, job.rows);
      job.rows_image = image;
    }
    if (staged) {
      Tensor sums = staging;
      if (image > 0) torch::stable::zero_(sums);
      job.grad_image = image;
    }
    torch::stable::parallel_for(0, share_count * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t share = i % share_count, split = i / share_count;
        const int64_t first = split * images / splits, last = (split + 1) * images / splits;
        DisplacementGradients<A> part{};
        if (shared && (wanted & kOffset))
          part.offset = view<A>(offset_parts), part.offset.data += share * held * part.offset.n;
        if (shared && (wanted & kMask)) part.mask = view<A>(mask_parts), part.mask.data += share * held * part.mask.n;
        if (first < last)
          job.run(shares[share], image, first, last - first, result, part,
                  data(weight_parts) + ((wanted & kWeight) && !stored ? split * weight_size : 0));
      }
    });
    if (staged) transpose_blocks<Transpose::kFromRows>(g, blocks, view<S>(grad_input), image, images, job.grad_rows);
    if (shared && (wanted & kOffset))
      add_parts<A>(offset_parts, share_count, images, image, view<F>(grad_offset), 2 * planes, g.out_height,
                   g.out_width);
    if (shared && (wanted & kMask))
      add_parts<A>(mask_parts, share_count, images, image, view<F>(grad_mask), planes, g.out_height, g.out_width);
  }
  if (!(wanted & kWeight) || stored) return;
  A* const sum = data(weight_parts);
  for (int64_t split = 1; split < splits; ++split)
    for (int64_t i = 0; i < weight_size; ++i) sum[i] += sum[split * weight_size + i];
  gradient.data = sum;
  repack_backward<false>(gradient, blocks, view<S>(grad_weight));
}

// Returns the kernels that served, if they are no matter of the vectors alone.
template <typename S, typename F>
const char* backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g, int64_t wanted,
                     const Tensor& grad_input, const Tensor& grad_offset, const Tensor& grad_weight,
                     const Tensor& grad_mask) {
  const std::vector<Block> blocks = make_backward_blocks(g, torch::stable::get_num_threads());
  const auto run = [&](auto p) {
    backward<S, F, decltype(p)>(grad_output, a, g, wanted, grad_input, grad_offset, grad_weight, grad_mask, blocks);
  };
  if constexpr (std::is_same_v<S, BFloat16>)
    if (multiplies_pairs(g, blocks)) return run(BFloat16()), name_of(kTunedBFloat16);
  return run(Accumulate<S>()), nullptr;
}

}  // namespace dcn::tiles
