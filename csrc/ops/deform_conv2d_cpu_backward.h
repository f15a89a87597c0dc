// Deformable convolution on the CPU, backward, in one pass per (tile, block of channels): the gradient of the columns,
// a sweep over them, the gradient of the weights. No thread adds to what another adds to: a lane owns channels, a split
// owns images; what they sum in parts is added up in a fixed order. Equal thread counts give equal bits.
#pragma once

#include "deform_conv2d_cpu_sweep.h"

namespace dcn::tiles {

// One thread's share: images [first_image, first_image + images) of those held, every `lanes`-th block of channels.
struct Share {
  int64_t first_image, images, lane, lanes;
};

template <typename S, typename F>
struct Backward {
  using A = Accumulate<S>;

  const ConvArguments& a;
  const ConvGeometry& g;
  const Tensor& grad_output;
  const int64_t needs;
  std::vector<Block> blocks{};
  int64_t widest = 0;
  const A* weight = nullptr;  // packed, or as stored
  bool oihw = false;          // weights and their gradient as stored
  const A* zeros = nullptr;
  Rows<const A> input{};
  Rows<A> grad_input{};

  bool dots() const { return needs & (kOffset | kMask); }
  int64_t planes() const { return g.offset_groups * g.taps(); }

  // `image` is the first image held; displaced sums and grad_weight belong to this share alone.
  void run(const Share& share, int64_t image, A* displaced, A* grad_weight) const {
    const int64_t first = share.first_image * g.out_pixels(), pixels = share.images * g.out_pixels();
    const int64_t per_tile = tile_size(pixels, g.taps() * widest * static_cast<int64_t>(sizeof(A)), 1);
    const Displacement<A, F> where = displacement<S, F>(a);
    const View<const S> grad_out = view<const S>(grad_output);
    A* const columns = thread_scratch<A, 0>(per_tile * g.taps() * widest);
    A* const grad_rows = thread_scratch<A, 1>(per_tile * g.out_channels);
    A* const offset = thread_scratch<A, 2>(per_tile * planes() * 3);
    int64_t* const at = thread_scratch<int64_t, 4>(per_tile);
    Pixel* const pixel = thread_scratch<Pixel, 8>(per_tile);
    A* const grad_columns = thread_scratch<A, 5>(per_tile * g.taps() * widest);
    A* const sink = thread_scratch<A, 6>(g.channels);
    GradientTap<A>* const taps = thread_scratch<GradientTap<A>, 7>(per_tile * planes());
    std::fill(sink, sink + g.channels, A(0));

    for (int64_t done = 0; done < pixels; done += per_tile) {
      const Tile tile{first + done, std::min(per_tile, pixels - done)};
      A* const mask = offset + 2 * planes() * tile.count;
      list_pixels(g, tile, pixel);
      load_displacement(g, tile, pixel, where, image, at, offset, mask);
      run_vectorised(FindGradientTaps<A>{g, tile, pixel, input, grad_input, offset, mask, zeros, sink, taps});
      locate_pixels(tile, pixel, grad_out, image, at);
      run_vectorised(LoadTile<A, S>{tile.count, g.out_channels, grad_out.c, grad_out.data, at, grad_rows});
      for (size_t i = share.lane; i < blocks.size(); i += share.lanes)
        run_block(blocks[i], tile, pixel, grad_rows, taps, columns, grad_columns, displaced, grad_weight);
    }
  }

  void run_block(const Block& b, const Tile& tile, const Pixel* pixel, const A* grad_rows, const GradientTap<A>* taps,
                 A* columns, A* grad_columns, A* displaced, A* grad_weight) const {
    const int64_t outputs = b.depthwise ? b.count : g.group_outputs(), depth = g.taps() * b.count;
    const int64_t row = oihw ? g.group_channels() * g.taps() : depth;  // of one output's weights
    const int64_t at = oihw ? stored_at(g, b) : b.weight_at;
    A* const turned = thread_scratch<A, 9>(oihw ? tile.count * depth : 0);
    const A* const grad = grad_rows + (b.depthwise ? b.first : b.group * outputs);
    const bool scatter = needs & kInput, weights = needs & kWeight;
    if (dots() || scatter) {
      if (b.depthwise)
        run_vectorised(DepthwiseColumnGradient<A>{tile.count, g.taps(), b.count, g.out_channels, weight + b.weight_at,
                                                  grad, grad_columns});
      else
        Cpu::multiply(matrix(oihw ? turned : grad_columns, tile.count, depth, depth, 1, a.input),
                      matrix(grad, tile.count, outputs, g.out_channels, 1, a.input),
                      matrix(weight + at, outputs, depth, row, 1, a.input));
      if (oihw) run_vectorised(TurnTaps<A, false>{tile.count, g.taps(), b.count, turned, grad_columns});
    }
    sweep(SweepTile<A, true, true, true>{g, b, tile, pixel, taps, grad_columns, columns, displaced}, dots(), scatter,
          weights);
    if (!weights) return;
    if (b.depthwise)
      run_vectorised(DepthwiseWeightGradient<A>{tile.count, g.taps(), b.count, g.out_channels, columns, grad,
                                                grad_weight + b.weight_at});
    else {
      if (oihw) run_vectorised(TurnTaps<A, true>{tile.count, g.taps(), b.count, columns, turned});
      Cpu::multiply(matrix(grad_weight + at, outputs, depth, row, 1, a.input),
                    matrix(grad, outputs, tile.count, 1, g.out_channels, a.input),
                    matrix(oihw ? turned : columns, tile.count, depth, depth, 1, a.input), true);
    }
  }
};

// result[n, plane, y, x] = sum over lanes of displaced[lane, n, plane / per * 3 + first + plane % per, pixel]
template <typename A, typename F>
void add_lanes(const ConvGeometry& g, const A* displaced, int64_t lanes, int64_t lane_size, int64_t image,
               int64_t images, int64_t first, int64_t per, const View<F>& result) {
  const int64_t planes = g.offset_groups * g.taps();
  torch::stable::parallel_for(0, images * planes * per, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (planes * per), plane = i % (planes * per);
      const A* from = displaced + ((n * planes + plane / per) * 3 + first + plane % per) * g.out_pixels();
      for (int64_t pixel = 0; pixel < g.out_pixels(); ++pixel) {
        A sum = 0;
        for (int64_t lane = 0; lane < lanes; ++lane) sum += from[lane * lane_size + pixel];
        result.at(image + n, plane, pixel / g.out_width, pixel % g.out_width) = static_cast<F>(sum);
      }
    }
  });
}

