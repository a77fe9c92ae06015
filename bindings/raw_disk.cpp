// The raw loops over a file for Python.
#include "tiermem/raw_disk.h"

#include <nanobind/nanobind.h>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_raw_disk(nb::module_& module) {
  nb::enum_<tiermem::IoDirection>(module, "IoDirection")
      .value("READ", tiermem::IoDirection::read)
      .value("WRITE", tiermem::IoDirection::write);

  module.def(
      "raw_disk_rate",
      [](const tiermem::BlockFile& file, std::int64_t address, std::int64_t num_bytes,
         tiermem::IoDirection direction, tiermem::EngineKind kind, std::int64_t num_at_once,
         std::int64_t piece_bytes, double seconds) {
        return tiermem::raw_disk_rate(file, address, num_bytes,
                                      {.direction = direction,
                                       .kind = kind,
                                       .num_at_once = num_at_once,
                                       .piece_bytes = piece_bytes,
                                       .seconds = seconds});
      },
      "file"_a, "address"_a, "num_bytes"_a, nb::kw_only(), "direction"_a, "kind"_a,
      "num_at_once"_a, "piece_bytes"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());
}
