// csrc/cuda/sparse_linear_half.cu on host fibers as a shared library, for tests/test_host_cuda_sparse_half.py (ctypes).
// Every function returns the message of what it threw, or null.

#include "guarded.h"
#include "launch.cuh"
#include "sparse_linear.h"

extern "C" {

const char* sl_fill(const uint16_t* weight, const uint32_t* words, const int32_t* columns, const int32_t* strips,
                    const int32_t* order, const int32_t* starts, int64_t groups, int64_t weight_columns,
                    bool transposed, uint16_t* values) {
  return guarded([&] {
    sl::cuda::sparse_linear_half_fill(weight, words, {columns, strips, order, starts, groups}, weight_columns,
                                      transposed, values, nullptr);
  });
}

const char* sl_product(int dtype, const int32_t* columns, const int32_t* strips, const int32_t* order,
                       const int32_t* starts, int64_t groups, const uint16_t* values, const uint16_t* x,
                       const uint16_t* bias, int64_t rows, int64_t inputs, int64_t batch, int64_t padded_batch,
                       uint16_t* y) {
  return guarded([&] {
    sl::cuda::sparse_linear_half_product(static_cast<sl::DType>(dtype), {columns, strips, order, starts, groups},
                                         values, x, bias, rows, inputs, batch, padded_batch, y, nullptr);
  });
}

}  // extern "C"
