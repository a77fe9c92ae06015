// Reading LMDB files for Python.
#include "tiermem/lmdb_file.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "tiermem/crc32.h"

namespace nb = nanobind;
using namespace nb::literals;
using tiermem::ConstBytes;

namespace {

constexpr std::size_t kCrcBytes = 4;
constexpr std::uint64_t kMinPageBytes = 4096;

struct Contents {
  std::vector<std::uint8_t> rows;
  std::vector<std::pair<ConstBytes, ConstBytes>> others;
  std::vector<std::uint8_t> file;  // what the others lie in
  std::string damage;
};

// Key and value behind each other, if they are a row whose last four bytes are the CRC of the rest.
bool take_row(Contents& contents, ConstBytes key, ConstBytes value, std::uint8_t kind,
              std::size_t row_bytes) {
  if (key[0] != kind || key.size() + value.size() != row_bytes) return false;
  std::vector<std::uint8_t>& rows = contents.rows;
  const std::size_t start = rows.size();
  rows.insert(rows.end(), key.begin(), key.end());
  rows.insert(rows.end(), value.begin(), value.end());
  const ConstBytes row = ConstBytes(rows).subspan(start);
  std::uint32_t crc = 0;
  std::memcpy(&crc, row.data() + row_bytes - kCrcBytes, kCrcBytes);
  if (crc == tiermem::crc32(row.first(row_bytes - kCrcBytes))) return true;
  rows.resize(start);
  return false;
}

Contents read(int descriptor, std::uint64_t most_bytes, std::uint8_t kind, std::size_t row_bytes) {
  Contents contents;
  try {
    contents.file = tiermem::read_lmdb_file(descriptor, most_bytes);
    contents.rows.reserve(contents.file.size());
    tiermem::read_lmdb(contents.file, most_bytes / kMinPageBytes,
                       [&](ConstBytes key, ConstBytes value) {
                         if (take_row(contents, key, value, kind, row_bytes)) return;
                         contents.others.emplace_back(key, value);
                       });
  } catch (const tiermem::DamagedFile& error) {
    contents.damage = error.what();
    contents.rows.clear();
    contents.others.clear();
  }
  contents.rows.shrink_to_fit();
  return contents;
}

nb::bytes bytes_of(ConstBytes bytes) { return nb::bytes(bytes.data(), bytes.size()); }

nb::tuple read_lmdb(int descriptor, std::uint64_t most_bytes, const nb::bytes& kind,
                    std::size_t row_bytes) {
  if (kind.size() != 1) throw nb::value_error("kind: must be one byte");
  if (row_bytes <= kCrcBytes) throw nb::value_error("row_bytes: must be more than 4");
  const std::uint8_t letter = *static_cast<const std::uint8_t*>(kind.data());
  Contents contents;
  {
    const nb::gil_scoped_release release;
    contents = read(descriptor, most_bytes, letter, row_bytes);
  }
  nb::list others;
  for (const auto& [key, value] : contents.others) {
    others.append(nb::make_tuple(bytes_of(key), bytes_of(value)));
  }
  const std::size_t count = contents.rows.size() / row_bytes;
  const auto [data, owner] = own(std::move(contents.rows));
  const nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<2>> rows(data, {count, row_bytes}, owner);
  return nb::make_tuple(rows, others, contents.damage);
}

}  // namespace

void bind_lmdb_file(nb::module_& module) {
  module.def("read_lmdb", &read_lmdb, "descriptor"_a, "most_bytes"_a, "kind"_a, "row_bytes"_a);
}
