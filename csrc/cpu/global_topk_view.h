// How global_topk sees a tensor: rows of whole words, read in place where memory has them so, else copied and padded.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../global_topk.h"

namespace sl::cpu {
namespace {  // names that other files of sl::cpu use too; only global_topk.cpp includes this

constexpr int64_t kChunkWords = 512;  // what one thread takes at a time: places fit in 16 bits
constexpr int64_t kChunkItems = kChunkWords * kWordBits;

struct Layout {
  int64_t rows, columns, row_words, words, items;
  bool dense;   // logical order is memory order
  bool direct;  // and words of weights follow one another without a gap, except after the last
};

Layout layout_of(const TopkTensor& t) {
  Layout l;
  l.columns = 1;
  l.dense = true;
  for (int64_t d = t.dims - 1; d >= 1; d--) {
    l.dense = l.dense && (t.sizes[d] == 1 || t.strides[d] == l.columns);
    l.columns *= t.sizes[d];
  }
  l.rows = t.sizes[0];
  l.dense = l.dense && (l.rows == 1 || t.strides[0] == l.columns);
  l.row_words = words_per_row(l.columns);
  l.words = l.rows * l.row_words;
  l.items = l.rows * l.columns;
  l.direct = l.dense && (l.rows == 1 || l.columns % kWordBits == 0);
  return l;
}

// Where item `column` of row `row` lies, in elements from the start.
int64_t offset_of(const TopkTensor& t, int64_t row, int64_t column) {
  int64_t offset = row * t.strides[0];
  for (int64_t d = t.dims - 1; d >= 1; d--) {
    offset += column % t.sizes[d] * t.strides[d];
    column /= t.sizes[d];
  }
  return offset;
}

template <class Item>
void gather(const TopkTensor& t, int64_t row, int64_t column, int64_t n, Item* to) {
  const int64_t inner = t.sizes[t.dims - 1], step = t.strides[t.dims - 1];
  const Item* data = static_cast<const Item*>(t.data);
  while (n > 0) {
    const int64_t run = std::min(n, inner - column % inner);
    const Item* from = data + offset_of(t, row, column);
    if (step == 1)
      std::memcpy(to, from, run * sizeof(Item));
    else
      for (int64_t i = 0; i < run; i++) to[i] = from[i * step];
    to += run, column += run, n -= run;
  }
}

// A chunk's weights as whole words, one after the other, with zeros in the padding, and which of the bits are weights.
struct Padded {
  alignas(64) char items[kChunkItems * 8];
  uint32_t allowed[kChunkWords];
};

template <class Item>
void pad(const TopkTensor& t, const Layout& l, int64_t first_word, int64_t words, Padded& to) {
  Item* items = reinterpret_cast<Item*>(to.items);
  int64_t row = first_word / l.row_words, column = first_word % l.row_words * kWordBits;
  for (int64_t w = 0; w < words;) {
    const int64_t run = std::min(words - w, l.row_words - column / kWordBits);
    const int64_t n = std::min(run * kWordBits, l.columns - column);
    Item* at = items + w * kWordBits;
    if (l.dense)
      std::memcpy(at, static_cast<const Item*>(t.data) + row * l.columns + column, n * sizeof(Item));
    else
      gather(t, row, column, n, at);
    std::fill(at + n, at + run * kWordBits, Item{0});
    for (int64_t i = 0; i < run; i++) {
      const int64_t left = n - i * kWordBits;
      to.allowed[w + i] = left >= kWordBits ? ~0u : (1u << left) - 1;
    }
    w += run, row++, column = 0;
  }
}

// Whole words of weights, one after the other; the first of them is word `from` of its chunk.
struct Stretch {
  const void* data;
  int64_t from, words;
};

}  // namespace
}  // namespace sl::cpu
