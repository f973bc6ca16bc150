// Between whole_step.cpp and whole_step_simd.cpp (compiled once per instruction set). Plain structs only: see the note
// on _simd files in setup.py. Activations lie as [feature][tile * width] floats.
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

struct PackArgs {
  const float* x;
  int64_t x_stride;
  const int64_t* order;  // which rows; null: first, first + 1, ...
  int64_t first, count;  // lanes from `count` on are zero
  int64_t features, tile;
  float* out;
};

#define SL_DECLARE_MLP(isa)                                                                                           \
  namespace isa {                                                                                                     \
  int64_t mlp_width();                                                                                                \
  void mlp_pack(const PackArgs&);                                                                                     \
  void mlp_dense_forward(const DenseArgs&);                                                                           \
  void mlp_dense_input(const DenseArgs&);                                                                             \
  void mlp_dense_weight(const DenseArgs&);                                                                            \
  void mlp_relu(float* values, int64_t count);                                       /* count: a multiple of width */ \
  void mlp_relu_gradient(const float* y, float* grad, int64_t count);                /* 0 where y <= 0 */             \
  void mlp_sums(const float* grad, int64_t rows, int64_t tile, float* db, bool add); /* over the lanes */             \
  }

SL_DECLARE_MLP(portable)
#if defined(__x86_64__)
SL_DECLARE_MLP(avx2)
SL_DECLARE_MLP(avx512)
#endif
#undef SL_DECLARE_MLP

}  // namespace sl::cpu
