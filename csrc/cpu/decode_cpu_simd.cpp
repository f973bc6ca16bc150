// The loops of decode_cpu, compiled once per instruction set. A slice is computed by one thread, in an order that does
// not depend on how many there are.
#include "decode_cpu_simd.h"

#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // as in simd.h
#endif

namespace sl::cpu::SL_ISA {
namespace {

SL_INLINE float widen(const float* p) { return *p; }
SL_INLINE float widen(const uint16_t* p) {
  const uint32_t bits = (uint32_t)*p << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Where a slice in the form of slots lies.
template <class T>
struct Slots {
  const int32_t* line;
  const uint8_t* steps;
  const uint8_t* codes;
  const T* values;
  const uint8_t* over_codes;
  const T* over_values;
  int64_t over;

  Slots(const DecodeArgs& a, int64_t slice) : line(a.starts + slice * kSlotStarts) {
    const int64_t header = (a.slices * a.blocks + 63) / 64 * 64, total = a.starts[a.slices * kSlotStarts];
    const T* all = (const T*)a.values;
    steps = a.codes + slice * a.blocks;
    codes = a.codes + header + line[0] * kSlotRows;
    values = all + line[0] * kSlotRows;
    over_codes = a.codes + header + total * kSlotRows + line[1] * (int64_t)sizeof(uint32_t);
    over_values = all + total * kSlotRows + line[1];
    over = line[kSlotStarts + 1] - line[1];
  }

  // Adds the overflow to what the slots gave, place by place, and writes the slice of one sample's y.
  SL_INLINE void finish(const DecodeArgs& a, int64_t sample, float* sum) const {
    const float* x = a.x + sample * a.x_stride;
    for (int64_t k = 0; k < over; k++) {
      uint32_t code;
      memcpy(&code, over_codes + k * sizeof code, sizeof code);
      sum[code % kSlotRows] += widen(over_values + k) * x[code / kSlotRows];
    }
    float* y = a.y + sample * a.rows;
    for (int64_t i = 0; i < kSlotRows; i++) {
      const int32_t row = line[2 + i];
      if (row >= 0) y[row] = a.bias != nullptr ? a.bias[row] + sum[i] : sum[i];
    }
  }
};

void write_mask_rows(const DecodeArgs& a, int64_t slice, int64_t sample, const float* sums) {
  const int64_t first = slice * kMaskRows;
  for (int64_t i = 0; i < kMaskRows && first + i < a.rows; i++) {
    a.y[sample * a.rows + first + i] = a.bias != nullptr ? a.bias[first + i] + sums[i] : sums[i];
  }
}

#if defined(SL_ISA_AVX512)

constexpr bool kPlanes = true;
constexpr int kSamples = 4;      // that walk a slice of slots together
constexpr int kMaskSamples = 2;  // and one of bits

SL_INLINE V widen_all(const float* p) { return load(p); }
SL_INLINE V widen_all(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// The 64 floats of a block as 64 low and 64 high halves, two registers each: one permutation of 16-bit lanes then
// gives a half of 32 of them.
struct Block {
  __m512i low[2], high[2];
  SL_INLINE void take(const uint16_t* planes, int64_t columns) {
    low[0] = _mm512_loadu_si512(planes);
    low[1] = _mm512_loadu_si512(planes + 32);
    high[0] = _mm512_loadu_si512(planes + columns);
    high[1] = _mm512_loadu_si512(planes + columns + 32);
  }
  SL_INLINE __m512i low_at(__m512i at) const { return _mm512_permutex2var_epi16(low[0], at, low[1]); }
  SL_INLINE __m512i high_at(__m512i at) const { return _mm512_permutex2var_epi16(high[0], at, high[1]); }
};

void split(const float* x, int64_t columns, uint16_t* planes) {
  for (int64_t j = 0; j < columns; j += 16) {
    const __m512i bits = _mm512_loadu_si512(x + j);
    _mm256_storeu_si256((__m256i*)(planes + j), _mm512_cvtepi32_epi16(bits));
    _mm256_storeu_si256((__m256i*)(planes + columns + j), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
}

// The steps of one block: x of its places, or of those of two blocks by bit 6 of the code.
template <bool WINDOWS, class T>
SL_INLINE void walk(const uint8_t* c, const T* v, int64_t steps, const Block& even, const Block& odd, V* sum) {
  for (int64_t i = 0; i < steps; i++, c += kSlotRows, v += kSlotRows) {
    const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)c));
    __m512i low = even.low_at(at), high = even.high_at(at);
    if (WINDOWS) {
      const __mmask32 is_odd = _mm512_test_epi16_mask(at, _mm512_set1_epi16(kDecodeBlock));
      low = _mm512_mask_blend_epi16(is_odd, low, odd.low_at(at));
      high = _mm512_mask_blend_epi16(is_odd, high, odd.high_at(at));
    }
    sum[0] = fma(_mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high)), widen_all(v), sum[0]);
    sum[1] = fma(_mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high)), widen_all(v + 16), sum[1]);
  }
}

