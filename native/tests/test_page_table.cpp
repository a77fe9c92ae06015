// Each transition of a page and of a copy, and each refusal.
#include <functional>
#include <limits>
#include <string>

#include "check.h"
#include "tiermem/errors.h"
#include "tiermem/page_table.h"

namespace {

using tiermem::CopyState;
using tiermem::InvariantError;
using tiermem::kNoSlot;
using tiermem::PageId;
using tiermem::PageTable;
using tiermem::Slot;
using tiermem::Tier;

using Ids = std::vector<PageId>;
using SlotList = std::vector<Slot>;
using Bits = std::vector<std::uint8_t>;

constexpr std::array kTiers = {Tier::Gpu, Tier::Ram, Tier::Ssd};

// Everything that can be seen of a table, as far as these pages are concerned.
std::vector<std::int64_t> picture(const PageTable& table, const Ids& pages) {
  std::vector<std::int64_t> seen = {table.num_pages()};
  const auto add = [&](const auto& values) {
    for (const auto value : values) seen.push_back(static_cast<std::int64_t>(value));
  };
  Ids ids;
  for (const PageId id : pages) {
    if (table.alive({&id, 1})[0]) ids.push_back(id);
  }
  add(ids), add(table.refs(ids)), add(table.is_sealed(ids)), add(table.is_published(ids));
  add(table.is_lost(ids));
  for (const Tier tier : kTiers) {
    add(table.slots(ids, tier)), add(table.states(ids, tier)), add(table.pins(ids, tier));
    add(table.coldest_dirty(tier, 1000));
    const tiermem::TierCounts c = table.counts(tier);
    add(Ids{c.free, c.filling, c.droppable, c.redundant, c.dirty, c.pinned, c.open});
  }
  return seen;
}

// Whether a call is refused, with a text that says all of `text`, and changes nothing.
bool refused(PageTable& table, const Ids& pages, const char* text,
             const std::function<void()>& call) {
  const auto before = picture(table, pages);
  bool threw = false;
  try {
    call();
  } catch (const InvariantError& error) {
    threw = std::string(error.what()).find(text) != std::string::npos;
    if (!threw) std::fprintf(stderr, "unexpected text: %s\n", error.what());
  }
  table.check();
  return threw && picture(table, pages) == before;
}

#define CHECK_REFUSED(text, ...) CHECK(refused(table, pages, text, [&] { __VA_ARGS__; }))

// Sealed pages, refs 1, VALID on the GPU.
Ids sealed_pages(PageTable& table, std::int64_t count) {
  Ids ids = table.create(count);
  table.reserve(ids, Tier::Gpu);
  table.commit(ids, Tier::Gpu);
  table.seal(ids);
  return ids;
}

void copy_to(PageTable& table, const Ids& ids, Tier tier) {
  table.reserve(ids, tier);
  table.commit(ids, tier);
}

void test_sizes() {
  CHECK_THROWS(std::invalid_argument, PageTable({0, 0, 0}));
  CHECK_THROWS(std::invalid_argument, PageTable({-1, 4, 4}));
  CHECK_THROWS(std::invalid_argument, PageTable({1, 4, std::int64_t{1} << 31}));
  CHECK(PageTable({1, 0, 0}).lowest_tier() == Tier::Gpu);
  CHECK(PageTable({0, 3, 0}).lowest_tier() == Tier::Ram);
  CHECK(PageTable({1, 0, 2}).lowest_tier() == Tier::Ssd);
}

void test_create() {
  PageTable table({2, 2, 2});
  const Ids pages = table.create(3);
  CHECK(pages.size() == 3 && table.num_pages() == 3);
  CHECK(table.refs(pages) == Ids({1, 1, 1}));
  CHECK(table.is_sealed(pages) == Bits({0, 0, 0}));
  CHECK(table.slots(pages, Tier::Gpu) == SlotList({kNoSlot, kNoSlot, kNoSlot}));
  CHECK(table.create(0).empty());
  CHECK_THROWS(std::invalid_argument, table.create(-1));
  CHECK_REFUSED("at most 2147483647", table.create(std::numeric_limits<std::int32_t>::max()));
}

void test_stale_ids() {
  PageTable table({4, 4, 4});
  const Ids old = table.create(2);
  CHECK(table.release(old) == old);
  CHECK(table.alive(old) == Bits({0, 0}));
  CHECK(table.alive(Ids{old[0] + (PageId{1} << 32)}) == Bits({0}));  // not yet
  const Ids pages = table.create(2);
  CHECK(pages[0] != old[0] && pages[0] != old[1] && pages[1] != old[0] && pages[1] != old[1]);
  CHECK(table.alive(Ids{-1, 0, 1, pages[0], pages[0] + (PageId{1} << 32), 77}) ==
        Bits({0, 0, 0, 1, 0, 0}));
  for (const PageId bad :
       {old[0], PageId{0}, PageId{-1}, pages[0] + (PageId{1} << 32), PageId{99}}) {
    const Ids ids = {pages[0], bad};
    CHECK_REFUSED("alive", table.add_ref(ids));
    CHECK_REFUSED("alive", table.release(ids));
    CHECK_REFUSED("alive", table.reserve(ids, Tier::Gpu));
    CHECK_REFUSED("alive", table.touch(ids));
    CHECK_REFUSED("alive", table.mark_lost(ids));
    CHECK_REFUSED("alive", table.slots(ids, Tier::Gpu));
    CHECK_REFUSED("alive", table.refs(ids));
  }
}

void test_reserve() {
  PageTable table({3, 3, 0});
  const Ids pages = table.create(4);
  CHECK(table.reserve(Ids{pages[2], pages[0]}, Tier::Gpu) == SlotList({0, 1}));
  CHECK(table.states(pages, Tier::Gpu)[0] == CopyState::Filling);
  CHECK(table.counts(Tier::Gpu).filling == 2 && table.counts(Tier::Gpu).free == 1);
  CHECK_REFUSED("at most the 1", table.reserve(Ids{pages[1], pages[3]}, Tier::Gpu));
  CHECK_REFUSED("at most the 0", table.reserve(Ids{pages[1]}, Tier::Ssd));
  CHECK_REFUSED("ABSENT", table.reserve(Ids{pages[0]}, Tier::Gpu));
  CHECK_REFUSED("once", table.reserve(Ids{pages[1], pages[1]}, Tier::Ram));
  CHECK_REFUSED("open without any other copy", table.reserve(Ids{pages[0]}, Tier::Ram));
  table.abort(Ids{pages[2]}, Tier::Gpu);
  CHECK(table.reserve(Ids{pages[3]}, Tier::Gpu) == SlotList({0}));
  CHECK(table.reserve(Ids{}, Tier::Gpu).empty());
}

void test_commit_and_abort() {
  PageTable table({4, 4, 4});
  const Ids pages = table.create(3);
  CHECK_REFUSED("FILLING", table.commit(pages, Tier::Gpu));
  table.reserve(pages, Tier::Gpu);
  table.pin(Ids{pages[0]}, Tier::Gpu);
  CHECK_REFUSED("unpinned", table.abort(Ids{pages[1], pages[0]}, Tier::Gpu));
  CHECK_REFUSED("once", table.commit(Ids{pages[1], pages[1]}, Tier::Gpu));
  CHECK_REFUSED("once", table.abort(Ids{pages[1], pages[1]}, Tier::Gpu));
  CHECK(table.commit(Ids{pages[0], pages[1]}, Tier::Gpu).empty());
  CHECK(table.counts(Tier::Gpu).pinned == 1 && table.counts(Tier::Gpu).open == 1);
  CHECK(table.abort(Ids{pages[2]}, Tier::Gpu).empty());
  CHECK(table.slots(pages, Tier::Gpu) == SlotList({0, 1, kNoSlot}));
  CHECK_REFUSED("FILLING", table.abort(Ids{pages[1]}, Tier::Gpu));
  CHECK_REFUSED("FILLING", table.commit(Ids{pages[1]}, Tier::Gpu));
}

void test_seal_and_reopen() {
  PageTable table({4, 4, 4});
  const Ids pages = table.create(2);
  CHECK_REFUSED("VALID in tier gpu", table.seal(pages));
  table.reserve(pages, Tier::Gpu);
  CHECK_REFUSED("VALID in tier gpu", table.seal(pages));
  table.commit(pages, Tier::Gpu);
  CHECK_REFUSED("once", table.seal(Ids{pages[0], pages[0]}));
  CHECK_REFUSED("must be sealed", table.reopen(pages));
  table.seal(pages);
  CHECK_REFUSED("must be open", table.seal(pages));
  CHECK(table.counts(Tier::Gpu).dirty == 2 && table.counts(Tier::Gpu).open == 0);
  CHECK_REFUSED("once", table.reopen(Ids{pages[0], pages[0]}));
  table.reopen(Ids{pages[0]});
  CHECK(table.counts(Tier::Gpu).dirty == 1 && table.counts(Tier::Gpu).open == 1);
  table.add_ref(Ids{pages[1]});
  CHECK_REFUSED("refs 1", table.reopen(Ids{pages[1]}));
  table.release(Ids{pages[1]});
  table.reserve(Ids{pages[1]}, Tier::Ram);
  CHECK_REFUSED("alone", table.reopen(Ids{pages[1]}));
  table.commit(Ids{pages[1]}, Tier::Ram);
  CHECK_REFUSED("alone", table.reopen(Ids{pages[1]}));
  table.drop(Ids{pages[1]}, Tier::Gpu);
  CHECK_REFUSED("VALID in tier gpu", table.reopen(Ids{pages[1]}));
  copy_to(table, {pages[1]}, Tier::Gpu);
  table.drop(Ids{pages[1]}, Tier::Ram);
  table.publish(Ids{pages[1]});
  CHECK_REFUSED("not be published", table.reopen(Ids{pages[1]}));
  table.unpublish(Ids{pages[1]});
  table.mark_lost(Ids{pages[1]});
  CHECK_REFUSED("lost", table.reopen(Ids{pages[1]}));
}

void test_write_through() {
  // Created open, FILLING in a lower tier; the commit seals it.
  PageTable table({2, 2, 2});
  const Ids pages = table.create(2);
  table.reserve(pages, Tier::Ram);
  CHECK_REFUSED("VALID in tier gpu", table.seal(pages));
  CHECK_REFUSED("open without any other copy", table.reserve(pages, Tier::Gpu));
  table.commit(Ids{pages[0]}, Tier::Ram);
  CHECK(table.is_sealed(pages) == Bits({1, 0}));
  CHECK(table.counts(Tier::Ram).dirty == 1);
  table.abort(Ids{pages[1]}, Tier::Ram);
  CHECK(table.is_sealed(pages) == Bits({1, 0}) && table.is_lost(pages) == Bits({0, 0}));
  copy_to(table, {pages[0]}, Tier::Gpu);
  table.drop(Ids{pages[0]}, Tier::Ram);
  table.reopen(Ids{pages[0]});
  CHECK(table.counts(Tier::Gpu).open == 1);
}

void test_drop() {
  PageTable table({4, 4, 4});
  const Ids pages = sealed_pages(table, 2);
  CHECK_REFUSED("another tier", table.drop(pages, Tier::Gpu));
  table.reserve(pages, Tier::Ram);
  CHECK_REFUSED("another tier", table.drop(pages, Tier::Gpu));
  CHECK_REFUSED("VALID", table.drop(pages, Tier::Ram));
  table.commit(pages, Tier::Ram);
  table.pin(Ids{pages[0]}, Tier::Gpu);
  CHECK_REFUSED("unpinned", table.drop(Ids{pages[1], pages[0]}, Tier::Gpu));
  CHECK_REFUSED("once", table.drop(Ids{pages[1], pages[1]}, Tier::Gpu));
  CHECK_REFUSED("VALID", table.drop(pages, Tier::Ssd));
  table.drop(Ids{pages[1]}, Tier::Gpu);
  CHECK(table.slots(pages, Tier::Gpu) == SlotList({0, kNoSlot}));
  table.drop(Ids{pages[0]}, Tier::Ram);
  CHECK(table.counts(Tier::Ram).dirty == 1 && table.counts(Tier::Ram).free == 3);
}

void test_discard() {
  PageTable table({4, 4, 4});
  const Ids pages = sealed_pages(table, 3);
  copy_to(table, {pages[0]}, Tier::Ram);
  CHECK_REFUSED("once", table.discard(Ids{pages[0], pages[0]}, Tier::Gpu));
  CHECK_REFUSED("VALID", table.discard(Ids{pages[0], pages[1]}, Tier::Ram));
  CHECK(table.discard(Ids{pages[0]}, Tier::Gpu).empty());
  CHECK(table.is_lost(pages) == Bits({0, 0, 0}));
  table.pin(Ids{pages[1]}, Tier::Gpu);
  CHECK_REFUSED("unpinned", table.discard(Ids{pages[1]}, Tier::Gpu));
  table.unpin(Ids{pages[1]}, Tier::Gpu);
  CHECK(table.discard(Ids{pages[1]}, Tier::Gpu).empty());
  CHECK(table.is_lost(pages) == Bits({0, 1, 0}));
  CHECK_REFUSED("not lost", table.publish(Ids{pages[1]}));
  table.publish(Ids{pages[2]});
  table.release(Ids{pages[2]});
  CHECK(table.discard(Ids{pages[2]}, Tier::Gpu) == Ids({pages[2]}));
  CHECK(table.release(Ids{pages[1]}) == Ids({pages[1]}));
  table.check();
}

void test_pins() {
  PageTable table({4, 4, 4});
  const Ids pages = sealed_pages(table, 2);
  CHECK_REFUSED("VALID or FILLING", table.pin(pages, Tier::Ram));
  table.pin(Ids{pages[0], pages[0], pages[1]}, Tier::Gpu);
  CHECK(table.pins(pages, Tier::Gpu) == Ids({2, 1}) && table.counts(Tier::Gpu).pinned == 2);
  CHECK(table.has_pins(pages) == Bits({1, 1}));
  CHECK_REFUSED("unpin in tier gpu", table.unpin(Ids{pages[0], pages[0], pages[0]}, Tier::Gpu));
  CHECK_REFUSED("as often", table.unpin(Ids{pages[0], pages[1], pages[1]}, Tier::Gpu));
  CHECK_REFUSED("pinned", table.unpin(pages, Tier::Ram));
  table.unpin(Ids{pages[0], pages[1]}, Tier::Gpu);
  CHECK(table.pins(pages, Tier::Gpu) == Ids({1, 0}));
  CHECK(table.coldest_dirty(Tier::Gpu, 9) == Ids({pages[1]}));
  table.unpin(Ids{pages[0]}, Tier::Gpu);
  CHECK(table.coldest_dirty(Tier::Gpu, 9) == Ids({pages[1], pages[0]}));
}

void test_pin_of_a_filling_copy() {
  PageTable table({4, 4, 4});
  const Ids pages = table.create(1);
  table.reserve(pages, Tier::Gpu);
  table.pin(pages, Tier::Gpu);
  CHECK(table.counts(Tier::Gpu).filling == 1 && table.counts(Tier::Gpu).pinned == 0);
  table.commit(pages, Tier::Gpu);
  CHECK(table.counts(Tier::Gpu).filling == 0 && table.counts(Tier::Gpu).pinned == 1);
  table.unpin(pages, Tier::Gpu);
  CHECK(table.counts(Tier::Gpu).open == 1);
}

void test_death() {
  PageTable table({4, 4, 4});
  const Ids pages = sealed_pages(table, 3);
  table.add_ref(Ids{pages[0]});
  CHECK_REFUSED("as often", table.release(Ids{pages[1], pages[0], pages[0], pages[0]}));
  CHECK(table.release(Ids{pages[1], pages[0], pages[0]}) == Ids({pages[1], pages[0]}));
  CHECK(table.counts(Tier::Gpu).free == 3 && table.num_pages() == 1);

  // Dying: a demotion reads the GPU copy and fills one in RAM.
  const Ids dying = {pages[2]};
  table.pin(dying, Tier::Gpu);
  table.reserve(dying, Tier::Ram);
  CHECK(table.release(dying).empty() && table.alive(dying) == Bits({1}));
  CHECK_REFUSED("dying", table.add_ref(dying));
  CHECK_REFUSED("dying", table.publish(dying));
  CHECK_REFUSED("dying", table.pin(dying, Tier::Gpu));
  CHECK_REFUSED("dying", table.reserve(dying, Tier::Ssd));
  CHECK_REFUSED("referred", table.release(dying));
  CHECK(table.commit(dying, Tier::Ram).empty());
  CHECK(table.counts(Tier::Ram).free == 4);
  CHECK(table.unpin(dying, Tier::Gpu) == dying);
  CHECK(table.num_pages() == 0 && table.counts(Tier::Gpu).free == 4);
}

void test_death_at_the_end_of_a_fill() {
  for (const bool is_commit : {true, false}) {
    PageTable table({4, 4, 4});
    const Ids pages = table.create(1);
    table.reserve(pages, Tier::Gpu);
    CHECK(table.release(pages).empty());
    CHECK_REFUSED("not dying", table.seal(pages));
    CHECK((is_commit ? table.commit(pages, Tier::Gpu) : table.abort(pages, Tier::Gpu)) == pages);
    CHECK(table.counts(Tier::Gpu).free == 4);
    table.check();
  }
}

void test_publish() {
  PageTable table({4, 4, 4});
  Ids pages = sealed_pages(table, 2);
  pages.push_back(table.create(1)[0]);
  CHECK_REFUSED("must be sealed", table.publish(Ids{pages[0], pages[2]}));
  CHECK_REFUSED("once", table.publish(Ids{pages[0], pages[0]}));
  CHECK_REFUSED("must be published", table.unpublish(Ids{pages[0]}));
  table.publish(Ids{pages[0], pages[1]});
  CHECK_REFUSED("not published", table.publish(Ids{pages[0]}));
  CHECK(table.release(Ids{pages[0], pages[1]}).empty() && table.num_pages() == 3);
  table.add_ref(Ids{pages[1]});
  CHECK_REFUSED("once", table.unpublish(Ids{pages[0], pages[0]}));
  CHECK(table.unpublish(Ids{pages[0], pages[1]}) == Ids({pages[0]}));
  CHECK(table.release(Ids{pages[1]}) == Ids({pages[1]}));
}

void test_create_stored() {
  PageTable table({2, 2, 5});
  Ids pages = table.create_stored(Tier::Ssd, SlotList{4, 1});
  CHECK(table.slots(pages, Tier::Ssd) == SlotList({4, 1}));
  CHECK(table.is_sealed(pages) == Bits({1, 1}) && table.is_published(pages) == Bits({1, 1}));
  CHECK(table.refs(pages) == Ids({0, 0}) && table.counts(Tier::Ssd).droppable == 2);
  CHECK_REFUSED("slot 4", table.create_stored(Tier::Ssd, SlotList{0, 4}));
  CHECK_REFUSED("slot 0", table.create_stored(Tier::Ssd, SlotList{0, 0}));
  CHECK_REFUSED("slot 5", table.create_stored(Tier::Ssd, SlotList{0, 5}));
  CHECK_REFUSED("slot -1", table.create_stored(Tier::Ssd, SlotList{-1}));
  const Ids more = sealed_pages(table, 2);
  CHECK(table.reserve(more, Tier::Ssd) == SlotList({0, 2}));
  const auto evicted = table.evict(Tier::Ssd, 9);
  CHECK(evicted.dropped == pages && evicted.dead == pages);
}

void test_places() {
  // One page seen in all three lists, by where its other copies are.
  PageTable table({2, 2, 2});
  const Ids page = sealed_pages(table, 1);
  CHECK(table.counts(Tier::Gpu).dirty == 1);
  copy_to(table, page, Tier::Ssd);
  CHECK(table.counts(Tier::Gpu).droppable == 1 && table.counts(Tier::Ssd).redundant == 1);
  copy_to(table, page, Tier::Ram);
  CHECK(table.counts(Tier::Ram).droppable == 1);
  table.drop(page, Tier::Ssd);
  CHECK(table.counts(Tier::Ram).redundant == 1 && table.counts(Tier::Gpu).droppable == 1);
  table.drop(page, Tier::Gpu);
  CHECK(table.counts(Tier::Ram).dirty == 1);
  copy_to(table, page, Tier::Ssd);
  table.drop(page, Tier::Ram);
  CHECK(table.counts(Tier::Ssd).dirty == 1);
  table.publish(page);
  table.release(page);
  CHECK(table.counts(Tier::Ssd).droppable == 1);
  table.add_ref(page);
  CHECK(table.counts(Tier::Ssd).dirty == 1);
  table.check();
}

void test_evict() {
  PageTable table({4, 4, 4});
  const Ids pages = sealed_pages(table, 4);
  CHECK(table.evict(Tier::Gpu, 4).dropped.empty());
  CHECK(table.coldest_dirty(Tier::Gpu, 2) == Ids({pages[0], pages[1]}));
  copy_to(table, {pages[0], pages[1], pages[2]}, Tier::Ram);
  table.touch(Ids{pages[0]});
  table.pin(Ids{pages[1]}, Tier::Gpu);
  CHECK(table.evict(Tier::Gpu, 1).dropped == Ids({pages[2]}));
  const auto evicted = table.evict(Tier::Gpu, 9);
  CHECK(evicted.dropped == Ids({pages[0]}) && evicted.dead.empty());
  CHECK(table.evict_redundant(Tier::Ram, 9).dropped == Ids({pages[1]}));
  CHECK_THROWS(std::invalid_argument, table.evict(Tier::Gpu, -1));
  CHECK_THROWS(std::invalid_argument, table.evict_redundant(Tier::Gpu, -1));
  CHECK_THROWS(std::invalid_argument, table.coldest_dirty(Tier::Gpu, -1));
  table.check();
}

void test_eviction_is_leaf_first() {
  PageTable table({4, 0, 4});
  const Ids pages = sealed_pages(table, 3);
  copy_to(table, pages, Tier::Ssd);
  table.publish(pages);
  table.release(Ids{pages[2], pages[1], pages[0]});
  const auto cold = table.evict(Tier::Ssd, 1);
  CHECK(cold.dropped == Ids({pages[2]}) && cold.dead.empty());
  CHECK(table.coldest_dirty(Tier::Gpu, 9) == Ids({pages[2]}));
  CHECK(table.evict(Tier::Gpu, 9).dropped == Ids({pages[1], pages[0]}));
  CHECK(table.evict(Tier::Ssd, 9).dead == Ids({pages[1], pages[0]}));
  table.check();
}

void test_lost() {
  PageTable table({4, 4, 4});
  const Ids pages = table.create(2);
  table.mark_lost(Ids{pages[0], pages[0]});
  CHECK(table.is_lost(pages) == Bits({1, 0}));
  CHECK(table.release(pages) == pages);
  CHECK(table.is_lost(table.create(2)) == Bits({0, 0}));
}

}  // namespace

int main() {
  test_sizes();
  test_create();
  test_stale_ids();
  test_reserve();
  test_commit_and_abort();
  test_seal_and_reopen();
  test_write_through();
  test_drop();
  test_discard();
  test_pins();
  test_pin_of_a_filling_copy();
  test_death();
  test_death_at_the_end_of_a_fill();
  test_publish();
  test_create_stored();
  test_places();
  test_evict();
  test_eviction_is_leaf_first();
  test_lost();
  return tiermem_test::report("page_table");
}
