// Launches of kernels with parameters that stay in place.
#include "tiermem/kernel_launch.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tiermem;

namespace {

std::vector<std::string> bytes_of(const nb::list& parameters) {
  std::vector<std::string> found;
  for (const nb::handle parameter : parameters) {
    const auto bytes = nb::cast<nb::bytes>(parameter);
    found.emplace_back(bytes.c_str(), bytes.size());
  }
  return found;
}

// The driver waits while a stream's queue is full, and what empties it may depend on a thread of
// Python's: a kernel that waits for one on another GPU which that thread is about to launch. So the
// interpreter is let go, and nothing that the launch uses may be shared and change.
void launch(const KernelLaunch& kernel, std::uintptr_t stream, const nb::args& numbers) {
  std::array<std::uint64_t, KernelLaunch::kMostParameters> values;
  const std::size_t count = numbers.size();
  if (count > values.size()) throw nb::value_error("more numbers than parameters");
  for (std::size_t i = 0; i < count; ++i) {
    if (!nb::try_cast(numbers[i], values[i], false)) {
      throw nb::type_error("numbers: must be int, from 0 to 2^64 - 1");
    }
  }
  const nb::gil_scoped_release release;
  kernel(stream, {values.data(), count});
}

}  // namespace

void bind_kernel_launch(nb::module_& module) {
  nb::class_<LaunchCalls>(module, "LaunchCalls")
      .def(nb::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>(),
           nb::kw_only(), "launch"_a, "get_context"_a, "set_context"_a, "error_string"_a);
  nb::class_<KernelLaunch>(module, "KernelLaunch")
      .def(
          "__init__",
          [](KernelLaunch* self, const LaunchCalls& calls, std::string name,
             std::uintptr_t function, std::uintptr_t context, std::pair<unsigned, unsigned> grid,
             unsigned threads, unsigned shared_bytes, bool early, std::size_t num_changing,
             const nb::list& fixed) {
            new (self) KernelLaunch(calls,
                                    {std::move(name),
                                     function,
                                     context,
                                     {grid.first, grid.second},
                                     threads,
                                     shared_bytes,
                                     early},
                                    num_changing, bytes_of(fixed));
          },
          "calls"_a, nb::kw_only(), "name"_a, "function"_a, "context"_a, "grid"_a, "threads"_a,
          "shared_bytes"_a, "early"_a, "num_changing"_a, "fixed"_a)
      .def("launch", &launch, "stream"_a, "numbers"_a);
}
