#include "bitmask_simd.h"

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
#include <immintrin.h>
#endif

namespace sl::cpu::SL_ISA {
namespace {

// Weights are looked at as integers of their size: +0 is all zero bits, and -0, NaN and inf are not.
typedef uint16_t __attribute__((may_alias)) Bits16;
typedef uint32_t __attribute__((may_alias)) Bits32;
typedef uint64_t __attribute__((may_alias)) Bits64;

inline uint32_t low_bits(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

inline uint32_t pack_word(const uint8_t* dense, int64_t n) {
  uint32_t word = 0;
  for (int64_t i = 0; i < n; i++) word |= static_cast<uint32_t>(dense[i] != 0) << i;
  return word;
}

#if defined(SL_ISA_AVX512)

// Zeros the lanes of `dead`, and writes only if one of them is not +0 yet: after a step that left the pruned weights
// alone no cache line gets dirty. Lanes outside `dead` are not touched, so a run may end anywhere.
inline void clear(Bits16* p, uint32_t dead) {
  const __m512i v = _mm512_maskz_loadu_epi16(dead, p);
  if (_mm512_test_epi16_mask(v, v)) _mm512_mask_storeu_epi16(p, dead, _mm512_setzero_si512());
}
inline void clear(Bits32* p, uint32_t dead) {
  const __mmask16 low = static_cast<__mmask16>(dead), high = static_cast<__mmask16>(dead >> 16);
  const __m512i a = _mm512_maskz_loadu_epi32(low, p), b = _mm512_maskz_loadu_epi32(high, p + 16);
  const __m512i any = _mm512_or_si512(a, b);
  if (_mm512_test_epi32_mask(any, any)) {
    _mm512_mask_storeu_epi32(p, low, _mm512_setzero_si512());
    _mm512_mask_storeu_epi32(p + 16, high, _mm512_setzero_si512());
  }
}
inline void clear(Bits64* p, uint32_t dead) {
  for (int part = 0; part < 4; part++, p += 8, dead >>= 8) {
    const __mmask8 lanes = static_cast<__mmask8>(dead);
    const __m512i v = _mm512_maskz_loadu_epi64(lanes, p);
    if (_mm512_test_epi64_mask(v, v)) _mm512_mask_storeu_epi64(p, lanes, _mm512_setzero_si512());
  }
}

#else

template <class Bits>
inline void clear(Bits* p, uint32_t dead) {
  while (dead) {
    p[__builtin_ctz(dead)] = 0;
    dead &= dead - 1;
  }
}

#endif

template <class Bits>
void apply_run(Bits* p, const uint32_t* words, int64_t columns) {
  const int64_t full = columns / 32;
  for (int64_t w = 0; w < full; w++, p += 32) {
    const uint32_t live = words[w];
    if (live == ~0u) continue;
#if defined(SL_ISA_AVX512)
    clear(p, ~live);
#else
    // Without masked stores, and most of a word dead: rewriting all 32 beats walking the bits (the compiler vectorizes
    // it).
    for (int i = 0; i < 32; i++) p[i] &= static_cast<Bits>(-static_cast<Bits>((live >> i) & 1));
#endif
  }
  if (columns % 32) clear(p, ~words[full] & low_bits(columns % 32));
}

inline int64_t popcount(uint64_t bits) {
#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
  return __builtin_popcountll(bits);
#else
  // Without the instruction the builtin is a call.
  bits -= (bits >> 1) & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + ((bits >> 2) & 0x3333333333333333u);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int64_t>((bits * 0x0101010101010101u) >> 56);
#endif
}

inline uint64_t two(const uint32_t* words) { return words[0] | static_cast<uint64_t>(words[1]) << 32; }

}  // namespace

void bitmask_pack_run(const uint8_t* dense, int64_t columns, uint32_t* words) {
  const int64_t full = columns / 32;
  int64_t w = 0;
#if defined(SL_ISA_AVX512)
  for (; w + 2 <= full; w += 2) {
    const __m512i v = _mm512_loadu_si512(dense + 32 * w);
    const uint64_t bits = _mm512_test_epi8_mask(v, v);
    words[w] = static_cast<uint32_t>(bits);
    words[w + 1] = static_cast<uint32_t>(bits >> 32);
  }
#elif defined(SL_ISA_AVX2)
  for (; w < full; w++) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dense + 32 * w));
    words[w] = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
  }
#endif
  for (; w < full; w++) words[w] = pack_word(dense + 32 * w, 32);
  if (columns % 32) words[full] = pack_word(dense + 32 * full, columns % 32);
}

void bitmask_unpack_run(const uint32_t* words, int64_t columns, uint8_t* dense) {
  const int64_t full = columns / 32;
  int64_t w = 0;
#if defined(SL_ISA_AVX512)
  for (; w + 2 <= full; w += 2) _mm512_storeu_si512(dense + 32 * w, _mm512_maskz_set1_epi8(two(words + w), 1));
#endif
  for (; w < full; w++)
    for (int i = 0; i < 32; i++) dense[32 * w + i] = static_cast<uint8_t>((words[w] >> i) & 1);
  for (int64_t i = 32 * full; i < columns; i++) dense[i] = static_cast<uint8_t>((words[full] >> (i % 32)) & 1);
}

void bitmask_apply_run(void* weights, int64_t item_size, const uint32_t* words, int64_t columns) {
  if (item_size == 2)
    apply_run(static_cast<Bits16*>(weights), words, columns);
  else if (item_size == 4)
    apply_run(static_cast<Bits32*>(weights), words, columns);
  else
    apply_run(static_cast<Bits64*>(weights), words, columns);
}

int64_t bitmask_count_run(const uint32_t* words, int64_t count) {
  int64_t total = 0, i = 0;
  for (; i + 2 <= count; i += 2) total += popcount(two(words + i));
  return i < count ? total + popcount(words[i]) : total;
}

int64_t bitmask_hamming_run(const uint32_t* a, const uint32_t* b, int64_t count) {
  int64_t total = 0, i = 0;
  for (; i + 2 <= count; i += 2) total += popcount(two(a + i) ^ two(b + i));
  return i < count ? total + popcount(a[i] ^ b[i]) : total;
}

}  // namespace sl::cpu::SL_ISA
