// The loops of a masked linear layer for a few samples, compiled once per instruction set: dense products in which the
// mask's bits blank the weights as they are loaded, and dW as it is stored. With few samples each weight is used once
// or twice, so an index of survivors costs more than the dead weights do until most vectors of weights are empty; and
// the gradient needs no second pass that masks it. Every output element is computed by one thread in one order.
#include "masked_linear_small_simd.h"

#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

#if defined(SL_ISA_AVX512)
constexpr int kSums = 16;  // of 32 registers
#else
constexpr int kSums = 8;  // of 16 registers
#endif
constexpr int kSamples = 4;   // that share a load of weights
constexpr int kGradRows = 4;  // of dW: rows by columns of kSums sums
constexpr int kGradColumns = kSums / kGradRows;

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The lanes whose bit is set, others 0: whatever they held.
#if defined(SL_ISA_AVX512)
SL_INLINE V keep(V v, uint32_t bits) { return _mm512_maskz_mov_ps((__mmask16)bits, v); }
SL_INLINE V load_kept(const float* p, uint32_t bits) { return _mm512_maskz_loadu_ps((__mmask16)bits, p); }
#elif defined(SL_ISA_AVX2)
SL_INLINE V keep(V v, uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i own = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lane)));
}
SL_INLINE V load_kept(const float* p, uint32_t bits) { return keep(load(p), bits); }
#else
typedef int32_t I __attribute__((vector_size(16)));
SL_INLINE V keep(V v, uint32_t bits) {
  const I lane = {1, 2, 4, 8}, b = {(int)bits, (int)bits, (int)bits, (int)bits};
  return (V)((I)v & ((b & lane) == lane));
}
SL_INLINE V load_kept(const float* p, uint32_t bits) { return keep(load(p), bits); }
#endif

// The bits of the vector at `column`, a multiple of kWidth: of its last columns where it is cut off, as padding is 0.
SL_INLINE uint32_t bits_at(const uint32_t* words, int64_t column) { return words[column / 32] >> (column % 32); }

// The weights at `column`, of which n remain in the row.
SL_INLINE V kept(const float* row, const uint32_t* words, int64_t column, int64_t n) {
#if defined(SL_ISA_AVX512)
  (void)n;  // a masked load touches nothing where its bit is 0, and beyond the row it is
  return load_kept(row + column, bits_at(words, column));
#else
  if (n >= kWidth) return load_kept(row + column, bits_at(words, column));
  return keep(load(row + column, (int)n), bits_at(words, column));
#endif
}

// y of B samples and R rows; rows beyond the last are the last one once more, and not written.
template <int B, int R>
void dot(const SmallArgs& a, int64_t first_row, int64_t sample) {
  const int64_t per_row = (a.columns + 31) / 32;
  const float* weight[R];
  const uint32_t* words[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const int64_t row = smaller(first_row + r, a.rows - 1);
    weight[r] = a.weight + row * a.columns;
    words[r] = a.words + row * per_row;
  }
  const float* x = a.x + sample * a.x_stride;
  V sum[R * B];
#pragma GCC unroll 16
  for (int i = 0; i < R * B; i++) sum[i] = zero();
  int64_t j = 0;
  for (; j + kWidth <= a.columns; j += kWidth) {
    V in[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) in[b] = load(x + b * a.x_stride + j);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const V w = load_kept(weight[r] + j, bits_at(words[r], j));
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) sum[r * B + b] = fma(w, in[b], sum[r * B + b]);
    }
  }
  if (j < a.columns) {
    const int n = (int)(a.columns - j);
    V in[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) in[b] = load(x + b * a.x_stride + j, n);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const V w = kept(weight[r], words[r], j, n);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) sum[r * B + b] = fma(w, in[b], sum[r * B + b]);
    }
  }
  const int64_t rows = smaller(R, a.rows - first_row);
#pragma GCC unroll 4
  for (int start = 0; start < R * B; start += kWidth) {
    V group[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) group[i] = start + i < R * B ? sum[start + i] : zero();
    float out[kWidth];
    store(out, row_sums(group));
    for (int i = 0; i < kWidth && start + i < R * B; i++) {
      const int r = (start + i) / B, b = (start + i) % B;
      if (r >= rows) continue;
      float v = out[i];
      if (a.bias != nullptr) v += a.bias[first_row + r];
      if (a.relu && v <= 0) v = 0;
      a.y[(sample + b) * a.rows + first_row + r] = v;
    }
  }
}

template <int B>
SL_INLINE void dot_rows(const SmallArgs& a, int64_t row, int64_t end, int64_t sample) {
  constexpr int R = B <= 2 && kSums / B > 8 ? 8 : kSums / (B == 3 ? 4 : B);
  for (; row < end; row += R) dot<B, R>(a, row, sample);
}

