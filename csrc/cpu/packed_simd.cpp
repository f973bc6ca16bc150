#include "packed_simd.h"

#include <string.h>

#if defined(SL_ISA_AVX512)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm256_undefined_si256, PR 105593
#endif
#endif

namespace sl::cpu::SL_ISA {
namespace {

typedef uint16_t __attribute__((may_alias)) Bits16;
typedef uint32_t __attribute__((may_alias)) Bits32;
typedef uint64_t __attribute__((may_alias)) Bits64;

template <class Bits>
inline const Bits* expand_some(const Bits* values, uint32_t live, Bits* dense, int64_t n) {
  memset(dense, 0, n * sizeof(Bits));
  for (; live != 0; live &= live - 1) dense[__builtin_ctz(live)] = *values++;
  return values;
}

template <class Bits>
inline Bits* gather_some(const Bits* dense, uint32_t live, Bits* values) {
  for (; live != 0; live &= live - 1) *values++ = dense[__builtin_ctz(live)];
  return values;
}

#if defined(SL_ISA_AVX512)

// Values go through masked loads and stores and are moved inside a register: expanding from memory and, above all,
// compressing to memory are microcoded on some CPUs.
inline uint32_t low_bits(int n) { return (1u << n) - 1; }

inline const Bits32* expand_word(const Bits32* values, uint32_t live, Bits32* dense) {
  for (int half = 0; half < 2; half++, live >>= 16, dense += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(live);
    const int n = __builtin_popcount(lanes);
    const __m512i v = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(low_bits(n)), values);
    _mm512_storeu_si512(dense, _mm512_maskz_expand_epi32(lanes, v));
    values += n;
  }
  return values;
}

inline const Bits16* expand_word(const Bits16* values, uint32_t live, Bits16* dense) {
  for (int half = 0; half < 2; half++, live >>= 16, dense += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(live);
    const int n = __builtin_popcount(lanes);
    const __m256i v = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(low_bits(n)), values);
    const __m512i spread = _mm512_maskz_expand_epi32(lanes, _mm512_cvtepu16_epi32(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dense), _mm512_cvtepi32_epi16(spread));
    values += n;
  }
  return values;
}

inline const Bits64* expand_word(const Bits64* values, uint32_t live, Bits64* dense) {
  for (int part = 0; part < 4; part++, live >>= 8, dense += 8) {
    const __mmask8 lanes = static_cast<__mmask8>(live);
    const int n = __builtin_popcount(lanes);
    const __m512i v = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(low_bits(n)), values);
    _mm512_storeu_si512(dense, _mm512_maskz_expand_epi64(lanes, v));
    values += n;
  }
  return values;
}

inline Bits32* gather_word(const Bits32* dense, uint32_t live, Bits32* values) {
  for (int half = 0; half < 2; half++, live >>= 16, dense += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(live);
    const int n = __builtin_popcount(lanes);
    const __m512i v = _mm512_maskz_compress_epi32(lanes, _mm512_maskz_loadu_epi32(lanes, dense));
    _mm512_mask_storeu_epi32(values, static_cast<__mmask16>(low_bits(n)), v);
    values += n;
  }
  return values;
}

inline Bits16* gather_word(const Bits16* dense, uint32_t live, Bits16* values) {
  for (int half = 0; half < 2; half++, live >>= 16, dense += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(live);
    const int n = __builtin_popcount(lanes);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, dense));
    const __m256i v = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(lanes, wide));
    _mm256_mask_storeu_epi16(values, static_cast<__mmask16>(low_bits(n)), v);
    values += n;
  }
  return values;
}

inline Bits64* gather_word(const Bits64* dense, uint32_t live, Bits64* values) {
  for (int part = 0; part < 4; part++, live >>= 8, dense += 8) {
    const __mmask8 lanes = static_cast<__mmask8>(live);
    const int n = __builtin_popcount(lanes);
    const __m512i v = _mm512_maskz_compress_epi64(lanes, _mm512_maskz_loadu_epi64(lanes, dense));
    _mm512_mask_storeu_epi64(values, static_cast<__mmask8>(low_bits(n)), v);
    values += n;
  }
  return values;
}

#else

template <class Bits>
inline const Bits* expand_word(const Bits* values, uint32_t live, Bits* dense) {
  return expand_some(values, live, dense, 32);
}

template <class Bits>
inline Bits* gather_word(const Bits* dense, uint32_t live, Bits* values) {
  return gather_some(dense, live, values);
}

#endif

template <class Bits>
void expand_run(const Bits* values, const uint32_t* words, int64_t columns, Bits* dense) {
  const int64_t full = columns / 32;
  for (int64_t w = 0; w < full; w++, dense += 32) values = expand_word(values, words[w], dense);
  if (columns % 32) expand_some(values, words[full], dense, columns % 32);
}

template <class Bits>
void gather_run(const Bits* dense, const uint32_t* words, int64_t columns, Bits* values) {
  const int64_t full = columns / 32;
  for (int64_t w = 0; w < full; w++, dense += 32) {
    if (words[w] != 0) values = gather_word(dense, words[w], values);
  }
  if (columns % 32) gather_some(dense, words[full], values);
}

}  // namespace

void packed_expand_run(const void* values, int64_t item_size, const uint32_t* words, int64_t columns, void* dense) {
  if (item_size == 2)
    expand_run(static_cast<const Bits16*>(values), words, columns, static_cast<Bits16*>(dense));
  else if (item_size == 4)
    expand_run(static_cast<const Bits32*>(values), words, columns, static_cast<Bits32*>(dense));
  else
    expand_run(static_cast<const Bits64*>(values), words, columns, static_cast<Bits64*>(dense));
}

void packed_gather_run(const void* dense, int64_t item_size, const uint32_t* words, int64_t columns, void* values) {
  if (item_size == 2)
    gather_run(static_cast<const Bits16*>(dense), words, columns, static_cast<Bits16*>(values));
  else if (item_size == 4)
    gather_run(static_cast<const Bits32*>(dense), words, columns, static_cast<Bits32*>(values));
  else
    gather_run(static_cast<const Bits64*>(dense), words, columns, static_cast<Bits64*>(values));
}

}  // namespace sl::cpu::SL_ISA
