// csrc/cuda/sparse_linear_half.cu with one host thread per CUDA thread, for ThreadSanitizer: three chunks, two row
// blocks and two batch tiles, all with ragged ends. Exit status: 0 all right, 1 a wrong result, 66 a data race, 86 a
// hang.
#include <cstdio>
#include <random>
#include <vector>

#include "launch.cuh"
#include "sparse_linear.h"

namespace {

uint16_t to_bfloat(float f) { return static_cast<uint16_t>(std::bit_cast<uint32_t>(f) >> 16); }

}  // namespace

int main() {
  std::mt19937 random(1);
  const int64_t rows = 70, columns = 410, batch = 131, padded = 136, strips = (rows + 15) / 16,
                chunks = (columns + 191) / 192, words_each = (columns + 31) / 32;
  std::vector<float> weight(rows * columns, 0), x(columns * batch), bias(rows);
  std::vector<uint32_t> words(rows * words_each, 0);
  std::vector<uint16_t> weight_bits(rows * columns, 0x7fc0), x_bits(columns * padded, 0), bias_bits(rows),
      got(batch * rows, 0x7fc0);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t b = 0; b < batch; ++b) {
      x[c * batch + b] = static_cast<float>(random() % 2);  // small integers: every sum is exact in bfloat16
      x_bits[c * padded + b] = to_bfloat(x[c * batch + b]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    bias[r] = static_cast<float>(random() % 16);
    bias_bits[r] = to_bfloat(bias[r]);
    for (int64_t c = 0; c < columns; ++c) {
      if (random() % 20) continue;
      weight[r * columns + c] = static_cast<float>(random() % 2 + 1);
      weight_bits[r * columns + c] = to_bfloat(weight[r * columns + c]);
      words[r * words_each + c / 32] |= 1u << (c % 32);
    }
  }
  std::vector<int32_t> group_columns, group_strips, order, starts;
  for (int64_t s = 0; s < strips; ++s) {
    for (int64_t i = 0; i < 16; ++i) order.push_back(s * 16 + i < rows ? static_cast<int32_t>(s * 16 + i) : -1);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      starts.push_back(static_cast<int32_t>(group_strips.size()));
      for (int64_t c = chunk * 192; c < columns && c < (chunk + 1) * 192; ++c) {
        bool live = false;
        for (int64_t r = s * 16; r < rows && r < s * 16 + 16; ++r) live = live || weight[r * columns + c] != 0;
        if (live) group_columns.push_back(static_cast<int32_t>(c));
      }
      while (group_columns.size() % 16) group_columns.push_back(-1);
      group_strips.resize(group_columns.size() / 16, static_cast<int32_t>(s));
    }
  }
  starts.push_back(static_cast<int32_t>(group_strips.size()));
  struct alignas(16) Group {
    uint16_t values[256];
  };
  std::vector<Group> values(group_strips.size());
  const sl::cuda::HalfIndex index{group_columns.data(), group_strips.data(), order.data(), starts.data(),
                                  static_cast<int64_t>(group_strips.size())};
  sl::cuda::sparse_linear_half_fill(weight_bits.data(), words.data(), index, columns, false, values[0].values, nullptr);
  sl::cuda::sparse_linear_half_product(sl::DType::kBFloat16, index, values[0].values, x_bits.data(), bias_bits.data(),
                                       rows, columns, batch, padded, got.data(), nullptr);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      float sum = bias[r];
      for (int64_t c = 0; c < columns; ++c) sum += weight[r * columns + c] * x[c * batch + b];
      if (got[b * rows + r] != to_bfloat(sum)) {
        std::printf("wrong at batch %d, row %d\n", static_cast<int>(b), static_cast<int>(r));
        return 1;
      }
    }
  }
  return 0;
}
