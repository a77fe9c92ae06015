// What the tests of files and I/O share: temporary files, aligned memory, batches.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "tiermem/io_engine.h"

namespace tiermem_test {

inline constexpr std::size_t kPage = 4096;
inline constexpr double kWaitS = 60;
inline constexpr auto kPoison = std::byte{0xA5};

// A name in the working directory, removed at both ends: /tmp may be a file system in memory.
class TemporaryPath {
 public:
  explicit TemporaryPath(const std::string& name)
      : path_("tiermem-test-" + name + "-" + std::to_string(::getpid())) {
    ::unlink(path_.c_str());
  }
  TemporaryPath(const TemporaryPath&) = delete;
  TemporaryPath& operator=(const TemporaryPath&) = delete;
  ~TemporaryPath() { ::unlink(path_.c_str()); }
  const std::string& get() const noexcept { return path_; }

 private:
  std::string path_;
};

// Page-aligned memory full of poison.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes), data_(allocate(bytes)) { poison(); }

  std::byte* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return bytes_; }
  std::int64_t address(std::size_t offset = 0) const noexcept {
    return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data_.get() + offset));
  }
  std::byte& operator[](std::size_t i) const noexcept { return data_.get()[i]; }
  void poison() noexcept { std::fill(data(), data() + bytes_, kPoison); }
  void fill(std::mt19937_64& random) noexcept {
    for (std::size_t i = 0; i < bytes_; ++i) data_.get()[i] = static_cast<std::byte>(random());
  }
  bool is_all(std::byte value, std::size_t start, std::size_t end) const noexcept {
    for (std::size_t i = start; i < end; ++i) {
      if (data_.get()[i] != value) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(std::byte* data) const noexcept { std::free(data); }
  };
  static std::byte* allocate(std::size_t bytes) {
    const std::size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    return static_cast<std::byte*>(std::aligned_alloc(kPage, rounded));
  }

  std::size_t bytes_;
  std::unique_ptr<std::byte[], Free> data_;
};

// Arrays of a batch, kept alive for the call that takes their spans.
struct Batch {
  std::vector<std::int64_t> offsets;
  std::vector<std::int64_t> addresses;
  std::vector<std::int64_t> lengths;
  std::vector<std::int64_t> tail_addresses = {};
  std::int64_t tail_length = 0;

  void add(std::size_t offset, std::int64_t address, std::size_t length) {
    offsets.push_back(static_cast<std::int64_t>(offset));
    addresses.push_back(address);
    lengths.push_back(static_cast<std::int64_t>(length));
  }
  tiermem::IoBatch view() const {
    return {offsets, addresses, lengths, tail_addresses, tail_length};
  }
};

inline Batch one(std::size_t offset, std::int64_t address, std::size_t length) {
  Batch batch;
  batch.add(offset, address, length);
  return batch;
}

// Nothing where the kernel refuses io_uring: the test then passes over that kind.
inline std::unique_ptr<tiermem::IoEngine> make_engine(
    tiermem::EngineKind kind, std::int64_t queue_depth = 8,
    std::int64_t piece_bytes = tiermem::kDefaultPieceBytes) {
  tiermem::IoEngineOptions options;
  options.kind = kind;
  options.queue_depth = queue_depth;
  options.num_threads = 3;
  options.piece_bytes = piece_bytes;
  try {
    return tiermem::make_io_engine(options);
  } catch (const std::system_error& error) {
    const bool refused = error.code().value() == ENOSYS || error.code().value() == EPERM;
    if (kind != tiermem::EngineKind::io_uring || !refused) throw;
    return nullptr;
  }
}

struct Pipe {
  tiermem::FileDescriptor read_end;
  tiermem::FileDescriptor write_end;
};

inline Pipe make_pipe() {
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) {
    throw std::system_error(errno, std::generic_category(), "pipe2");
  }
  return {tiermem::FileDescriptor(ends[0]), tiermem::FileDescriptor(ends[1])};
}

}  // namespace tiermem_test