template <int B, bool WINDOWS, class T>
void slots_of(const DecodeArgs& a, int64_t slice, int64_t sample) {
  const Slots<T> m(a, slice);
  const int64_t columns = a.blocks * kDecodeBlock;
  const uint8_t* codes = m.codes;
  const T* values = m.values;
  V sum[B][2];
#pragma GCC unroll 4
  for (int j = 0; j < B; j++) sum[j][0] = sum[j][1] = zero();
  Block x[2];  // of the even and the odd block
  if (WINDOWS && a.blocks > 0) x[0].take(a.planes + sample * 2 * columns, columns);
  // The parity as a constant, or the compiler keeps both blocks in memory.
  const auto block = [&](int64_t b, int parity) __attribute__((always_inline)) {
    const int64_t steps = m.steps[b];
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) {
      const uint16_t* planes = a.planes + (sample + j) * 2 * columns + b * kDecodeBlock;
      if (!WINDOWS) {
        x[0].take(planes, columns);
      } else {
        if (B > 1) x[parity].take(planes, columns);
        if (b + 1 < a.blocks) x[1 - parity].take(planes + kDecodeBlock, columns);
      }
      walk<WINDOWS>(codes, values, steps, x[0], x[1], sum[j]);
    }
    codes += steps * kSlotRows;
    values += steps * kSlotRows;
  };
  int64_t b = 0;
  for (; b + 1 < a.blocks; b += 2) {
    block(b, 0);
    block(b + 1, 1);
  }
  if (b < a.blocks) block(b, 0);
#pragma GCC unroll 4
  for (int j = 0; j < B; j++) {
    alignas(64) float sums[kSlotRows];
    store(sums, sum[j][0]);
    store(sums + 16, sum[j][1]);
    m.finish(a, sample + j, sums);
  }
}

// The next values under the 16 lowest bits. Loaded first and then spread: expanding out of memory is slow on Zen.
template <class T>
SL_INLINE V spread(uint64_t bits, const T* next) {
  V v = widen_all(next);
  asm("" : "+v"(v));
  return _mm512_maskz_expand_ps((__mmask16)bits, v);
}

template <int B, class T>
void bitmask_of(const DecodeArgs& a, int64_t slice, int64_t sample) {
  const uint8_t* codes = a.codes + slice * a.blocks * kMaskRows * (int64_t)sizeof(uint64_t);
  const T* next = (const T*)a.values + a.starts[slice];
  V sum[B][kMaskRows];
#pragma GCC unroll 2
  for (int j = 0; j < B; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < kMaskRows; i++) sum[j][i] = zero();
  }
  for (int64_t b = 0; b < a.blocks; b++, codes += kMaskRows * sizeof(uint64_t)) {
    V x[B][4];
#pragma GCC unroll 2
    for (int j = 0; j < B; j++) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) x[j][q] = load(a.x + (sample + j) * a.x_stride + b * kDecodeBlock + q * 16);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kMaskRows; i++) {
      uint64_t bits;
      memcpy(&bits, codes + i * sizeof bits, sizeof bits);
      // One addition is all that the next row waits for.
      const V v[4] = {spread(bits, next), spread(bits >> 16, next + _mm_popcnt_u64(bits & 0xffff)),
                      spread(bits >> 32, next + _mm_popcnt_u64(bits & 0xffffffff)),
                      spread(bits >> 48, next + _mm_popcnt_u64(bits & 0xffffffffffff))};
      next += _mm_popcnt_u64(bits);
#pragma GCC unroll 2
      for (int j = 0; j < B; j++) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) sum[j][i] = fma(v[q], x[j][q], sum[j][i]);
      }
    }
  }
  V r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = i < B * kMaskRows ? sum[i / kMaskRows % B][i % kMaskRows] : zero();
  alignas(64) float sums[16];
  store(sums, row_sums(r));
  for (int j = 0; j < B; j++) write_mask_rows(a, slice, sample + j, sums + j * kMaskRows);
}

