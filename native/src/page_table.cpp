// The life of pages and copies. Every call looks at its whole batch before it changes anything.
#include "tiermem/page_table.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "page_table_batch.h"
#include "tiermem/errors.h"

namespace tiermem {
namespace {

constexpr std::size_t kMaxPages = std::numeric_limits<std::int32_t>::max();
constexpr std::array<const char*, kNumTiers> kTierNames = {"gpu", "ram", "ssd"};
constexpr std::array<const char*, kNumTiers> kUnpinNames = {
    "unpin in tier gpu", "unpin in tier ram", "unpin in tier ssd"};
constexpr std::array<const char*, 7> kPlaceNames = {"ABSENT",    "FILLING",   "pinned", "open",
                                                    "droppable", "redundant", "dirty"};

}  // namespace

// Marks the pages of one batch with the batch's number, so that a second mention is seen.
class PageTable::Marks {
 public:
  Marks(PageTable& table, const char* verb) : table_(table), verb_(verb) {
    if (++table_.batch_ != 0) return;
    for (Page& page : table_.pages_) page.batch = 0;  // numbers start again after 2^32 batches
    table_.batch_ = 1;
  }
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  void add(std::int32_t index) {
    Page& page = table_.page_at(index);
    if (page.batch == table_.batch_) {
      table_.refuse(verb_, table_.id_of(index), "must be given once");
    }
    page.batch = table_.batch_;
  }

 private:
  PageTable& table_;
  const char* verb_;
};

PageTable::PageTable(const std::array<std::int64_t, kNumTiers>& num_slots) {
  for (std::size_t tier = 0; tier < kNumTiers; ++tier) {
    const std::int64_t count = num_slots[tier];
    if (count < 0 || count > static_cast<std::int64_t>(kMaxPages)) {
      throw std::invalid_argument(std::string("slots of tier ") + kTierNames[tier] + ": " +
                                  std::to_string(count) + ": must be in [0, 2147483647]");
    }
    free_slots_.emplace_back(static_cast<std::int32_t>(count));
    num_in_place_[tier][0] = count;
    if (count > 0) lowest_ = static_cast<Tier>(tier);
  }
  if (free_slots_[tier_number(lowest_)].num_slots() == 0) {
    throw std::invalid_argument("slots of tiers gpu, ram, ssd: all 0: one must be positive");
  }
}

PageId PageTable::id_of(std::int32_t index) const {
  return PageId{page_at(index).generation} << 32 | index;
}

std::int32_t PageTable::find(const char* verb, PageId id) const {
  const std::int32_t index = index_of(id);
  if (index == kNone) refuse(verb, id, "must name a page that is alive");
  return index;
}

void PageTable::refuse(const char* verb, PageId id, const char* want) const {
  std::string text = std::string(verb) + ": page " + std::to_string(id) + " (index " +
                     std::to_string(id & 0xffffffff) + ", generation " + std::to_string(id >> 32) +
                     ")";
  const std::int32_t index = index_of(id);
  if (index != kNone) {
    const Page& page = page_at(index);
    text += page.is_dying() ? " dying," : page.has(kSealed) ? " sealed," : " open,";
    if (page.has(kPublished)) text += " published,";
    if (page.has(kLost)) text += " lost,";
    text += " refs " + std::to_string(page.refs);
    for (std::size_t tier = 0; tier < kNumTiers; ++tier) {
      text += std::string(", ") + kTierNames[tier] + " " +
              kPlaceNames[static_cast<std::size_t>(page.places[tier])];
      if (page.copies[tier].pins > 0)
        text += " with " + std::to_string(page.copies[tier].pins) + " pins";
    }
  }
  throw InvariantError(text + ": " + want);
}

void PageTable::refuse(const char* verb, PageId id, std::size_t tier, const char* want) const {
  refuse((std::string(verb) + " in tier " + kTierNames[tier]).c_str(), id, want);
}

// -- Life of a page
// --------------------------------------------------------------------------------

// Room for new pages, so that nothing can fail once the first is made.
void PageTable::grow(std::size_t num_new) {
  const std::size_t num_reused = std::min(num_new, free_indices_.size());
  const std::size_t wanted = pages_.size() + num_new - num_reused;
  if (wanted > kMaxPages) {
    throw InvariantError("create: " + std::to_string(num_new) + " pages: the table would have " +
                         std::to_string(wanted) + ": must be at most 2147483647");
  }
  if (wanted > pages_.capacity()) pages_.reserve(std::max(wanted, 2 * pages_.capacity()));
  // Each page that dies hands back its index; that push must not have to allocate.
  free_indices_.reserve(pages_.capacity());
}

std::int32_t PageTable::new_page(std::uint8_t flags, std::int32_t refs) {
  std::int32_t index = static_cast<std::int32_t>(pages_.size());
  if (free_indices_.empty()) {
    pages_.emplace_back();
  } else {
    index = free_indices_.back();
    free_indices_.pop_back();
  }
  page_at(index).flags = static_cast<std::uint8_t>(kAlive | flags);
  page_at(index).refs = refs;
  ++num_alive_;
  return index;
}

void PageTable::die(std::int32_t index) {
  Page& page = page_at(index);
  page.flags = 0;
  --num_alive_;
  // An index whose generations are used up is never used again, so that no id comes back.
  if (page.generation == std::numeric_limits<std::int32_t>::max()) return;
  ++page.generation;
  free_indices_.push_back(index);
}

std::vector<PageId> PageTable::create(std::int64_t count) {
  require_count("create", count);
  grow(static_cast<std::size_t>(count));
  std::vector<PageId> ids(static_cast<std::size_t>(count));
  for (PageId& id : ids) id = id_of(new_page(0, 1));
  return ids;
}

std::vector<PageId> PageTable::create_stored(Tier tier, Slots slots) {
  const std::size_t t = tier_number(tier);
  SlotBitmap& bitmap = free_slots_[t];
  grow(slots.size());
  std::vector<PageId> ids(slots.size());
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const Slot slot = slots[i];
    if (slot >= 0 && slot < bitmap.num_slots() && bitmap.is_free(static_cast<std::int32_t>(slot))) {
      bitmap.take(static_cast<std::int32_t>(slot));
      continue;
    }
    for (const Slot taken : slots.first(i)) bitmap.give_back(static_cast<std::int32_t>(taken));
    throw InvariantError(std::string("create_stored in tier ") + kTierNames[t] + ": slot " +
                         std::to_string(slot) + ": must be free, given once and in [0, " +
                         std::to_string(bitmap.num_slots()) + ")");
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::int32_t index = new_page(kSealed | kPublished, 0);
    page_at(index).copies[t].slot = static_cast<std::int32_t>(slots[i]);
    move(index, t, place_for(page_at(index), t));
    ids[i] = id_of(index);
  }
  return ids;
}

