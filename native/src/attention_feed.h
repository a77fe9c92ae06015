// TokenFeed: a run's tokens, 64 at a time, and where to prefetch.
//
// Memory is read strictly in order, with a prefetch into the second-level cache 8 KiB ahead. On 15 threads
// of an Emerald Rapids that took reading K and V in pages from 48 to 100 GB/s and more.
#pragma once

#include "attention_vectors.h"

namespace tiermem {
namespace {

constexpr int kTokens = 64;           // of a block: K and V of 32 KiB for head_dim 128 in half precision
constexpr int kSumTokens = 16;        // whose V is summed before the sums are stored
constexpr int kAheadBytes = 8 << 10;  // from what is read to what is prefetched

// Tokens [start, end) of a block, which are one page's.
struct PagePart {
  int start;
  int end;
  std::uint32_t page;  // index in the sequence's table
  bool continues;      // the page has tokens in the block before, too
};

// Up to 64 tokens of a run, in order, and those after them: where their K and V rows lie.
//
// The rows are a ring in the order in which they are read: K of the block, V of the block, K of the next
// one, V of the next one. What a block lacks of 64 repeats its last row, so that tiles may reach beyond.
class TokenFeed {
 public:
  explicit TokenFeed(const UnitTask& task) : task_(task) {
    const KvShape& shape = task.shape;
    row_bytes_ = shape.head_dim * bytes_of(shape.type);
    head_at_ = task.kv_head * shape.page_tokens * row_bytes_;
    values_at_ = shape.num_kv_heads * shape.page_tokens * row_bytes_;
    const std::size_t rows = kAheadBytes / row_bytes_;
    ahead_ = rows > kTokens ? kTokens : rows < 1 ? 1 : static_cast<int>(rows);
    fill(0);
    fill(1);
    for (int i = 0; i < ahead_; ++i) fetch_row(rows_[i]);
  }

  int count() const { return counts_[half_]; }
  const std::int64_t* positions() const { return positions_[half_]; }
  std::int64_t lowest() const { return lowest_[half_]; }
  std::int64_t highest() const { return highest_[half_]; }
  int num_parts() const { return num_parts_[half_]; }
  const PagePart* parts() const { return parts_[half_]; }
  const std::byte* const* keys() const { return rows_ + half_ * 2 * kTokens; }
  const std::byte* const* values() const { return keys() + kTokens; }

  // The row to prefetch while row i of keys() or values() is read.
  const std::byte* ahead_of_key(int i) const { return rows_[(at() + i + ahead_) & kRingMask]; }
  const std::byte* ahead_of_value(int i) const {
    return rows_[(at() + kTokens + i + ahead_) & kRingMask];
  }

  // Row i of this block's K, V and the next block's K, V, 64 each.
  const std::byte* row_from_here(int i) const { return rows_[(at() + i) & kRingMask]; }

  // Whether K of these tokens of the block lie one behind the other.
  bool are_in_a_row(int start, int end) const {
    for (int i = 0; i < num_parts(); ++i) {
      if (parts()[i].start <= start && end <= parts()[i].end) return true;
    }
    return false;
  }

  // Whether one of the lines sees a token of the block, or what lies between its tokens.
  bool any_sees(const SeenRange* sees, int num_lines) const {
    for (int i = 0; i < num_lines; ++i) {
      if (sees[i].start <= highest() && lowest() < sees[i].end) return true;
    }
    return false;
  }

  void fetch_row(const std::byte* row) const {
    for (std::size_t at = 0; at < row_bytes_; at += kLineBytes) fetch(row + at);
  }

  void next() {
    const int done = half_;
    half_ = 1 - half_;
    fill(done);
  }

 private:
  static constexpr int kRingMask = 4 * kTokens - 1;

  int at() const { return half_ * 2 * kTokens; }

  // Without tokens left the rows stay as they are: prefetching them again does no harm.
  void fill(int half) {
    const std::byte** keys = rows_ + half * 2 * kTokens;
    const std::byte** values = keys + kTokens;
    int count = 0;
    num_parts_[half] = 0;
    lowest_[half] = INT64_MAX;
    highest_[half] = INT64_MIN;
    while (count < kTokens && page_ < task_.num_pages) {
      count = fill_from_page(half, count);
    }
    counts_[half] = count;
    for (int i = count; count > 0 && i < kTokens; ++i) {
      keys[i] = keys[count - 1];
      values[i] = values[count - 1];
    }
  }

  int fill_from_page(int half, int count) {
    const SeenPage& page = task_.pages[page_];
    const std::byte** keys = rows_ + half * 2 * kTokens;
    const std::uint32_t first = page.first + done_in_page_;
    std::uint32_t taken = page.end - first;
    const auto room = static_cast<std::uint32_t>(kTokens - count);
    if (taken > room) taken = room;
    const std::byte* row = page.slice + head_at_ + first * row_bytes_;
    const std::int64_t position = page.position + done_in_page_;
    parts_[half][num_parts_[half]++] = {count, count + static_cast<int>(taken), page.index,
                                        done_in_page_ > 0};
    for (std::uint32_t i = 0; i < taken; ++i, row += row_bytes_) {
      keys[count] = row;
      keys[kTokens + count] = row + values_at_;
      positions_[half][count++] = position + i;
    }
    if (position < lowest_[half]) lowest_[half] = position;
    if (position + taken - 1 > highest_[half]) highest_[half] = position + taken - 1;
    done_in_page_ += taken;
    if (page.first + done_in_page_ == page.end) {
      ++page_;
      done_in_page_ = 0;
    }
    return count;
  }

  const UnitTask& task_;
  std::size_t row_bytes_ = 0;
  std::size_t head_at_ = 0;
  std::size_t values_at_ = 0;
  int ahead_ = 1;  // rows
  int half_ = 0;
  std::size_t page_ = 0;
  std::uint32_t done_in_page_ = 0;
  int counts_[2] = {};
  int num_parts_[2] = {};
  PagePart parts_[2][kTokens] = {};
  std::int64_t lowest_[2] = {};
  std::int64_t highest_[2] = {};
  std::int64_t positions_[2][kTokens] = {};
  const std::byte* rows_[4 * kTokens] = {};
};

}  // namespace
}  // namespace tiermem
