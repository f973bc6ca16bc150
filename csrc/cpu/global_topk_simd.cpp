#include "global_topk_simd.h"

#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
#include <immintrin.h>
#endif

namespace sl::cpu::SL_ISA {
namespace {

inline int64_t popcount(uint32_t bits) {
#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX2)
  return __builtin_popcount(bits);
#else
  // Without the instruction the builtin is a call.
  bits -= (bits >> 1) & 0x55555555u;
  bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
  return ((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
#endif
}

// The comparisons of 32 keys as bits, and the largest magnitude so far.
struct Bits {
  uint32_t over_high, over_low, from_low;
};

// Lanes<Key, kDType, kByValue>: word() compares the next 32 weights. The general one takes them one by one.
template <class Key, DType kDType, bool kByValue>
struct Lanes {
  Key low, high, largest = 0;
  Lanes(Key low, Key high) : low(low), high(high) {}

  Bits word(const void* data, int64_t first) {
    Bits bits = {0, 0, 0};
    for (int i = 0; i < 32; i++) {
      Key sign;
      const Key magnitude = magnitude_at(data, kDType, first + i, &sign);
      const Key key = kByValue ? (magnitude ^ sign) - sign : magnitude;
      largest = magnitude > largest ? magnitude : largest;
      bits.over_high |= static_cast<uint32_t>(key > high) << i;
      bits.over_low |= static_cast<uint32_t>(key > low) << i;
      bits.from_low |= static_cast<uint32_t>(key >= low) << i;
    }
    return bits;
  }
  Key largest_magnitude() const { return largest; }
};

#if defined(SL_ISA_AVX512)

template <DType kDType, bool kByValue>
struct Lanes<int32_t, kDType, kByValue> {
  __m512i low, high, largest = _mm512_setzero_si512();
  Lanes(int32_t low, int32_t high) : low(_mm512_set1_epi32(low)), high(_mm512_set1_epi32(high)) {}

  static __m512i load(const void* data, int64_t i) {
    if constexpr (kDType == DType::kFloat32) return _mm512_loadu_si512(static_cast<const char*>(data) + 4 * i);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(data) + 2 * i));
    if constexpr (kDType == DType::kBFloat16)
      return _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
    else
      return _mm512_castps_si512(_mm512_maskz_cvtph_ps(0xffff, half));
  }
  Bits word(const void* data, int64_t first) {
    Bits bits = {0, 0, 0};
    for (int part = 0; part < 2; part++) {
      const __m512i v = load(data, first + 16 * part);
      const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff));
      const __m512i sign = _mm512_maskz_srai_epi32(0xffff, v, 31);
      const __m512i key = kByValue ? _mm512_sub_epi32(_mm512_xor_si512(magnitude, sign), sign) : magnitude;
      largest = _mm512_maskz_max_epi32(0xffff, largest, magnitude);
      bits.over_high |= static_cast<uint32_t>(_mm512_cmpgt_epi32_mask(key, high)) << (16 * part);
      bits.over_low |= static_cast<uint32_t>(_mm512_cmpgt_epi32_mask(key, low)) << (16 * part);
      bits.from_low |= static_cast<uint32_t>(_mm512_cmpge_epi32_mask(key, low)) << (16 * part);
    }
    return bits;
  }
  int32_t largest_magnitude() const {
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, largest);
    int32_t found = 0;
    for (int32_t lane : lanes) found = lane > found ? lane : found;
    return found;
  }
};

template <bool kByValue>
struct Lanes<int64_t, DType::kFloat64, kByValue> {
  __m512i low, high, largest = _mm512_setzero_si512();
  Lanes(int64_t low, int64_t high) : low(_mm512_set1_epi64(low)), high(_mm512_set1_epi64(high)) {}

  Bits word(const void* data, int64_t first) {
    Bits bits = {0, 0, 0};
    for (int part = 0; part < 4; part++) {
      const __m512i v = _mm512_loadu_si512(static_cast<const char*>(data) + 8 * (first + 8 * part));
      const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi64(INT64_MAX));
      const __m512i sign = _mm512_maskz_srai_epi64(0xff, v, 63);
      const __m512i key = kByValue ? _mm512_sub_epi64(_mm512_xor_si512(magnitude, sign), sign) : magnitude;
      largest = _mm512_maskz_max_epi64(0xff, largest, magnitude);
      bits.over_high |= static_cast<uint32_t>(_mm512_cmpgt_epi64_mask(key, high)) << (8 * part);
      bits.over_low |= static_cast<uint32_t>(_mm512_cmpgt_epi64_mask(key, low)) << (8 * part);
      bits.from_low |= static_cast<uint32_t>(_mm512_cmpge_epi64_mask(key, low)) << (8 * part);
    }
    return bits;
  }
  int64_t largest_magnitude() const {
    alignas(64) int64_t lanes[8];
    _mm512_store_si512(lanes, largest);
    int64_t found = 0;
    for (int64_t lane : lanes) found = lane > found ? lane : found;
    return found;
  }
};

