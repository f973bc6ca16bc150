// Weights whose neighbouring columns need not be neighbours in memory.
#pragma once
#include "../common.h"
#include "launch.cuh"

namespace sl::cuda {

constexpr int kMaxDims = 8;

// Strides of a weight tensor. `inner` dimensions are sizes[1..dims): columns are split over them.
struct Strides {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];

  __device__ int64_t offset(int64_t row, int64_t column) const {
    int64_t at = row * strides[0];
    for (int d = dims - 1; d > 1; --d) {
      const int64_t outer = column / sizes[d];
      at += (column - outer * sizes[d]) * strides[d];
      column = outer;
    }
    return at + column * strides[1];
  }
};

// Fills `where` and the number of columns; says whether the tensor is contiguous. 2 <= dims <= kMaxDims.
inline bool strides_of(int64_t dims, const int64_t* sizes, const int64_t* strides, Strides& where, int64_t& columns) {
  where = {};
  where.dims = static_cast<int>(dims);
  int64_t dense_stride = 1;
  bool contiguous = true;
  columns = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    where.sizes[d] = sizes[d];
    where.strides[d] = strides[d];
    if (sizes[d] != 1 && strides[d] != dense_stride) contiguous = false;
    dense_stride *= sizes[d];
    if (d > 0) columns *= sizes[d];
  }
  return contiguous;
}

inline Layout layout_of(int64_t rows, int64_t columns) {
  return {columns, words_per_row(columns), rows * words_per_row(columns)};
}

}  // namespace sl::cuda