void PageTable::add_ref(PageIds ids) {
  each("add_ref", ids, [&](std::int32_t index) {
    if (page_at(index).is_dying()) refuse("add_ref", id_of(index), "must not be dying");
  });
  each("add_ref", ids, [&](std::int32_t index) {
    ++page_at(index).refs;
    settle(index);
  });
}

std::vector<PageId> PageTable::release(PageIds ids) {
  require_countdown("release", ids, "must be referred to as often as it is given",
                    [](Page& page) -> std::int32_t& { return page.refs; });
  std::vector<PageId> dead;
  each("release", ids, [&](std::int32_t index) {
    if (--page_at(index).refs > 0) return;
    settle(index, dead);
    for (std::size_t tier = 0; tier < kNumTiers; ++tier) to_hot_end(index, tier);
  });
  return dead;
}

void PageTable::publish(PageIds ids) {
  Marks marks(*this, "publish");
  each("publish", ids, [&](std::int32_t index) {
    const Page& page = page_at(index);
    if (!page.has(kSealed) || page.has(kPublished) || page.has(kLost) || page.is_dying()) {
      refuse("publish", id_of(index), "must be sealed, not published, not lost and not dying");
    }
    marks.add(index);
  });
  each("publish", ids, [&](std::int32_t index) { page_at(index).flags |= kPublished; });
}

std::vector<PageId> PageTable::unpublish(PageIds ids) {
  Marks marks(*this, "unpublish");
  each("unpublish", ids, [&](std::int32_t index) {
    if (!page_at(index).has(kPublished)) refuse("unpublish", id_of(index), "must be published");
    marks.add(index);
  });
  std::vector<PageId> dead;
  each("unpublish", ids, [&](std::int32_t index) {
    page_at(index).flags &= static_cast<std::uint8_t>(~kPublished);
    settle(index, dead);
  });
  return dead;
}

void PageTable::seal(PageIds ids) {
  Marks marks(*this, "seal");
  each("seal", ids, [&](std::int32_t index) {
    const Page& page = page_at(index);
    if (page.has(kSealed) || page.is_dying() || !page.is_valid(tier_number(Tier::Gpu))) {
      refuse("seal", id_of(index), "must be open, not dying, and VALID in tier gpu");
    }
    marks.add(index);
  });
  each("seal", ids, [&](std::int32_t index) {
    page_at(index).flags |= kSealed;
    settle(index);
  });
}

