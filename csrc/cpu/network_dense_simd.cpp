// The dense loops of a linear layer in a network, compiled once per instruction set: matrices small enough for the
// caches, times tiles of up to four vectors of batch, so that a tile's accumulators stay in registers.
#include "network_dense_simd.h"

#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

#if defined(SL_ISA_AVX512)
constexpr int kLines = 4;  // results side by side: 4 x 4 accumulators, 4 operands, of 32 registers
#else
constexpr int kLines = 2;  // of 16 registers
#endif
constexpr int kGradRows = kWidth / 4, kGradColumns = 4;  // a block of dW fills one vector of sums

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// out[line + r] = start[r] + sum over k of weight[r * line_step + k * step] * in[k], for L lines.
template <int T, int L>
SL_INLINE void lines(const float* weight, int64_t line_step, int64_t step, int64_t count, const float* in,
                     const float* start, float* out) {
  V sum[L][T];
#pragma GCC unroll 4
  for (int r = 0; r < L; r++) {
    const V s = set1(start != nullptr ? start[r] : 0.f);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[r][t] = s;
  }
  for (int64_t k = 0; k < count; k++) {
    V x[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) x[t] = load(in + (k * T + t) * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < L; r++) {
      const V w = set1(weight[r * line_step + k * step]);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) sum[r][t] = fma(w, x[t], sum[r][t]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < L; r++) {
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) store(out + (r * T + t) * kWidth, sum[r][t]);
  }
}

template <int T>
void forward(const DenseArgs& a) {
  int64_t i = 0;
  for (; i + kLines <= a.rows; i += kLines) {
    lines<T, kLines>(a.weight + i * a.stride, a.stride, 1, a.columns, a.x, a.bias != nullptr ? a.bias + i : nullptr,
                     a.y + i * T * kWidth);
  }
  for (; i < a.rows; i++) {
    lines<T, 1>(a.weight + i * a.stride, a.stride, 1, a.columns, a.x, a.bias != nullptr ? a.bias + i : nullptr,
                a.y + i * T * kWidth);
  }
}

template <int T>
void input(const DenseArgs& a) {
  int64_t j = 0;
  for (; j + kLines <= a.columns; j += kLines) {
    lines<T, kLines>(a.weight + j, 1, a.stride, a.rows, a.grad, nullptr, a.dx + j * T * kWidth);
  }
  for (; j < a.columns; j++) lines<T, 1>(a.weight + j, 1, a.stride, a.rows, a.grad, nullptr, a.dx + j * T * kWidth);
}

template <int T>
void weight(const DenseArgs& a) {
  for (int64_t i = 0; i < a.rows; i += kGradRows) {
    for (int64_t j = 0; j < a.columns; j += kGradColumns) {
      V sum[kWidth];
      // Beyond the edge the last line is computed once more, and not written.
#pragma GCC unroll 4
      for (int c = 0; c < kGradColumns; c++) {
        const float* x = a.x + smaller(j + c, a.columns - 1) * T * kWidth;
#pragma GCC unroll 4
        for (int r = 0; r < kGradRows; r++) {
          const float* g = a.grad + smaller(i + r, a.rows - 1) * T * kWidth;
          V s = mul(load(g), load(x));
#pragma GCC unroll 4
          for (int t = 1; t < T; t++) s = fma(load(g + t * kWidth), load(x + t * kWidth), s);
          sum[r * kGradColumns + c] = s;
        }
      }
      alignas(64) float block[kWidth];
      store(block, row_sums(sum));
      const int64_t high = smaller(kGradRows, a.rows - i), wide = smaller(kGradColumns, a.columns - j);
      for (int64_t r = 0; r < high; r++) {
        float* out = a.dw + (i + r) * a.stride + j;
        for (int64_t c = 0; c < wide; c++) out[c] = (a.add ? out[c] : 0.f) + block[r * kGradColumns + c];
      }
    }
  }
}

template <int T>
void sums(const float* grad, int64_t rows, float* db, bool add_to) {
  for (int64_t i = 0; i < rows; i += kWidth) {
    const int n = (int)smaller(kWidth, rows - i);
    V r[kWidth];
#pragma GCC unroll 16
    for (int u = 0; u < kWidth; u++) {
      r[u] = zero();
      if (u >= n) continue;
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) r[u] = add(r[u], load(grad + ((i + u) * T + t) * kWidth));
    }
    const V s = row_sums(r);
    store(db + i, add_to ? add(load(db + i, n), s) : s, n);
  }
}

}  // namespace

#define SL_BY_TILE(function, tile, ...) \
  switch (tile) {                       \
    case 1:                             \
      return function<1>(__VA_ARGS__);  \
    case 2:                             \
      return function<2>(__VA_ARGS__);  \
    case 3:                             \
      return function<3>(__VA_ARGS__);  \
    default:                            \
      return function<4>(__VA_ARGS__);  \
  }

void net_dense_forward(const DenseArgs& a) { SL_BY_TILE(forward, a.tile, a) }
void net_dense_input(const DenseArgs& a) { SL_BY_TILE(input, a.tile, a) }
void net_dense_weight(const DenseArgs& a) { SL_BY_TILE(weight, a.tile, a) }
void net_tile_sums(const float* grad, int64_t rows, int64_t tile, float* db, bool add) {
  SL_BY_TILE(sums, tile, grad, rows, db, add)
}

void net_tile_relu(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(values + i, relu(load(values + i)));
}

void net_tile_relu_gradient(const float* y, float* grad, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(grad + i, relu_gradient(load(y + i), load(grad + i)));
}

}  // namespace sl::cpu::SL_ISA
