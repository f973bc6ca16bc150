// Between network*.cpp and the loops in network_simd.cpp, network_conv_simd.cpp and network_dense_simd.cpp, compiled
// once per instruction set. Plain structs only: see the note on _simd files in setup.py.
//
// Everything here works on one vector of the batch ("group"): a value is `width` floats, one for each example.
#pragma once
#include <stdint.h>

namespace sl::cpu {

// Images of one group. Distances in floats.
struct View {
  float* data;  // channel 0, row 0, pixel 0
  int64_t channel, row, pixel;
};

struct Extent {
  int64_t channels, height, width;
};

// Examples, row-major, to and from a group; lanes from `count` on become zero.
struct EdgeArgs {
  const float* from;     // pack
  float* to;             // unpack
  int64_t stride;        // from one example to the next
  const int64_t* order;  // pack: which examples; null: first, first + 1, ...
  int64_t first, count;
  Extent extent;
  View view;
};

struct PoolArgs {
  View x, y, gx, gy;  // gradients: backward only
  Extent in;
  int64_t height, width;  // of the output
  int64_t kernel[2], stride[2], padding[2];
  bool count_include_pad;
  bool relu;
};

struct NormArgs {
  View x, y, gx, gy;
  Extent extent;
  int64_t count;               // lanes that hold examples
  const float* mean;           // [channels], as all of these
  const float *a, *b, *shift;  // see each function
  float *sum, *other;
  bool relu;
};

// The survivors of a convolution, grouped as SparseLayout groups those of a matrix; places are distances in bytes.
struct ConvWalk {
  int64_t lines, panels;
  int64_t first_line;     // what `line` counts from
  const uint32_t* begin;  // [lines * panels + 1]
  const uint32_t* line;   // [lines * panels]
  const int32_t* place;
  const float* value;
};

// One line of a dense convolution is the sum over `count` places of weight[index] * in[place].
struct ConvTaps {
  int64_t count;
  const int32_t* place;   // bytes
  const uint32_t* index;  // in the weight
};

// out[line][row][pixel] = bias[line] + sum over a line's survivors (or taps) of value * in[row][pixel + place].
struct ConvArgs {
  ConvWalk walk;
  ConvTaps taps;
  const float* weight;  // dense: of the first line
  int64_t line_step;    // dense: from one line's weights to the next
  int64_t lines;
  const float* in;           // where the first pixel's places count from
  int64_t in_row, in_pixel;  // floats from row to row, from pixel to pixel
  int64_t height, width;     // pixels that are computed
  View out;
  const float* bias;  // [lines] or null
  bool relu;
};

// Sparse: dX and dW in one walk over input channels. in: the gradient of the output; x, dx: the pixels concerned.
struct ConvGradArgs {
  ConvWalk walk;
  const float* in;
  int64_t in_row;
  int64_t height, width;
  View x, dx;  // dx.data null: not wanted
  float* dw;   // [survivors], added to
};

// Dense dW: dw[line * line_step + index] += sum over pixels of g[line][pixel] * x[pixel + place].
struct ConvWeightArgs {
  ConvTaps taps;
  int64_t lines, line_step;
  const float* x;
  int64_t x_row, x_pixel;
  View g;
  int64_t height, width;
  float* dw;
};

#define SL_DECLARE_NETWORK(isa)                                                                                      \
  namespace isa {                                                                                                    \
  int64_t net_width();                                                                                               \
  void net_pack(const EdgeArgs&);                                                                                    \
  void net_unpack(const EdgeArgs&);                                                                                  \
  void net_copy(View from, View to, Extent extent, bool relu);                                                       \
  void net_relu_gradient(View y, View grad, Extent extent); /* grad becomes 0 where y <= 0 */                        \
  void net_sums(View x, Extent extent, float* sum);         /* sum[channel] += over pixels and lanes */              \
  void net_max_pool(const PoolArgs&);                                                                                \
  void net_max_pool_backward(const PoolArgs&);                                                                       \
  void net_avg_pool(const PoolArgs&);                                                                                \
  void net_avg_pool_backward(const PoolArgs&);                                                                       \
  void net_norm_sums(const NormArgs&);     /* sum = of x - mean, other = of its squares, over `count` lanes */       \
  void net_norm_apply(const NormArgs&);    /* y = a x + (shift - a mean) */                                          \
  void net_norm_products(const NormArgs&); /* sum = of gy, other = of gy (x - mean) */                               \
  void net_norm_backward(const NormArgs&); /* gx = a gy + b (x - mean) + shift (b null: 0), 0 in lanes >= `count` */ \
  void net_conv_sparse(const ConvArgs&);                                                                             \
  void net_conv_sparse_gradients(const ConvGradArgs&);                                                               \
  void net_conv_dense(const ConvArgs&);                                                                              \
  void net_conv_dense_weight(const ConvWeightArgs&);                                                                 \
  }

SL_DECLARE_NETWORK(portable)
#if defined(__x86_64__)
SL_DECLARE_NETWORK(avx2)
SL_DECLARE_NETWORK(avx512)
#endif
#undef SL_DECLARE_NETWORK

}  // namespace sl::cpu
