// Between masked_linear.cpp and masked_linear_small_simd.cpp (compiled once per instruction set): a masked linear layer
// for a few samples at densities that leave a survivor in nearly every vector. Plain structs only, see setup.py.
#pragma once
#include <stdint.h>

namespace sl::cpu {

// weight [rows, columns] is read under its mask, so that what it holds elsewhere counts as 0; matrices of samples are
// row-major with a stride in elements.
struct SmallArgs {
  int64_t rows, columns;
  const float* weight;
  const uint32_t* words;  // [rows, words_per_row(columns)]
  int64_t batch;
  const float* x;
  int64_t x_stride;
  const float* bias;  // [rows] or null
  float* y;           // [batch, rows]
  bool relu;
  const float* grad;
  int64_t grad_stride;
  float* dx;  // [batch, columns] or null
  float* dw;  // [rows, columns] or null: every element is written
  float* db;  // [rows] or null
  int threads;
};

#define SL_DECLARE_MASKED_LINEAR_SMALL(isa)            \
  namespace isa {                                      \
  void masked_linear_small_forward(const SmallArgs&);  \
  void masked_linear_small_backward(const SmallArgs&); \
  }

SL_DECLARE_MASKED_LINEAR_SMALL(portable)
#if defined(__x86_64__)
SL_DECLARE_MASKED_LINEAR_SMALL(avx2)
SL_DECLARE_MASKED_LINEAR_SMALL(avx512)
#endif
#undef SL_DECLARE_MASKED_LINEAR_SMALL

}  // namespace sl::cpu
