// The loops of masked_linear on a CPU, compiled once per instruction set.
//
// Forward: x is turned into [feature][batch lane] tiles; a row of Y is then a sum of scaled feature vectors, one load
// per multiply-add. Backward walks the columns with x_j and dX_j in registers: each dY_i is loaded once and feeds both
// dX_j and the survivor's dW_ij, whose lanes are summed kWidth survivors at a time out of a small ring. Each output
// element is computed by one thread, in an order that does not depend on how many threads there are.
#include "masked_linear_simd.h"

#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

constexpr int64_t kPackFeatures = 64;  // features that one thread turns at a time
constexpr int kRing = 64;              // survivors whose dW lanes wait to be summed; a power of two

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The address as the compiler must see it: computed once, then used with constant offsets.
SL_INLINE const float* opaque(const float* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// rows [first, first + count) of a row-major matrix, features [from, to) -> tile [feature][T * kWidth]; missing rows
// are zeros. `sums` (may be null) receives += the features' sums over the rows.
template <int T>
void pack(const float* matrix, int64_t stride, int64_t first, int64_t count, int64_t from, int64_t to, float* tile,
          float* sums) {
  for (int g = 0; g < T; g++) {
    const int64_t left = count - g * kWidth;
    const int rows = left <= 0 ? 0 : (int)smaller(left, kWidth);
    const float* source = matrix + (first + g * kWidth) * stride;
    for (int64_t k = from; k < to; k += kWidth) {
      const int features = (int)smaller(kWidth, to - k);
      float* out = tile + k * (T * kWidth) + g * kWidth;
      V r[kWidth];
      if (rows == kWidth && features == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) r[i] = load(source + i * stride + k);
      } else {
        for (int i = 0; i < kWidth; i++) r[i] = i < rows ? load(source + i * stride + k, features) : zero();
      }
      if (sums != nullptr) {
        V s = r[0];
#pragma GCC unroll 16
        for (int i = 1; i < kWidth; i++) s = add(s, r[i]);
        if (features == kWidth) {
          store(sums + k, add(load(sums + k), s));
        } else {
          store(sums + k, add(load(sums + k, features), s), features);
        }
      }
      transpose(r);
      if (features == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) store(out + i * (T * kWidth), r[i]);
      } else {
        for (int i = 0; i < features; i++) store(out + i * (T * kWidth), r[i]);
      }
    }
  }
}

// The way back: features [from, to) of a tile -> rows [first, first + count) of a row-major matrix.
template <int T>
void unpack(const float* tile, int64_t from, int64_t to, float* matrix, int64_t stride, int64_t first, int64_t count) {
  for (int g = 0; g < T; g++) {
    const int64_t left = count - g * kWidth;
    const int rows = left <= 0 ? 0 : (int)smaller(left, kWidth);
    if (rows == 0) break;
    float* target = matrix + (first + g * kWidth) * stride;
    for (int64_t k = from; k < to; k += kWidth) {
      const int features = (int)smaller(kWidth, to - k);
      const float* in = tile + k * (T * kWidth) + g * kWidth;
      V r[kWidth];
      if (features == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) r[i] = load(in + i * (T * kWidth));
      } else {
        for (int i = 0; i < kWidth; i++) r[i] = i < features ? load(in + i * (T * kWidth)) : zero();
      }
      transpose(r);
      if (rows == kWidth && features == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) store(target + i * stride + k, r[i]);
      } else {
        for (int i = 0; i < rows; i++) store(target + i * stride + k, r[i], features);
      }
    }
  }
}

// a[t] += sum over survivors [s, e) of value * x[index]. Several sums run side by side, so that the multiply-adds of
// one do not wait for each other.
template <int T>
SL_INLINE void accumulate(const uint16_t* index, const float* value, uint32_t s, uint32_t e, const float* x, V* a) {
  constexpr int U = T == 1 ? 8 : T == 2 ? 4 : (T <= 4 || (T == 5 && kMaxTile == 8)) ? 2 : 1;
  V b[U][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) b[0][t] = a[t];
#pragma GCC unroll 8
  for (int u = 1; u < U; u++) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) b[u][t] = zero();
  }
  uint32_t k = s;
  for (; k + U <= e; k += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      const V w = set1(value[k + u]);
      const float* f = opaque(x + (int64_t)index[k + u] * (T * kWidth));
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) b[u][t] = fma(w, load(f + t * kWidth), b[u][t]);
    }
  }
  if (U > 1) {
    for (; k < e; k++) {
      const V w = set1(value[k]);
      const float* f = opaque(x + (int64_t)index[k] * (T * kWidth));
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) b[0][t] = fma(w, load(f + t * kWidth), b[0][t]);
    }
  }
#pragma GCC unroll 8
  for (int u = 1; u < U; u++) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) b[0][t] = add(b[0][t], b[u][t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) a[t] = b[0][t];
}

