// PageTable::check: every invariant that one table can see, from the definitions, by brute force.
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "page_table_batch.h"
#include "tiermem/errors.h"

namespace tiermem {

class PageTableAudit {
 public:
  explicit PageTableAudit(const PageTable& table) : table_(table) {}

  void run() {
    check_pages();
    for (std::size_t tier = 0; tier < kNumTiers; ++tier) {
      check_slots(tier);
      check_counts(tier);
      for (const Place place : {Place::Droppable, Place::Redundant, Place::Dirty}) {
        check_list(tier, place);
      }
    }
  }

 private:
  using Place = PageTable::Place;
  using Page = PageTable::Page;
  static constexpr std::int32_t kNone = PageTable::kNone;

  static void require(bool holds, const std::string& where, const char* invariant) {
    if (!holds) throw InvariantError("check: " + where + ": " + invariant);
  }

  static std::string in_tier(std::size_t tier) { return "tier " + std::to_string(tier); }

  void check_pages() const {
    std::int64_t num_alive = 0;
    std::vector<bool> is_free(table_.pages_.size(), false);
    for (const std::int32_t index : table_.free_indices_) {
      const std::string where = "index " + std::to_string(index);
      require(!is_free.at(static_cast<std::size_t>(index)), where, "is free twice");
      is_free[static_cast<std::size_t>(index)] = true;
    }
    for (std::size_t index = 0; index < table_.pages_.size(); ++index) {
      const Page& page = table_.pages_[index];
      const std::string where = "page index " + std::to_string(index);
      require(page.refs >= 0, where, "refs are negative");
      for (std::size_t tier = 0; tier < kNumTiers; ++tier) check_copy(page, tier, where);
      if (page.has(PageTable::kAlive)) {
        ++num_alive;
        require(!is_free[index], where, "alive, but its index is free");
        check_alive(page, where);
      } else {
        require(page.flags == 0 && page.refs == 0 && page.num_copies() == 0, where,
                "dead, but has flags, refs or copies");
      }
    }
    require(num_alive == table_.num_alive_, "num_pages", "is not the number of pages alive");
  }

  void check_copy(const Page& page, std::size_t tier, const std::string& page_text) const {
    const PageTable::Copy& copy = page.copies[tier];
    const Place place = page.places[tier];
    const std::string where = page_text + " in " + in_tier(tier);
    require(copy.pins >= 0, where, "I6: pins are negative");
    if (place == Place::Absent) {
      require(copy.slot == kNone && copy.pins == 0, where, "ABSENT, but has a slot or pins");
      return;
    }
    require(copy.slot >= 0 && copy.slot < table_.free_slots_[tier].num_slots(), where,
            "I1: its slot is not a slot of the tier");
    if (place == Place::Filling) return;
    require(place == wanted_place(page, tier), where, "I5: the copy is in the wrong place");
  }

  // The definition of the places once more, so that a mistake in the table's own is seen.
  Place wanted_place(const Page& page, std::size_t tier) const {
    bool is_below = false;
    bool is_above = false;
    for (std::size_t other = 0; other < kNumTiers; ++other) {
      is_below = is_below || (page.is_valid(other) && other > tier);
      is_above = is_above || (page.is_valid(other) && other < tier);
    }
    const bool is_leftover = page.refs == 0 && tier == tier_number(table_.lowest_);
    const Place listed = is_below || is_leftover ? Place::Droppable
                         : is_above              ? Place::Redundant
                                                 : Place::Dirty;
    const Place unpinned = page.has(PageTable::kSealed) ? listed : Place::Open;
    return page.copies[tier].pins > 0 ? Place::Pinned : unpinned;
  }

  static void check_alive(const Page& page, const std::string& where) {
    const bool is_sealed = page.has(PageTable::kSealed);
    if (!is_sealed) {
      require(page.num_copies() <= 1, where, "I4: open with more than one copy");
      require(page.num_valid() == 0 || page.is_valid(0), where,
              "I4: open and VALID outside the GPU");
      require(!page.has(PageTable::kPublished), where, "I7: published, but open");
    }
    if (page.refs == 0) require(page.num_copies() > 0, where, "unreferenced without a copy");
    if (page.is_dying()) {
      for (std::size_t tier = 0; tier < kNumTiers; ++tier) {
        require(!page.is_movable(tier), where, "dying, but keeps a copy that nothing holds");
      }
    } else if (is_sealed && page.num_valid() == 0) {
      require(page.has(PageTable::kLost), where, "I2: sealed, no VALID copy, and not LOST");
    }
  }

  void check_slots(std::size_t tier) const {
    const SlotBitmap& bitmap = table_.free_slots_[tier];
    require(bitmap.is_consistent(), in_tier(tier), "the levels of the slot bitmap disagree");
    std::vector<int> num_owners(static_cast<std::size_t>(bitmap.num_slots()), 0);
    for (const Page& page : table_.pages_) {
      if (page.copies[tier].slot != kNone)
        ++num_owners[static_cast<std::size_t>(page.copies[tier].slot)];
    }
    for (std::int32_t slot = 0; slot < bitmap.num_slots(); ++slot) {
      const int num_wanted = bitmap.is_free(slot) ? 0 : 1;
      require(num_owners[static_cast<std::size_t>(slot)] == num_wanted,
              "slot " + std::to_string(slot) + " of " + in_tier(tier),
              "I1: a slot must be free or belong to exactly one copy");
    }
  }

  void check_counts(std::size_t tier) const {
    std::array<std::int64_t, PageTable::kNumPlaces> counted{};
    for (const Page& page : table_.pages_) ++counted[static_cast<std::size_t>(page.places[tier])];
    counted[0] = table_.free_slots_[tier].num_free();
    require(counted == table_.num_in_place_[tier], in_tier(tier),
            "the counts of the places are wrong");
  }

  void check_list(std::size_t tier, Place place) const {
    const PageTable::List& list = table_.list_of(tier, place);
    const std::string where =
        "list " + std::to_string(static_cast<int>(place)) + " of " + in_tier(tier);
    const std::int64_t num_wanted = table_.num_in_place_[tier][static_cast<std::size_t>(place)];
    std::int64_t num_seen = 0;
    std::int32_t before = kNone;
    for (std::int32_t index = list.cold; index != kNone;
         index = table_.page_at(index).copies[tier].next) {
      const Page& page = table_.page_at(index);
      require(page.places[tier] == place, where, "I5: holds a copy of another place");
      require(page.copies[tier].prev == before, where, "I5: a back link is wrong");
      require(++num_seen <= num_wanted, where, "I5: longer than the number of its copies");
      before = index;
    }
    require(list.hot == before, where, "I5: does not end at its hot end");
    require(num_seen == num_wanted, where, "I5: a copy is missing from it");
  }

  const PageTable& table_;
};

void PageTable::check() const { PageTableAudit(*this).run(); }

}  // namespace tiermem
