// The inner loops of bitmask, once per instruction set. A run is `columns` consecutive bytes or weights of one row,
// from a word's first bit on.
#pragma once
#include <cstdint>

#define SL_DECLARE(isa)                                                                             \
  namespace sl::cpu::isa {                                                                          \
  void bitmask_pack_run(const uint8_t* dense, int64_t columns, uint32_t* words);                    \
  void bitmask_unpack_run(const uint32_t* words, int64_t columns, uint8_t* dense);                  \
  void bitmask_apply_run(void* weights, int64_t item_size, const uint32_t* words, int64_t columns); \
  int64_t bitmask_count_run(const uint32_t* words, int64_t count);                                  \
  int64_t bitmask_hamming_run(const uint32_t* a, const uint32_t* b, int64_t count);                 \
  }
SL_DECLARE(avx512)
SL_DECLARE(avx2)
SL_DECLARE(portable)
#undef SL_DECLARE
