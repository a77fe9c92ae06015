// Copies for Python: the engine that drives a GPU's driver, copies within host memory, and the
// first touch of a pool.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "tiermem/copy_engine.h"
#include "tiermem/host_memory.h"
#include "tiermem/memory_reader.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tiermem;

namespace {

using Numbers = ArrayIn<std::int64_t>;
using Methods = ArrayIn<std::uint8_t>;

void check_pieces(const Numbers& dst, const Numbers& src, const Numbers& bytes) {
  if (dst.size() != src.size() || dst.size() != bytes.size()) {
    throw nb::value_error("dst, src and num_bytes must have as many pieces");
  }
  const auto sizes = span_of(bytes);
  const auto smallest = std::min_element(sizes.begin(), sizes.end());
  if (smallest != sizes.end() && *smallest < 1) {
    throw nb::value_error(
        ("num_bytes=" + std::to_string(*smallest) + ": a piece must be at least 1 byte").c_str());
  }
}

CopyDirection direction_of(int number) {
  if (number < 0 || number >= static_cast<int>(kNumCopyDirections)) {
    throw nb::value_error(("direction=" + std::to_string(number) + ": must be in [0, 2]").c_str());
  }
  return static_cast<CopyDirection>(number);
}

void choose(CopyEngine& engine, int direction, bool busy, const Methods& methods) {
  CopyChoices choices;
  if (methods.size() != CopyChoices::kNumSizes * CopyChoices::kNumRuns) {
    throw nb::value_error("methods: must have NUM_COPY_SIZES × NUM_COPY_RUNS entries");
  }
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const std::uint8_t method = methods.data()[i];
    if (method > static_cast<std::uint8_t>(CopyMethod::Kernel)) {
      throw nb::value_error(("methods: " + std::to_string(method) + " is none").c_str());
    }
    choices.methods[i / CopyChoices::kNumRuns][i % CopyChoices::kNumRuns] =
        static_cast<CopyMethod>(method);
  }
  engine.choose(direction_of(direction), busy, choices);
}

void set_borders(CopyEngine& engine, const Numbers& borders) {
  const auto values = span_of(borders);
  if (!std::is_sorted(values.begin(), values.end())) {
    throw nb::value_error("borders: must ascend");
  }
  engine.set_borders({values.begin(), values.end()});
}

// The call that the driver refused, and CUDA's code; or none.
using Refusal = std::optional<std::pair<std::string, int>>;

Refusal warm_up(CopyEngine& engine, StreamHandle stream) {
  try {
    engine.warm_up(stream);
  } catch (const CopyRefused& refused) {
    return std::pair<std::string, int>(refused.what(), refused.code());
  }
  return std::nullopt;
}

Refusal submit(CopyEngine& engine, int direction, const Numbers& dst, const Numbers& src,
               const Numbers& bytes, StreamHandle stream, StreamOwner owner) {
  check_pieces(dst, src, bytes);
  const CopyDirection way = direction_of(direction);
  const nb::gil_scoped_release release;
  try {
    engine.submit(way, span_of(dst), span_of(src), span_of(bytes), stream, owner);
  } catch (const CopyRefused& refused) {
    return std::pair<std::string, int>(refused.what(), refused.code());
  }
  return std::nullopt;
}

