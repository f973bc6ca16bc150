// Packed parameters: the survivors' values in the row-major order of the mask <-> the dense weight. Rows of the mask
// are padded to whole words (common.h); only item_size (2, 4 or 8 bytes) is asked of the dtype.
#pragma once
#include <cstdint>

namespace sl::cpu {

// values [count] -> dense [rows, columns], contiguous; +0 where the mask is 0, every element is written. Throws
// std::invalid_argument, before anything is written, where the mask does not keep `count` weights.
void packed_expand(const void* values, int64_t count, int64_t item_size, const uint32_t* words, int64_t rows,
                   int64_t columns, void* dense);

// The way back: only survivors are read. sizes and strides (in elements) as in bitmask_apply. Throws as above.
void packed_gather(const void* dense, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                   const int64_t* strides, void* values, int64_t count);

}  // namespace sl::cpu

namespace sl::cuda {

constexpr int64_t kPackedTile = 32;  // words whose first survivor has its place noted

// counts[i] = how many weights the words [32 i, 32 i + 32) keep; counts has ceil(words / 32) elements.
void packed_counts(const uint32_t* words, int64_t count, int64_t* counts, void* stream);

// As on the CPU, on device memory, asynchronous on `stream`. offsets[i]: the place of the first survivor of the words
// from 32 i on. Neither reads nor writes values past `count`, whatever the offsets say. sizes and strides are host
// memory, read before the call returns; at most 8 dims.
void packed_expand(const void* values, int64_t count, int64_t item_size, const uint32_t* words, const int64_t* offsets,
                   int64_t rows, int64_t columns, void* dense, void* stream);
void packed_gather(const void* dense, int64_t item_size, const uint32_t* words, const int64_t* offsets, int64_t dims,
                   const int64_t* sizes, const int64_t* strides, void* values, int64_t count, void* stream);

}  // namespace sl::cuda
