#include "uring_engine.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>

namespace tiermem {
namespace {

constexpr std::uint64_t kMostRegisteredBytes = std::uint64_t{1} << 30;  // what the kernel takes

iovec memory_at(std::uint64_t address, std::uint64_t bytes) {
  return {reinterpret_cast<void*>(address), bytes};
}

}  // namespace

UringEngine::UringEngine(std::size_t queue_depth, std::size_t num_rings, std::uint64_t piece_bytes)
    : WorkerEngine(piece_bytes),
      memory_(std::make_shared<RegisteredMemory>(Uring::kMostBuffers)) {
  const std::size_t ring_depth = std::max<std::size_t>(1, queue_depth / num_rings);
  for (std::size_t i = 0; i < num_rings; ++i) {
    rings_.push_back(std::make_shared<UringWorker>(ring_depth, *memory_));
    start([ring = rings_.back(), memory = memory_](WorkShare& share) { ring->run(share); });
  }
}

// Pinning takes long: not under the mutex that the workers need.
int UringEngine::register_piece(iovec piece) {
  std::optional<std::uint32_t> number;
  {
    const std::lock_guard lock(share().mutex);
    number = memory_->free_number();
  }
  if (!number) return ENOSPC;
  for (std::size_t i = 0; i < rings_.size(); ++i) {
    const int error = rings_[i]->set_buffer(*number, piece);
    if (error == 0) continue;
    while (i-- > 0) rings_[i]->set_buffer(*number, {});
    return error;
  }
  const std::lock_guard lock(share().mutex);
  memory_->add(reinterpret_cast<std::uintptr_t>(piece.iov_base), piece.iov_len, *number);
  return 0;
}

Registration UringEngine::register_memory(std::int64_t address, std::int64_t bytes) {
  require_memory(address, bytes);
  const auto start = static_cast<std::uint64_t>(address);
  const auto total = static_cast<std::uint64_t>(bytes);
  Registration done;
  while (done.bytes < total && done.error == 0) {
    const std::uint64_t length = std::min(total - done.bytes, kMostRegisteredBytes);
    done.error = register_piece(memory_at(start + done.bytes, length));
    if (done.error == 0) done.bytes += length;
  }
  return done;
}

void UringEngine::unregister_memory(std::int64_t address, std::int64_t bytes) {
  require_memory(address, bytes);
  const std::lock_guard lock(share().mutex);
  const auto numbers = memory_->remove(static_cast<std::uint64_t>(address),
                                       static_cast<std::uint64_t>(bytes));
  for (const std::uint32_t number : numbers) {
    for (const auto& ring : rings_) ring->set_buffer(number, {});
  }
}

}  // namespace tiermem
