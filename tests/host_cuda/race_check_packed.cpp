// csrc/cuda/packed.cu with one host thread per CUDA thread, for ThreadSanitizer: words that end inside a row, several
// tiles, contiguous and strided. Exit status: 0 all right, 1 a wrong result, 66 a data race, 86 a hang.
#include <cstdio>
#include <random>
#include <vector>

#include "common.h"
#include "launch.cuh"
#include "packed.h"

int main() {
  std::mt19937 random(1);
  int wrong = 0;
  for (const int64_t columns : {37, 64, 470}) {
    const int64_t rows = 29, per_row = sl::words_per_row(columns), tiles = (rows * per_row + 31) / 32;
    std::vector<uint32_t> words(rows * per_row, 0);
    std::vector<float> dense(rows * columns), swapped(rows * columns), want(rows * columns, 0), values, got;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const float v = static_cast<float>(random() % 1000 + 1);
        dense[r * columns + c] = swapped[c * rows + r] = v;
        if (random() % 3) continue;
        words[r * per_row + c / 32] |= 1u << (c % 32);
        values.push_back(want[r * columns + c] = v);
      }
    }
    const int64_t count = static_cast<int64_t>(values.size());
    std::vector<int64_t> offsets(tiles + 1, 0);
    sl::cuda::packed_counts(words.data(), rows * per_row, offsets.data() + 1, nullptr);
    for (int64_t t = 0; t < tiles; ++t) offsets[t + 1] += offsets[t];
    wrong |= offsets[tiles] != count;
    std::vector<float> back(dense.size(), -1);
    sl::cuda::packed_expand(values.data(), count, 4, words.data(), offsets.data(), rows, columns, back.data(), nullptr);
    wrong |= back != want;
    const int64_t sizes[] = {rows, columns}, plain[] = {columns, 1}, turned[] = {1, rows};
    for (const auto* strides : {plain, turned}) {
      got.assign(values.size(), -1);
      sl::cuda::packed_gather((strides == plain ? dense : swapped).data(), 4, words.data(), offsets.data(), 2, sizes,
                              strides, got.data(), count, nullptr);
      wrong |= got != values;
    }
    if (wrong) std::printf("wrong at %d columns\n", static_cast<int>(columns));
  }
  return wrong;
}