template <int T>
void forward_block(const ForwardArgs& a, int64_t block) {
  const SparseLayout& m = a.rows;
  const int64_t first = block * m.block, lines = smaller(m.block, m.lines - first);
  for (int64_t p = 0; p < m.panels; p++) {
    const float* x = a.x_tile + p * m.panel * (T * kWidth);
    const int64_t segment = first * m.panels + p * lines;
    const bool relu = a.relu && p == m.panels - 1;
    for (int64_t r = segment; r < segment + lines; r++) {
      const uint32_t s = m.begin[r], e = m.begin[r + 1];
      if (p > 0 && s == e && !relu) continue;
      float* y = a.y_tile + (int64_t)m.line[r] * (T * kWidth);
      V sum[T];
      if (p == 0) {
        const V b = set1(a.bias != nullptr ? a.bias[m.line[r]] : 0.f);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[t] = b;
      } else {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[t] = load(y + t * kWidth);
      }
      accumulate<T>(m.index, m.value, s, e, x, sum);
      if (relu) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[t] = sl::cpu::SL_ISA::relu(sum[t]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) store(y + t * kWidth, sum[t]);
    }
  }
}

template <int T>
void forward(const ForwardArgs& a) {
  const SparseLayout& m = a.rows;
  const int64_t slices = (m.minors + kPackFeatures - 1) / kPackFeatures;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int64_t row = 0; row < a.batch; row += T * kWidth) {
    const int64_t rows = smaller(T * kWidth, a.batch - row);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < slices; i++) {
      const int64_t from = i * kPackFeatures;
      pack<T>(a.x, a.x_stride, row, rows, from, smaller(from + kPackFeatures, m.minors), a.x_tile, nullptr);
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < m.blocks; block++) {
      forward_block<T>(a, block);
      const int64_t from = block * m.block;
      unpack<T>(a.y_tile, from, smaller(from + m.block, m.lines), a.y, m.lines, row, rows);
    }
  }
}

// Sums waiting survivors [done, upto) in groups of kWidth; `last`: also the incomplete group. Returns the new `done`.
SL_INLINE uint32_t flush(const float* ring, float* dw, uint32_t done, uint32_t upto, bool add_to, bool last) {
  while (upto - done >= (uint32_t)kWidth || (last && upto > done)) {
    const int n = (int)smaller(kWidth, upto - done);
    V r[kWidth];
#pragma GCC unroll 16
    for (int u = 0; u < kWidth; u++) r[u] = load(ring + ((done + u) & (kRing - 1)) * kWidth);
    V v = row_sums(r);
    if (n == kWidth) {
      if (add_to) v = add(v, load(dw + done));
      store(dw + done, v);
    } else {
      if (add_to) v = add(v, load(dw + done, n));
      store(dw + done, v, n);
    }
    done += n;
  }
  return done;
}

template <int T, bool DX, bool DW>
void backward_block(const BackwardArgs& a, int64_t block, bool first_tile) {
  const SparseLayout& m = a.columns;
  const int64_t first = block * m.block, lines = smaller(m.block, m.lines - first);
  alignas(64) float ring[kRing * kWidth];
  uint32_t done = m.begin[first * m.panels];
  for (int64_t p = 0; p < m.panels; p++) {
    const float* grad = a.g_tile + p * m.panel * (T * kWidth);
    const int64_t segment = first * m.panels + p * lines;
    for (int64_t r = segment; r < segment + lines; r++) {
      const uint32_t s = m.begin[r], e = m.begin[r + 1];
      if (s == e && (!DX || p > 0)) continue;
      const int64_t at = (int64_t)m.line[r] * (T * kWidth);
      V g[T], x[T];
      if (DX) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) g[t] = p == 0 ? zero() : load(a.dx_tile + at + t * kWidth);
      }
      if (DW) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) x[t] = load(a.x_tile + at + t * kWidth);
      }
      for (uint32_t k = s; k < e;) {
        const uint32_t stop = DW ? (uint32_t)smaller(e, (int64_t)done + kRing) : e;
        for (; k < stop; k++) {
          const V w = set1(m.value[k]);
          const float* d = opaque(grad + (int64_t)m.index[k] * (T * kWidth));
          V even = zero(), odd = zero();
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) {
            const V dy = load(d + t * kWidth);
            if (DX) g[t] = fma(w, dy, g[t]);
            if (DW) {
              if (t == 0) {
                even = mul(dy, x[0]);
              } else if (t == 1) {
                odd = mul(dy, x[1]);
              } else if (t & 1) {
                odd = fma(dy, x[t], odd);
              } else {
                even = fma(dy, x[t], even);
              }
            }
          }
          if (DW) store(ring + (k & (kRing - 1)) * kWidth, T > 1 ? add(even, odd) : even);
        }
        if (DW) done = flush(ring, a.dw, done, k, !first_tile, false);
      }
      if (DX) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) store(a.dx_tile + at + t * kWidth, g[t]);
      }
    }
  }
  if (DW) flush(ring, a.dw, done, m.begin[(first + lines) * m.panels], !first_tile, true);
}

