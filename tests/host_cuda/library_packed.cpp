// csrc/cuda/packed.cu on host fibers as a shared library, for tests/test_host_cuda_packed.py (ctypes). Every function
// returns the message of what it threw, or null.

#include "guarded.h"
#include "launch.cuh"
#include "packed.h"

extern "C" {

const char* sl_counts(const uint32_t* words, int64_t count, int64_t* counts) {
  return guarded([&] { sl::cuda::packed_counts(words, count, counts, nullptr); });
}

const char* sl_expand(const void* values, int64_t count, int64_t item_size, const uint32_t* words,
                      const int64_t* offsets, int64_t rows, int64_t columns, void* dense) {
  return guarded(
      [&] { sl::cuda::packed_expand(values, count, item_size, words, offsets, rows, columns, dense, nullptr); });
}

const char* sl_gather(const void* dense, int64_t item_size, const uint32_t* words, const int64_t* offsets, int64_t dims,
                      const int64_t* sizes, const int64_t* strides, void* values, int64_t count) {
  return guarded(
      [&] { sl::cuda::packed_gather(dense, item_size, words, offsets, dims, sizes, strides, values, count, nullptr); });
}

}  // extern "C"
