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
// one, V of the next one, and so on. What a block lacks of 64 repeats its last row, so that tiles may reach beyond.
class TokenFeed {
 public:
  explicit TokenFeed(const UnitTask& task) : task_(task) {
    const KvShape& shape = task.shape;
    row_bytes_ = shape.head_dim * bytes_of(shape.type);
    head_at_ = task.kv_head * shape.page_tokens * row_bytes_;
    values_at_ = shape.num_kv_heads * shape.page_tokens * row_bytes_;
    const std::size_t rows = kAheadBytes / row_bytes_;
    ahead_ = rows > kTokens ? kTokens : rows < 1 ? 1 : static_cast<int>(rows);
    for (int block = 0; block < kBlocks; ++block) fill(block);
    for (int i = 0; i < ahead_; ++i) fetch_row(rows_[i]);
  }

  int count() const { return counts_[block_]; }
  const std::int64_t* positions() const { return positions_[block_]; }
  std::int64_t lowest() const { return lowest_[block_]; }
  std::int64_t highest() const { return highest_[block_]; }
  int num_parts() const { return num_parts_[block_]; }
  const PagePart* parts() const { return parts_[block_]; }
  const std::byte* const* keys() const { return keys_of(block_); }
  const std::byte* const* values() const { return keys() + kTokens; }

  // Of the block after this one; 0 tokens: there is none.
  int next_count() const { return counts_[after()]; }
  const std::byte* const* next_keys() const { return keys_of(after()); }

  // The row to prefetch while row i of keys() or values() is read.
  const std::byte* ahead_of_key(int i) const { return rows_[(at() + i + ahead_) & kRingMask]; }
  const std::byte* ahead_of_value(int i) const {
    return rows_[(at() + kTokens + i + ahead_) & kRingMask];
  }

  // Row i of this block's K and V, and of those of the blocks after it, 64 each.
  const std::byte* row_from_here(int i) const { return rows_[(at() + i) & kRingMask]; }

  // Whether K of these tokens of this block, or the next one, lie one behind the other.
  bool are_in_a_row(bool is_next, int start, int end) const {
    const int block = is_next ? after() : block_;
    for (int i = 0; i < num_parts_[block]; ++i) {
      if (parts_[block][i].start <= start && end <= parts_[block][i].end) return true;
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
    const int done = block_;
    block_ = after();
    fill(done);
  }

 private:
  static constexpr int kBlocks = 4;
  static constexpr int kRingMask = kBlocks * 2 * kTokens - 1;

  int at() const { return block_ * 2 * kTokens; }
  int after() const { return (block_ + 1) % kBlocks; }
  const std::byte* const* keys_of(int block) const { return rows_ + block * 2 * kTokens; }

  // Without tokens left the rows stay as they are: prefetching them again does no harm.
  void fill(int block) {
    const std::byte** keys = rows_ + block * 2 * kTokens;
    const std::byte** values = keys + kTokens;
    int count = 0;
    num_parts_[block] = 0;
    lowest_[block] = INT64_MAX;
    highest_[block] = INT64_MIN;
    while (count < kTokens && page_ < task_.num_pages) {
      count = fill_from_page(block, count);
    }
    counts_[block] = count;
    for (int i = count; count > 0 && i < kTokens; ++i) {
      keys[i] = keys[count - 1];
      values[i] = values[count - 1];
    }
  }

  int fill_from_page(int block, int count) {
    const SeenPage& page = task_.pages[page_];
    const std::byte** keys = rows_ + block * 2 * kTokens;
    const std::uint32_t first = page.first + done_in_page_;
    std::uint32_t taken = page.end - first;
    const auto room = static_cast<std::uint32_t>(kTokens - count);
    if (taken > room) taken = room;
    const std::byte* row = page.slice + head_at_ + first * row_bytes_;
    const std::int64_t position = page.position + done_in_page_;
    parts_[block][num_parts_[block]++] = {count, count + static_cast<int>(taken), page.index,
                                        done_in_page_ > 0};
    for (std::uint32_t i = 0; i < taken; ++i, row += row_bytes_) {
      keys[count] = row;
      keys[kTokens + count] = row + values_at_;
      positions_[block][count++] = position + i;
    }
    if (position < lowest_[block]) lowest_[block] = position;
    if (position + taken - 1 > highest_[block]) highest_[block] = position + taken - 1;
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
  int block_ = 0;
  std::size_t page_ = 0;
  std::uint32_t done_in_page_ = 0;
  int counts_[kBlocks] = {};
  int num_parts_[kBlocks] = {};
  PagePart parts_[kBlocks][kTokens];
  std::int64_t lowest_[kBlocks] = {};
  std::int64_t highest_[kBlocks] = {};
  std::int64_t positions_[kBlocks][kTokens];
  const std::byte* rows_[kBlocks * 2 * kTokens] = {};
};

}  // namespace
}  // namespace tiermem