// Adds the products of R rows to dX of B samples at the columns [column, end).
template <int B, int R>
void input(const SmallArgs& a, int64_t row, int64_t column, int64_t end, int64_t sample) {
  const int64_t per_row = (a.columns + 31) / 32;
  const float* grad = a.grad + sample * a.grad_stride + row;
  const float* weight = a.weight + row * a.columns;
  const uint32_t* words = a.words + row * per_row;
  float* dx = a.dx + sample * a.columns;
  V g[R * B];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) g[r * B + b] = set1(grad[b * a.grad_stride + r]);
  }
  int64_t j = column;
  for (; j + kWidth <= end; j += kWidth) {
    V sum[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) sum[b] = load(dx + b * a.columns + j);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const V w = load_kept(weight + r * a.columns + j, bits_at(words + r * per_row, j));
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) sum[b] = fma(w, g[r * B + b], sum[b]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) store(dx + b * a.columns + j, sum[b]);
  }
  if (j < end) {
    const int n = (int)(end - j);
    V sum[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) sum[b] = load(dx + b * a.columns + j, n);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const V w = kept(weight + r * a.columns, words + r * per_row, j, n);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) sum[b] = fma(w, g[r * B + b], sum[b]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) store(dx + b * a.columns + j, sum[b], n);
  }
}

template <int B>
SL_INLINE void input_rows(const SmallArgs& a, int64_t row, int64_t last, int64_t column, int64_t end, int64_t sample) {
  constexpr int R = B == 1 ? 8 : kSums / (B == 3 ? 4 : B);
  for (; row + R <= last; row += R) input<B, R>(a, row, column, end, sample);
  for (; row < last; row++) input<B, 1>(a, row, column, end, sample);
}

// dW at R rows and C vectors of columns.
template <int R, int C>
void weight_block(const SmallArgs& a, int64_t row, int64_t column) {
  const int64_t per_row = (a.columns + 31) / 32, left = a.columns - column;
  const float* x = a.x + column;
  const float* grad = a.grad + row;
  V sum[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; i++) sum[i] = zero();
  for (int64_t b = 0; b < a.batch; b++) {
    V in[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      in[c] = C > 1 || left >= kWidth ? load(x + b * a.x_stride + c * kWidth) : load(x + b * a.x_stride, (int)left);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V g = set1(grad[b * a.grad_stride + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sum[r * C + c] = fma(g, in[c], sum[r * C + c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    const uint32_t* words = a.words + (row + r) * per_row;
    float* out = a.dw + (row + r) * a.columns + column;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const V v = keep(sum[r * C + c], bits_at(words, column + c * kWidth));
      if (C > 1 || left >= kWidth) {
        store(out + c * kWidth, v);
      } else {
        store(out, v, (int)left);
      }
    }
  }
}

template <int R>
SL_INLINE void weight_rows(const SmallArgs& a, int64_t row) {
  int64_t j = 0;
  for (; j + kGradColumns * kWidth <= a.columns; j += kGradColumns * kWidth) weight_block<R, kGradColumns>(a, row, j);
  for (; j < a.columns; j += kWidth) weight_block<R, 1>(a, row, j);
}

// run(first, count as a type's value) for the batch, kSamples at a time.
#define SL_BY_SAMPLES(function, ...)                               \
  for (int64_t sample = 0; sample < a.batch; sample += kSamples) { \
    switch (smaller(kSamples, a.batch - sample)) {                 \
      case 1:                                                      \
        function<1>(a, __VA_ARGS__, sample);                       \
        break;                                                     \
      case 2:                                                      \
        function<2>(a, __VA_ARGS__, sample);                       \
        break;                                                     \
      case 3:                                                      \
        function<3>(a, __VA_ARGS__, sample);                       \
        break;                                                     \
      default:                                                     \
        function<4>(a, __VA_ARGS__, sample);                       \
    }                                                              \
  }

}  // namespace

void masked_linear_small_forward(const SmallArgs& a) {
  constexpr int64_t kRows = 16;  // their weights stay in the first-level cache for all samples
  const int64_t blocks = (a.rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t row = i * kRows, end = smaller(a.rows, row + kRows);
    SL_BY_SAMPLES(dot_rows, row, end)
  }
}

void masked_linear_small_backward(const SmallArgs& a) {
  if (a.dx != nullptr) {
    // Rows of weights are read from end to end, as memory likes it; a panel of dX stays in the first-level cache
    // meanwhile, and some rows do for all samples.
    constexpr int64_t kRows = 16, kPanel = 4096;
    const int64_t wide = kPanel / a.batch > 256 ? kPanel / a.batch : 256;
    const int64_t share = ((a.columns + a.threads - 1) / a.threads + kWidth - 1) / kWidth * kWidth;
    const int64_t panel = smaller(wide, share) / kWidth * kWidth;
    const int64_t blocks = (a.columns + panel - 1) / panel;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t column = i * panel, end = smaller(a.columns, column + panel);
      for (int64_t b = 0; b < a.batch; b++) {
        for (int64_t j = column; j < end; j++) a.dx[b * a.columns + j] = 0;
      }
      for (int64_t row = 0; row < a.rows; row += kRows) {
        const int64_t last = smaller(a.rows, row + kRows);
        SL_BY_SAMPLES(input_rows, row, last, column, end)
      }
    }
  }
  if (a.dw != nullptr) {
    const int64_t blocks = a.rows / kGradRows;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
    for (int64_t i = 0; i < blocks; i++) weight_rows<kGradRows>(a, i * kGradRows);
    for (int64_t i = blocks * kGradRows; i < a.rows; i++) weight_rows<1>(a, i);
  }
  if (a.db != nullptr) {
    for (int64_t i = 0; i < a.rows; i++) a.db[i] = 0;
    for (int64_t b = 0; b < a.batch; b++) {
      for (int64_t i = 0; i < a.rows; i++) a.db[i] += a.grad[b * a.grad_stride + i];
    }
  }
}

}  // namespace sl::cpu::SL_ISA
