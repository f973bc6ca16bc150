// Sums over the lanes of four vectors at once, for *_simd.cpp files: no ring in memory between the products of four
// survivors and their sums.
#pragma once
#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
using Quad = __m128;
SL_INLINE Quad load_quad(const float* p) { return _mm_loadu_ps(p); }
SL_INLINE void store_quad(float* p, Quad q) { _mm_storeu_ps(p, q); }
SL_INLINE Quad add_quads(Quad a, Quad b) { return _mm_add_ps(a, b); }
#else
using Quad = V;
SL_INLINE Quad load_quad(const float* p) { return load(p); }
SL_INLINE void store_quad(float* p, Quad q) { store(p, q); }
SL_INLINE Quad add_quads(Quad a, Quad b) { return add(a, b); }
#endif

// Element u is the sum of r[u]'s lanes; every vector's lanes are summed in the same order.
SL_INLINE Quad quad_sums(const V* r) {
#if defined(SL_ISA_AVX512)
  // Halves: a blend takes a place from either, so that one shuffle does for two vectors. [a b] means a's lower half.
  const V ac = add(_mm512_mask_blend_ps(0xff00, r[0], r[2]), _mm512_shuffle_f32x4(r[0], r[2], 0x4e));
  const V bd = add(_mm512_mask_blend_ps(0xff00, r[1], r[3]), _mm512_shuffle_f32x4(r[1], r[3], 0x4e));
  const V pairs = add(_mm512_unpacklo_ps(ac, bd), _mm512_unpackhi_ps(ac, bd));  // a b a b a b a b c d c d c d c d
  const __m256d low = _mm512_castpd512_pd256(_mm512_castps_pd(pairs));
  const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(pairs), 1);
  const __m256 all = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));  // a b c d a b c d
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#elif defined(SL_ISA_AVX2)
  const V all = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));  // a b c d a b c d
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  return row_sums(r);
#endif
}

}  // namespace
}  // namespace sl::cpu::SL_ISA
