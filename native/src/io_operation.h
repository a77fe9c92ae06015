// One read or write on its way: what is left of it, and what the kernel's answer means for it.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "tiermem/io_engine.h"

namespace tiermem {

enum class IoProgress {
  again,     // start the operation again: the rest of it
  finished,  // every byte was moved
  failed,    // error() says why
};

class IoOperation {
 public:
  IoOperation() = default;  // an empty place for one

  // Operation i of a valid batch. `files` outlives the operation: its ticket holds it.
  IoOperation(Ticket ticket, IoDirection direction, const BlockFile::Descriptors& files,
              const IoBatch& batch, std::size_t i);

  Ticket ticket() const noexcept { return ticket_; }
  IoDirection direction() const noexcept { return direction_; }
  int error() const noexcept { return error_; }
  std::string describe_error() const;

  // Arguments of the next system call. The segments stay where they are while `this` does.
  int fd() const noexcept;
  std::uint64_t offset() const noexcept { return start_ + done_bytes_; }
  std::span<const iovec> segments() const noexcept {
    return std::span(segments_).subspan(first_segment_, end_segment_ - first_segment_);
  }
  std::uint64_t done_bytes() const noexcept { return done_bytes_; }

  // Takes in what the system call returned: bytes, or a negative errno.
  IoProgress advance(std::int64_t result);

 private:
  bool is_aligned() const noexcept;
  IoProgress fail(int error) noexcept;
  void consume(std::uint64_t bytes) noexcept;

  Ticket ticket_ = 0;
  IoDirection direction_ = IoDirection::read;
  const BlockFile::Descriptors* files_ = nullptr;
  std::uint64_t start_ = 0;
  std::uint64_t total_bytes_ = 0;
  std::uint64_t done_bytes_ = 0;
  std::array<iovec, 2> segments_ = {};
  std::size_t first_segment_ = 0;
  std::size_t end_segment_ = 0;
  bool direct_refused_ = false;  // the file system took O_DIRECT but wants a coarser alignment
  int error_ = 0;
};

}  // namespace tiermem
