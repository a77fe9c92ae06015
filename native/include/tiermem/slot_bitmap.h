// SlotBitmap: which slots of one tier are free. Lowest first, so that neighbours in a batch tend to
// be neighbours in the pool and their copies can be joined.
#pragma once

#include <cstdint>
#include <vector>

namespace tiermem {

// A set of numbers 0 .. num_slots - 1 as a tree of 64-bit words: a bit in level n + 1 says whether
// the word below it has a bit set. Every call is O(levels), at most 6.
class SlotBitmap {
 public:
  // All slots free. REQUIRES: num_slots >= 0.
  explicit SlotBitmap(std::int32_t num_slots);

  std::int32_t num_slots() const { return num_slots_; }
  std::int32_t num_free() const { return num_free_; }

  // REQUIRES: 0 <= slot < num_slots().
  bool is_free(std::int32_t slot) const;

  // Takes the lowest free slot. REQUIRES: num_free() > 0.
  std::int32_t take_lowest();

  // Takes one slot. REQUIRES: is_free(slot).
  void take(std::int32_t slot);

  // Gives a slot back. REQUIRES: !is_free(slot).
  void give_back(std::int32_t slot);

  // Whether every upper level and the count agree with the lowest level, by brute force.
  bool is_consistent() const;

 private:
  std::int32_t num_slots_;
  std::int32_t num_free_;
  std::vector<std::vector<std::uint64_t>> levels_;  // [0] has one bit a slot; the last is one word
};

}  // namespace tiermem
