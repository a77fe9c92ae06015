// Work on much host memory at once: the first touch of a pool, and copies within it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace tiermem {

// Fills memory for the first time, from its start to its end, with several threads. The kernel
// clears a page at its first touch, at 6 GB/s a thread with huge pages on a server; 16 threads made
// it 64. What is behind them can be registered with a GPU meanwhile.
class MemoryToucher {
 public:
  // Starts to set all bytes to `value`. REQUIRES: num_threads >= 1; the memory outlives this.
  MemoryToucher(std::byte* memory, std::uint64_t num_bytes, std::uint8_t value,
                std::size_t num_threads);

  // Stops after the units at work, and waits for the threads.
  ~MemoryToucher();

  MemoryToucher(const MemoryToucher&) = delete;
  MemoryToucher& operator=(const MemoryToucher&) = delete;

  // Waits until the first `num_bytes` bytes are set. REQUIRES: num_bytes is not above the whole.
  void wait(std::uint64_t num_bytes);

 private:
  void work();

  std::byte* const memory_;
  const std::uint64_t num_bytes_;
  const std::uint8_t value_;
  std::atomic<std::uint64_t> next_unit_ = 0;
  std::atomic<bool> stops_ = false;

  std::mutex mutex_;
  std::condition_variable advanced_;
  std::vector<bool> is_set_;      // by unit; guarded by mutex_
  std::uint64_t first_unset_ = 0;  // guarded by mutex_

  std::vector<std::thread> threads_;
};

// dst[i] receives bytes[i] bytes of src[i]; the pieces have no order and do not overlap.
// REQUIRES: spans of one length, nothing negative.
void move_pieces(std::span<const std::int64_t> dst, std::span<const std::int64_t> src,
                 std::span<const std::int64_t> bytes, std::size_t num_threads);

}  // namespace tiermem