template <typename S, typename F>
void backward(const Tensor& grad_output, const ConvArguments& a, const ConvGeometry& g, int64_t needs,
              const Tensor& grad_input, const Tensor& grad_offset, const Tensor& grad_weight, const Tensor& grad_mask) {
  using A = Accumulate<S>;
  const int64_t threads = torch::stable::get_num_threads(), pixels = g.height * g.width;
  const auto fresh = [&](int64_t count) { return torch::stable::new_empty(a.input, {count}, scalar_type_of<A>()); };
  const auto zeroed = [&](int64_t count) { return torch::stable::new_zeros(a.input, {count}, scalar_type_of<A>()); };
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };

  Backward<S, F> job{a, g, grad_output, needs};
  // Enough blocks for the threads as long as each keeps two vectors' worth of channels.
  job.blocks = make_blocks(g, 128);
  if (static_cast<int64_t>(job.blocks.size()) < threads)
    job.blocks = make_blocks(g, std::clamp<int64_t>(divide_up(g.channels, threads), 32, 128));
  for (const Block& b : job.blocks) job.widest = std::max(job.widest, b.count);
  const Tensor zero_row = zeroed(g.channels);
  job.zeros = data(zero_row);

  const View<const S> input = view<const S>(a.input);
  const bool scatter = needs & kInput, weights = needs & kWeight;
  const ImageSize size{g.channels, g.height, g.width};
  const bool direct = is_rows<S>(a.input), direct_grad = scatter && is_rows<S>(grad_input);
  const int64_t held = direct && (direct_grad || !scatter) ? g.batch : images_at_a_time<A>(size, g.batch);
  const Tensor staged = fresh(direct ? 0 : held * g.channels * pixels);
  const Tensor grad_rows = fresh(scatter && !direct_grad ? held * g.channels * pixels : 0);

  const int64_t lanes = std::min(threads, static_cast<int64_t>(job.blocks.size()));
  const int64_t splits = std::min(held, divide_up(threads, lanes));
  // One split alone may add to the gradient itself.
  job.oihw = std::is_same_v<S, A> && is_few_pixels(g) && splits == 1 && is_oihw(g, a.weight) &&
             (!weights || is_oihw(g, grad_weight));
  const Tensor packed = fresh(job.oihw ? 0 : a.weight.numel());
  job.weight = job.oihw ? static_cast<const A*>(a.weight.data_ptr()) : data(packed);
  if (!job.oihw) transpose_weights<true>(g, job.blocks, view<const S>(a.weight), data(packed));
  const int64_t lane_size = job.dots() ? held * job.planes() * 3 * g.out_pixels() : 0;
  const Tensor displaced = fresh(lanes * lane_size);
  const Tensor weight_parts = zeroed(weights && !job.oihw ? splits * a.weight.numel() : 0);

  for (int64_t image = 0; image < g.batch; image += held) {
    const int64_t images = std::min(held, g.batch - image);
    job.input = input_rows(direct, input, size, image, images, staged);
    if (scatter) {
      const View<A> out = view<A>(grad_input);
      job.grad_input =
          direct_grad ? Rows<A>{out.data + image * out.n, out.n, out.h, out.w} : dense_rows(size, data(grad_rows));
      for (const Tensor& t :
           {direct_grad ? torch::stable::narrow(const_cast<Tensor&>(grad_input), 0, image, images)
                        : torch::stable::narrow(const_cast<Tensor&>(grad_rows), 0, 0, images * g.channels * pixels)}) {
        Tensor part = t;
        torch::stable::zero_(part);
      }
    }
    if (job.dots()) {
      Tensor all = displaced;
      torch::stable::zero_(all);
    }
    torch::stable::parallel_for(0, lanes * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t lane = i % lanes, split = i / lanes;
        const int64_t from = split * images / splits, to = (split + 1) * images / splits;
        job.run({from, to - from, lane, lanes}, image, data(displaced) + lane * lane_size,
                job.oihw ? static_cast<A*>(grad_weight.data_ptr())
                         : data(weight_parts) + (weights ? split * a.weight.numel() : 0));
      }
    });
    if (scatter && !direct_grad) transpose_images<false>(size, view<S>(grad_input), image, images, job.grad_input);
    if (needs & kOffset) add_lanes(g, data(displaced), lanes, lane_size, image, images, 0, 2, view<F>(grad_offset));
    if (needs & kMask) add_lanes(g, data(displaced), lanes, lane_size, image, images, 2, 1, view<F>(grad_mask));
  }
  if (weights && !job.oihw)
    transpose_weights<false>(g, job.blocks, view<S>(grad_weight), data(weight_parts), splits, a.weight.numel());
}

}  // namespace dcn::tiles
