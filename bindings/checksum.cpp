// The checksum for Python.
#include "tiermem/checksum.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using tiermem::ChecksumPath;
using Addresses = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<nb::numpy, std::uint64_t>;

std::size_t count_of(const char* name, std::int64_t value) {
  if (value >= 0) return static_cast<std::size_t>(value);
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) +
                              ": must not be negative");
}

const std::byte* pointer_to(std::int64_t address, std::size_t bytes) {
  if (address == 0 && bytes > 0) throw std::invalid_argument("address=0: must be an address");
  return reinterpret_cast<const std::byte*>(static_cast<std::uintptr_t>(address));
}

// Hands the numbers to numpy without a copy.
Sums array_of(std::vector<std::uint64_t>&& sums, std::initializer_list<std::size_t> shape) {
  auto owned = std::make_unique<std::vector<std::uint64_t>>(std::move(sums));
  std::uint64_t* data = owned->data();
  const nb::capsule owner(owned.get(), [](void* pointer) noexcept {
    const std::unique_ptr<std::vector<std::uint64_t>> end(
        static_cast<std::vector<std::uint64_t>*>(pointer));
  });
  static_cast<void>(owned.release());
  return Sums(data, shape, owner);
}

std::uint64_t checksum(std::int64_t address, std::int64_t num_bytes, ChecksumPath path) {
  const std::size_t bytes = count_of("num_bytes", num_bytes);
  return tiermem::checksum(pointer_to(address, bytes), bytes, path);
}

Sums checksum_slices(std::int64_t address, std::int64_t slice_bytes, std::int64_t num_slices,
                     ChecksumPath path) {
  const std::size_t bytes = count_of("slice_bytes", slice_bytes);
  std::vector<std::uint64_t> sums(count_of("num_slices", num_slices));
  {
    const nb::gil_scoped_release release;
    tiermem::checksum_slices(pointer_to(address, bytes * sums.size()), bytes, sums, path);
  }
  const std::size_t count = sums.size();
  return array_of(std::move(sums), {count});
}

Sums checksum_pages(const Addresses& addresses, std::int64_t slice_bytes, std::int64_t num_slices,
                    ChecksumPath path) {
  const std::size_t bytes = count_of("slice_bytes", slice_bytes);
  const std::size_t slices = count_of("num_slices", num_slices);
  std::vector<const std::byte*> pages(addresses.size());
  for (std::size_t i = 0; i < pages.size(); ++i) {
    pages[i] = pointer_to(addresses.data()[i], bytes * slices);
  }
  std::vector<std::uint64_t> sums(pages.size() * slices);
  {
    const nb::gil_scoped_release release;
    tiermem::checksum_pages(pages, bytes, sums, path);
  }
  return array_of(std::move(sums), {pages.size(), slices});
}

std::pair<Sums, Sums> checksum_tables() {
  const tiermem::ChecksumTables& tables = tiermem::checksum_tables();
  const auto copy = [](const auto& table) {
    return array_of({table.begin(), table.end()}, {table.size()});
  };
  return {copy(tables.keys), copy(tables.multipliers)};
}

}  // namespace

void bind_checksum(nb::module_& module) {
  nb::enum_<ChecksumPath>(module, "ChecksumPath")
      .value("AUTO", ChecksumPath::automatic)
      .value("PORTABLE", ChecksumPath::portable)
      .value("AVX2", ChecksumPath::avx2)
      .value("AVX512", ChecksumPath::avx512);
  module.def("checksum_path_supported", &tiermem::checksum_path_supported, "path"_a);
  module.def("checksum", &checksum, "address"_a, "num_bytes"_a, "path"_a = ChecksumPath::automatic,
             nb::call_guard<nb::gil_scoped_release>());
  module.def("checksum_slices", &checksum_slices, "address"_a, "slice_bytes"_a, "num_slices"_a,
             "path"_a = ChecksumPath::automatic);
  module.def("checksum_pages", &checksum_pages, "addresses"_a.noconvert(), "slice_bytes"_a,
             "num_slices"_a, "path"_a = ChecksumPath::automatic);
  module.def("checksum_tables", &checksum_tables);
}
