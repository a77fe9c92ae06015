// Reading LMDB files for Python.
#include "tiermem/lmdb_file.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::size_t kMaxThreads = 8;

struct Contents {
  tiermem::LmdbContent sound;
  std::string damage;
};

Contents read(int descriptor, std::uint64_t most_bytes, tiermem::RowShape shape) {
  const std::size_t num_threads = std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1,
                                                          kMaxThreads);
  try {
    return {tiermem::read_lmdb_file(descriptor, most_bytes, shape, num_threads), {}};
  } catch (const tiermem::DamagedFile& error) {
    return {{}, error.what()};
  }
}

nb::bytes bytes_of(tiermem::ConstBytes bytes) { return nb::bytes(bytes.data(), bytes.size()); }

nb::tuple read_lmdb(int descriptor, std::uint64_t most_bytes, const nb::bytes& kind,
                    std::size_t row_bytes) {
  if (kind.size() != 1) throw nb::value_error("kind: must be one byte");
  if (row_bytes <= 4) throw nb::value_error("row_bytes: must be more than 4");
  const std::uint8_t letter = *static_cast<const std::uint8_t*>(kind.data());
  Contents contents;
  {
    const nb::gil_scoped_release release;
    contents = read(descriptor, most_bytes, {letter, row_bytes});
  }
  nb::list others;
  for (const auto& [key, value] : contents.sound.others) {
    others.append(nb::make_tuple(bytes_of(key), bytes_of(value)));
  }
  auto owned = std::make_unique<tiermem::LmdbRows>(std::move(contents.sound.rows));
  const std::size_t count = owned->size();
  std::uint8_t* data = owned->data();
  const nb::capsule owner(owned.get(),
                          [](void* p) noexcept { delete static_cast<tiermem::LmdbRows*>(p); });
  owned.release();
  const nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<2>> rows(data, {count, row_bytes}, owner);
  return nb::make_tuple(rows, others, contents.damage);
}

}  // namespace

void bind_lmdb_file(nb::module_& module) {
  module.def("read_lmdb", &read_lmdb, "descriptor"_a, "most_bytes"_a, "kind"_a, "row_bytes"_a);
}