template <int T, bool DX, bool DW>
void backward(const BackwardArgs& a) {
  const SparseLayout& m = a.columns;
  const int64_t row_slices = (m.minors + kPackFeatures - 1) / kPackFeatures;
  const int64_t column_slices = DW || a.pack_x ? (m.lines + kPackFeatures - 1) / kPackFeatures : 0;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  for (int64_t row = 0; row < a.batch; row += T * kWidth) {
    const int64_t rows = smaller(T * kWidth, a.batch - row);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < row_slices + column_slices; i++) {
      const bool is_grad = i < row_slices;
      const int64_t from = (is_grad ? i : i - row_slices) * kPackFeatures;
      if (is_grad) {
        const int64_t to = smaller(from + kPackFeatures, m.minors);
        if (a.db != nullptr && row == 0 && !a.add) memset(a.db + from, 0, (to - from) * sizeof(float));
        pack<T>(a.grad, a.grad_stride, row, rows, from, to, a.g_tile, a.db);
      } else {
        pack<T>(a.x, a.x_stride, row, rows, from, smaller(from + kPackFeatures, m.lines), a.x_tile, nullptr);
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < m.blocks; block++) {
      backward_block<T, DX, DW>(a, block, row == 0 && !a.add);
      const int64_t from = block * m.block;
      if (DX) unpack<T>(a.dx_tile, from, smaller(from + m.block, m.lines), a.dx, m.lines, row, rows);
    }
  }
}

template <int T>
void backward_any(const BackwardArgs& a) {
  if (a.dx != nullptr && a.dw != nullptr) {
    backward<T, true, true>(a);
  } else if (a.dx != nullptr) {
    backward<T, true, false>(a);
  } else if (a.dw != nullptr) {
    backward<T, false, true>(a);
  } else {
    backward<T, false, false>(a);
  }
}

template <int T>
void tile_forward(const ForwardArgs& a) {
  for (int64_t block = 0; block < a.rows.blocks; block++) forward_block<T>(a, block);
}

template <int T>
void tile_backward(const BackwardArgs& a) {
  for (int64_t block = 0; block < a.columns.blocks; block++) {
    if (a.dx_tile != nullptr) {
      backward_block<T, true, true>(a, block, !a.add);
    } else {
      backward_block<T, false, true>(a, block, !a.add);
    }
  }
}

template <int T>
void weight(const WeightArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t i = 0; i < a.rows; i++) {
    if (a.clear) memset(a.dw + i * a.columns, 0, a.columns * sizeof(float));
    V g[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) g[t] = load(a.g_tile + (i * T + t) * kWidth);
    const int64_t first = i * a.columns;
    const uint32_t end = a.offsets[i + 1];
    for (uint32_t k = a.offsets[i]; k < end; k += kWidth) {
      const int n = (int)smaller(kWidth, end - k);
      V r[kWidth];
#pragma GCC unroll 16
      for (int u = 0; u < kWidth; u++) {
        if (u >= n) {
          r[u] = zero();
          continue;
        }
        const float* x = a.x_tile + (a.position[k + u] - first) * (T * kWidth);
        r[u] = mul(g[0], load(x));
#pragma GCC unroll 8
        for (int t = 1; t < T; t++) r[u] = fma(g[t], load(x + t * kWidth), r[u]);
      }
      alignas(64) float sums[kWidth];
      store(sums, row_sums(r));
      for (int u = 0; u < n; u++) a.dw[a.position[k + u]] = sums[u];
    }
  }
}

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
// x at eight places, by loads of one element each.
SL_INLINE __m256 pick(const float* x, const uint16_t* index) {
  uint64_t low, high;
  memcpy(&low, index, 8);
  memcpy(&high, index + 4, 8);
  const auto four = [x](uint64_t i) __attribute__((always_inline)) {
    __m128 v = _mm_load_ss(x + (uint16_t)i);
    v = _mm_insert_ps(v, _mm_load_ss(x + (uint16_t)(i >> 16)), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + (uint16_t)(i >> 32)), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(x + (uint16_t)(i >> 48)), 0x30);
  };
  return _mm256_insertf128_ps(_mm256_castps128_ps256(four(low)), four(high), 1);
}

