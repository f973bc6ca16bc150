// One vector of floats per instruction set, for *_simd.cpp files: V, kWidth and the few operations the kernels need.
// No standard templates in here (see setup.py).
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_ps, PR 105593
#endif
#endif

#define SL_INLINE __attribute__((always_inline)) inline

namespace sl::cpu::SL_ISA {

#if defined(SL_ISA_AVX512)

constexpr int kWidth = 16;
constexpr int kMaxTile = 8;
using V = __m512;
SL_INLINE V zero() { return _mm512_setzero_ps(); }
SL_INLINE V set1(float v) { return _mm512_set1_ps(v); }
SL_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
SL_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
SL_INLINE V load(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
SL_INLINE void store(float* p, V v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
SL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
SL_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
SL_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// A value that is used twice is loaded once: GCC would rather give both instructions the address.
SL_INLINE V once(V v) {
  asm("" : "+v"(v));
  return v;
}
// w[u] has v[u] in all lanes; one load for four vectors.
SL_INLINE void set4(const float* v, V* w) {
  const V all = _mm512_castps128_ps512(_mm_loadu_ps(v));
#pragma GCC unroll 4
  for (int u = 0; u < 4; u++) w[u] = _mm512_permutexvar_ps(_mm512_set1_epi32(u), all);
}
// max(v, 0), NaN kept; and what of a gradient passes through it: nothing where its result y is 0.
SL_INLINE V relu(V v) { return _mm512_max_ps(zero(), v); }
SL_INLINE V relu_gradient(V y, V grad) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), grad); }

// r[i] lane j -> r[j] lane i.
SL_INLINE void transpose(V* r) {
  V t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // 4x4 blocks, one per 128-bit lane
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Lane u of the result is the sum of r[u]'s lanes; every lane is summed in the same order, wherever it stands.
SL_INLINE V row_sums(const V* r) {
  V a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    a[i] = add(_mm512_shuffle_f32x4(r[i], r[i + 8], 0x44), _mm512_shuffle_f32x4(r[i], r[i + 8], 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  }
  const V c = add(_mm512_unpacklo_ps(b[0], b[2]), _mm512_unpackhi_ps(b[0], b[2]));
  const V d = add(_mm512_unpacklo_ps(b[1], b[3]), _mm512_unpackhi_ps(b[1], b[3]));
  const V e = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_shuffle_f32x4(e, e, _MM_SHUFFLE(3, 1, 2, 0));
}

#elif defined(SL_ISA_AVX2)

constexpr int kWidth = 8;
constexpr int kMaxTile = 4;  // 16 registers
using V = __m256;
SL_INLINE V zero() { return _mm256_setzero_ps(); }
SL_INLINE V set1(float v) { return _mm256_set1_ps(v); }
SL_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
SL_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
SL_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SL_INLINE V load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
SL_INLINE void store(float* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }
SL_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
SL_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
SL_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
SL_INLINE V once(V v) {
  asm("" : "+x"(v));
  return v;
}
SL_INLINE void set4(const float* v, V* w) {
  for (int u = 0; u < 4; u++) w[u] = set1(v[u]);
}
SL_INLINE V relu(V v) { return _mm256_max_ps(zero(), v); }
SL_INLINE V relu_gradient(V y, V grad) { return _mm256_andnot_ps(_mm256_cmp_ps(y, zero(), _CMP_LE_OQ), grad); }

SL_INLINE void transpose(V* r) {
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  V s[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    s[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    s[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    s[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    s[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(s[i], s[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(s[i], s[4 + i], 0x31);
  }
}

SL_INLINE V row_sums(const V* r) {
  const V a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const V b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#else  // any CPU: the compiler's own vectors

constexpr int kWidth = 4;
constexpr int kMaxTile = 4;
typedef float V __attribute__((vector_size(16)));
SL_INLINE V zero() { return V{0, 0, 0, 0}; }
SL_INLINE V set1(float v) { return V{v, v, v, v}; }
SL_INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
SL_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
SL_INLINE V load(const float* p, int n) {
  V v = zero();
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
SL_INLINE void store(float* p, V v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}
SL_INLINE V add(V a, V b) { return a + b; }
SL_INLINE V mul(V a, V b) { return a * b; }
SL_INLINE V fma(V a, V b, V c) { return a * b + c; }
SL_INLINE V once(V v) { return v; }
SL_INLINE void set4(const float* v, V* w) {
  for (int u = 0; u < 4; u++) w[u] = set1(v[u]);
}
SL_INLINE V relu(V v) { return v <= zero() ? zero() : v; }
SL_INLINE V relu_gradient(V y, V grad) { return y <= zero() ? zero() : grad; }

SL_INLINE void transpose(V* r) {
  const V a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; i++) r[i] = V{a[i], b[i], c[i], d[i]};
}

SL_INLINE V row_sums(const V* r) {
  V v;
  for (int i = 0; i < 4; i++) v[i] = (r[i][0] + r[i][2]) + (r[i][1] + r[i][3]);
  return v;
}

#endif

}  // namespace sl::cpu::SL_ISA
