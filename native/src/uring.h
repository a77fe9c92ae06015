// The two rings that a process shares with the kernel, by raw system calls.
//
// Source: io_uring_setup(2), io_uring_enter(2) and <linux/io_uring.h>. The process owns the tail of
// the submission ring and the head of the completion ring; the kernel owns the other two.
#pragma once

#include <linux/io_uring.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "tiermem/block_file.h"
#include "tiermem/io_engine.h"

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

// Not thread-safe, but that set_buffer() may be called beside the other functions.
class Uring {
 public:
  static constexpr std::uint32_t kMostBuffers = 4096;
  static constexpr std::uint32_t kMostFiles = 16;

  // Throws std::system_error if the kernel refuses io_uring or lacks a feature that is needed
  // (ENOSYS; Linux 5.11 has them all).
  explicit Uring(unsigned num_entries);

  // Places for operations that the kernel has not taken yet; the ring never holds more.
  unsigned num_entries() const noexcept { return num_entries_; }

  // A file as the ring names it: a descriptor of the process, or a number that was registered.
  struct File {
    int number = -1;
    bool is_registered = false;
  };

  // Each puts one operation into the submission ring; submit() hands it over.
  // REQUIRES: fewer than num_entries() are waiting there. Memory stays where it is until the
  // operation completed; `buffer` is registered and holds all of `segment`.
  void prepare_vectored(IoDirection direction, File file, std::span<const iovec> segments,
                        std::uint64_t offset, std::uint64_t user_data) noexcept;
  void prepare_registered(IoDirection direction, File file, const iovec& segment,
                          std::uint32_t buffer, std::uint64_t offset,
                          std::uint64_t user_data) noexcept;
  void prepare_poll(int fd, std::uint64_t user_data) noexcept;  // completes when fd can be read

  // Registers memory under a number below kMostBuffers, in place of what it named; without memory
  // the number is free. Returns 0 or an errno: ENOMEM for the limit of locked memory, EOPNOTSUPP
  // where the kernel has no such table (before Linux 5.19).
  int set_buffer(std::uint32_t number, iovec memory) noexcept;

  // Registers a descriptor under a number below kMostFiles, or frees the number with -1.
  // False where the kernel has no such table.
  bool set_file(std::uint32_t number, int fd) noexcept;

  // Hands over what was prepared. What the kernel does not take now (it may lack memory for the
  // moment) stays prepared. Throws std::system_error if the ring is unusable.
  void submit();

  // As submit(), and then waits until a completion is there.
  void submit_and_wait();

  // Takes the oldest completion, if there is one, without a system call.
  std::optional<UringCompletion> take_completion() noexcept;

 private:
  int enter(unsigned min_complete, unsigned flags);
  long register_with(unsigned opcode, const void* argument, unsigned count) const noexcept;
  void set_up(unsigned num_entries);
  void make_tables() noexcept;
  void map_rings(const io_uring_params& params);
  void require_operations() const;
  io_uring_sqe& next_entry(std::uint8_t opcode, std::uint64_t user_data) noexcept;
  void push_entry() noexcept;

  FileDescriptor fd_;
  io_uring_params params_ = {};
  Mapping rings_;
  Mapping entries_;
  unsigned num_entries_ = 0;
  unsigned num_prepared_ = 0;
  bool has_buffers_ = false;
  bool has_files_ = false;

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
