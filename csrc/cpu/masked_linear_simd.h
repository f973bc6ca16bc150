// Between masked_linear.cpp (indexes, workspace, choice of instruction set) and masked_linear_simd.cpp (the loops,
// compiled once per instruction set). Plain structs only: see the note on _simd files in setup.py.
#pragma once
#include <stdint.h>

namespace sl::cpu {

// The survivors of a [lines, minors] matrix, grouped so that a kernel walks them front to back: blocks of `block` lines
// (what one thread owns), in a block panels of `panel` minors (what fits the cache), in a panel the block's lines,
// sorted by their number of survivors so that trip counts are predictable, in a line its survivors by ascending minor.
struct SparseLayout {
  int64_t lines, minors;
  int64_t block, panel;
  int64_t blocks, panels;
  const uint32_t* begin;  // [lines * panels + 1]: where a segment's survivors start
  const uint32_t* line;   // [lines * panels]: the segment's line
  const uint16_t* index;  // [count]: minor, relative to the panel
  const float* value;     // [count]
};

// Activations of one batch tile lie as [feature][T * width] floats, `width` lanes of batch per vector; x, y, dx and
// grad are row-major with a row stride in elements.
struct ForwardArgs {
  SparseLayout rows;
  int64_t batch, tile;  // tile: vectors per feature (T), 1..max_tile()
  const float* x;
  int64_t x_stride;
  const float* bias;  // [rows] or null
  float* y;           // [batch, rows]
  float* x_tile;      // workspace [columns * T * width]
  float* y_tile;      // workspace [rows * T * width]
  int threads;
  bool relu = false;  // max(y, 0)
};

struct BackwardArgs {
  SparseLayout columns;
  int64_t batch, tile;
  const float* x;
  int64_t x_stride;
  const float* grad;
  int64_t grad_stride;
  float* dx;               // [batch, columns] or null
  float* dw;               // [count] in the order of `columns`, or null
  bool pack_x;             // x_tile is wanted although dw is null
  float* db;               // [rows] or null
  bool add;                // to dw and db of an earlier part of the batch
  float *x_tile, *g_tile;  // workspace [columns * T * width], [rows * T * width]
  float* dx_tile;          // workspace [columns * T * width]
  int threads;
};

// dW row by row, straight into the dense gradient: for batches of one small tile, where walking the columns for dX and
// dW at once saves few loads and the way from column order to row order costs more.
struct WeightArgs {
  int64_t rows, columns;
  const uint32_t* offsets;   // [rows + 1]: the survivors of each row
  const uint32_t* position;  // [count]: where they stand in dw
  int64_t tile;
  const float *x_tile, *g_tile;  // as a backward pass has left them
  float* dw;                     // [rows, columns]
  bool clear;                    // the dead places, too
  int threads;
};

// One sample: y[line] = bias[line] + sum of value * x[minor]; `rows` has a single panel.
struct VectorArgs {
  SparseLayout rows;
  const float* x;
  const float* bias;
  float* y;
  bool gathers;  // this CPU's gather instructions are faster than eight loads
  int threads;
  bool relu;
};

#define SL_DECLARE_MASKED_LINEAR(isa)                                               \
  namespace isa {                                                                   \
  int64_t masked_linear_width();                                                    \
  int64_t masked_linear_max_tile();                                                 \
  void masked_linear_forward(const ForwardArgs&);                                   \
  void masked_linear_backward(const BackwardArgs&);                                 \
  /* The same on tiles that are packed already, results left packed; one thread. */ \
  void masked_linear_tile_forward(const ForwardArgs&);                              \
  void masked_linear_tile_backward(const BackwardArgs&);                            \
  void masked_linear_weight(const WeightArgs&);                                     \
  void masked_linear_vector(const VectorArgs&);                                     \
  }

SL_DECLARE_MASKED_LINEAR(portable)
#if defined(__x86_64__)
SL_DECLARE_MASKED_LINEAR(avx2)
SL_DECLARE_MASKED_LINEAR(avx512)
#endif
#undef SL_DECLARE_MASKED_LINEAR

}  // namespace sl::cpu
