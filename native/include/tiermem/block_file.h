// One preallocated file of bytes, reachable past the page cache and through it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

#include "tiermem/file_ops.h"

namespace tiermem {

// Offsets, lengths and addresses that are multiples of this may take the direct descriptor.
inline constexpr std::uint64_t kDirectAlignment = 4096;

// A system call on a file failed: code().value() is the errno, path() the file it was about.
class FileError : public std::system_error {
 public:
  FileError(int error, const std::string& what, std::string path)
      : std::system_error(error, std::generic_category(), what), path_(std::move(path)) {}
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
};

// Owns one descriptor; -1 is none.
class FileDescriptor {
 public:
  FileDescriptor() noexcept = default;
  explicit FileDescriptor(int fd) noexcept : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

enum class OpenMode {
  read_only,  // the file must be there; nothing about it changes
  existing,   // the file must be there, and long enough
  create,     // made if absent, grown to the wanted size if shorter, never shrunk
};

// Thread-safety: constant after construction but for close() and resize(), which the owner calls.
class BlockFile {
 public:
  // What an operation in flight holds on to: the file may be closed before the operation ends.
  struct Descriptors : std::enable_shared_from_this<Descriptors> {
    FileDescriptor direct;    // O_DIRECT; none where the file system refuses it
    FileDescriptor buffered;  // always there
    std::string path;
  };

  // Opens `path`, itself no symbolic link and a regular file, with mode 0600 if it is made.
  //
  // With OpenMode::create every byte that is added up to size_bytes is allocated on the disk before
  // this returns, by fallocate, or by writing zeros where the file system has none; a file that was
  // there keeps its bytes. With the other modes size_bytes is the least the file must have.
  //
  // REQUIRES: size_bytes >= 1 with OpenMode::create (std::invalid_argument otherwise).
  // Throws FileError: ENOSPC if the free space does not suffice (the file is then as it was: back at
  // its former size, or gone if it was made here); ENODATA if the file is shorter than size_bytes;
  // ELOOP for a symbolic link; EINVAL for anything but a regular file; else what the system says.
  static std::shared_ptr<BlockFile> open(
      const std::string& path, std::uint64_t size_bytes, OpenMode mode,
      std::shared_ptr<FileOps> ops = std::make_shared<FileOps>());

  // Wraps descriptors of any kind, such as a pipe or a device. For tests of the engines.
  static std::shared_ptr<BlockFile> adopt(FileDescriptor direct, FileDescriptor buffered,
                                          std::uint64_t size_bytes, std::string path);

  const std::string& path() const noexcept { return path_; }

  // Length of the file in bytes: operations must lie below it.
  std::uint64_t size_bytes() const noexcept { return size_bytes_; }

  // True if aligned operations bypass the page cache.
  bool is_direct() const noexcept { return is_direct_; }

  // Bytes that the file takes on the disk, as `du` counts them. Throws FileError.
  std::uint64_t allocated_bytes() const;

  // Returns when every write that completed before the call would survive a loss of power.
  // Throws FileError: some of those writes may then be lost, also if a later sync succeeds.
  void sync() const;

  // Makes the file size_bytes long, allocating what is added, as open() does, or cutting it off.
  // REQUIRES: size_bytes >= 1; no operation in flight. Throws FileError as open(): nothing changed.
  void resize(std::uint64_t size_bytes);

  // Lets go of the descriptors; operations in flight keep them until they end. Idempotent.
  void close() noexcept { descriptors_.reset(); }
  bool is_closed() const noexcept { return descriptors_ == nullptr; }

  // Throws FileError with EBADF after close().
  std::shared_ptr<const Descriptors> descriptors() const;

 private:
  BlockFile(std::shared_ptr<Descriptors> descriptors, std::uint64_t size_bytes,
            std::shared_ptr<FileOps> ops);

  const std::string path_;
  const bool is_direct_;
  std::shared_ptr<const Descriptors> descriptors_;
  std::uint64_t size_bytes_;
  std::shared_ptr<FileOps> ops_;
};

}  // namespace tiermem
