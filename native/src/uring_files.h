// The files that a ring knows by number, so that not every transfer looks its descriptor up.
#pragma once

#include <array>
#include <memory>

#include "tiermem/block_file.h"
#include "uring.h"

namespace tiermem {

// Owned by the thread that drives the ring.
class UringFiles {
 public:
  explicit UringFiles(Uring& ring) : ring_(ring) {}

  // The file as an operation names it: by its number, or plainly while all numbers are taken.
  Uring::File name(const BlockFile::Descriptors& files, int fd);

  // Lets go of files that nobody else holds any more: the ring holds them open until then.
  void drop_closed() noexcept;

 private:
  struct Entry {
    std::weak_ptr<const BlockFile::Descriptors> files;
    int fd = -1;  // -1: the number is free
  };

  Uring& ring_;
  std::array<Entry, Uring::kMostFiles> entries_ = {};
};

}  // namespace tiermem
