// The ceiling that an engine is measured against: plain loops over one file, nothing around them.
#pragma once

#include <cstdint>

#include "tiermem/block_file.h"
#include "tiermem/io_engine.h"

namespace tiermem {

struct RawDiskLoop {
  IoDirection direction = IoDirection::read;
  EngineKind kind = EngineKind::threads;  // threads: pread and pwrite; io_uring: one ring
  std::int64_t num_at_once = 1;           // threads, or the ring's depth; 1 to 256
  std::int64_t piece_bytes = 1 << 20;     // of one transfer, a multiple of kDirectAlignment
  double seconds = 1.0;                   // after that nothing new starts
};

// Moves pieces of the file in the order of their offsets, again from the start after the last,
// from or to the memory, and returns bytes a second, counting what ended until all had.
//
// Takes direct I/O if the file has it.
// REQUIRES: memory_bytes at least num_at_once pieces, the file at least one, else
// std::invalid_argument.
// Throws FileError for a transfer that fails or is short, std::system_error without io_uring.
double raw_disk_rate(const BlockFile& file, std::int64_t address, std::int64_t memory_bytes,
                     const RawDiskLoop& loop);

}  // namespace tiermem
