#include "tiermem/host_memory.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tiermem {

namespace {

// What a thread touches at a time: some huge pages.
constexpr std::uint64_t kUnitBytes = 8 << 20;

// Below this a second thread costs more than it saves.
constexpr std::uint64_t kLeastThreadBytes = 8 << 20;

std::byte* pointer_to(std::int64_t address) {
  return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address));
}

struct Pieces {
  std::span<const std::int64_t> dst, src, bytes;

  // Moves the bytes [start, end) of all pieces in a row.
  void move(std::uint64_t start, std::uint64_t end) const {
    std::uint64_t first = 0;  // of piece i
    for (std::size_t i = 0; i < dst.size() && first < end; ++i) {
      const auto size = static_cast<std::uint64_t>(bytes[i]);
      const std::uint64_t from = std::max(start, first), to = std::min(end, first + size);
      if (from < to) {
        std::memmove(pointer_to(dst[i]) + (from - first), pointer_to(src[i]) + (from - first),
                     to - from);
      }
      first += size;
    }
  }
};

}  // namespace

MemoryToucher::MemoryToucher(std::byte* memory, std::uint64_t num_bytes, std::uint8_t value,
                             std::size_t num_threads)
    : memory_(memory),
      num_bytes_(num_bytes),
      value_(value),
      is_set_((num_bytes + kUnitBytes - 1) / kUnitBytes) {
  for (std::size_t i = 0; i < std::min(num_threads, is_set_.size()); ++i) {
    threads_.emplace_back([this] { work(); });
  }
}

MemoryToucher::~MemoryToucher() {
  stops_ = true;
  for (std::thread& thread : threads_) thread.join();
}

void MemoryToucher::wait(std::uint64_t num_bytes) {
  const std::uint64_t end = (num_bytes + kUnitBytes - 1) / kUnitBytes;
  std::unique_lock lock(mutex_);
  advanced_.wait(lock, [&] { return first_unset_ >= end; });
}

void MemoryToucher::work() {
  for (std::uint64_t unit = next_unit_++; unit < is_set_.size() && !stops_; unit = next_unit_++) {
    const std::uint64_t start = unit * kUnitBytes;
    std::memset(memory_ + start, value_, std::min(kUnitBytes, num_bytes_ - start));
    const std::lock_guard lock(mutex_);
    is_set_[unit] = true;
    while (first_unset_ < is_set_.size() && is_set_[first_unset_]) ++first_unset_;
    advanced_.notify_all();
  }
}

void move_pieces(std::span<const std::int64_t> dst, std::span<const std::int64_t> src,
                 std::span<const std::int64_t> bytes, std::size_t num_threads) {
  const auto total = static_cast<std::uint64_t>(
      std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0}));
  const Pieces pieces{dst, src, bytes};
  const std::uint64_t most = std::max<std::size_t>(num_threads, 1);
  const std::uint64_t num_parts = std::clamp<std::uint64_t>(total / kLeastThreadBytes, 1, most);
  std::vector<std::thread> threads;
  for (std::uint64_t part = 1; part < num_parts; ++part) {
    threads.emplace_back([&pieces, total, num_parts, part] {
      pieces.move(total / num_parts * part,
                  part + 1 == num_parts ? total : total / num_parts * (part + 1));
    });
  }
  pieces.move(0, num_parts == 1 ? total : total / num_parts);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace tiermem
