// Attention that waits for its queries, for Python.
#include "tiermem/attention_queue.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tiermem;

namespace {

template <class T>
using TableIn = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr double kMostTeamSpinS = 1.0;

// Address of the word, value.
using FlagIn = std::pair<std::uintptr_t, std::uint32_t>;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

AttentionFlag flag(const FlagIn& given) {
  return {pointer<std::uint32_t>(given.first), given.second};
}

void make(AttentionQueue* self, std::size_t num_threads, const std::vector<int>& cpus,
          AttentionInstructions instructions, std::size_t capacity, double deadline_s,
          double spin_s) {
  // The queue looks at its own spin_s, which may be longer.
  const double team_spin_s = std::min(spin_s, kMostTeamSpinS);
  auto attention = std::make_unique<CpuAttention>(num_threads, cpus, instructions, team_spin_s);
  new (self) AttentionQueue(std::move(attention), {capacity, deadline_s, spin_s});
}

// One long function, for what it takes to name the arguments once. The queue checks sizes below 1.
AttentionQueue::Ticket submit(
    AttentionQueue& queue, FloatType type, std::int64_t num_kv_heads, std::int64_t page_tokens,
    std::int64_t head_dim, const TableIn<std::int64_t>& slices,
    const std::optional<TableIn<std::int32_t>>& starts, const ArrayIn<std::int32_t>& num_pages,
    const ArrayIn<std::int32_t>& kv_end, const ArrayIn<std::int32_t>& row_starts,
    const ArrayIn<std::int32_t>& q_start, std::uintptr_t q, std::int64_t row_stride,
    std::int64_t head_stride, std::int64_t num_heads, double scale,
    std::optional<std::int64_t> window, std::uintptr_t out, FloatType out_type, std::uintptr_t lse,
    const FlagIn& ready, const FlagIn& done, std::optional<std::uintptr_t> page_lse) {
  PageTables tables{slices.shape(1),     {slices.data(), slices.size()}, {}, span_of(num_pages),
                    span_of(kv_end), span_of(row_starts),            span_of(q_start)};
  if (starts) tables.starts = {starts->data(), starts->size()};
  const AttentionJob job{{type, static_cast<std::size_t>(num_kv_heads),
                          static_cast<std::size_t>(page_tokens), static_cast<std::size_t>(head_dim)},
                         tables,
                         {pointer<const void>(q), row_stride, head_stride,
                          static_cast<std::size_t>(num_heads), scale, window},
                         {out_type, pointer<void>(out), pointer<float>(lse),
                          pointer<float>(page_lse.value_or(0))},
                         flag(ready),
                         flag(done)};
  const nb::gil_scoped_release release;
  return queue.submit(job);
}

void bind_values(nb::module_& module) {
  nb::enum_<AttentionStatus>(module, "AttentionStatus")
      .value("PENDING", AttentionStatus::pending)
      .value("DONE", AttentionStatus::done)
      .value("FAILED", AttentionStatus::failed);
  nb::class_<AttentionOutcome>(module, "AttentionOutcome")
      .def_ro("status", &AttentionOutcome::status)
      .def_ro("message", &AttentionOutcome::message)
      .def_ro("waited_s", &AttentionOutcome::waited_s)
      .def_ro("attended_s", &AttentionOutcome::attended_s)
      .def_ro("bytes_read", &AttentionOutcome::bytes_read)
      .def_ro("is_reading", &AttentionOutcome::is_reading);
  nb::class_<AttentionCounters>(module, "AttentionCounters")
      .def_ro("submitted", &AttentionCounters::submitted)
      .def_ro("done", &AttentionCounters::done)
      .def_ro("failed", &AttentionCounters::failed)
      .def_ro("bytes_read", &AttentionCounters::bytes_read)
      .def_ro("waited_s", &AttentionCounters::waited_s)
      .def_ro("attended_s", &AttentionCounters::attended_s);
}

}  // namespace

void bind_attention_queue(nb::module_& module) {
  bind_values(module);
  constexpr AttentionQueueOptions defaults;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<AttentionQueue>(module, "AttentionQueue", nb::is_final())
      .def("__init__", &make, "num_threads"_a, nb::kw_only(), "cpus"_a = std::vector<int>{},
           "instructions"_a = AttentionInstructions::automatic, "capacity"_a = defaults.capacity,
           "deadline_s"_a = defaults.deadline_s, "spin_s"_a = defaults.spin_s)
      .def_prop_ro("num_threads", &AttentionQueue::num_threads)
      .def_prop_ro("instructions", &AttentionQueue::instructions)
      .def("submit", &submit, nb::kw_only(), "kv_type"_a, "num_kv_heads"_a, "page_tokens"_a,
           "head_dim"_a, "slices"_a.noconvert(), "starts"_a.none().noconvert(),
           "num_pages"_a.noconvert(), "kv_end"_a.noconvert(), "row_starts"_a.noconvert(),
           "q_start"_a.noconvert(), "q"_a, "row_stride"_a, "head_stride"_a, "num_heads"_a,
           "scale"_a, "window"_a.none(), "out"_a, "out_type"_a, "lse"_a, "ready"_a, "done"_a,
           "page_lse"_a.none() = nb::none())
      .def("poll", &AttentionQueue::poll, "ticket"_a, Release())
      .def("cancel", &AttentionQueue::cancel, "ticket"_a, Release())
      .def("forget", &AttentionQueue::forget, "ticket"_a, Release())
      .def("counters", &AttentionQueue::counters)
      .def("close", &AttentionQueue::close, "timeout_s"_a, Release());
}