SL_INLINE float dot_loads(const uint16_t* index, const float* value, uint32_t s, uint32_t e, const float* x) {
  __m256 a = _mm256_setzero_ps(), b = a;
  uint32_t k = s;
  for (; k + 16 <= e; k += 16) {
    a = _mm256_fmadd_ps(pick(x, index + k), _mm256_loadu_ps(value + k), a);
    b = _mm256_fmadd_ps(pick(x, index + k + 8), _mm256_loadu_ps(value + k + 8), b);
  }
  if (k + 8 <= e) {
    a = _mm256_fmadd_ps(pick(x, index + k), _mm256_loadu_ps(value + k), a);
    k += 8;
  }
  a = _mm256_add_ps(a, b);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
  for (; k < e; k++) sum = _mm_fmadd_ss(_mm_load_ss(x + index[k]), _mm_load_ss(value + k), sum);
  return _mm_cvtss_f32(sum);
}
#else
SL_INLINE float dot_loads(const uint16_t* index, const float* value, uint32_t s, uint32_t e, const float* x) {
  float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  uint32_t k = s;
  for (; k + 8 <= e; k += 8) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++) sum[u] += value[k + u] * x[index[k + u]];
  }
  for (; k < e; k++) sum[0] += value[k] * x[index[k]];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
#endif

SL_INLINE float dot_gathers(const uint16_t* index, const float* value, uint32_t s, uint32_t e, const float* x) {
#if defined(SL_ISA_AVX512)
  V a = zero(), b = zero();
  uint32_t k = s;
  for (; k + 32 <= e; k += 32) {
    const __m512i i0 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(index + k)));
    const __m512i i1 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(index + k + 16)));
    a = fma(_mm512_i32gather_ps(i0, x, 4), load(value + k), a);
    b = fma(_mm512_i32gather_ps(i1, x, 4), load(value + k + 16), b);
  }
  for (; k < e; k += 16) {
    const int n = (int)smaller(16, e - k);
    const __mmask16 some = (__mmask16)((1u << n) - 1);
    const __m512i i0 = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, index + k));
    a = fma(_mm512_mask_i32gather_ps(zero(), some, i0, x, 4), load(value + k, n), a);
  }
  return _mm512_reduce_add_ps(add(a, b));
#else
  return dot_loads(index, value, s, e, x);
#endif
}

template <bool GATHERS>
void vector(const VectorArgs& a) {
  const SparseLayout& m = a.rows;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t block = 0; block < m.blocks; block++) {
    const int64_t first = block * m.block;
    for (int64_t r = first; r < smaller(first + m.block, m.lines); r++) {
      const uint32_t line = m.line[r];
      const float sum = GATHERS ? dot_gathers(m.index, m.value, m.begin[r], m.begin[r + 1], a.x)
                                : dot_loads(m.index, m.value, m.begin[r], m.begin[r + 1], a.x);
      const float y = a.bias != nullptr ? a.bias[line] + sum : sum;
      a.y[line] = a.relu && y < 0 ? 0 : y;  // NaN stays
    }
  }
}

}  // namespace

int64_t masked_linear_width() { return kWidth; }
int64_t masked_linear_max_tile() { return kMaxTile; }

void masked_linear_forward(const ForwardArgs& a) {
  switch (a.tile) {
    case 1:
      return forward<1>(a);
    case 2:
      return forward<2>(a);
    case 3:
      return forward<3>(a);
    case 4:
      return forward<4>(a);
#if defined(SL_ISA_AVX512)
    case 5:
      return forward<5>(a);
    case 6:
      return forward<6>(a);
    case 7:
      return forward<7>(a);
    case 8:
      return forward<8>(a);
#endif
  }
}

void masked_linear_backward(const BackwardArgs& a) {
  switch (a.tile) {
    case 1:
      return backward_any<1>(a);
    case 2:
      return backward_any<2>(a);
    case 3:
      return backward_any<3>(a);
    case 4:
      return backward_any<4>(a);
#if defined(SL_ISA_AVX512)
    case 5:
      return backward_any<5>(a);
    case 6:
      return backward_any<6>(a);
    case 7:
      return backward_any<7>(a);
    case 8:
      return backward_any<8>(a);
#endif
  }
}

void masked_linear_tile_forward(const ForwardArgs& a) {
  switch (a.tile) {
    case 1:
      return tile_forward<1>(a);
    case 2:
      return tile_forward<2>(a);
    case 3:
      return tile_forward<3>(a);
    case 4:
      return tile_forward<4>(a);
  }
}

void masked_linear_tile_backward(const BackwardArgs& a) {
  switch (a.tile) {
    case 1:
      return tile_backward<1>(a);
    case 2:
      return tile_backward<2>(a);
    case 3:
      return tile_backward<3>(a);
    case 4:
      return tile_backward<4>(a);
  }
}

void masked_linear_weight(const WeightArgs& a) { return a.tile == 1 ? weight<1>(a) : weight<2>(a); }

void masked_linear_vector(const VectorArgs& a) { return a.gathers ? vector<true>(a) : vector<false>(a); }

}  // namespace sl::cpu::SL_ISA
