#include "tiermem/fault_ops.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>

#include "deadline.h"

namespace tiermem {
namespace {

// The segments cut off after `bytes` bytes.
std::vector<iovec> cut(const iovec* segments, int num_segments, std::uint64_t bytes) {
  std::vector<iovec> kept(segments, segments + num_segments);
  for (iovec& segment : kept) {
    segment.iov_len = std::min<std::uint64_t>(segment.iov_len, bytes);
    bytes -= segment.iov_len;
  }
  return kept;
}

int fail_with(std::uint64_t error) {
  errno = static_cast<int>(error);
  return -1;
}

}  // namespace

void FaultOps::plan(const Fault& fault) {
  if (fault.first < 1) throw std::invalid_argument("first=0: calls are counted from 1");
  const std::lock_guard lock(mutex_);
  faults_.push_back(fault);
}

void FaultOps::fail(FileCall call, std::uint64_t first, int error, std::uint64_t count) {
  if (error < 1) {
    throw std::invalid_argument("error=" + std::to_string(error) + ": must be an errno");
  }
  plan({call, first, count, Kind::fail, static_cast<std::uint64_t>(error)});
}

void FaultOps::shorten(FileCall call, std::uint64_t first, std::uint64_t bytes,
                       std::uint64_t count) {
  if (call != FileCall::read && call != FileCall::write) {
    throw std::invalid_argument("only reads and writes can be shortened");
  }
  plan({call, first, count, Kind::shorten, bytes});
}

void FaultOps::hold(FileCall call, std::uint64_t first, std::uint64_t count) {
  plan({call, first, count, Kind::hold, 0});
}

void FaultOps::release() {
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(faults_, [](const Fault& fault) { return fault.kind == Kind::hold; });
    ++num_releases_;
  }
  changed_.notify_all();
}

bool FaultOps::wait_held(std::uint64_t count, double timeout_s) {
  const Deadline deadline(timeout_s);
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.end(), [&] { return num_held_ >= count; });
}

std::uint64_t FaultOps::num_calls(FileCall call) const {
  const std::lock_guard lock(mutex_);
  return num_calls_[static_cast<std::size_t>(call)];
}

FaultOps::Fault FaultOps::next(FileCall call) {
  std::unique_lock lock(mutex_);
  const std::uint64_t number = ++num_calls_[static_cast<std::size_t>(call)];
  const auto found = std::find_if(faults_.rbegin(), faults_.rend(), [&](const Fault& fault) {
    return fault.call == call && number >= fault.first && number - fault.first < fault.count;
  });
  if (found == faults_.rend()) return {};
  const Fault fault = *found;
  if (fault.kind != Kind::hold) return fault;
  ++num_held_;
  changed_.notify_all();
  changed_.wait(lock, [&, seen = num_releases_] { return num_releases_ != seen; });
  --num_held_;
  return fault;
}

ssize_t FaultOps::preadv(int fd, const iovec* segments, int num_segments, off_t offset) {
  const Fault fault = next(FileCall::read);
  if (fault.kind == Kind::fail) return fail_with(fault.value);
  if (fault.kind != Kind::shorten) return FileOps::preadv(fd, segments, num_segments, offset);
  const std::vector<iovec> kept = cut(segments, num_segments, fault.value);
  return FileOps::preadv(fd, kept.data(), num_segments, offset);
}

ssize_t FaultOps::pwritev(int fd, const iovec* segments, int num_segments, off_t offset) {
  const Fault fault = next(FileCall::write);
  if (fault.kind == Kind::fail) return fail_with(fault.value);
  if (fault.kind != Kind::shorten) return FileOps::pwritev(fd, segments, num_segments, offset);
  const std::vector<iovec> kept = cut(segments, num_segments, fault.value);
  return FileOps::pwritev(fd, kept.data(), num_segments, offset);
}

int FaultOps::fallocate(int fd, off_t offset, off_t bytes) {
  const Fault fault = next(FileCall::allocate);
  return fault.kind == Kind::fail ? fail_with(fault.value) : FileOps::fallocate(fd, offset, bytes);
}

int FaultOps::fdatasync(int fd) {
  const Fault fault = next(FileCall::sync);
  return fault.kind == Kind::fail ? fail_with(fault.value) : FileOps::fdatasync(fd);
}

}  // namespace tiermem
