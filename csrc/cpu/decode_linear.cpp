// Packs weights for decode_linear. Runs once per layer, so plain loops over rows or strips, on all threads.
#include "../decode_linear.h"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

namespace sl::cpu {
namespace {

constexpr int kBanks = 32;

int code_bits(DecodeFormat format) { return format == DecodeFormat::kGap4 ? 4 : 8; }

// Calls visit(column) for each survivor of a row, in order.
template <class Visit>
void survivors(const uint32_t* words, int64_t columns, const Visit& visit) {
  for (int64_t w = 0; w < words_per_row(columns); ++w) {
    for (uint32_t bits = words[w]; bits != 0; bits &= bits - 1) visit(w * kWordBits + __builtin_ctz(bits));
  }
}

// Calls emit(code, column) for each entry of a row; column -1: a filler.
template <class Emit>
void row_entries(const uint32_t* words, int64_t columns, int64_t reach, const Emit& emit) {
  int64_t previous = -1;
  survivors(words, columns, [&](int64_t column) {
    for (; column - previous > reach; previous += reach) emit(reach - 1, int64_t{-1});
    emit(column - previous - 1, column);
    previous = column;
  });
}

// The survivors of one tile: bit c of element r.
using TileMask = std::array<uint32_t, kTileSide>;

TileMask tile_mask(const uint32_t* words, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  TileMask mask{};
  if (column >= columns) return mask;
  for (int64_t r = 0; r < std::min(kTileSide, rows - row); ++r) {
    // A tile lies in one half of a word, and bits past the last column are zero.
    mask[r] = words[(row + r) * words_per_row(columns) + column / kWordBits] >> (column % kWordBits) & 0xffffu;
  }
  return mask;
}

int64_t tile_units(const TileMask& mask) {
  int64_t count = 0;
  for (const uint32_t bits : mask) count += __builtin_popcount(bits);
  return (count + kUnit - 1) / kUnit;
}

int position_of(int64_t r, int64_t c) { return static_cast<int>((c / 8 * 2 + r / 8) * 64 + r % 8 * 8 + c % 8); }

struct Entry {
  uint16_t value;
  uint8_t position;
};

int bank_of(int position) { return position / 2 % kBanks; }

// The entries of a step that are still to be placed, by tile and bank of shared memory.
class StepEntries {
 public:
  void add(int64_t tile, int position, uint16_t value) {
    entries_[tile][bank_of(position)].push_back({value, static_cast<uint8_t>(position)});
    ++left_[bank_of(position)];
  }
  // The dead positions of a tile with the least to do for their banks take the zeros that fill its last unit.
  void pad(int64_t tile, const TileMask& mask, int64_t count) {
    std::array<bool, kTileSide * kTileSide> taken{};
    for (; count % kUnit != 0; ++count) {
      int best = -1;
      for (int p = 0; p < kTileSide * kTileSide; ++p) {
        const int r = p / 64 % 2 * 8 + p % 64 / 8, c = p / 128 * 8 + p % 8;
        if (taken[p] || (mask[r] >> c & 1) != 0) continue;
        if (best < 0 || left_[bank_of(p)] < left_[bank_of(best)]) best = p;
      }
      taken[best] = true;
      add(tile, best, 0);
    }
  }
  // Hands out need[t] entries of each tile t to give(t, entry): one of each bank, those with the most to do first, and
  // again from the first where that is not enough.
  template <class Give>
  void take(std::array<int64_t, kStepTiles> need, const Give& give) {
    std::array<int, kBanks> order{};
    for (int b = 0; b < kBanks; ++b) order[b] = b;
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return left_[x] > left_[y]; });
    for (bool more = true; more;) {
      more = false;
      for (const int bank : order) {
        int best = -1;  // the tile that needs most
        for (int t = 0; t < kStepTiles; ++t) {
          if (need[t] != 0 && !entries_[t][bank].empty() && (best < 0 || need[t] > need[best])) best = t;
        }
        if (best < 0) continue;
        give(best, entries_[best][bank].back());
        entries_[best][bank].pop_back();
        --left_[bank];
        --need[best];
        more = true;
      }
    }
  }

 private:
  std::array<std::array<std::vector<Entry>, kBanks>, kStepTiles> entries_;
  std::array<int, kBanks> left_{};
};

