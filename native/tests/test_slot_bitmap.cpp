// The bitmap against a std::set, at the sizes where it gains words and levels.
#include <random>
#include <set>

#include "check.h"
#include "tiermem/slot_bitmap.h"

namespace {

using tiermem::SlotBitmap;

void test_takes_all_lowest_first(std::int32_t num_slots) {
  SlotBitmap bitmap(num_slots);
  CHECK(bitmap.num_slots() == num_slots && bitmap.num_free() == num_slots);
  bool is_ordered = true;
  for (std::int32_t slot = 0; slot < num_slots; ++slot) {
    is_ordered = bitmap.is_free(slot) && bitmap.take_lowest() == slot && is_ordered;
    is_ordered = !bitmap.is_free(slot) && is_ordered;
  }
  CHECK(is_ordered && bitmap.num_free() == 0 && bitmap.is_consistent());
}

void test_against_a_set(std::int32_t num_slots, std::uint32_t seed) {
  std::mt19937 random(seed);
  SlotBitmap bitmap(num_slots);
  std::set<std::int32_t> free;
  for (std::int32_t slot = 0; slot < num_slots; ++slot) free.insert(slot);
  for (int step = 0; step < 3000; ++step) {
    const auto slot = static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(num_slots));
    if (random() % 3 == 0 && !free.empty()) {
      CHECK(bitmap.take_lowest() == *free.begin());
      free.erase(free.begin());
    } else if (free.erase(slot) == 1) {
      bitmap.take(slot);
    } else {
      bitmap.give_back(slot);
      free.insert(slot);
    }
    CHECK(bitmap.is_free(slot) == free.contains(slot));
    CHECK(bitmap.num_free() == static_cast<std::int32_t>(free.size()));
    if (step % 64 == 0) CHECK(bitmap.is_consistent());
  }
}

}  // namespace

int main() {
  for (const std::int32_t num_slots : {0, 1, 63, 64, 65, 4095, 4096, 4097, 262'144, 262'145}) {
    test_takes_all_lowest_first(num_slots);
    if (num_slots > 0) test_against_a_set(num_slots, 7);
  }
  return tiermem_test::report("slot_bitmap");
}