void bind_engine(nb::module_& module) {
  nb::enum_<StreamOwner>(module, "StreamOwner")
      .value("DEVICE", StreamOwner::Device)
      .value("OTHER", StreamOwner::Other);
  nb::class_<CopyCalls>(module, "CopyCalls")
      .def(nb::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t>(),
           nb::kw_only(), "copy"_a, "copy_batch"_a, "launch"_a, "record"_a, "query"_a, "wait"_a);
  nb::class_<CopyKernel>(module, "CopyKernel")
      .def(nb::init<KernelHandle, unsigned, unsigned, unsigned>(), nb::kw_only(), "function"_a = 0,
           "blocks"_a = 0, "threads"_a = 0, "shared_bytes"_a = 0);
  nb::class_<CopyKernels>(module, "CopyKernels")
      .def(nb::init<CopyKernel, CopyKernel>(), nb::kw_only(), "any"_a, "aligned"_a);
  nb::class_<CopyStaging>(module, "CopyStaging")
      .def(nb::init<std::uint64_t, std::uint64_t, StreamHandle, std::vector<EventHandle>>(),
           nb::kw_only(), "address"_a = 0, "stage_bytes"_a = 0, "stream"_a = 0,
           "events"_a = std::vector<EventHandle>{});
  nb::class_<CopyEngine>(module, "CopyEngine")
      .def(
          "__init__",
          [](CopyEngine* engine, const CopyCalls& calls, const CopyKernels& link,
             const CopyKernels& spread, const std::pair<CopyStaging, CopyStaging>& staging,
             const std::pair<EventHandle, EventHandle>& last, std::size_t pieces_per_call) {
            if (pieces_per_call < 1) {
              throw nb::value_error("pieces_per_call=0: must be at least 1");
            }
            new (engine) CopyEngine(calls, {link,
                                            spread,
                                            {staging.first, staging.second},
                                            {last.first, last.second},
                                            pieces_per_call});
          },
          "calls"_a, nb::kw_only(), "link"_a, "spread"_a, "staging"_a, "last"_a,
          "pieces_per_call"_a)
      .def("choose", &choose, "direction"_a, "busy"_a, "methods"_a.noconvert())
      .def("set_borders", &set_borders, "borders"_a.noconvert())
      .def("warm_up", &warm_up, "stream"_a)
      .def("submit", &submit, "direction"_a, "dst"_a.noconvert(), "src"_a.noconvert(),
           "num_bytes"_a.noconvert(), "stream"_a, "owner"_a);
  module.attr("NUM_COPY_SIZES") = CopyChoices::kNumSizes;
  module.attr("NUM_COPY_RUNS") = CopyChoices::kNumRuns;
}

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  throw nb::value_error((std::string(name) + "=" + std::to_string(value) + ": must be in [" +
                         std::to_string(least) + ", " + std::to_string(most) + "]")
                            .c_str());
}

// A toucher that knows its size, so that no wait is for more.
class Toucher {
 public:
  Toucher(std::int64_t address, std::int64_t num_bytes, int value, int num_threads)
      : num_bytes_(num_bytes) {
    check_range("num_bytes", num_bytes, 1, INT64_MAX);
    check_range("value", value, 0, 255);
    check_range("num_threads", num_threads, 1, 1024);
    toucher_.emplace(reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address)),
                     static_cast<std::uint64_t>(num_bytes), static_cast<std::uint8_t>(value),
                     static_cast<std::size_t>(num_threads));
  }

  void wait(std::int64_t num_bytes) {
    check_range("num_bytes", num_bytes, 0, num_bytes_);
    if (!toucher_) throw nb::value_error("the threads were stopped");
    const nb::gil_scoped_release release;
    toucher_->wait(static_cast<std::uint64_t>(num_bytes));
  }

  void stop() {
    const nb::gil_scoped_release release;
    toucher_.reset();
  }

 private:
  std::int64_t num_bytes_;
  std::optional<MemoryToucher> toucher_;
};

void move_checked(const Numbers& dst, const Numbers& src, const Numbers& bytes, int num_threads) {
  check_pieces(dst, src, bytes);
  check_range("num_threads", num_threads, 1, 1024);
  const nb::gil_scoped_release release;
  move_pieces(span_of(dst), span_of(src), span_of(bytes), static_cast<std::size_t>(num_threads));
}

std::uint64_t read_checked(MemoryReader& reader, std::int64_t address, std::int64_t num_bytes) {
  check_range("num_bytes", num_bytes, 0, INT64_MAX);
  if (address % 64 != 0 || num_bytes % 64 != 0) {
    throw nb::value_error("address and num_bytes: must be multiples of 64");
  }
  const nb::gil_scoped_release release;
  return reader.sum(reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(address)),
                    static_cast<std::uint64_t>(num_bytes));
}

}  // namespace

void bind_copies(nb::module_& module) {
  bind_engine(module);
  nb::class_<Toucher>(module, "MemoryToucher")
      .def(nb::init<std::int64_t, std::int64_t, int, int>(), "address"_a, "num_bytes"_a,
           nb::kw_only(), "value"_a, "num_threads"_a)
      .def("wait", &Toucher::wait, "num_bytes"_a)
      .def("stop", &Toucher::stop);
  nb::class_<MemoryReader>(module, "MemoryReader")
      .def(
          "__init__",
          [](MemoryReader* self, int num_threads) {
            check_range("num_threads", num_threads, 1, 1024);
            new (self) MemoryReader(static_cast<std::size_t>(num_threads));
          },
          "num_threads"_a)
      .def("sum", &read_checked, "address"_a, "num_bytes"_a);
  module.def("move_pieces", &move_checked, "dst"_a.noconvert(), "src"_a.noconvert(),
             "num_bytes"_a.noconvert(), "num_threads"_a);
}
