// csrc/cuda on host fibers as a shared library, for tests/test_host_cuda*.py (ctypes). Every function returns the
// message of what it threw, or null.
#include <string>
#include <vector>

#include "bitmask.h"
#include "global_topk.h"
#include "guarded.h"
#include "launch.cuh"

namespace {

host_cuda::Graph graph;

// ---- kernels that are wrong on purpose: does the harness notice? ----

__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 2);
}

__global__ void mixed_collectives(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 2);
  } else {
    out[threadIdx.x] = int(__ballot_sync(~0u, 1));
  }
}

__global__ void half_a_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void partial_mask(int* out) { out[threadIdx.x] = int(__ballot_sync(0xffffu, 1)); }

__global__ void reads_shared_unwritten(int* out) {
  __shared__ int value[64];
  out[threadIdx.x] = value[threadIdx.x];
}

// Each thread takes its neighbour's value; right only if the barrier keeps them together.
template <bool kBarrier>
__global__ void neighbours(int* out) {
  DYNAMIC_SHARED(int, value);
  value[threadIdx.x] = int(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = value[(threadIdx.x + 1) % blockDim.x];
}

}  // namespace

extern "C" {

const char* sl_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint32_t* words) {
  return guarded([&] { sl::cuda::bitmask_pack(dense, rows, columns, words, nullptr); });
}

const char* sl_unpack(const uint32_t* words, int64_t rows, int64_t columns, uint8_t* dense) {
  return guarded([&] { sl::cuda::bitmask_unpack(words, rows, columns, dense, nullptr); });
}

const char* sl_count(const uint32_t* words, int64_t count, int64_t* out) {
  return guarded([&] { sl::cuda::bitmask_count(words, count, out, nullptr); });
}

const char* sl_hamming(const uint32_t* a, const uint32_t* b, int64_t count, int64_t* out) {
  return guarded([&] { sl::cuda::bitmask_hamming(a, b, count, out, nullptr); });
}

const char* sl_apply(void* weights, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                     const int64_t* strides) {
  return guarded([&] { sl::cuda::bitmask_apply(weights, item_size, words, dims, sizes, strides, nullptr); });
}

// Per tensor: data, dtype, rows, columns, eligible, words. `reversed`: which thread of a block runs first. The scratch
// is followed by a guard of the same garbage that must come back untouched.
const char* sl_topk(const int64_t* tensors, int64_t count, int64_t keep, int by_value, int reversed,
                    int64_t* nan_tensor, double* threshold) {
  return guarded([&] {
    host_cuda::reversed = reversed != 0;
    std::vector<sl::TopkTensor> list;
    std::vector<int64_t> shapes(static_cast<size_t>(count) * 4);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t* row = tensors + 6 * t;
      int64_t* shape = shapes.data() + 4 * t;
      shape[0] = row[2], shape[1] = row[3], shape[2] = row[3], shape[3] = 1;
      list.push_back({reinterpret_cast<const void*>(row[0]), static_cast<sl::DType>(row[1]), 2, shape, shape + 2,
                      reinterpret_cast<const uint32_t*>(row[4]), reinterpret_cast<uint32_t*>(row[5])});
    }
    constexpr size_t kGuard = 4096;
    const int64_t scratch_bytes = sl::cuda::global_topk_scratch(list.data(), count);
    std::vector<unsigned char> scratch(static_cast<size_t>(scratch_bytes) + kGuard, 0xa5);
    sl::TopkResult result{-12345, -12345};
    sl::cuda::global_topk(list.data(), count, keep, by_value != 0, scratch.data(), &result, nullptr);
    host_cuda::reversed = false;
    for (size_t i = scratch.size() - kGuard; i < scratch.size(); ++i) {
      if (scratch[i] != 0xa5) throw std::runtime_error("a kernel wrote past its scratch");
    }
    *nan_tensor = result.nan_tensor;
    *threshold = result.threshold;
  });
}

// The launches of one call, captured; scratch of sl_topk_scratch's size and result belong to the caller. sl_replay runs
// them again on whatever the buffers hold by then, without any code of the host's.
const char* sl_topk_capture(const int64_t* tensor, int64_t keep, void* scratch, void* result) {
  return guarded([&] {
    const int64_t sizes[] = {tensor[2], tensor[3]}, strides[] = {tensor[3], 1};
    const sl::TopkTensor one{
        reinterpret_cast<const void*>(tensor[0]),     static_cast<sl::DType>(tensor[1]),     2, sizes, strides,
        reinterpret_cast<const uint32_t*>(tensor[4]), reinterpret_cast<uint32_t*>(tensor[5])};
    graph.clear();
    host_cuda::capture = &graph;
    sl::cuda::global_topk(&one, 1, keep, false, scratch, static_cast<sl::TopkResult*>(result), nullptr);
    host_cuda::capture = nullptr;
  });
}

const char* sl_replay() {
  return guarded([&] {
    for (const auto& work : graph) work();
  });
}

const char* sl_topk_scratch(int dtype, int64_t weights, int64_t* bytes) {
  return guarded([&] {
    const int64_t sizes[] = {1, weights}, strides[] = {weights, 1};
    const sl::TopkTensor tensor{nullptr, static_cast<sl::DType>(dtype), 2, sizes, strides, nullptr, nullptr};
    *bytes = sl::cuda::global_topk_scratch(&tensor, 1);
  });
}

const char* sl_broken(const char* name, int* out) {
  return guarded([&] {
    const std::string which = name;
    const auto go = [&](auto kernel) { sl::cuda::launch(kernel, 1, 64, 64 * sizeof(int), nullptr, out); };
    if (which == "divergent_shuffle") return go(divergent_shuffle);
    if (which == "mixed_collectives") return go(mixed_collectives);
    if (which == "half_a_barrier") return go(half_a_barrier);
    if (which == "partial_mask") return go(partial_mask);
    if (which == "reads_shared_unwritten") return go(reads_shared_unwritten);
    if (which == "with_barrier") return go(neighbours<true>);
    if (which == "without_barrier") return go(neighbours<false>);
    throw std::invalid_argument("unknown kernel " + which);
  });
}

}  // extern "C"