void PageTable::reopen(PageIds ids) {
  Marks marks(*this, "reopen");
  each("reopen", ids, [&](std::int32_t index) {
    const Page& page = page_at(index);
    const bool is_private = page.refs == 1 && !page.has(kPublished) && !page.has(kLost);
    const bool is_alone = page.is_valid(tier_number(Tier::Gpu)) && page.num_copies() == 1;
    if (!page.has(kSealed) || !is_private || !is_alone) {
      refuse(
          "reopen", id_of(index),
          "must be sealed, have refs 1, not be published or lost, and be VALID in tier gpu alone");
    }
    marks.add(index);
  });
  each("reopen", ids, [&](std::int32_t index) {
    page_at(index).flags &= static_cast<std::uint8_t>(~kSealed);
    settle(index);
  });
}

void PageTable::mark_lost(PageIds ids) {
  each("mark_lost", ids, [](std::int32_t) {});
  each("mark_lost", ids, [&](std::int32_t index) { page_at(index).flags |= kLost; });
}

// -- Life of a copy
// --------------------------------------------------------------------------------

std::vector<Slot> PageTable::reserve(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  const auto num_free = static_cast<std::size_t>(free_slots_[t].num_free());
  if (ids.size() > num_free) {
    throw InvariantError(std::string("reserve in tier ") + kTierNames[t] + ": " +
                         std::to_string(ids.size()) + " slots: must be at most the " +
                         std::to_string(num_free) + " that are free");
  }
  Marks marks(*this, "reserve");
  each("reserve", ids, [&](std::int32_t index) {
    const Page& page = page_at(index);
    if (page.places[t] != Place::Absent || page.is_dying() ||
        (!page.has(kSealed) && page.num_copies() > 0)) {
      refuse("reserve", id_of(index), t,
             "must be ABSENT there, not dying, and if open without any other copy");
    }
    marks.add(index);
  });
  std::vector<Slot> slots;
  slots.reserve(ids.size());
  each("reserve", ids, [&](std::int32_t index) {
    const std::int32_t slot = free_slots_[t].take_lowest();
    page_at(index).copies[t].slot = slot;
    slots.push_back(slot);
    move(index, t, Place::Filling);
  });
  return slots;
}

std::vector<PageId> PageTable::commit(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  Marks marks(*this, "commit");
  each("commit", ids, [&](std::int32_t index) {
    if (page_at(index).places[t] != Place::Filling)
      refuse("commit", id_of(index), t, "must be FILLING");
    marks.add(index);
  });
  std::vector<PageId> dead;
  each("commit", ids, [&](std::int32_t index) {
    if (tier != Tier::Gpu) page_at(index).flags |= kSealed;
    move(index, t, Place::Pinned);
    settle(index, dead);
  });
  return dead;
}

std::vector<PageId> PageTable::abort(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  Marks marks(*this, "abort");
  each("abort", ids, [&](std::int32_t index) {
    const Page& page = page_at(index);
    if (page.places[t] != Place::Filling || page.copies[t].pins > 0) {
      refuse("abort", id_of(index), t, "must be FILLING and unpinned");
    }
    marks.add(index);
  });
  std::vector<PageId> dead;
  each("abort", ids, [&](std::int32_t index) {
    free_copy(index, t);
    settle(index, dead);
  });
  return dead;
}

void PageTable::drop(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  Marks marks(*this, "drop");
  each("drop", ids, [&](std::int32_t index) {
    const Page& page = page_at(index);
    if (!page.is_movable(t) || page.num_valid() < 2) {
      refuse("drop", id_of(index), t, "must be VALID, unpinned, and VALID in another tier too");
    }
    marks.add(index);
  });
  each("drop", ids, [&](std::int32_t index) {
    free_copy(index, t);
    settle(index);
  });
}

std::vector<PageId> PageTable::discard(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  Marks marks(*this, "discard");
  each("discard", ids, [&](std::int32_t index) {
    if (!page_at(index).is_movable(t))
      refuse("discard", id_of(index), t, "must be VALID and unpinned");
    marks.add(index);
  });
  std::vector<PageId> dead;
  each("discard", ids, [&](std::int32_t index) {
    free_copy(index, t);
    settle(index, dead);
  });
  return dead;
}

void PageTable::pin(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  each("pin", ids, [&](std::int32_t index) {
    if (page_at(index).places[t] == Place::Absent || page_at(index).is_dying()) {
      refuse("pin", id_of(index), t, "must be VALID or FILLING there, and not dying");
    }
  });
  each("pin", ids, [&](std::int32_t index) {
    ++page_at(index).copies[t].pins;
    settle(index);
  });
}

std::vector<PageId> PageTable::unpin(PageIds ids, Tier tier) {
  const std::size_t t = tier_number(tier);
  require_countdown(kUnpinNames[t], ids, "must be pinned there as often as it is given",
                    [t](Page& page) -> std::int32_t& { return page.copies[t].pins; });
  std::vector<PageId> dead;
  each("unpin", ids, [&](std::int32_t index) {
    --page_at(index).copies[t].pins;
    settle(index, dead);
  });
  return dead;
}

}  // namespace tiermem
