// decode_linear with one host thread per CUDA thread, for ThreadSanitizer. Weights and inputs are small integers, so
// that sums are exact in float16. Exit status: 0 all right, 1 a wrong result, 66 a data race, 86 a hang.
#include <cstdio>
#include <random>
#include <vector>

#include "decode_linear.h"
#include "half.cuh"
#include "tensor_core.cuh"

namespace {

int wrong = 0;

void check(sl::DecodeFormat format, int64_t rows, int64_t columns, int64_t batch, unsigned one_in, const char* what) {
  std::mt19937 random(static_cast<unsigned>(rows + columns + batch));
  const int64_t per_row = sl::words_per_row(columns);
  std::vector<uint32_t> words(static_cast<size_t>(rows * per_row), 0);
  std::vector<float> weight(static_cast<size_t>(rows * columns), 0.0f), x(static_cast<size_t>(batch * columns));
  std::vector<uint16_t> dense(weight.size(), 0x7e00), halves, y(static_cast<size_t>(batch * rows), 0x7e00);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      if (random() % one_in != 0) continue;
      words[r * per_row + c / 32] |= 1u << (c % 32);
      weight[r * columns + c] = static_cast<float>(static_cast<int>(random() % 5) - 2);
      dense[r * columns + c] = sl::cuda::float_to_half(weight[r * columns + c]);
    }
  }
  for (float& v : x) {
    v = static_cast<float>(static_cast<int>(random() % 5) - 2);
    halves.push_back(sl::cuda::float_to_half(v));
  }
  const bool tiles = format == sl::DecodeFormat::kTiles;
  const int64_t steps = sl::decode_strips(rows) * sl::decode_steps(columns);
  std::vector<int32_t> starts(static_cast<size_t>(tiles ? 2 * steps : rows + 1));
  const int64_t units = sl::cpu::decode_linear_layout(format, words.data(), rows, columns, starts.data());
  std::vector<sl::cuda::Words4> codes(static_cast<size_t>(units + 1)), values(static_cast<size_t>(units + 1));
  auto* const code = reinterpret_cast<uint8_t*>(codes.data());
  auto* const value = reinterpret_cast<uint16_t*>(values.data());
  sl::cpu::decode_linear_pack(format, dense.data(), words.data(), rows, columns, starts.data(), code, value);
  const sl::DecodeWeight packed{format, rows, columns, units, starts.data(), code, value};
  std::vector<char> scratch(static_cast<size_t>(sl::cuda::decode_linear_scratch(packed, batch)) + 1, 0x5a);
  sl::cuda::decode_linear(packed, sl::DType::kFloat16, halves.data(), nullptr, y.data(), batch, scratch.data(),
                          nullptr);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      float want = 0;
      for (int64_t c = 0; c < columns; ++c) want += weight[r * columns + c] * x[b * columns + c];
      if (sl::cuda::low_half<sl::DType::kFloat16>(y[b * rows + r]) == want) continue;
      std::printf("wrong: %s, batch %d, row %d\n", what, static_cast<int>(b), static_cast<int>(r));
      wrong = 1;
      return;
    }
  }
}

}  // namespace

int main() {
  check(sl::DecodeFormat::kGap4, 20, 90, 3, 2, "4-bit gaps, short rows");
  check(sl::DecodeFormat::kGap8, 6, 700, 1, 3, "8-bit gaps, long rows");
  check(sl::DecodeFormat::kTiles, 40, 264, 5, 6, "tiles, few entries");
  check(sl::DecodeFormat::kTiles, 20, 600, 17, 2, "tiles, many entries, split columns");
  return wrong;
}
