#include "io_operation.h"

#include <cerrno>
#include <utility>

namespace tiermem {
namespace {

bool is_multiple(std::uint64_t value) { return value % kDirectAlignment == 0; }

}  // namespace

IoOperation::IoOperation(Ticket ticket, IoDirection direction, const BlockFile::Descriptors& files,
                         std::uint64_t offset, std::vector<iovec> segments, IoShare share)
    : ticket_(ticket),
      direction_(direction),
      share_(share),
      files_(&files),
      start_(offset),
      segments_(std::move(segments)) {
  for (const iovec& segment : segments_) total_bytes_ += segment.iov_len;
}

bool IoOperation::is_aligned() const noexcept {
  bool aligned = is_multiple(offset());
  for (const iovec& segment : segments()) {
    aligned = aligned && is_multiple(reinterpret_cast<std::uintptr_t>(segment.iov_base)) &&
              is_multiple(segment.iov_len);
  }
  return aligned;
}

int IoOperation::fd() const noexcept {
  const bool direct = files_->direct && !direct_refused_ && is_aligned();
  return direct ? files_->direct.get() : files_->buffered.get();
}

IoProgress IoOperation::fail(int error) noexcept {
  error_ = error;
  return IoProgress::failed;
}

void IoOperation::consume(std::uint64_t bytes) noexcept {
  done_bytes_ += bytes;
  while (bytes > 0) {
    iovec& segment = segments_[first_segment_];
    const std::size_t taken = bytes < segment.iov_len ? bytes : segment.iov_len;
    segment.iov_base = static_cast<std::byte*>(segment.iov_base) + taken;
    segment.iov_len -= taken;
    bytes -= taken;
    if (segment.iov_len == 0) ++first_segment_;
  }
}

IoProgress IoOperation::advance(std::int64_t result) {
  // ECANCELED: io_uring gives up what a thread submitted when that thread ends; we cancel nothing.
  if (result == -EINTR || result == -EAGAIN || result == -ECANCELED) return IoProgress::again;
  if (result == -EINVAL && fd() != files_->buffered.get()) {
    direct_refused_ = true;
    return IoProgress::again;
  }
  if (result < 0) return fail(static_cast<int>(-result));
  if (result == 0) return fail(direction_ == IoDirection::read ? ENODATA : EIO);
  consume(static_cast<std::uint64_t>(result));
  return done_bytes_ == total_bytes_ ? IoProgress::finished : IoProgress::again;
}

std::string IoOperation::describe_error() const {
  const bool is_read = direction_ == IoDirection::read;
  const bool at_end = is_read && error_ == ENODATA;
  return std::string(is_read ? "read" : "write") + " of " + std::to_string(total_bytes_) +
         " bytes at offset " + std::to_string(start_) + " of " + files_->path + " failed after " +
         std::to_string(done_bytes_) + " bytes: " +
         (at_end ? "end of file" : std::generic_category().message(error_));
}

}  // namespace tiermem
