// csrc/cuda/sparse_linear.cu with one host thread per CUDA thread, for ThreadSanitizer: several chunks, row blocks and
// batch tiles, all with ragged ends. Exit status: 0 all right, 1 a wrong result, 66 a data race, 86 a hang.
#include <random>
#include <vector>

#include "launch.cuh"
#include "sparse_linear.h"

int main() {
  std::mt19937 random(1);
  const int64_t rows = 37, columns = 150, batch = 135, chunks = (columns + 63) / 64;
  std::vector<float> weight(rows * columns, 0), x(columns * batch), bias(rows), want(rows * batch),
      got(rows * batch, -7);
  std::vector<int64_t> places;
  std::vector<sl::cuda::SparseEntry> entries;
  std::vector<int32_t> starts;
  for (auto& v : x) v = static_cast<float>(random() % 16);  // small integers: every sum is exact
  for (auto& v : bias) v = static_cast<float>(random() % 16);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      if (c % 64 == 0) starts.push_back(static_cast<int32_t>(entries.size()));
      if (random() % 5) continue;
      weight[r * columns + c] = static_cast<float>(random() % 16 + 1);
      places.push_back(r * columns + c);
      entries.push_back({static_cast<int32_t>(c % 64), -99.0f});
    }
  }
  starts.push_back(static_cast<int32_t>(entries.size()));
  if (static_cast<int64_t>(starts.size()) != rows * chunks + 1) return 1;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < batch; ++b) {
      float sum = bias[r];
      for (int64_t c = 0; c < columns; ++c) sum += weight[r * columns + c] * x[c * batch + b];
      want[r * batch + b] = sum;
    }
  }
  sl::cuda::sparse_linear_fill(weight.data(), places.data(), static_cast<int64_t>(places.size()), entries.data(),
                               nullptr);
  sl::cuda::sparse_linear_product(entries.data(), starts.data(), x.data(), bias.data(), rows, columns, batch,
                                  got.data(), nullptr);
  return got != want;
}
