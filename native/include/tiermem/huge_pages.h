// An allocator for large arrays that are read at random: starts at huge pages and asks for them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace tiermem {

// Allocations of at least one huge page start at one and ask the kernel for more of them: a random
// access then needs a 512th of the address translations. A kernel that refuses is slower, no more.
template <class T>
struct HugePageAllocator {
  using value_type = T;
  static constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

  HugePageAllocator() noexcept = default;
  template <class U>
  explicit HugePageAllocator(const HugePageAllocator<U>&) noexcept {}

  static std::align_val_t alignment(std::size_t count) noexcept {
    const bool is_large = count * sizeof(T) >= kHugePageBytes;
    return std::align_val_t{is_large ? kHugePageBytes : alignof(T)};
  }

  T* allocate(std::size_t count) {
    void* memory = ::operator new(count * sizeof(T), alignment(count));
    if (count * sizeof(T) >= kHugePageBytes) madvise(memory, count * sizeof(T), MADV_HUGEPAGE);
    return static_cast<T*>(memory);
  }

  void deallocate(T* memory, std::size_t count) noexcept {
    ::operator delete(memory, alignment(count));
  }

  template <class U>
  bool operator==(const HugePageAllocator<U>&) const noexcept {
    return true;
  }
};

}  // namespace tiermem
