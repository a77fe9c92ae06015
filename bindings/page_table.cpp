#include "tiermem/page_table.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <string>

#include "arrays.h"
#include "bindings.h"
#include "tiermem/errors.h"

namespace nb = nanobind;
using namespace nb::literals;
using tiermem::CopyState;
using tiermem::PageIds;
using tiermem::PageTable;
using tiermem::Tier;
using tiermem::TierCounts;

namespace {

using Ids = ArrayIn<std::int64_t>;

Tier tier_of(int number) {
  if (number < 0 || number >= static_cast<int>(tiermem::kNumTiers)) {
    throw nb::value_error(("tier=" + std::to_string(number) + ": must be in [0, 2]").c_str());
  }
  return static_cast<Tier>(number);
}

// Callables for the three shapes that the methods of a page table have.
template <auto kMethod>
auto on_ids() {
  return [](PageTable& table, const Ids& ids) { (table.*kMethod)(span_of(ids)); };
}

template <auto kMethod>
auto on_copies() {
  return [](PageTable& table, const Ids& ids, int tier) {
    (table.*kMethod)(span_of(ids), tier_of(tier));
  };
}

template <class As, auto kMethod>
auto answer_ids() {
  return
      [](PageTable& table, const Ids& ids) { return to_array<As>((table.*kMethod)(span_of(ids))); };
}

template <class As, auto kMethod>
auto answer_copies() {
  return [](PageTable& table, const Ids& ids, int tier) {
    return to_array<As>((table.*kMethod)(span_of(ids), tier_of(tier)));
  };
}

template <auto kMethod>
auto evict_with() {
  return [](PageTable& table, int tier, std::int64_t count) {
    PageTable::Evicted evicted = (table.*kMethod)(tier_of(tier), count);
    return std::pair(to_array<std::int64_t>(std::move(evicted.dropped)),
                     to_array<std::int64_t>(std::move(evicted.dead)));
  };
}

std::string text_of(const TierCounts& counts) {
  const auto field = [](const char* name, std::int64_t value) {
    return std::string(", ") + name + "=" + std::to_string(value);
  };
  return "TierCounts(slots=" + std::to_string(counts.slots) + field("free", counts.free) +
         field("filling", counts.filling) + field("droppable", counts.droppable) +
         field("redundant", counts.redundant) + field("dirty", counts.dirty) +
         field("pinned", counts.pinned) + field("open", counts.open) + ")";
}

void bind_values(nb::module_& module) {
  nb::enum_<Tier>(module, "Tier", nb::is_arithmetic())
      .value("GPU", Tier::Gpu)
      .value("RAM", Tier::Ram)
      .value("SSD", Tier::Ssd);
  nb::enum_<CopyState>(module, "CopyState", nb::is_arithmetic())
      .value("ABSENT", CopyState::Absent)
      .value("FILLING", CopyState::Filling)
      .value("VALID", CopyState::Valid);
  nb::class_<TierCounts>(module, "TierCounts")
      .def_ro("slots", &TierCounts::slots)
      .def_ro("free", &TierCounts::free)
      .def_ro("filling", &TierCounts::filling)
      .def_ro("droppable", &TierCounts::droppable)
      .def_ro("redundant", &TierCounts::redundant)
      .def_ro("dirty", &TierCounts::dirty)
      .def_ro("pinned", &TierCounts::pinned)
      .def_ro("open", &TierCounts::open)
      .def("__repr__", &text_of);
  module.attr("NO_SLOT") = tiermem::kNoSlot;
}

void bind_transitions(nb::class_<PageTable>& table) {
  const auto ids = [] { return nb::arg("ids").noconvert(); };
  table
      .def(
          "create",
          [](PageTable& self, std::int64_t count) {
            return to_array<std::int64_t>(self.create(count));
          },
          "count"_a)
      .def(
          "create_stored",
          [](PageTable& self, int tier, const Ids& slots) {
            return to_array<std::int64_t>(self.create_stored(tier_of(tier), span_of(slots)));
          },
          "tier"_a, nb::arg("slots").noconvert())
      .def("add_ref", on_ids<&PageTable::add_ref>(), ids())
      .def("release", answer_ids<std::int64_t, &PageTable::release>(), ids())
      .def("publish", on_ids<&PageTable::publish>(), ids())
      .def("unpublish", answer_ids<std::int64_t, &PageTable::unpublish>(), ids())
      .def("seal", on_ids<&PageTable::seal>(), ids())
      .def("reopen", on_ids<&PageTable::reopen>(), ids())
      .def("mark_lost", on_ids<&PageTable::mark_lost>(), ids())
      .def("reserve", answer_copies<std::int64_t, &PageTable::reserve>(), ids(), "tier"_a)
      .def("commit", answer_copies<std::int64_t, &PageTable::commit>(), ids(), "tier"_a)
      .def("abort", answer_copies<std::int64_t, &PageTable::abort>(), ids(), "tier"_a)
      .def("drop", on_copies<&PageTable::drop>(), ids(), "tier"_a)
      .def("discard", answer_copies<std::int64_t, &PageTable::discard>(), ids(), "tier"_a)
      .def("pin", on_copies<&PageTable::pin>(), ids(), "tier"_a)
      .def("unpin", answer_copies<std::int64_t, &PageTable::unpin>(), ids(), "tier"_a)
      .def("touch", on_ids<&PageTable::touch>(), ids())
      .def("evict", evict_with<&PageTable::evict>(), "tier"_a, "count"_a)
      .def("evict_redundant", evict_with<&PageTable::evict_redundant>(), "tier"_a, "count"_a);
}

void bind_questions(nb::class_<PageTable>& table) {
  const auto ids = [] { return nb::arg("ids").noconvert(); };
  table
      .def(
          "coldest_dirty",
          [](const PageTable& self, int tier, std::int64_t count) {
            return to_array<std::int64_t>(self.coldest_dirty(tier_of(tier), count));
          },
          "tier"_a, "count"_a)
      .def("slots", answer_copies<std::int64_t, &PageTable::slots>(), ids(), "tier"_a)
      .def("states", answer_copies<std::uint8_t, &PageTable::states>(), ids(), "tier"_a)
      .def("pins", answer_copies<std::int64_t, &PageTable::pins>(), ids(), "tier"_a)
      .def("refs", answer_ids<std::int64_t, &PageTable::refs>(), ids())
      .def("has_pins", answer_ids<bool, &PageTable::has_pins>(), ids())
      .def("is_sealed", answer_ids<bool, &PageTable::is_sealed>(), ids())
      .def("is_published", answer_ids<bool, &PageTable::is_published>(), ids())
      .def("is_lost", answer_ids<bool, &PageTable::is_lost>(), ids())
      .def("alive", answer_ids<bool, &PageTable::alive>(), ids())
      .def(
          "counts", [](const PageTable& self, int tier) { return self.counts(tier_of(tier)); },
          "tier"_a)
      .def("check", &PageTable::check)
      .def_prop_ro("num_pages", &PageTable::num_pages)
      .def_prop_ro("lowest_tier", &PageTable::lowest_tier);
}

}  // namespace

void bind_page_table(nb::module_& module) {
  bind_values(module);
  nb::class_<PageTable> table(module, "PageTable");
  table.def(
      "__init__",
      [](PageTable* self, std::int64_t gpu, std::int64_t ram, std::int64_t ssd) {
        new (self) PageTable({gpu, ram, ssd});
      },
      "gpu"_a, "ram"_a, "ssd"_a);
  bind_transitions(table);
  bind_questions(table);
}
