// The inner loops of masked_conv2d, one copy per instruction set.
//
// conv_copy: to[h * to_row + w * to_column] = from[h * from_row + w * from_column].
//
// conv_product: y[row * y_stride + p] = bias[row] + sum of value[k] * x[p + offset[k]] for p in [0, length), where the
// survivors k of a row lie in [first[i], first[i + 1]), i = panel * rows + row, for each panel; offsets are in bytes. A
// panel is a part of x that stays in the first cache while all rows use it. y is aligned to 64 bytes, its rows are
// multiples of 16 floats, and bias may be null.
//
// conv_gradients: for each column and q in [0, length): dx[column * stride + q] = sum of value[k] * dy[q + offset[k]],
// and dw[k] += sum over q of x[column * stride + q] * dy[q + offset[k]], survivors listed as above. dx or dw may be
// null.
//
// conv_sum: the sum of n floats, always in the same order.
#pragma once
#include <cstdint>

#define SL_CONV_LOOPS(ISA)                                                                                           \
  namespace sl::cpu::ISA {                                                                                           \
  void conv_copy(int64_t rows, int64_t columns, const float* from, int64_t from_row, int64_t from_column, float* to, \
                 int64_t to_row, int64_t to_column);                                                                 \
  void conv_product(int64_t panels, int64_t rows, const int64_t* first, const uint32_t* offset, const float* value,  \
                    const float* bias, const float* x, float* y, int64_t y_stride, int64_t length);                  \
  void conv_gradients(int64_t panels, int64_t columns, const int64_t* first, const uint32_t* offset,                 \
                      const float* value, const float* dy, const float* x, float* dx, int64_t stride, float* dw,     \
                      int64_t length);                                                                               \
  float conv_sum(const float* x, int64_t n);                                                                         \
  }
