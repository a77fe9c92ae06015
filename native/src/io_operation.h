// One transfer on its way: what is left of it, and what the kernel's answer means for it.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tiermem/io_engine.h"

namespace tiermem {

enum class IoProgress {
  again,     // start the transfer again: the rest of it
  finished,  // every byte was moved
  failed,    // error() says why
};

// What a transfer is of its batch: several whole operations, or a piece of one that was cut.
struct IoShare {
  static constexpr std::uint32_t kNotCut = UINT32_MAX;
  std::uint32_t num_operations = 0;  // whole ones
  std::uint32_t cut = kNotCut;       // number of the cut operation among those of its ticket
};

class IoOperation {
 public:
  IoOperation() = default;  // an empty place for one

  // `files` outlives the operation: its ticket holds it.
  // REQUIRES: at least one segment, none empty.
  IoOperation(Ticket ticket, IoDirection direction, const BlockFile::Descriptors& files,
              std::uint64_t offset, std::vector<iovec> segments, IoShare share);

  Ticket ticket() const noexcept { return ticket_; }
  IoDirection direction() const noexcept { return direction_; }
  IoShare share() const noexcept { return share_; }
  const BlockFile::Descriptors& files() const noexcept { return *files_; }
  int error() const noexcept { return error_; }
  std::string describe_error() const;

  // Arguments of the next system call. The segments stay where they are, also when `this` moves.
  int fd() const noexcept;
  std::uint64_t offset() const noexcept { return start_ + done_bytes_; }
  std::span<const iovec> segments() const noexcept {
    return std::span(segments_).subspan(first_segment_);
  }

  // Takes in what the system call returned: bytes, or a negative errno.
  IoProgress advance(std::int64_t result);

 private:
  bool is_aligned() const noexcept;
  IoProgress fail(int error) noexcept;
  void consume(std::uint64_t bytes) noexcept;

  Ticket ticket_ = 0;
  IoDirection direction_ = IoDirection::read;
  IoShare share_;
  const BlockFile::Descriptors* files_ = nullptr;
  std::uint64_t start_ = 0;
  std::uint64_t total_bytes_ = 0;
  std::uint64_t done_bytes_ = 0;
  std::vector<iovec> segments_;
  std::size_t first_segment_ = 0;
  bool direct_refused_ = false;  // the file system took O_DIRECT but wants a coarser alignment
  int error_ = 0;
};

}  // namespace tiermem