#elif defined(SL_ISA_AVX2)

template <DType kDType, bool kByValue>
struct Lanes<int32_t, kDType, kByValue> {
  __m256i low, high, largest = _mm256_setzero_si256();
  Lanes(int32_t low, int32_t high) : low(_mm256_set1_epi32(low)), high(_mm256_set1_epi32(high)) {}

  static __m256i load(const void* data, int64_t i) {
    const char* p = static_cast<const char*>(data);
    if constexpr (kDType == DType::kFloat32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4 * i));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i));
    if constexpr (kDType == DType::kBFloat16)
      return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    else
      return _mm256_castps_si256(_mm256_cvtph_ps(half));
  }
  static uint32_t signs(__m256i v) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v))); }
  Bits word(const void* data, int64_t first) {
    Bits bits = {0, 0, 0};
    for (int part = 0; part < 4; part++) {
      const __m256i v = load(data, first + 8 * part);
      const __m256i magnitude = _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff));
      const __m256i sign = _mm256_srai_epi32(v, 31);
      const __m256i key = kByValue ? _mm256_sub_epi32(_mm256_xor_si256(magnitude, sign), sign) : magnitude;
      const __m256i over_low = _mm256_cmpgt_epi32(key, low);
      largest = _mm256_max_epi32(largest, magnitude);
      bits.over_high |= signs(_mm256_cmpgt_epi32(key, high)) << (8 * part);
      bits.over_low |= signs(over_low) << (8 * part);
      bits.from_low |= signs(_mm256_or_si256(over_low, _mm256_cmpeq_epi32(key, low))) << (8 * part);
    }
    return bits;
  }
  int32_t largest_magnitude() const {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
    int32_t found = 0;
    for (int32_t lane : lanes) found = lane > found ? lane : found;
    return found;
  }
};

#endif

template <class Key, DType kDType, bool kByValue>
ScanCounts<Key> scan(const void* data, int64_t words, const uint32_t* allowed, Key low, Key high, uint32_t* above,
                     uint32_t* candidates) {
  Lanes<Key, kDType, kByValue> lanes(low, high);
  ScanCounts<Key> counts = {0, 0, 0, 0};
  for (int64_t w = 0; w < words; w++) {
    const Bits bits = lanes.word(data, 32 * w);
    const uint32_t mine = allowed ? allowed[w] : ~0u;
    const uint32_t top = bits.over_high & mine, middle = bits.over_low & ~bits.over_high & mine;
    above[w] = top;
    candidates[w] = middle;
    counts.above += popcount(top);
    counts.candidates += popcount(middle);
    counts.ties += popcount(bits.from_low & ~bits.over_low & mine);
  }
  counts.largest = lanes.largest_magnitude();
  return counts;
}

}  // namespace

#define SL_SCAN(key, dtype)                                                                      \
  case dtype:                                                                                    \
    return by_value ? scan<key, dtype, true>(data, words, allowed, low, high, above, candidates) \
                    : scan<key, dtype, false>(data, words, allowed, low, high, above, candidates);

ScanCounts<int32_t> topk_scan(const void* data, DType dtype, bool by_value, int64_t words, const uint32_t* allowed,
                              int32_t low, int32_t high, uint32_t* above, uint32_t* candidates) {
  switch (dtype) {
    SL_SCAN(int32_t, DType::kFloat32)
    SL_SCAN(int32_t, DType::kFloat16)
    SL_SCAN(int32_t, DType::kBFloat16)
    default:
      return {0, 0, 0, 0};  // float64 has 64-bit keys
  }
}

ScanCounts<int64_t> topk_scan(const void* data, DType dtype, bool by_value, int64_t words, const uint32_t* allowed,
                              int64_t low, int64_t high, uint32_t* above, uint32_t* candidates) {
  switch (dtype) {
    SL_SCAN(int64_t, DType::kFloat64)
    SL_SCAN(int64_t, DType::kFloat32)
    SL_SCAN(int64_t, DType::kFloat16)
    SL_SCAN(int64_t, DType::kBFloat16)
    default:
      return {0, 0, 0, 0};
  }
}

}  // namespace sl::cpu::SL_ISA