void pack_step(const uint16_t* weight, const uint32_t* words, int64_t rows, int64_t columns, int64_t row,
               int64_t column, uint8_t* codes, uint16_t* values) {
  std::array<TileMask, kStepTiles> masks;
  std::array<int64_t, kStepTiles> counts{}, begin{}, end{};  // units of a tile lie from begin to end
  StepEntries entries;
  int64_t units = 0;
  for (int64_t t = 0; t < kStepTiles; ++t) {
    const int64_t left = column + t * kTileSide;
    masks[t] = tile_mask(words, rows, columns, row, left);
    for (int64_t r = 0; r < kTileSide; ++r) {
      for (uint32_t bits = masks[t][r]; bits != 0; bits &= bits - 1, ++counts[t]) {
        const int c = __builtin_ctz(bits);
        entries.add(t, position_of(r, c), weight[(row + r) * columns + left + c]);
      }
    }
    begin[t] = units;
    end[t] = units += tile_units(masks[t]);
  }
  for (int64_t t = 0; t < kStepTiles; ++t) entries.pad(t, masks[t], counts[t]);
  constexpr int64_t kLanes = 32;
  for (int64_t first = 0; first < units; first += kLanes) {
    for (int64_t i = 0; i < kUnit; ++i) {
      std::array<int64_t, kStepTiles> need{}, at{};
      for (int64_t t = 0; t < kStepTiles; ++t) {
        at[t] = std::max(begin[t], first);
        need[t] = std::max<int64_t>(std::min(end[t], first + kLanes) - at[t], 0);
      }
      entries.take(need, [&](int t, const Entry& entry) {
        codes[at[t] * kUnit + i] = entry.position;
        values[at[t] * kUnit + i] = entry.value;
        ++at[t];
      });
    }
  }
}

void check_format(DecodeFormat format) {
  if (format != DecodeFormat::kGap4 && format != DecodeFormat::kGap8 && format != DecodeFormat::kTiles)
    throw std::invalid_argument("decode_linear: unknown format");
}

int32_t checked(int64_t count) {
  if (count > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("decode_linear: the weight has too many entries");
  return static_cast<int32_t>(count);
}

}  // namespace

int64_t decode_linear_layout(DecodeFormat format, const uint32_t* words, int64_t rows, int64_t columns,
                             int32_t* starts) {
  check_format(format);
  int64_t total = 0;
  if (format == DecodeFormat::kTiles) {
    const int64_t steps = decode_steps(columns);
    for (int64_t i = 0; i < decode_strips(rows) * steps; ++i) {
      uint32_t counts = 0;
      starts[2 * i] = checked(total);
      for (int64_t t = 0; t < kStepTiles; ++t) {
        const int64_t column = i % steps * kStepColumns + t * kTileSide;
        const int64_t units = tile_units(tile_mask(words, rows, columns, i / steps * kTileSide, column));
        counts |= static_cast<uint32_t>(units) << (8 * t);
        total += units;
      }
      starts[2 * i + 1] = static_cast<int32_t>(counts);
    }
  } else {
    const int64_t reach = int64_t{1} << code_bits(format);
    for (int64_t r = 0; r < rows; ++r) {
      starts[r] = checked(total);
      int64_t entries = 0;
      row_entries(words + r * words_per_row(columns), columns, reach, [&](int64_t, int64_t) { ++entries; });
      total += (entries + kGapGroup - 1) / kGapGroup;
    }
    starts[rows] = checked(total);
  }
  checked(total);
  return total;
}

void decode_linear_pack(DecodeFormat format, const uint16_t* weight, const uint32_t* words, int64_t rows,
                        int64_t columns, const int32_t* starts, uint8_t* codes, uint16_t* values) {
  check_format(format);
  if (format == DecodeFormat::kTiles) {
    const int64_t steps = decode_steps(columns);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < decode_strips(rows) * steps; ++i) {
      const int64_t at = int64_t{starts[2 * i]} * kUnit;
      pack_step(weight, words, rows, columns, i / steps * kTileSide, i % steps * kStepColumns, codes + at, values + at);
    }
    return;
  }
  const int bits = code_bits(format);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = int64_t{starts[r + 1]} * kGapGroup;
    int64_t at = int64_t{starts[r]} * kGapGroup;
    const auto put = [&](int64_t code, uint16_t value) {
      values[at] = value;
      if (bits == 8) {
        codes[at] = static_cast<uint8_t>(code);
      } else if (at % 2 == 0) {  // rows begin with whole groups, so both nibbles of a byte are one row's
        codes[at / 2] = static_cast<uint8_t>(code);
      } else {
        codes[at / 2] = static_cast<uint8_t>(codes[at / 2] | code << 4);
      }
      ++at;
    };
    row_entries(words + r * words_per_row(columns), columns, int64_t{1} << bits,
                [&](int64_t code, int64_t c) { put(code, c < 0 ? uint16_t{0} : weight[r * columns + c]); });
    while (at < end) put(0, 0);
  }
}

}  // namespace sl::cpu
