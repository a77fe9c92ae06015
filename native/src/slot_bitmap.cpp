#include "tiermem/slot_bitmap.h"

#include <bit>
#include <cstddef>

namespace tiermem {
namespace {

std::uint64_t bit_of(std::size_t position) { return std::uint64_t{1} << (position % 64); }

// `count` ones, then zeros up to whole words; at least one word.
std::vector<std::uint64_t> ones(std::size_t count) {
  std::vector<std::uint64_t> words(count / 64 + (count % 64 != 0 || count == 0), ~std::uint64_t{0});
  if (count % 64 != 0 || count == 0) words.back() = bit_of(count) - 1;
  return words;
}

}  // namespace

SlotBitmap::SlotBitmap(std::int32_t num_slots) : num_slots_(num_slots), num_free_(num_slots) {
  levels_.push_back(ones(static_cast<std::size_t>(num_slots)));
  while (levels_.back().size() > 1) levels_.push_back(ones(levels_.back().size()));
}

bool SlotBitmap::is_free(std::int32_t slot) const {
  const auto position = static_cast<std::size_t>(slot);
  return (levels_[0][position / 64] & bit_of(position)) != 0;
}

std::int32_t SlotBitmap::take_lowest() {
  std::size_t position = 0;
  for (std::size_t level = levels_.size(); level-- > 0;) {
    position = position * 64 + static_cast<std::size_t>(std::countr_zero(levels_[level][position]));
  }
  const auto slot = static_cast<std::int32_t>(position);
  take(slot);
  return slot;
}

void SlotBitmap::take(std::int32_t slot) {
  auto position = static_cast<std::size_t>(slot);
  for (auto& level : levels_) {
    std::uint64_t& word = level[position / 64];
    word &= ~bit_of(position);
    if (word != 0) break;
    position /= 64;
  }
  --num_free_;
}

void SlotBitmap::give_back(std::int32_t slot) {
  auto position = static_cast<std::size_t>(slot);
  for (auto& level : levels_) {
    std::uint64_t& word = level[position / 64];
    const bool was_empty = word == 0;
    word |= bit_of(position);
    if (!was_empty) break;
    position /= 64;
  }
  ++num_free_;
}

bool SlotBitmap::is_consistent() const {
  std::int64_t num_set = 0;
  for (const std::uint64_t word : levels_[0]) num_set += std::popcount(word);
  for (std::size_t level = 1; level < levels_.size(); ++level) {
    for (std::size_t child = 0; child < levels_[level - 1].size(); ++child) {
      const bool is_set = (levels_[level][child / 64] & bit_of(child)) != 0;
      if (is_set != (levels_[level - 1][child] != 0)) return false;
    }
  }
  return num_set == num_free_;
}

}  // namespace tiermem
