// The loops of masked_linear on a CPU, compiled once per instruction set.
//
// Forward: x is turned into [feature][batch lane] tiles; a row of Y is then a sum of scaled feature vectors, one load
// per multiply-add. Backward walks the columns with x_j and dX_j in registers: each dY_i is loaded once and feeds both
// dX_j and the survivor's dW_ij, whose lanes are summed four survivors at a time. Each output element is computed by
// one thread, in an order that does not depend on how many threads there are.
#include "masked_linear_simd.h"

#include "masked_linear_sums.h"
#include "masked_linear_tiles.h"
#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

constexpr int64_t kPackFeatures = 256;  // features that one thread turns at a time

// The address as the compiler must see it: computed once, then used with constant offsets.
SL_INLINE const float* opaque(const float* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// Four values, and each of them in all lanes: one load, and shuffles where a broadcast takes the place of a load.
#if defined(SL_ISA_AVX512)
SL_INLINE V four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int U>
SL_INLINE V lane(V v, const float*) {
  return _mm512_permute_ps(v, U * 0x55);
}
#elif defined(SL_ISA_AVX2)
SL_INLINE V four(const float* p) { return _mm256_broadcast_ps((const __m128*)p); }
template <int U>
SL_INLINE V lane(V v, const float*) {
  return _mm256_permute_ps(v, U * 0x55);
}
#else
SL_INLINE V four(const float*) { return zero(); }
template <int U>
SL_INLINE V lane(V, const float* p) {
  return set1(p[U]);
}
#endif

template <int T>
SL_INLINE void add_feature(V w, const float* x, uint16_t index, V* sum) {
  const float* f = opaque(x + (int64_t)index * (T * kWidth));
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) sum[t] = fma(w, load(f + t * kWidth), sum[t]);
}

// a[t] += sum over survivors [s, e) of value * x[index]. Several sums run side by side, so that the multiply-adds of
// one do not wait for each other.
template <int T>
SL_INLINE void accumulate(const uint16_t* index, const float* value, uint32_t s, uint32_t e, const float* x, V* a) {
  constexpr int U = T <= 2 ? 4 : (T <= 4 || (T == 5 && kMaxTile == 8)) ? 2 : 1;
  V b[U][T];
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) b[u][t] = zero();
  }
  uint32_t k = s;
  for (; k + 4 <= e; k += 4) {
    const V w = four(value + k);
    add_feature<T>(lane<0>(w, value + k), x, index[k], b[0]);
    add_feature<T>(lane<1>(w, value + k), x, index[k + 1], b[1 % U]);
    add_feature<T>(lane<2>(w, value + k), x, index[k + 2], b[2 % U]);
    add_feature<T>(lane<3>(w, value + k), x, index[k + 3], b[3 % U]);
  }
  for (; k < e; k++) add_feature<T>(set1(value[k]), x, index[k], b[0]);
#pragma GCC unroll 4
  for (int u = 1; u < U; u++) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) b[0][t] = add(b[0][t], b[u][t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) a[t] = add(a[t], b[0][t]);
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

// One survivor of a column: its part of dX_j into g, the lanes of its dW left in the result.
template <int T, bool DX>
SL_INLINE V survivor(const float* grad, uint16_t index, float value, const V* x, V* g) {
  const V w = set1(value);
  const float* d = opaque(grad + (int64_t)index * (T * kWidth));
  V even = zero(), odd = zero();
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
    const V dy = once(load(d + t * kWidth));
    if (DX) g[t] = fma(w, dy, g[t]);
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
  return T > 1 ? add(even, odd) : even;
}

// Survivors [s, e) of a column: g += dX_j, dw[s .. e) = or += their gradients, four at a time.
template <int T, bool DX>
SL_INLINE void both(const SparseLayout& m, uint32_t s, uint32_t e, const float* grad, const V* x, V* g, float* dw,
                    bool add_to) {
  constexpr int U = T == 1 ? 4 : T == 2 ? 2 : 1;  // sums side by side, as in `accumulate`
  const uint16_t* index = m.index;
  const float* value = m.value;
  V b[U][T], r[4];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) b[0][t] = g[t];
#pragma GCC unroll 4
  for (int u = 1; u < U; u++) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) b[u][t] = zero();
  }
  uint32_t k = s;
  for (; k + 4 <= e; k += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) r[u] = survivor<T, DX>(grad, index[k + u], value[k + u], x, b[u % U]);
    Quad sums = quad_sums(r);
    if (add_to) sums = add_quads(sums, load_quad(dw + k));
    store_quad(dw + k, sums);
  }
  if (k < e) {
    const int n = (int)(e - k);
    r[0] = survivor<T, DX>(grad, index[k], value[k], x, b[0]);
    r[1] = n > 1 ? survivor<T, DX>(grad, index[k + 1], value[k + 1], x, b[0]) : zero();
    r[2] = n > 2 ? survivor<T, DX>(grad, index[k + 2], value[k + 2], x, b[0]) : zero();
    r[3] = zero();
    alignas(16) float sums[4];
    store_quad(sums, quad_sums(r));
    for (int u = 0; u < n; u++) dw[k + u] = add_to ? dw[k + u] + sums[u] : sums[u];
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
    g[t] = b[0][t];
#pragma GCC unroll 4
    for (int u = 1; u < U; u++) g[t] = add(g[t], b[u][t]);
  }
}

template <int T, bool DX, bool DW>
void backward_block(const BackwardArgs& a, int64_t block, bool first_tile) {
  const SparseLayout& m = a.columns;
  const int64_t first = block * m.block, lines = smaller(m.block, m.lines - first);
  for (int64_t p = 0; p < m.panels; p++) {
    const float* grad = a.g_tile + p * m.panel * (T * kWidth);
    const int64_t segment = first * m.panels + p * lines;
    for (int64_t r = segment; r < segment + lines; r++) {
      const uint32_t s = m.begin[r], e = m.begin[r + 1];
      if (s == e && (!DX || p > 0)) continue;
      const int64_t at = (int64_t)m.line[r] * (T * kWidth);
      V g[T], x[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        g[t] = !DX || p == 0 ? zero() : load(a.dx_tile + at + t * kWidth);
        if (DW) x[t] = load(a.x_tile + at + t * kWidth);
      }
      if (DW) {
        both<T, DX>(m, s, e, grad, x, g, a.dw, !first_tile);
      } else if (DX) {
        accumulate<T>(m.index, m.value, s, e, grad, g);
      }
      if (DX) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) store(a.dx_tile + at + t * kWidth, g[t]);
      }
    }
  }
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
    for (uint32_t k = a.offsets[i]; k < end; k += 4) {
      const int n = (int)smaller(4, end - k);
      V r[4];
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const float* x = a.x_tile + (a.position[u < n ? k + u : k] - first) * (T * kWidth);
        r[u] = mul(g[0], load(x));
#pragma GCC unroll 8
        for (int t = 1; t < T; t++) r[u] = fma(g[t], load(x + t * kWidth), r[u]);
      }
      alignas(16) float sums[4];
      store_quad(sums, quad_sums(r));
      for (int u = 0; u < n; u++) a.dw[a.position[k + u]] = sums[u];
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

}  // namespace sl::cpu::SL_ISA
