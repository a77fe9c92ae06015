#include "tiermem/prefix_index.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>

#include "arrays.h"
#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using tiermem::Digest;
using tiermem::PrefixIndex;

namespace {

using Ids = ArrayIn<std::int64_t>;

Digest digest_of(const char* name, const nb::bytes& bytes) {
  Digest digest;
  if (bytes.size() != digest.size()) {
    throw nb::value_error(
        (std::string(name) + ": " + std::to_string(bytes.size()) + " bytes: must be 32").c_str());
  }
  std::copy_n(static_cast<const std::uint8_t*>(bytes.data()), digest.size(), digest.begin());
  return digest;
}

nb::bytes root_hash(const std::vector<nb::bytes>& parts) {
  std::vector<tiermem::Bytes> spans;
  for (const nb::bytes& part : parts) {
    spans.emplace_back(static_cast<const std::uint8_t*>(part.data()), part.size());
  }
  const Digest root = PrefixIndex::root_hash(spans);
  return nb::bytes(root.data(), root.size());
}

template <class Token>
auto chain(const PrefixIndex& index, const nb::bytes& parent, const ArrayIn<Token>& tokens) {
  return to_rows(index.chain(digest_of("parent", parent), span_of(tokens)));
}

bool insert(PrefixIndex& index, const nb::bytes& parent, const nb::bytes& key, std::int64_t page,
            std::int64_t position) {
  return index.insert(digest_of("parent", parent), digest_of("key", key), page, position);
}

// Hashes that need not lie right behind each other: columns of wider rows.
using HashColumn =
    nb::ndarray<const std::uint8_t, nb::shape<-1, sizeof(tiermem::Digest)>, nb::device::cpu>;

tiermem::KeyRows rows_of(const char* name, const HashColumn& column) {
  if (column.stride(1) != 1 || column.stride(0) < 0) {
    throw nb::value_error((std::string(name) + ": the bytes of a hash must follow each other").c_str());
  }
  return {column.data(), column.shape(0), static_cast<std::size_t>(column.stride(0))};
}

auto insert_many(PrefixIndex& index, const HashColumn& parents, const HashColumn& keys,
                 const Ids& pages, const Ids& positions) {
  return to_array<std::int64_t>(index.insert_many(
      rows_of("parents", parents), rows_of("keys", keys), span_of(pages), span_of(positions)));
}

auto names(const PrefixIndex& index, const Ids& pages) {
  PrefixIndex::Names names = index.names(span_of(pages));
  return std::tuple(to_rows(std::move(names.keys)), to_rows(std::move(names.parents)),
                    to_array<std::int64_t>(std::move(names.positions)),
                    to_array<bool>(std::move(names.named)));
}

}  // namespace

void bind_prefix_index(nb::module_& module) {
  const auto array = [](const char* name) { return nb::arg(name).noconvert(); };
  nb::class_<PrefixIndex>(module, "PrefixIndex")
      .def(nb::init<std::int64_t>(), "page_tokens"_a)
      .def_static("root_hash", &root_hash, "parts"_a)
      .def("chain", &chain<std::int64_t>, "parent"_a, array("tokens"))
      .def("chain", &chain<std::uint32_t>, "parent"_a, array("tokens"))
      .def("insert", &insert, "parent"_a, "key"_a, "page"_a, "position"_a)
      .def("insert_many", &insert_many, array("parents"), array("keys"), array("pages"),
           array("positions"))
      .def(
          "remove",
          [](PrefixIndex& index, const Ids& pages) {
            PrefixIndex::Removed removed = index.remove(span_of(pages));
            return std::pair(to_array<std::int64_t>(std::move(removed.pages)),
                             to_rows(std::move(removed.keys)));
          },
          array("pages"))
      .def(
          "match",
          [](const PrefixIndex& index, const HashesIn& keys) {
            return to_array<std::int64_t>(index.match(hashes_of(keys)));
          },
          array("keys"))
      .def(
          "contains",
          [](const PrefixIndex& index, const nb::bytes& key) {
            return index.contains(digest_of("key", key));
          },
          "key"_a)
      .def("names", &names, array("pages"))
      .def(
          "keys",
          [](const PrefixIndex& index, const Ids& pages) {
            return to_rows(index.keys(span_of(pages)));
          },
          array("pages"))
      .def("pages", [](const PrefixIndex& index) { return to_array<std::int64_t>(index.pages()); })
      .def(
          "raise_parents",
          [](const PrefixIndex& index, const ArrayOf<std::int64_t>& last_use) {
            return index.raise_parents({last_use.data(), last_use.size()});
          },
          array("last_use"))
      .def_prop_ro("size", &PrefixIndex::size)
      .def_prop_ro("page_tokens", &PrefixIndex::page_tokens);
}
