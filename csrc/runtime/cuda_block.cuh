// A thread block on the device: indices, barriers, asynchronous copies, and the tensor cores' fragments (sm_80 and
// later). Kernels are templates on it; tests/emulation/block.h is the same interface on the host.
#pragma once

#include <array>
#include <limits>

#include "cuda.cuh"
#include "gpu_values.h"
#include "kernels.h"
#include "precision.h"

namespace dcn {

class CudaBlock {
 public:
  __device__ explicit CudaBlock(unsigned char* shared) : shared_(shared) {}

  DCN_DEVICE int64_t index() const { return blockIdx.x; }
  DCN_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  DCN_DEVICE unsigned char* shared() const { return shared_; }

  // All threads of the block, of the warp: what they wrote before is seen after.
  DCN_DEVICE void sync() { __syncthreads(); }
  DCN_DEVICE void sync_warp() { __syncwarp(); }

  // The value of the lane whose number differs in the bits of `distance`.
  DCN_DEVICE float from_lane_across(float value, int distance) { return __shfl_xor_sync(~0u, value, distance); }

  // Whether four neighbours are added to memory in one operation, which other blocks may do at the same time.
#if __CUDA_ARCH__ >= 900
  static constexpr bool adds_vectors() { return true; }
#else
  static constexpr bool adds_vectors() { return false; }
#endif
  DCN_DEVICE void add(float* to, float value) { atomicAdd(to, value); }
  DCN_DEVICE void add_vector([[maybe_unused]] float* to, [[maybe_unused]] const float* four) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(four[0]), "f"(four[1]), "f"(four[2]),
                 "f"(four[3])
                 : "memory");
#endif
  }

#if __CUDA_ARCH__ >= 800
  // Starts a copy of 16 bytes into shared memory, zeros where it is not `wanted`; the source is then not read.
  DCN_DEVICE void copy_async(void* to, const void* from, bool wanted) {
    const int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(bytes) : "memory");
  }
  DCN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until all of this thread's committed copies but the last `Pending` groups are there.
  template <int Pending>
  DCN_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
  }

  // Four 8x8 matrices of half values; lane 8 i + r names row r (16 bytes) of matrix i. A lane gets two neighbours of
  // row lane / 4 of each.
  DCN_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address(row))
                 : "memory");
  }

  // sums [16, 8] += a [16, n] * b [n, 8], in float: n = 16 half values, or 8 of float that to_tf32 has rounded. A lane
  // has of each 16 bytes of a row (row lane / 4 of a, column lane / 4 of b) number lane % 4 of its four words.
  template <typename S>
  DCN_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<S, float>)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else if constexpr (std::is_same_v<S, torch::headeronly::BFloat16>)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif

 private:
  static DCN_DEVICE unsigned address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
  }
  unsigned char* shared_;
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerMultiprocessor)
    run_blocks(const __grid_constant__ Kernel kernel) {
  // Older processors lack the instructions; the plan never sends them here.
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  CudaBlock block(dynamic_shared);
  kernel(block);
#else
  __trap();
#endif
}

// The device with blocks of threads: what the fused kernels need beyond a body per element.
struct CudaBlocks : Cuda {
  // About as much as the L2 of a large GPU holds, so that most of it is read back from there.
  static constexpr int64_t column_gradient_bytes = 64 << 20;

  // Work goes to the device of a tensor for as long as this lives.
  struct Guard {
    explicit Guard(const Tensor& on) : device(on.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard device;
  };

  // out = a @ b, for matrices or batches of them. A float product of half values is not rounded in between.
  static void multiply_groups(const Tensor& out, const Tensor& a, const Tensor& b) {
    const bool batches = out.dim() == 3;
    if (out.scalar_type() == a.scalar_type()) {
      STABLE_TORCH_ERROR_CODE_CHECK(batches ? aoti_torch_cuda_bmm_out(out.get(), a.get(), b.get())
                                            : aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
      return;
    }
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(batches ? "aten::bmm" : "aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }

  static int attribute(cudaDeviceAttr of, const Tensor& on) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, of, on.get_device_index()));
    return value;
  }
  static int64_t multiprocessors(const Tensor& on) { return attribute(cudaDevAttrMultiProcessorCount, on); }

  // How much a block may have.
  static int64_t shared_bytes(const Tensor& on) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, on); }

  // Whether float32 is multiplied in TF32, as torch's convolutions do.
  static bool uses_tf32() { return convolutions_use_tf32(); }

  // Why no fused kernel may run; null if they are chosen, and the processor has what they use.
  static const char* why_portable(const Tensor& on) {
    if (!chooses_fused_kernels()) return kNotChosen;
    return attribute(cudaDevAttrComputeCapabilityMajor, on) >= 8 ? nullptr : kOldProcessor;
  }

  // False if the device has too little shared memory, or the grid is too large for one launch.
  template <typename Kernel>
  static bool launch(const Kernel& kernel, int64_t blocks, const Tensor& on) {
    if (blocks > std::numeric_limits<int>::max() || Kernel::kSharedBytes > shared_bytes(on)) return false;
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(run_blocks<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes));
    // Large tiles: what their blocks take on a multiprocessor (the system has 1 KiB of each); the rest remains a cache.
    if constexpr (Kernel::kSharedBytes > 48 << 10) {
      const int64_t whole = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, on);
      const int64_t taken = Kernel::kBlocksPerMultiprocessor * (Kernel::kSharedBytes + 1024);
      STD_CUDA_CHECK(cudaFuncSetAttribute(run_blocks<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          static_cast<int>(std::min<int64_t>((100 * taken + whole - 1) / whole, 100))));
    }
    run_blocks<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, Kernel::kSharedBytes, stream(on)>>>(kernel);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return true;
  }
};

}  // namespace dcn
