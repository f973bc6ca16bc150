// The survivors of a mask as the CPU kernels walk them: by rows for a forward pass, by columns for a backward pass.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "../common.h"
#include "masked_linear_simd.h"

namespace sl::cpu {

// Aligned memory that is not initialized. Large arrays ask for huge pages: an index is walked front to back once per
// call, and without them a miss in the translation cache every 4 KiB costs a quarter of a matrix-vector product.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Array() { std::free(data_); }

  // At least `size` elements; what was there before is lost if the memory has to grow.
  T* reserve(int64_t size) {
    if (size > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const size_t bytes = size * sizeof(T), unit = bytes >= kHugePage / 2 ? kHugePage : 64;
      data_ = static_cast<T*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
      if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
      if (unit == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
      capacity_ = size;
    }
    return data_;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Array& other) {
    std::swap(data_, other.data_);
    std::swap(capacity_, other.capacity_);
  }
  static constexpr size_t kHugePage = 2 << 20;
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Owns what a SparseLayout points to.
struct Order {
  SparseLayout layout{};
  std::vector<uint32_t> begin, line;
  Array<uint16_t> index;
  Array<float> value;
  bool has_values = false;

  // The survivors in `lines` x `minors`: offsets[line] .. offsets[line + 1] of `minor`, ascending in each line. If
  // `where` is given, where[i] becomes the new place of survivor i.
  void build(int64_t lines, int64_t minors, int64_t block, int64_t panel, const std::vector<uint32_t>& offsets,
             const uint32_t* minor, uint32_t* where) {
    const int64_t panels = std::max<int64_t>(1, (minors + panel - 1) / panel);
    const int64_t blocks = (lines + block - 1) / block;
    const int64_t count = offsets[lines];
    begin.resize(lines * panels + 1);
    line.resize(lines * panels);
    index.reserve(count);
    value.reserve(count);
    std::vector<uint32_t> cursor(offsets.begin(), offsets.end() - 1), end(lines), sorted(lines);
    uint32_t place = 0;
    int64_t segment = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = b * block, last = std::min(first + block, lines);
      for (int64_t p = 0; p < panels; p++) {
        const uint32_t limit = static_cast<uint32_t>(std::min((p + 1) * panel, minors));
        for (int64_t i = first; i < last; i++) {
          end[i] = static_cast<uint32_t>(std::lower_bound(minor + cursor[i], minor + offsets[i + 1], limit) - minor);
        }
        std::iota(sorted.begin() + first, sorted.begin() + last, static_cast<uint32_t>(first));
        std::stable_sort(sorted.begin() + first, sorted.begin() + last,
                         [&](uint32_t a, uint32_t c) { return end[a] - cursor[a] < end[c] - cursor[c]; });
        for (int64_t r = first; r < last; r++) {
          const uint32_t i = sorted[r];
          begin[segment] = place;
          line[segment++] = i;
          for (uint32_t k = cursor[i]; k < end[i]; k++, place++) {
            index[place] = static_cast<uint16_t>(minor[k] - p * panel);
            if (where != nullptr) where[k] = place;
          }
          cursor[i] = end[i];
        }
      }
    }
    begin[segment] = place;
    layout = {lines, minors, block, panel, blocks, panels, begin.data(), line.data(), index.get(), value.get()};
  }
};

// A mask as the list of its survivors, row by row.
struct Survivors {
  int64_t rows = 0, columns = 0;
  std::vector<uint32_t> offsets;  // [rows + 1]
  Array<uint32_t> position;       // [count]: where a survivor stands in the dense weight

  // words: [rows, words_per_row(columns)]; fewer than 2^32 weights.
  void build(const uint32_t* words, int64_t rows_, int64_t columns_) {
    rows = rows_;
    columns = columns_;
    const int64_t words_per_line = words_per_row(columns);
    offsets.resize(rows + 1);
    for (int64_t i = 0; i < rows; i++) {
      uint32_t survivors = 0;
      for (int64_t w = 0; w < words_per_line; w++) survivors += __builtin_popcount(words[i * words_per_line + w]);
      offsets[i + 1] = offsets[i] + survivors;
    }
    uint32_t* next = position.reserve(count());
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t w = 0; w < words_per_line; w++) {
        for (uint32_t bits = words[i * words_per_line + w]; bits != 0; bits &= bits - 1) {
          *next++ = static_cast<uint32_t>(i * columns + w * kWordBits + __builtin_ctz(bits));
        }
      }
    }
  }

  int64_t count() const { return offsets.back(); }
  double density() const { return static_cast<double>(count()) / std::max<int64_t>(1, rows * columns); }

  // Columns per panel of a forward pass: few enough that their features stay near the first-level cache while a block
  // of rows goes over them, enough that a row finds some 20 survivors there. `thin`: with one or two vectors of batch.
  int64_t row_panel(bool thin = false) const {
    const double d = density();
    return d <= 0.05 ? 1024 : thin ? 512 : d <= 0.3 ? 192 : 128;
  }

  // Rows per panel of a backward pass: every load feeds two multiply-adds, so that it may come from the second level.
  int64_t column_panel() const { return density() <= 0.05 ? 1024 : 512; }

  // The order of a forward pass. `places` (may be null) receives where each survivor stands in it.
  void build_rows(Order& order, int64_t block, int64_t panel, Array<uint32_t>* places) const {
    uint32_t* place = places != nullptr ? places->reserve(count()) : nullptr;
    std::vector<uint32_t> column(count());
    for (int64_t i = 0; i < rows; i++) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++)
        column[k] = static_cast<uint32_t>(position[k] - i * columns);
    }
    order.build(rows, columns, block, panel, offsets, column.data(), place);
  }

  // The order of a backward pass, and where each survivor stands in it.
  void build_columns(Order& order, int64_t block, Array<uint32_t>& places) const {
    std::vector<uint32_t> starts(columns + 1, 0), row(count()), place(count());
    for (int64_t i = 0; i < rows; i++) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) starts[position[k] - i * columns + 1]++;
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<uint32_t> cursor(starts.begin(), starts.end() - 1), turned(count());
    for (int64_t i = 0; i < rows; i++) {
      for (uint32_t k = offsets[i]; k < offsets[i + 1]; k++) {
        turned[k] = cursor[position[k] - i * columns]++;
        row[turned[k]] = static_cast<uint32_t>(i);
      }
    }
    order.build(columns, rows, block, column_panel(), starts, row.data(), place.data());
    uint32_t* where = places.reserve(count());
    for (int64_t k = 0; k < count(); k++) where[k] = place[turned[k]];
  }
};

}  // namespace sl::cpu
