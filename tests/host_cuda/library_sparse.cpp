// csrc/cuda/sparse_linear.cu on host fibers as a shared library, for tests/test_host_cuda_sparse.py (ctypes). Every
// function returns the message of what it threw, or null.

#include "guarded.h"
#include "launch.cuh"
#include "sparse_linear.h"

extern "C" {

const char* sl_fill(const float* weight, const int64_t* places, int64_t count, sl::cuda::SparseEntry* entries) {
  return guarded([&] { sl::cuda::sparse_linear_fill(weight, places, count, entries, nullptr); });
}

const char* sl_product(const sl::cuda::SparseEntry* entries, const int32_t* starts, const float* x, const float* bias,
                       int64_t rows, int64_t columns, int64_t batch, float* target) {
  return guarded(
      [&] { sl::cuda::sparse_linear_product(entries, starts, x, bias, rows, columns, batch, target, nullptr); });
}

}  // extern "C"
