// The loops of decode_cpu, once per instruction set; formats: decode_cpu.h.
#pragma once
#include <cstdint>

namespace sl::cpu {

constexpr int64_t kDecodeBlock = 64;
constexpr int64_t kSlotRows = 32;
constexpr int64_t kSlotStarts = kSlotRows + 2;
constexpr int64_t kMaskRows = 8;
constexpr int64_t kMaskPad = 16;
constexpr uint8_t kEmptySlot = 128;

// Where the byte of a place stands in a step: two 16-bit permutations, interleaved, then give places 0-15 and 16-31.
inline int64_t slot_lane(int64_t place) { return place % 16 / 4 * 8 + place / 16 * 4 + place % 4; }

struct DecodeArgs {
  int64_t rows, columns, slices, blocks, batch;
  const int32_t* starts;
  const uint8_t* codes;
  const void* values;
  bool half;       // values are bfloat16
  bool windows;    // decode_slots: in the form of windows
  const float* x;  // [batch, x_stride]: whole blocks, zeros past the columns
  int64_t x_stride;
  uint16_t* planes;   // [batch, 2, blocks * 64] for the low and high halves of x, where decode_planes() asks for them
  const float* bias;  // may be null
  float* y;           // [batch, rows]
  int threads;
};

}  // namespace sl::cpu

#define SL_DECLARE(isa)                     \
  namespace sl::cpu::isa {                  \
  bool decode_planes();                     \
  void decode_slots(const DecodeArgs& a);   \
  void decode_bitmask(const DecodeArgs& a); \
  }
SL_DECLARE(avx512)
SL_DECLARE(avx2)
SL_DECLARE(portable)
#undef SL_DECLARE
