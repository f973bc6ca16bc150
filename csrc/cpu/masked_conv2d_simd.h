// The inner loops of masked_conv2d, one copy per instruction set.
#pragma once
#include <cstdint>

#define SL_CONV_LOOPS(ISA)                                                                                             \
  namespace sl::cpu::ISA {                                                                                             \
  /* to[h * to_row + w * to_column] = from[h * from_row + w * from_column] */                                          \
  void conv_copy(int64_t rows, int64_t columns, const float* from, int64_t from_row, int64_t from_column, float* to,   \
                 int64_t to_row, int64_t to_column);                                                                   \
  /* y[row * y_stride + p] = bias[row] + sum over k in [first[row], first[row + 1]) of value[k] * x[p + offset[k]], */ \
  /* p in [0, length); offsets in bytes. y is aligned to 64 bytes, its rows are multiples of 16 floats. */             \
  void conv_product(int64_t rows, const int64_t* first, const uint32_t* offset, const float* value, const float* bias, \
                    const float* x, float* y, int64_t y_stride, int64_t length);                                       \
  /* For each column, q in [0, length): dx[column * stride + q] = sum over k of value[k] * dy[q + offset[k]], and */   \
  /* dw[k] += sum over q of x[column * stride + q] * dy[q + offset[k]]. dx or dw may be null. */                       \
  void conv_gradients(int64_t columns, const int64_t* first, const uint32_t* offset, const float* value,               \
                      const float* dy, const float* x, float* dx, int64_t stride, float* dw, int64_t length);          \
  /* The sum of n floats, always in the same order. */                                                                 \
  float conv_sum(const float* x, int64_t n);                                                                           \
  }
