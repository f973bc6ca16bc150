// The inner loops of packed, once per instruction set. A run is `columns` consecutive weights of one row, from a word's
// first bit on; `values` points to the first survivor of the run. No more is read or written than the run's own.
#pragma once
#include <cstdint>

#define SL_DECLARE(isa)                                                                                               \
  namespace sl::cpu::isa {                                                                                            \
  void packed_expand_run(const void* values, int64_t item_size, const uint32_t* words, int64_t columns, void* dense); \
  void packed_gather_run(const void* dense, int64_t item_size, const uint32_t* words, int64_t columns, void* values); \
  }
SL_DECLARE(avx512)
SL_DECLARE(avx2)
SL_DECLARE(portable)
#undef SL_DECLARE
