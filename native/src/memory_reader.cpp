#include "tiermem/memory_reader.h"

#include <algorithm>
#include <atomic>

namespace tiermem {
namespace {

using Line = std::uint64_t __attribute__((vector_size(64)));

constexpr std::uint64_t kLineBytes = sizeof(Line);
constexpr std::uint64_t kUnitBytes = 1 << 20;
// As attention on the CPU does: the prefetch of the hardware stops at every border of 4 KiB.
constexpr std::uint64_t kAheadBytes = 8 << 10;

// Four sums, so that loads wait for nothing but memory. Prefetching past the end does no harm.
[[gnu::always_inline]] inline std::uint64_t sum_lines(const std::byte* memory,
                                                      std::uint64_t num_lines) {
  const auto* lines = reinterpret_cast<const Line*>(memory);
  Line sums[4] = {};
  std::uint64_t i = 0;
  for (; i + 4 <= num_lines; i += 4) {
    for (std::uint64_t j = 0; j < 4; ++j) {
      __builtin_prefetch(memory + (i + j) * kLineBytes + kAheadBytes, 0, 2);
      sums[j] += lines[i + j];
    }
  }
  for (; i < num_lines; ++i) sums[0] += lines[i];
  const Line all = sums[0] + sums[1] + sums[2] + sums[3];
  std::uint64_t sum = 0;
  for (std::size_t j = 0; j < sizeof(Line) / sizeof(std::uint64_t); ++j) sum += all[j];
  return sum;
}

using SumFunction = std::uint64_t (*)(const std::byte* memory, std::uint64_t num_lines);

std::uint64_t sum_portable(const std::byte* memory, std::uint64_t num_lines) {
  return sum_lines(memory, num_lines);
}

#if defined(__x86_64__)

[[gnu::target("avx2")]] std::uint64_t sum_avx2(const std::byte* memory, std::uint64_t num_lines) {
  return sum_lines(memory, num_lines);
}

[[gnu::target("avx512f")]] std::uint64_t sum_avx512(const std::byte* memory,
                                                    std::uint64_t num_lines) {
  return sum_lines(memory, num_lines);
}

SumFunction widest_sum() {
  if (__builtin_cpu_supports("avx512f")) return sum_avx512;
  if (__builtin_cpu_supports("avx2")) return sum_avx2;
  return sum_portable;
}

#else

SumFunction widest_sum() { return sum_portable; }

#endif

}  // namespace

std::uint64_t MemoryReader::sum(const std::byte* memory, std::uint64_t num_bytes) {
  const SumFunction sum_of = widest_sum();
  std::atomic<std::uint64_t> total = 0;
  team_.run((num_bytes + kUnitBytes - 1) / kUnitBytes, [&](std::size_t unit) {
    const std::uint64_t start = unit * kUnitBytes;
    const std::uint64_t size = std::min(kUnitBytes, num_bytes - start);
    total.fetch_add(sum_of(memory + start, size / kLineBytes), std::memory_order_relaxed);
  });
  return total;
}

}  // namespace tiermem