#elif defined(SL_ISA_AVX2)

constexpr bool kPlanes = false;
constexpr int kSamples = 1, kMaskSamples = 1;

SL_INLINE V widen_all(const float* p) { return load(p); }
SL_INLINE V widen_all(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

SL_INLINE void split(const float*, int64_t, uint16_t*) {}

// x at the four columns of four codes, by loads of one element each.
SL_INLINE __m128 pick(const float* x, const uint8_t* codes, uint32_t flip) {
  uint32_t at;
  memcpy(&at, codes, sizeof at);
  at = (at ^ flip) & 0x7f7f7f7f;  // an empty slot: any column, its value is 0
  __m128 v = _mm_load_ss(x + (uint8_t)at);
  v = _mm_insert_ps(v, _mm_load_ss(x + (uint8_t)(at >> 8)), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(x + (uint8_t)(at >> 16)), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(x + (at >> 24)), 0x30);
}

template <int B, bool WINDOWS, class T>
void slots_of(const DecodeArgs& a, int64_t slice, int64_t sample) {
  const Slots<T> m(a, slice);
  const uint8_t* c = m.codes;
  const T* v = m.values;
  const float* x = a.x + sample * a.x_stride;
  V sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t b = 0; b < a.blocks; b++, x += kDecodeBlock) {
    const uint32_t flip = WINDOWS && b % 2 != 0 ? 0x40404040 : 0;  // columns from the first of this block on
    for (int64_t i = 0; i < m.steps[b]; i++, c += kSlotRows, v += kSlotRows) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {  // places 8 g on: slot_lane(8 g), and 8 lanes further
        const uint8_t* at = c + g % 2 * 16 + g / 2 * 4;
        const V picked = _mm256_insertf128_ps(_mm256_castps128_ps256(pick(x, at, flip)), pick(x, at + 8, flip), 1);
        sum[g] = fma(picked, widen_all(v + 8 * g), sum[g]);
      }
    }
  }
  alignas(32) float sums[kSlotRows];
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) store(sums + 8 * g, sum[g]);
  m.finish(a, sample, sums);
}

// For each byte of a mask: which of the next values goes to each lane, with the sign bit set; 0 where none does.
struct SpreadTable {
  alignas(32) int32_t lanes[256][8];
  constexpr SpreadTable() : lanes() {
    for (int bits = 0; bits < 256; bits++) {
      for (int i = 0, n = 0; i < 8; i++) lanes[bits][i] = bits >> i & 1 ? (-0x7fffffff - 1) + n++ : 0;
    }
  }
};
constexpr SpreadTable kSpread;

template <class T>
SL_INLINE V spread(uint64_t bits, const T* next) {
  const __m256i lanes = _mm256_load_si256((const __m256i*)kSpread.lanes[(uint8_t)bits]);
  return _mm256_blendv_ps(zero(), _mm256_permutevar8x32_ps(widen_all(next), lanes), _mm256_castsi256_ps(lanes));
}

template <int B, class T>
void bitmask_of(const DecodeArgs& a, int64_t slice, int64_t sample) {
  const uint8_t* codes = a.codes + slice * a.blocks * kMaskRows * (int64_t)sizeof(uint64_t);
  const T* next = (const T*)a.values + a.starts[slice];
  const float* x = a.x + sample * a.x_stride;
  V sum[kMaskRows];
#pragma GCC unroll 8
  for (int i = 0; i < kMaskRows; i++) sum[i] = zero();
  for (int64_t b = 0; b < a.blocks; b++, codes += kMaskRows * sizeof(uint64_t), x += kDecodeBlock) {
#pragma GCC unroll 8
    for (int i = 0; i < kMaskRows; i++) {
      uint64_t bits;
      memcpy(&bits, codes + i * sizeof bits, sizeof bits);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {  // one addition is all that the next row waits for
        const int64_t before = _mm_popcnt_u64(bits & ((uint64_t{1} << 8 * q) - 1));
        sum[i] = fma(spread(bits >> 8 * q, next + before), load(x + 8 * q), sum[i]);
      }
      next += _mm_popcnt_u64(bits);
    }
  }
  alignas(32) float sums[kMaskRows];
  store(sums, row_sums(sum));
  write_mask_rows(a, slice, sample, sums);
}

