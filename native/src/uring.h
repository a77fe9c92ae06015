// The two rings that a process shares with the kernel, by raw system calls.
//
// Source: io_uring_setup(2), io_uring_enter(2) and <linux/io_uring.h>. The process owns the tail of
// the submission ring and the head of the completion ring; the kernel owns the other two.
#pragma once

#include <linux/io_uring.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "tiermem/block_file.h"

namespace tiermem {

// A shared mapping, unmapped at the end; not inherited by fork().
class Mapping {
 public:
  Mapping() noexcept = default;
  // Throws std::system_error.
  Mapping(int fd, std::size_t bytes, std::uint64_t offset);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  template <typename T>
  T* at(std::size_t offset_bytes) const noexcept {
    return reinterpret_cast<T*>(base_ + offset_bytes);
  }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
};

struct UringCompletion {
  std::uint64_t user_data;
  std::int32_t result;  // of the system call: bytes, or a negative errno
};

// Not thread-safe.
class Uring {
 public:
  // Throws std::system_error if the kernel refuses io_uring or lacks a feature that is needed
  // (ENOSYS; Linux 5.11 has them all).
  explicit Uring(unsigned num_entries);

  // Places for operations that the kernel has not taken yet; the ring never holds more.
  unsigned num_entries() const noexcept { return num_entries_; }

  // Puts a vectored read or write into the submission ring; submit() hands it over.
  // REQUIRES: fewer than num_entries() are waiting there. The segments stay where they are until
  // the operation completed.
  void prepare(std::uint8_t opcode, int fd, std::span<const iovec> segments, std::uint64_t offset,
               std::uint64_t user_data) noexcept;

  unsigned num_prepared() const noexcept { return num_prepared_; }

  // Hands over what was prepared. What the kernel does not take now (it may lack memory for the
  // moment) stays prepared. Throws std::system_error if the ring is unusable.
  void submit();

  // As submit(), and then waits until a completion is there or `timeout` is over.
  void submit_and_wait(std::chrono::nanoseconds timeout);

  // Takes the oldest completion, if there is one, without a system call.
  std::optional<UringCompletion> take_completion() noexcept;

 private:
  int enter(unsigned min_complete, unsigned flags, const void* argument, std::size_t bytes);
  void map_rings(const io_uring_params& params);
  void require_operations() const;

  FileDescriptor fd_;
  Mapping rings_;
  Mapping entries_;
  unsigned num_entries_ = 0;
  unsigned num_prepared_ = 0;

  // Inside the mappings.
  unsigned* submit_tail_ = nullptr;
  unsigned* complete_head_ = nullptr;
  unsigned* complete_tail_ = nullptr;
  io_uring_sqe* submissions_ = nullptr;
  io_uring_cqe* completions_ = nullptr;
  unsigned submit_mask_ = 0;
  unsigned complete_mask_ = 0;
};

}  // namespace tiermem
