// CUDA as a device: the current stream, one thread per element, torch's own matrix product.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>

#include "tensor.h"

namespace dcn {

template <typename Body>
__global__ void run_body(const Body body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, size = body.size();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) body(i);
}

struct Cuda {
  // Operands of matrix products stay half: tensor cores multiply these, and sum in float.
  template <typename S>
  using Product = S;
  static constexpr int64_t column_bytes = 48 << 20;  // about the L2 of a large GPU, so that columns stay on the chip

  static constexpr int kLanes = 8;  // threads that may share an element (shared_sums.h)

  // What elements may be numbered with in 32 bits.
  static int64_t largest_index() { return std::numeric_limits<int32_t>::max(); }

  static cudaStream_t stream(const Tensor& on) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  template <typename Body>
  static void for_each(const Body& body, const Tensor& on) {
    if (body.size() == 0) return;
    run_body<<<blocks(body.size()), kThreads, 0, stream(on)>>>(body);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // out = a @ b
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
  }
  // out = added + a @ b, where `added` is out itself or a row for all of its rows.
  static void multiply_and_add(const Tensor& out, const Tensor& added, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
  }

  // sums[i] = counts[0] + ... + counts[i], in the type of the counts.
  static Tensor running_sum(const Tensor& counts) {
    AtenTensorHandle sums = nullptr;
    int32_t type = aoti_torch_dtype_int32();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_cumsum(counts.get(), 0, &type, &sums));
    return Tensor(sums);
  }

 private:
  static constexpr int64_t kThreads = 256;
  static unsigned blocks(int64_t threads) {
    return static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 20));
  }
};

}  // namespace dcn