#else

constexpr bool kPlanes = false;
constexpr int kSamples = 1, kMaskSamples = 1;

SL_INLINE void split(const float*, int64_t, uint16_t*) {}

template <int B, bool WINDOWS, class T>
void slots_of(const DecodeArgs& a, int64_t slice, int64_t sample) {
  const Slots<T> m(a, slice);
  const uint8_t* c = m.codes;
  const T* v = m.values;
  const float* x = a.x + sample * a.x_stride;
  float sums[kSlotRows] = {};
  for (int64_t b = 0; b < a.blocks; b++, x += kDecodeBlock) {
    const int flip = WINDOWS && b % 2 != 0 ? kDecodeBlock : 0;  // columns from the first of this block on
    for (int64_t i = 0; i < m.steps[b]; i++, c += kSlotRows, v += kSlotRows) {
#pragma GCC unroll 32
      for (int64_t p = 0; p < kSlotRows; p++) sums[p] += widen(v + p) * x[(c[slot_lane(p)] ^ flip) % kEmptySlot];
    }
  }
  m.finish(a, sample, sums);
}

template <int B, class T>
void bitmask_of(const DecodeArgs& a, int64_t slice, int64_t sample) {
  const uint8_t* codes = a.codes + slice * a.blocks * kMaskRows * (int64_t)sizeof(uint64_t);
  const T* next = (const T*)a.values + a.starts[slice];
  const float* x = a.x + sample * a.x_stride;
  float sums[kMaskRows] = {};
  for (int64_t b = 0; b < a.blocks; b++, x += kDecodeBlock) {
    for (int64_t i = 0; i < kMaskRows; i++, codes += sizeof(uint64_t)) {
      uint64_t bits;
      memcpy(&bits, codes, sizeof bits);
      for (; bits != 0; bits &= bits - 1) sums[i] += widen(next++) * x[__builtin_ctzll(bits)];
    }
  }
  write_mask_rows(a, slice, sample, sums);
}

#endif

// A slice for the whole batch, several samples at a time: the others find it in the second-level cache.
template <bool WINDOWS, class T>
void slots(const DecodeArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t slice = 0; slice < a.slices; slice++) {
    int64_t sample = 0;
    for (; sample + kSamples <= a.batch; sample += kSamples) slots_of<kSamples, WINDOWS, T>(a, slice, sample);
    for (; sample < a.batch; sample++) slots_of<1, WINDOWS, T>(a, slice, sample);
  }
}

template <class T>
void bitmask(const DecodeArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1)
  for (int64_t slice = 0; slice < a.slices; slice++) {
    int64_t sample = 0;
    for (; sample + kMaskSamples <= a.batch; sample += kMaskSamples) bitmask_of<kMaskSamples, T>(a, slice, sample);
    for (; sample < a.batch; sample++) bitmask_of<1, T>(a, slice, sample);
  }
}

}  // namespace

bool decode_planes() { return kPlanes; }

void decode_slots(const DecodeArgs& a) {
  for (int64_t i = 0; kPlanes && i < a.batch; i++) {
    split(a.x + i * a.x_stride, a.blocks * kDecodeBlock, a.planes + i * 2 * a.blocks * kDecodeBlock);
  }
  if (a.windows) {
    a.half ? slots<true, uint16_t>(a) : slots<true, float>(a);
  } else {
    a.half ? slots<false, uint16_t>(a) : slots<false, float>(a);
  }
}

void decode_bitmask(const DecodeArgs& a) { a.half ? bitmask<uint16_t>(a) : bitmask<float>(a); }

}  // namespace sl::cpu::SL_ISA
