// The seam between the kernels and what runs them: the CUDA runtime, or, with HOST_CUDA, the tests' harness that runs
// the same source on host threads (tests/host_cuda/host_cuda.h). Kernels are launched only through launch().
#pragma once
#ifdef HOST_CUDA
#include "host_cuda.h"
#else
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]
#endif

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef SL_BLOCK_THREADS  // the harness takes smaller blocks: each CUDA thread is a host thread there
#define SL_BLOCK_THREADS 256
#endif

namespace sl::cuda {

constexpr int kWarp = 32;
constexpr int kBlock = SL_BLOCK_THREADS;
constexpr int kWarps = kBlock / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kBlock % kWarp == 0 && kWarps <= kWarp);

using u64 = unsigned long long;  // what the 64-bit atomics take

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args... args) {
#ifdef HOST_CUDA
  static_cast<void>(stream);  // everything is done when the call returns
  host_cuda::launch(kernel, grid, block, shared_bytes, args...);
#else
  if (shared_bytes > 48 * 1024) {  // more is given only to those who ask
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
#endif
  check(cudaGetLastError(), "kernel launch");
}

inline void fill_zero(void* pointer, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(pointer, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "memset");
}

// An attribute of the current device.
inline int64_t device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

// Blocks for grid-stride loops over `items`, `per_block` of them at a time: no more than fill the device.
inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t per_multiprocessor = 8) {
  const int64_t wanted = (items + per_block - 1) / per_block;
  const int64_t most = per_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, most));
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int64_t warp_in_grid() { return (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp; }
__device__ inline int64_t warps_in_grid() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// The sum over the block, in thread 0. `parts` is shared memory; all threads of the block call.
__device__ inline u64 block_sum(u64 value, u64 (&parts)[kWarps]) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  if (lane_id() == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  u64 sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) sum += parts[w];
  }
  return sum;
}

// ---- a tile: 32 consecutive words of a mask, one per lane ----

// Which weights a word stands for: `count` (0 to 32) of them from flat index `start`.
struct Span {
  int64_t start;
  int count;
};

// How the weights of a contiguous tensor lie in its mask.
struct Layout {
  int64_t columns, words_per_row, words;

  __device__ Span span(int64_t word) const {
    if (word >= words) return {0, 0};
    // Most masks need no division: 64-bit division is some seventy instructions.
    const bool fits = ((word | words_per_row) >> 32) == 0;
    const int64_t row = words == words_per_row ? 0
                        : fits
                            ? static_cast<int64_t>(static_cast<uint32_t>(word) / static_cast<uint32_t>(words_per_row))
                            : word / words_per_row;
    const int64_t column = (word - row * words_per_row) * kWarp;
    const int64_t left = columns - column;
    return {row * columns + column, static_cast<int>(left < kWarp ? left : kWarp)};
  }
};

// The span of the tile's word j, from the lane that worked it out.
__device__ inline Span span_of(const Span& mine, int j) {
  return {static_cast<int64_t>(__shfl_sync(kAllLanes, static_cast<u64>(mine.start), j)),
          __shfl_sync(kAllLanes, mine.count, j)};
}

}  // namespace sl::cuda
