// NumPy arrays in and out: one-dimensional, contiguous, no copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

// An argument of exactly this dtype; pass `.noconvert()` so that nothing is cast silently.
template <class T>
using ArrayIn =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

template <class T>
std::span<const T> span_of(const ArrayIn<T>& array) {
  return {array.data(), array.size()};
}

// Hands a vector over to Python as an array of `As`. The array owns it.
template <class As, class T>
nanobind::ndarray<nanobind::numpy, As, nanobind::ndim<1>> to_array(std::vector<T>&& values) {
  static_assert(sizeof(As) == sizeof(T));
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  void* data = owned->data();
  const std::size_t size = owned->size();
  const nanobind::capsule owner(owned.get(),
                                [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  owned.release();
  return {data, {size}, owner};
}
