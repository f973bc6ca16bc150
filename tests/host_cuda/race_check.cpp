// csrc/cuda with one host thread per CUDA thread, for ThreadSanitizer. Each case takes another way through the kernels
// and is compared with a plain version. Exit status: 0 all right, 1 a wrong result, 66 a data race, 86 a hang.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "bitmask.h"
#include "global_topk.h"
#include "launch.cuh"

namespace {

using Words = std::vector<uint32_t>;

int wrong = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  wrong = 1;
}

Words packed(const std::vector<uint8_t>& dense, int64_t rows, int64_t columns) {
  const int64_t per_row = sl::words_per_row(columns);
  Words words(static_cast<size_t>(rows * per_row), 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      if (dense[r * columns + c]) words[r * per_row + c / 32] |= 1u << (c % 32);
    }
  }
  return words;
}

void masks(std::mt19937& random) {
  const int64_t rows = 5, columns = 470;
  std::vector<uint8_t> dense(rows * columns), back(dense.size(), 7);
  for (auto& d : dense) d = random() % 2;
  const Words want = packed(dense, rows, columns);
  Words words(want.size(), 0xdeadbeef);
  sl::cuda::bitmask_pack(dense.data(), rows, columns, words.data(), nullptr);
  expect(words == want, "pack");
  sl::cuda::bitmask_unpack(words.data(), rows, columns, back.data(), nullptr);
  expect(back == dense, "unpack");
  int64_t count = -1;
  sl::cuda::bitmask_count(words.data(), static_cast<int64_t>(words.size()), &count, nullptr);
  expect(count == std::accumulate(dense.begin(), dense.end(), int64_t{0}), "count");
  std::vector<float> weights(dense.size(), 3.0f);
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  sl::cuda::bitmask_apply(weights.data(), 4, words.data(), 2, sizes, strides, nullptr);
  bool right = true;
  for (size_t i = 0; i < dense.size(); ++i) right &= weights[i] == (dense[i] ? 3.0f : 0.0f);
  expect(right, "apply");
}

void topk(std::vector<float> weights, int64_t rows, int64_t keep, const char* what) {
  const int64_t columns = static_cast<int64_t>(weights.size()) / rows;
  std::vector<int64_t> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return std::fabs(weights[a]) > std::fabs(weights[b]); });
  std::vector<uint8_t> dense(weights.size(), 0);
  for (int64_t i = 0; i < keep; ++i) dense[order[i]] = 1;
  const Words want = packed(dense, rows, columns);
  Words words(want.size(), 0xdeadbeef);
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  const sl::TopkTensor tensor{weights.data(), sl::DType::kFloat32, 2, sizes, strides, nullptr, words.data()};
  std::vector<char> scratch(static_cast<size_t>(sl::cuda::global_topk_scratch(&tensor, 1)), 0x5a);
  sl::TopkResult result{-5, -5};
  sl::cuda::global_topk(&tensor, 1, keep, false, scratch.data(), &result, nullptr);
  expect(words == want && result.nan_tensor == -1 && result.threshold == std::fabs(weights[order[keep - 1]]), what);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  masks(random);
  std::vector<float> weights(4000);
  for (auto& w : weights) w = normal(random);
  topk(weights, 40, 1200, "sampled, the last survivor in the pool");
  for (auto& w : weights) w = random() % 8 == 0 ? 1.0f : 0.5f;
  topk(weights, 20, 2000, "ties beyond the pool");
  topk(std::vector<float>(2200, -0.25f), 2200, 1500, "more chunks of ties than a block has threads");
  return wrong;
}
