// Masks of one bit per weight: pack, unpack, count, Hamming distance, apply. Rows are padded to whole words (common.h).
#pragma once
#include <cstdint>

namespace sl::cpu {

// dense [rows, columns] bytes, nonzero = keep -> words [rows, words_per_row(columns)], padding bits 0.
void bitmask_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint32_t* words);

// words -> dense bytes 0 or 1.
void bitmask_unpack(const uint32_t* words, int64_t rows, int64_t columns, uint8_t* dense);

// *out = how many of the bits of `count` words are set; hamming: in how many bits a and b differ.
void bitmask_count(const uint32_t* words, int64_t count, int64_t* out);
void bitmask_hamming(const uint32_t* a, const uint32_t* b, int64_t count, int64_t* out);

// Writes +0 into every weight whose bit is 0; only item_size (2, 4 or 8 bytes) is asked of the dtype, since all of
// their zeros are zero bits. The weight at logical coordinates (i0, i1, ...) lies `strides` (in elements) from
// `weights` and its mask is bit (i1, i2, ... flattened) of row i0; sizes has `dims` >= 2 entries (a vector is sizes {1,
// n}).
void bitmask_apply(void* weights, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                   const int64_t* strides);

}  // namespace sl::cpu

namespace sl::cuda {

// The same on device memory (`out` too), asynchronous on `stream`.
void bitmask_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint32_t* words, void* stream);
void bitmask_unpack(const uint32_t* words, int64_t rows, int64_t columns, uint8_t* dense, void* stream);
void bitmask_count(const uint32_t* words, int64_t count, int64_t* out, void* stream);
void bitmask_hamming(const uint32_t* a, const uint32_t* b, int64_t count, int64_t* out, void* stream);
// sizes and strides are host memory, read before the call returns; at most 8 dims.
void bitmask_apply(void* weights, int64_t item_size, const uint32_t* words, int64_t dims, const int64_t* sizes,
                   const int64_t* strides, void* stream);

}  // namespace sl::cuda
