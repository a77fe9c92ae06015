// NumPy arrays in and out: contiguous, no copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "tiermem/sha256.h"

// An argument of exactly this dtype; pass `.noconvert()` so that nothing is cast silently.
template <class T>
using ArrayIn =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// The same, to be written to.
template <class T>
using ArrayOf = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// Hashes, one a row: (n, 32) uint8.
using HashesIn = nanobind::ndarray<const std::uint8_t, nanobind::shape<-1, sizeof(tiermem::Digest)>,
                                   nanobind::c_contig, nanobind::device::cpu>;

template <class T>
std::span<const T> span_of(const ArrayIn<T>& array) {
  return {array.data(), array.size()};
}

inline std::span<const tiermem::Digest> hashes_of(const HashesIn& array) {
  static_assert(sizeof(tiermem::Digest) == 32 && alignof(tiermem::Digest) == 1);
  return {reinterpret_cast<const tiermem::Digest*>(array.data()), array.shape(0)};
}

// A Python object that owns a vector, for the array that shows it.
template <class T>
std::pair<void*, nanobind::capsule> own(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  void* data = owned->data();
  nanobind::capsule owner(owned.get(),
                          [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  owned.release();
  return {data, std::move(owner)};
}

// Hands a vector over to Python as an array of `As`. The array owns it.
template <class As, class T>
nanobind::ndarray<nanobind::numpy, As, nanobind::ndim<1>> to_array(std::vector<T>&& values) {
  static_assert(sizeof(As) == sizeof(T));
  const std::size_t size = values.size();
  const auto [data, owner] = own(std::move(values));
  return {data, {size}, owner};
}

inline nanobind::ndarray<nanobind::numpy, std::uint8_t, nanobind::ndim<2>> to_rows(
    std::vector<tiermem::Digest>&& hashes) {
  const std::size_t size = hashes.size();
  const auto [data, owner] = own(std::move(hashes));
  return {data, {size, sizeof(tiermem::Digest)}, owner};
}
