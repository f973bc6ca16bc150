// masked_linear for a batch of one on a CPU, compiled once per instruction set.
#include "masked_linear_simd.h"
#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

void masked_linear_vector(const VectorArgs& a) { return a.gathers ? vector<true>(a) : vector<false>(a); }

}  // namespace sl::cpu::SL_ISA
