// A batch between row-major and tiles of [feature][T * kWidth], for *_simd.cpp files.
#pragma once
#include "simd.h"

namespace sl::cpu::SL_ISA {
namespace {

SL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

}  // namespace
}  // namespace sl::cpu::SL_ISA
