// What a page table answers without changing anything.
#include "page_table_batch.h"

namespace tiermem {

std::vector<Slot> PageTable::slots(PageIds ids, Tier tier) const {
  static_assert(kNoSlot == kNone);
  const std::size_t t = tier_number(tier);
  return read<Slot>("slots", ids, [t](const Page& page) { return Slot{page.copies[t].slot}; });
}

std::vector<CopyState> PageTable::states(PageIds ids, Tier tier) const {
  const std::size_t t = tier_number(tier);
  return read<CopyState>("states", ids, [t](const Page& page) {
    if (page.is_valid(t)) return CopyState::Valid;
    return page.places[t] == Place::Filling ? CopyState::Filling : CopyState::Absent;
  });
}

std::vector<std::int64_t> PageTable::pins(PageIds ids, Tier tier) const {
  const std::size_t t = tier_number(tier);
  return read<std::int64_t>("pins", ids,
                            [t](const Page& page) { return std::int64_t{page.copies[t].pins}; });
}

std::vector<std::int64_t> PageTable::refs(PageIds ids) const {
  return read<std::int64_t>("refs", ids, [](const Page& page) { return std::int64_t{page.refs}; });
}

std::vector<std::uint8_t> PageTable::has_pins(PageIds ids) const {
  return read<std::uint8_t>("has_pins", ids, [](const Page& page) {
    return std::any_of(page.copies.begin(), page.copies.end(),
                       [](const Copy& copy) { return copy.pins > 0; });
  });
}

std::vector<std::uint8_t> PageTable::is_sealed(PageIds ids) const {
  return read<std::uint8_t>("is_sealed", ids, [](const Page& page) { return page.has(kSealed); });
}

std::vector<std::uint8_t> PageTable::is_published(PageIds ids) const {
  return read<std::uint8_t>("is_published", ids,
                            [](const Page& page) { return page.has(kPublished); });
}

std::vector<std::uint8_t> PageTable::is_lost(PageIds ids) const {
  return read<std::uint8_t>("is_lost", ids, [](const Page& page) { return page.has(kLost); });
}

std::vector<std::uint8_t> PageTable::alive(PageIds ids) const {
  std::vector<std::uint8_t> answers;
  answers.reserve(ids.size());
  for (const PageId id : ids) answers.push_back(index_of(id) != kNone);
  return answers;
}

TierCounts PageTable::counts(Tier tier) const {
  const std::size_t t = tier_number(tier);
  const auto in = [&](Place place) { return num_in_place_[t][static_cast<std::size_t>(place)]; };
  return TierCounts{.slots = free_slots_[t].num_slots(),
                    .free = in(Place::Absent),
                    .filling = in(Place::Filling),
                    .droppable = in(Place::Droppable),
                    .redundant = in(Place::Redundant),
                    .dirty = in(Place::Dirty),
                    .pinned = in(Place::Pinned),
                    .open = in(Place::Open)};
}

}  // namespace tiermem
