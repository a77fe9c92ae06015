// Sinks of one submission: each gathers pieces of one method and gives them to the driver as soon
// as a call is full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tiermem/copy_engine.h"

namespace tiermem {

// Driver copies in batches, or one by one where there are none. The first calls are small, so that
// the link is busy while the next ones are put together: the driver takes 0.5 µs a piece.
class BatchSink {
 public:
  BatchSink(const CopyDriver& driver, std::size_t pieces_per_call, StreamHandle stream);

  void add(const CopyPiece& piece);
  void flush();

 private:
  const CopyDriver& driver_;
  std::size_t most_;
  std::size_t capacity_;  // of the next call
  StreamHandle stream_;
  std::vector<std::uint64_t> dst_, src_, bytes_;
};

// Launches of the kernel, each with a table of pieces.
class KernelSink {
 public:
  // Larger pieces are cut, so that a few of them occupy every block.
  static constexpr std::uint64_t kUnitBytes = 32 << 10;

  // For a first launch that starts soon.
  static constexpr std::size_t kFewUnits = 64;

  static std::size_t units_of(std::uint64_t bytes) {
    return static_cast<std::size_t>((bytes + kUnitBytes - 1) / kUnitBytes);
  }

  // The first launch is for so many units, later ones for up to as many as a table holds.
  KernelSink(const CopyDriver& driver, const CopyKernels& kernels, KernelTable& table,
             StreamHandle stream, std::size_t first_units);

  // How many units fit before the next launch.
  std::size_t room() const { return capacity_ - table_.count; }

  void add(CopyPiece piece);
  void flush();

 private:
  const CopyDriver& driver_;
  const CopyKernels& kernels_;
  KernelTable& table_;
  StreamHandle stream_;
  std::size_t capacity_;  // of the next launch
  std::uint64_t bits_ = 0;  // of all addresses and sizes in the table
};

// Runs of host memory: DMA to or from a stage, and a kernel that spreads or collects its pieces.
// The DMA is given to the submission's stream, the kernel to the staging's own, so that both run at
// once on different stages.
class StagingSink {
 public:
  // `next_stage` is the ring's place, which outlives the submission. A submission of few bytes
  // fills its stages only in part, so that DMA and kernel overlap there too.
  StagingSink(const CopyDriver& driver, const CopyStaging& staging, std::size_t& next_stage,
              CopySide host_side, std::size_t pieces_per_call, const CopyKernels& kernels,
              KernelTable& table, StreamHandle stream, std::uint64_t total_bytes);

  // Whether a piece of this size can go through a stage.
  bool takes(std::uint64_t bytes) const {
    return bytes <= staging_.stage_bytes && KernelSink::units_of(bytes) < KernelTable::kCapacity;
  }

  // Pieces of one size without gaps in host memory. REQUIRES: takes(run[0].bytes).
  void add(std::span<const CopyPiece> run);

  // Gives what is left, and lets the submission's stream wait for all of it.
  void finish();

 private:
  bool is_load() const { return host_side_ == CopySide::Src; }
  std::size_t num_stages() const { return staging_.events.size() / 2; }
  EventHandle filled() const { return staging_.events[2 * next_stage_]; }
  EventHandle emptied() const { return staging_.events[2 * next_stage_ + 1]; }
  EventHandle border() const { return staging_.events.back(); }

  std::size_t fitting(std::uint64_t bytes) const;
  void put(std::span<const CopyPiece> run);
  void flush();
  void move_rows();

  const CopyDriver& driver_;
  const CopyStaging& staging_;
  std::size_t& next_stage_;
  CopySide host_side_;
  StreamHandle stream_;
  std::uint64_t limit_bytes_;
  BatchSink batch_;
  KernelSink kernel_;
  std::vector<CopyPiece> rows_;  // between host memory and the stage
  std::uint64_t used_bytes_ = 0;
  bool has_started_ = false;
};

}  // namespace tiermem
