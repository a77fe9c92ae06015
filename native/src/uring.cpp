#include "uring.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace tiermem {
namespace {

constexpr unsigned kNeededFeatures =
    IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG;
constexpr std::array<std::uint8_t, 5> kNeededOperations = {
    IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED,
    IORING_OP_POLL_ADD};

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

std::uint64_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Busy rings and signals: what was not taken is tried again with the next call.
bool is_passing(int error) {
  return error == EINTR || error == EAGAIN || error == EBUSY || error == ENOMEM;
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
  set_up(num_entries);
  if ((params_.features & kNeededFeatures) != kNeededFeatures) {
    fail(ENOSYS, "the kernel's io_uring is too old (Linux 5.11 or later is needed)");
  }
  require_operations();
  map_rings(params_);
  // A filter of system calls may allow the set-up and refuse the use.
  const int entered = enter(0, 0);
  if (entered < 0 && !is_passing(-entered)) fail(-entered, "the kernel refuses io_uring");
  make_tables();
}

// The one thread that drives a ring is in the kernel or on its way there: completions need not
// interrupt it (COOP_TASKRUN, Linux 5.19).
void Uring::set_up(unsigned num_entries) {
  long fd = -1;
  for (const unsigned flags : {IORING_SETUP_COOP_TASKRUN, 0U}) {
    params_ = {};
    params_.flags = flags;
    // close-on-exec: the kernel sets it on every ring.
    fd = ::syscall(__NR_io_uring_setup, num_entries, &params_);
    if (fd >= 0 || errno != EINVAL) break;
  }
  if (fd < 0) fail(errno, "the kernel refuses io_uring");
  fd_ = FileDescriptor(static_cast<int>(fd));
}

long Uring::register_with(unsigned opcode, const void* argument, unsigned count) const noexcept {
  return ::syscall(__NR_io_uring_register, fd_.get(), opcode, argument, count);
}

void Uring::make_tables() noexcept {
  io_uring_rsrc_register table{};
  table.nr = kMostBuffers;
  table.flags = IORING_RSRC_REGISTER_SPARSE;
  has_buffers_ = register_with(IORING_REGISTER_BUFFERS2, &table, sizeof(table)) == 0;
  std::array<int, kMostFiles> none;
  none.fill(-1);
  has_files_ = register_with(IORING_REGISTER_FILES, none.data(), kMostFiles) == 0;
}

int Uring::set_buffer(std::uint32_t number, iovec memory) noexcept {
  if (!has_buffers_) return EOPNOTSUPP;
  io_uring_rsrc_update2 update{};
  update.offset = number;
  update.data = address_of(&memory);
  update.nr = 1;
  return register_with(IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update)) < 0 ? errno : 0;
}

bool Uring::set_file(std::uint32_t number, int fd) noexcept {
  if (!has_files_) return false;
  io_uring_files_update update{};
  update.offset = number;
  update.fds = address_of(&fd);
  return register_with(IORING_REGISTER_FILES_UPDATE, &update, 1) == 1;
}

void Uring::require_operations() const {
  constexpr unsigned kMostOperations = 256;
  alignas(io_uring_probe) std::array<
      std::byte, sizeof(io_uring_probe) + kMostOperations * sizeof(io_uring_probe_op)>
      bytes{};
  auto* probe = reinterpret_cast<io_uring_probe*>(bytes.data());
  if (register_with(IORING_REGISTER_PROBE, probe, kMostOperations) < 0) {
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

io_uring_sqe& Uring::next_entry(std::uint8_t opcode, std::uint64_t user_data) noexcept {
  io_uring_sqe& entry = submissions_[*submit_tail_ & submit_mask_];
  std::memset(&entry, 0, sizeof(entry));
  entry.opcode = opcode;
  entry.user_data = user_data;
  return entry;
}

void Uring::push_entry() noexcept {
  std::atomic_ref(*submit_tail_).store(*submit_tail_ + 1, std::memory_order_release);
  ++num_prepared_;
}

void Uring::prepare_vectored(IoDirection direction, File file, std::span<const iovec> segments,
                             std::uint64_t offset, std::uint64_t user_data) noexcept {
  const bool is_read = direction == IoDirection::read;
  io_uring_sqe& entry = next_entry(is_read ? IORING_OP_READV : IORING_OP_WRITEV, user_data);
  entry.fd = file.number;
  entry.flags = file.is_registered ? IOSQE_FIXED_FILE : 0;
  entry.off = offset;
  entry.addr = address_of(segments.data());
  entry.len = static_cast<unsigned>(segments.size());
  push_entry();
}

void Uring::prepare_registered(IoDirection direction, File file, const iovec& segment,
                               std::uint32_t buffer, std::uint64_t offset,
                               std::uint64_t user_data) noexcept {
  const bool is_read = direction == IoDirection::read;
  io_uring_sqe& entry =
      next_entry(is_read ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED, user_data);
  entry.fd = file.number;
  entry.flags = file.is_registered ? IOSQE_FIXED_FILE : 0;
  entry.off = offset;
  entry.addr = address_of(segment.iov_base);
  entry.len = static_cast<unsigned>(segment.iov_len);
  entry.buf_index = static_cast<std::uint16_t>(buffer);
  push_entry();
}

void Uring::prepare_poll(int fd, std::uint64_t user_data) noexcept {
  io_uring_sqe& entry = next_entry(IORING_OP_POLL_ADD, user_data);
  entry.fd = fd;
  entry.poll32_events = POLLIN;
  push_entry();
}

// Returns the number of operations taken, or a negative errno.
int Uring::enter(unsigned min_complete, unsigned flags) {
  const long taken = ::syscall(__NR_io_uring_enter, fd_.get(), num_prepared_, min_complete, flags,
                               nullptr, 0);
  if (taken < 0) return -errno;
  num_prepared_ -= static_cast<unsigned>(taken);
  return static_cast<int>(taken);
}

void Uring::submit() {
  while (num_prepared_ > 0) {
    const int taken = enter(0, 0);
    if (taken < 0 && !is_passing(-taken)) fail(-taken, "io_uring_enter failed");
    if (taken <= 0) return;
  }
}

void Uring::submit_and_wait() {
  const int taken = enter(1, IORING_ENTER_GETEVENTS);
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
