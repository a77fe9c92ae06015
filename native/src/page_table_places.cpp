// Which place a copy belongs to, the LRU lists, and the choice of victims.
#include <stdexcept>
#include <string>

#include "page_table_batch.h"

namespace tiermem {

std::size_t PageTable::Page::num_valid() const {
  std::size_t count = 0;
  for (std::size_t tier = 0; tier < kNumTiers; ++tier) count += is_valid(tier);
  return count;
}

std::size_t PageTable::Page::num_copies() const {
  std::size_t count = 0;
  for (const Place place : places) count += place != Place::Absent;
  return count;
}

// The place of a VALID copy, from the state of its page. This is the definition; `settle` applies
// it.
PageTable::Place PageTable::place_for(const Page& page, std::size_t tier) const {
  if (page.copies[tier].pins > 0) return Place::Pinned;
  if (!page.has(kSealed)) return Place::Open;
  for (std::size_t lower = tier + 1; lower < kNumTiers; ++lower) {
    if (page.is_valid(lower)) return Place::Droppable;
  }
  if (tier == tier_number(lowest_) && page.refs == 0) return Place::Droppable;
  for (std::size_t higher = 0; higher < tier; ++higher) {
    if (page.is_valid(higher)) return Place::Redundant;
  }
  return Place::Dirty;
}

void PageTable::unlink(std::int32_t index, std::size_t tier) {
  List& list = list_of(tier, page_at(index).places[tier]);
  Copy& copy = page_at(index).copies[tier];
  (copy.prev == kNone ? list.cold : page_at(copy.prev).copies[tier].next) = copy.next;
  (copy.next == kNone ? list.hot : page_at(copy.next).copies[tier].prev) = copy.prev;
  copy.prev = copy.next = kNone;
}

void PageTable::append(std::int32_t index, std::size_t tier) {
  List& list = list_of(tier, page_at(index).places[tier]);
  Copy& copy = page_at(index).copies[tier];
  copy.prev = list.hot;
  copy.next = kNone;
  (list.hot == kNone ? list.cold : page_at(list.hot).copies[tier].next) = index;
  list.hot = index;
}

void PageTable::move(std::int32_t index, std::size_t tier, Place place) {
  Place& now = page_at(index).places[tier];
  if (is_listed(now)) unlink(index, tier);
  --num_in_place_[tier][static_cast<std::size_t>(now)];
  now = place;
  ++num_in_place_[tier][static_cast<std::size_t>(now)];
  if (is_listed(now)) append(index, tier);
}

void PageTable::to_hot_end(std::int32_t index, std::size_t tier) {
  if (!is_listed(page_at(index).places[tier]) || page_at(index).copies[tier].next == kNone) return;
  unlink(index, tier);
  append(index, tier);
}

void PageTable::free_copy(std::int32_t index, std::size_t tier) {
  Page& page = page_at(index);
  const bool was_valid = page.is_valid(tier);
  move(index, tier, Place::Absent);
  free_slots_[tier].give_back(page.copies[tier].slot);
  page.copies[tier] = Copy{};
  if (was_valid && page.num_valid() == 0 && !page.is_dying()) page.flags |= kLost;
}

// Brings a page to the state that its refs, flags and pins ask for: every copy in its place, and
// what is left of a dying page freed.
void PageTable::settle(std::int32_t index) {
  Page& page = page_at(index);
  for (std::size_t tier = 0; tier < kNumTiers; ++tier) {
    if (page.is_dying() && page.is_movable(tier)) {
      free_copy(index, tier);
    } else if (page.is_valid(tier) && page.places[tier] != place_for(page, tier)) {
      move(index, tier, place_for(page, tier));
    }
  }
}

void PageTable::settle(std::int32_t index, std::vector<PageId>& dead) {
  settle(index);
  if (page_at(index).refs > 0 || page_at(index).num_copies() > 0) return;
  dead.push_back(id_of(index));
  die(index);
}

void PageTable::touch(PageIds ids) {
  each("touch", ids, [](std::int32_t) {});
  each("touch", ids, [this](std::int32_t index) {
    for (std::size_t tier = 0; tier < kNumTiers; ++tier) to_hot_end(index, tier);
  });
}

PageTable::Evicted PageTable::evict_from(Place place, Tier tier, std::int64_t count) {
  require_count("evict", count);
  const std::size_t t = tier_number(tier);
  Evicted evicted;
  for (std::int64_t i = 0; i < count && list_of(t, place).cold != kNone; ++i) {
    const std::int32_t index = list_of(t, place).cold;
    evicted.dropped.push_back(id_of(index));
    free_copy(index, t);
    settle(index, evicted.dead);
  }
  return evicted;
}

PageTable::Evicted PageTable::evict(Tier tier, std::int64_t count) {
  return evict_from(Place::Droppable, tier, count);
}

PageTable::Evicted PageTable::evict_redundant(Tier tier, std::int64_t count) {
  return evict_from(Place::Redundant, tier, count);
}

std::vector<PageId> PageTable::coldest_dirty(Tier tier, std::int64_t count) const {
  require_count("coldest_dirty", count);
  const std::size_t t = tier_number(tier);
  std::vector<PageId> ids;
  std::int32_t index = list_of(t, Place::Dirty).cold;
  for (std::int64_t i = 0; i < count && index != kNone; ++i) {
    ids.push_back(id_of(index));
    index = page_at(index).copies[t].next;
  }
  return ids;
}

}  // namespace tiermem
