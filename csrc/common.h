// What every kernel of the extension shares. No torch headers anywhere below csrc/: functions take raw pointers and
// sizes, so that one build serves every torch version.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace sl {

// The codes travel from Python (sparselottery/_ext.py) as plain integers; keep both lists alike.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  throw std::invalid_argument("unknown dtype code");
}

// A mask keeps bit i of word w for column 32 w + i; each row starts a new word and its last word is padded with zeros.
constexpr int kWordBits = 32;
inline int64_t words_per_row(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

}  // namespace sl
