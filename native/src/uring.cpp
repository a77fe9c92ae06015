#include "uring.h"

#include <linux/time_types.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <system_error>
#include <utility>

namespace tiermem {
namespace {

constexpr unsigned kNeededFeatures =
    IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG;
constexpr std::array<std::uint8_t, 2> kNeededOperations = {IORING_OP_READV, IORING_OP_WRITEV};

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

std::uint64_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Busy rings and signals: what was not taken is tried again with the next call.
bool is_passing(int error) {
  return error == EINTR || error == EAGAIN || error == EBUSY || error == ETIME || error == ENOMEM;
}

}  // namespace

Mapping::Mapping(int fd, std::size_t bytes, std::uint64_t offset) : bytes_(bytes) {
  void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                      static_cast<off_t>(offset));
  if (base == MAP_FAILED) fail(errno, "cannot map an io_uring ring");
  base_ = static_cast<std::byte*>(base);
  // A child of fork() that touched the rings would take the parent's completions.
  ::madvise(base, bytes, MADV_DONTFORK);
}

Mapping::Mapping(Mapping&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (base_ != nullptr) ::munmap(base_, bytes_);
}

Uring::Uring(unsigned num_entries) {
  io_uring_params params{};
  // close-on-exec: the kernel sets it on every ring.
  const long fd = ::syscall(__NR_io_uring_setup, num_entries, &params);
  if (fd < 0) fail(errno, "the kernel refuses io_uring");
  fd_ = FileDescriptor(static_cast<int>(fd));
  if ((params.features & kNeededFeatures) != kNeededFeatures) {
    fail(ENOSYS, "the kernel's io_uring is too old (Linux 5.11 or later is needed)");
  }
  require_operations();
  map_rings(params);
  // A filter of system calls may allow the set-up and refuse the use.
  const int entered = enter(0, 0, nullptr, 0);
  if (entered < 0 && !is_passing(-entered)) fail(-entered, "the kernel refuses io_uring");
}

void Uring::require_operations() const {
  constexpr unsigned kMostOperations = 256;
  alignas(io_uring_probe) std::array<
      std::byte, sizeof(io_uring_probe) + kMostOperations * sizeof(io_uring_probe_op)>
      bytes{};
  auto* probe = reinterpret_cast<io_uring_probe*>(bytes.data());
  if (::syscall(__NR_io_uring_register, fd_.get(), IORING_REGISTER_PROBE, probe,
                kMostOperations) < 0) {
    fail(errno, "cannot ask io_uring for its operations");
  }
  for (const std::uint8_t operation : kNeededOperations) {
    const bool known = operation <= probe->last_op;
    if (!known || (probe->ops[operation].flags & IO_URING_OP_SUPPORTED) == 0) {
      fail(ENOSYS, "the kernel's io_uring cannot read or write files");
    }
  }
}

void Uring::map_rings(const io_uring_params& params) {
  const std::size_t submit_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
  const std::size_t complete_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  rings_ = Mapping(fd_.get(), submit_bytes > complete_bytes ? submit_bytes : complete_bytes,
                   IORING_OFF_SQ_RING);
  entries_ = Mapping(fd_.get(), params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
  num_entries_ = params.sq_entries;
  submit_tail_ = rings_.at<unsigned>(params.sq_off.tail);
  submit_mask_ = *rings_.at<unsigned>(params.sq_off.ring_mask);
  submissions_ = entries_.at<io_uring_sqe>(0);
  complete_head_ = rings_.at<unsigned>(params.cq_off.head);
  complete_tail_ = rings_.at<unsigned>(params.cq_off.tail);
  complete_mask_ = *rings_.at<unsigned>(params.cq_off.ring_mask);
  completions_ = rings_.at<io_uring_cqe>(params.cq_off.cqes);
  // The indirection between ring and entries is not needed: place i always names entry i.
  unsigned* array = rings_.at<unsigned>(params.sq_off.array);
  for (unsigned i = 0; i < num_entries_; ++i) array[i] = i;
}

void Uring::prepare(std::uint8_t opcode, int fd, std::span<const iovec> segments,
                    std::uint64_t offset, std::uint64_t user_data) noexcept {
  const unsigned tail = *submit_tail_;
  io_uring_sqe& entry = submissions_[tail & submit_mask_];
  std::memset(&entry, 0, sizeof(entry));
  entry.opcode = opcode;
  entry.fd = fd;
  entry.off = offset;
  entry.addr = address_of(segments.data());
  entry.len = static_cast<unsigned>(segments.size());
  entry.user_data = user_data;
  std::atomic_ref(*submit_tail_).store(tail + 1, std::memory_order_release);
  ++num_prepared_;
}

// Returns the number of operations taken, or a negative errno.
int Uring::enter(unsigned min_complete, unsigned flags, const void* argument, std::size_t bytes) {
  const long taken = ::syscall(__NR_io_uring_enter, fd_.get(), num_prepared_, min_complete, flags,
                               argument, bytes);
  if (taken < 0) return -errno;
  num_prepared_ -= static_cast<unsigned>(taken);
  return static_cast<int>(taken);
}

void Uring::submit() {
  while (num_prepared_ > 0) {
    const int taken = enter(0, 0, nullptr, 0);
    if (taken < 0 && !is_passing(-taken)) fail(-taken, "io_uring_enter failed");
    if (taken <= 0) return;
  }
}

void Uring::submit_and_wait(std::chrono::nanoseconds timeout) {
  submit();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  const __kernel_timespec span{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
  io_uring_getevents_arg argument{};
  argument.sigmask_sz = _NSIG / 8;
  argument.ts = address_of(&span);
  const unsigned flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;
  const int taken = enter(1, flags, &argument, sizeof(argument));
  if (taken < 0 && !is_passing(-taken)) fail(-taken, "io_uring_enter failed");
}

std::optional<UringCompletion> Uring::take_completion() noexcept {
  const unsigned head = *complete_head_;
  const unsigned tail = std::atomic_ref(*complete_tail_).load(std::memory_order_acquire);
  if (head == tail) return std::nullopt;
  const io_uring_cqe& entry = completions_[head & complete_mask_];
  const UringCompletion completion{entry.user_data, entry.res};
  std::atomic_ref(*complete_head_).store(head + 1, std::memory_order_release);
  return completion;
}

}  // namespace tiermem
