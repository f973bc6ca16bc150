// The inner loop of global_topk, once per instruction set, and what a key is.
//
// A key is a signed integer that orders like the weight: its magnitude's bits, negated for negative weights if they are
// ranked by value. So -0 equals +0, and denormals and infinities need no care. float16 and bfloat16 are exact in
// float32, and all of them in float64, so a list of mixed dtypes has 64-bit keys if it holds a float64 and 32-bit keys
// otherwise.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common.h"

namespace sl::cpu {

template <class Key>
struct KeyTraits;
template <>
struct KeyTraits<int32_t> {
  static constexpr int32_t kInfinity = 0x7f800000, kLowest = INT32_MIN, kHighest = INT32_MAX;
};
template <>
struct KeyTraits<int64_t> {
  static constexpr int64_t kInfinity = 0x7ff0000000000000, kLowest = INT64_MIN, kHighest = INT64_MAX;
};

// What one scan finds out beside the words it writes.
template <class Key>
struct ScanCounts {
  int64_t above, candidates, ties;  // how many allowed keys are > high, in (low, high], == low
  Key largest;  // the largest magnitude of all weights, allowed or not: above infinity, there is a NaN
};

// `words` times 32 weights of one dtype, one after the other. allowed: the bits of those that take part, or null for
// all. Writes the bits of those above `high` to `above` and of those in (low, high] to `candidates`.
#define SL_DECLARE(isa)                                                                                               \
  namespace isa {                                                                                                     \
  ScanCounts<int32_t> topk_scan(const void* data, DType dtype, bool by_value, int64_t words, const uint32_t* allowed, \
                                int32_t low, int32_t high, uint32_t* above, uint32_t* candidates);                    \
  ScanCounts<int64_t> topk_scan(const void* data, DType dtype, bool by_value, int64_t words, const uint32_t* allowed, \
                                int64_t low, int64_t high, uint32_t* above, uint32_t* candidates);                    \
  }
SL_DECLARE(avx512)
SL_DECLARE(avx2)
SL_DECLARE(portable)
#undef SL_DECLARE

// The functions below are static: each file that includes them keeps its own copy, compiled for its own instruction
// set.

static inline uint32_t half_to_float_bits(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00) return sign | 0x7f800000u | (rest & 0x3ff) << 13;
  if (rest >= 0x400) return sign | ((rest << 13) + (112u << 23));
  if (rest == 0) return sign;
  const int shift = __builtin_clz(rest) - 21;  // a denormal: normalize it
  return sign | (static_cast<uint32_t>(113 - shift) << 23) | ((rest << (13 + shift)) & 0x7fffffu);
}

static inline uint32_t float_bits_at(const void* data, DType dtype, int64_t i) {
  uint32_t bits;
  uint16_t half;
  if (dtype == DType::kFloat32) {
    std::memcpy(&bits, static_cast<const char*>(data) + 4 * i, 4);
    return bits;
  }
  std::memcpy(&half, static_cast<const char*>(data) + 2 * i, 2);
  return dtype == DType::kFloat16 ? half_to_float_bits(half) : static_cast<uint32_t>(half) << 16;
}

// Integers only, so that a thread that flushes denormals to zero sees them too.
static inline uint64_t float_to_double_bits(uint32_t bits) {
  const uint64_t sign = static_cast<uint64_t>(bits & 0x80000000u) << 32, rest = bits & 0x7fffffffu;
  if (rest >= 0x7f800000u) return sign | 0x7ff0000000000000u | (rest & 0x7fffffu) << 29;
  if (rest >= 0x800000u) return sign | ((rest << 29) + (uint64_t{896} << 52));
  if (rest == 0) return sign;
  const int shift = __builtin_clzll(rest) - 40;
  return sign | (static_cast<uint64_t>(897 - shift) << 52) | ((rest << (29 + shift)) & 0xfffffffffffffu);
}

static inline int32_t magnitude_at(const void* data, DType dtype, int64_t i, int32_t* sign) {
  const uint32_t bits = float_bits_at(data, dtype, i);
  *sign = static_cast<int32_t>(bits) >> 31;
  return static_cast<int32_t>(bits & 0x7fffffffu);
}

static inline int64_t magnitude_at(const void* data, DType dtype, int64_t i, int64_t* sign) {
  uint64_t bits;
  if (dtype == DType::kFloat64)
    std::memcpy(&bits, static_cast<const char*>(data) + 8 * i, 8);
  else
    bits = float_to_double_bits(float_bits_at(data, dtype, i));
  *sign = static_cast<int64_t>(bits) >> 63;
  return static_cast<int64_t>(bits & 0x7fffffffffffffffu);
}

template <class Key>
static inline Key key_at(const void* data, DType dtype, bool by_value, int64_t i) {
  Key sign;
  const Key magnitude = magnitude_at(data, dtype, i, &sign);
  return by_value ? (magnitude ^ sign) - sign : magnitude;
}

}  // namespace sl::cpu
