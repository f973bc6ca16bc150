// 16-bit floats as bits: widening, and rounding to nearest even. The same on the host, so that tests can run it.
#pragma once
#include <cstdint>

#include "../common.h"
#include "launch.cuh"

namespace sl::cuda {
namespace {

// Bits of the float with the number of a float16.
__device__ inline uint32_t half_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return __float_as_uint(f);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 1023u;
  if (exponent == 31) return sign | 0x7f800000u | mantissa << 13;
  if (exponent != 0) return sign | (exponent + 112) << 23 | mantissa << 13;
  return sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f);
#endif
}

__device__ inline uint16_t float_to_half(float f) {
#ifdef __CUDA_ARCH__
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  const uint32_t bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the number, in units of 2^-24, in the low bits
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

__device__ inline uint16_t float_to_bfloat(float f) {
  const uint32_t bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <DType D>
__device__ float low_half(uint32_t pair) {
  return __uint_as_float(D == DType::kBFloat16 ? pair << 16 : half_to_float(static_cast<uint16_t>(pair)));
}

template <DType D>
__device__ float high_half(uint32_t pair) {
  return __uint_as_float(D == DType::kBFloat16 ? pair & 0xffff0000u : half_to_float(static_cast<uint16_t>(pair >> 16)));
}

template <DType D>
__device__ uint16_t to_half(float f) {
  return D == DType::kBFloat16 ? float_to_bfloat(f) : float_to_half(f);
}

}  // namespace
}  // namespace sl::cuda
