// Between network_linear.cpp and network_dense_simd.cpp (compiled once per instruction set). Plain structs only: see
// the note on _simd files in setup.py. Activations lie as [feature][tile * width] floats.
#pragma once
#include <stdint.h>

namespace sl::cpu {

struct DenseArgs {
  int64_t rows, columns, tile;  // tile: vectors per feature, 1 to 4
  int64_t stride;               // from one row of weight and dw to the next
  const float* weight;          // [rows, columns]
  const float* bias;            // [rows] or null
  const float *x, *grad;        // [columns], [rows] features
  float *y, *dx;                // [rows], [columns] features
  float* dw;                    // [rows, columns]
  bool add;                     // to dw
};

#define SL_DECLARE_NETWORK_DENSE(isa)                                                                          \
  namespace isa {                                                                                              \
  void net_dense_forward(const DenseArgs&);                                                                    \
  void net_dense_input(const DenseArgs&);                                                                      \
  void net_dense_weight(const DenseArgs&);                                                                     \
  void net_tile_relu(float* values, int64_t count);                        /* count: a multiple of width */    \
  void net_tile_relu_gradient(const float* y, float* grad, int64_t count); /* 0 where y <= 0 */                \
  void net_tile_sums(const float* grad, int64_t rows, int64_t tile, float* db, bool add); /* over the lanes */ \
  }

SL_DECLARE_NETWORK_DENSE(portable)
#if defined(__x86_64__)
SL_DECLARE_NETWORK_DENSE(avx2)
SL_DECLARE_NETWORK_DENSE(avx512)
#endif
#undef SL_DECLARE_NETWORK_DENSE

}  // namespace sl::cpu
