#include "copy_sinks.h"

#include <algorithm>

namespace tiermem {

namespace {

// Every row of a stage starts here, so that the kernel finds whole 16-byte words.
constexpr std::uint64_t kRowAlign = 256;

// A submission fills this many stages at least, of at least so many bytes each.
constexpr std::uint64_t kLeastStages = 8;
constexpr std::uint64_t kLeastStageBytes = 4 << 20;

constexpr std::size_t kFirstBatch = 16;
constexpr std::size_t kBatchGrowth = 2;
constexpr std::size_t kLaunchGrowth = 4;

}  // namespace

BatchSink::BatchSink(const CopyDriver& driver, std::size_t pieces_per_call, StreamHandle stream)
    : driver_(driver),
      most_(driver.has_batches() ? pieces_per_call : 1),
      capacity_(std::min(most_, kFirstBatch)),
      stream_(stream) {}

void BatchSink::add(const CopyPiece& piece) {
  dst_.push_back(piece.dst);
  src_.push_back(piece.src);
  bytes_.push_back(piece.bytes);
  if (dst_.size() >= capacity_) flush();
}

void BatchSink::flush() {
  if (dst_.empty()) return;
  if (dst_.size() == 1) {
    driver_.copy({dst_[0], src_[0], bytes_[0]}, stream_);
  } else {
    driver_.copy_batch(dst_, src_, bytes_, stream_);
  }
  dst_.clear();
  src_.clear();
  bytes_.clear();
  capacity_ = std::min(most_, kBatchGrowth * capacity_);
}

KernelSink::KernelSink(const CopyDriver& driver, const CopyKernels& kernels, KernelTable& table,
                       StreamHandle stream, std::size_t first_units)
    : driver_(driver),
      kernels_(kernels),
      table_(table),
      stream_(stream),
      capacity_(std::min(first_units, KernelTable::kCapacity)) {
  table_.count = 0;
}

void KernelSink::add(CopyPiece piece) {
  while (piece.bytes > 0) {
    const std::uint64_t bytes = std::min(piece.bytes, kUnitBytes);
    table_.pieces[table_.count++] = KernelPiece::of({piece.dst, piece.src, bytes});
    bits_ |= piece.dst | piece.src | bytes;
    piece = {piece.dst + bytes, piece.src + bytes, piece.bytes - bytes};
    if (room() == 0) flush();
  }
}

void KernelSink::flush() {
  if (table_.count == 0) return;
  const bool is_aligned = bits_ % 16 == 0 && kernels_.aligned.function != 0;
  driver_.launch(is_aligned ? kernels_.aligned : kernels_.any, table_, stream_);
  table_.count = 0;
  bits_ = 0;
  capacity_ = std::min(KernelTable::kCapacity, kLaunchGrowth * capacity_);
}

StagingSink::StagingSink(const CopyDriver& driver, const CopyStaging& staging,
                         std::size_t& next_stage, CopySide host_side, std::size_t pieces_per_call,
                         const CopyKernels& kernels, KernelTable& table, StreamHandle stream,
                         std::uint64_t total_bytes)
    : driver_(driver),
      staging_(staging),
      next_stage_(next_stage),
      host_side_(host_side),
      stream_(stream),
      limit_bytes_(std::min(staging.stage_bytes,
                            std::max(kLeastStageBytes, total_bytes / kLeastStages))),
      batch_(driver, pieces_per_call, stream),
      kernel_(driver, kernels, table, staging.stream, KernelTable::kCapacity) {}

void StagingSink::add(std::span<const CopyPiece> run) {
  while (!run.empty()) {
    const std::size_t count = std::min(fitting(run[0].bytes), run.size());
    if (count > 0) put(run.first(count));
    run = run.subspan(count);
    if (!run.empty()) flush();
  }
}

void StagingSink::finish() {
  flush();
  if (!is_load() || !has_started_) return;
  driver_.record(border(), staging_.stream);
  driver_.wait(stream_, border());
}

// How many pieces of this size the stage still takes; at least one if it is empty. The last unit of
// the table stays free: a full table would be launched before the stage is filled.
std::size_t StagingSink::fitting(std::uint64_t bytes) const {
  const std::uint64_t left = limit_bytes_ - std::min(used_bytes_, limit_bytes_);
  const std::uint64_t by_bytes = std::max<std::uint64_t>(left / bytes, rows_.empty() ? 1 : 0);
  return std::min<std::size_t>(by_bytes, (kernel_.room() - 1) / KernelSink::units_of(bytes));
}

void StagingSink::put(std::span<const CopyPiece> run) {
  const std::uint64_t bytes = run[0].bytes, row_bytes = run.size() * bytes;
  const std::uint64_t place =
      staging_.address + next_stage_ * staging_.stage_bytes + used_bytes_;
  rows_.push_back(is_load() ? CopyPiece{place, run[0].src, row_bytes}
                            : CopyPiece{run[0].dst, place, row_bytes});
  for (std::size_t i = 0; i < run.size(); ++i) {
    const std::uint64_t staged = place + i * bytes;
    kernel_.add(is_load() ? CopyPiece{run[i].dst, staged, bytes}
                          : CopyPiece{staged, run[i].src, bytes});
  }
  const std::uint64_t end = used_bytes_ + row_bytes;
  used_bytes_ = end + (kRowAlign - end % kRowAlign) % kRowAlign;
}

void StagingSink::flush() {
  if (rows_.empty()) return;
  if (is_load()) {
    driver_.wait(stream_, emptied());
    move_rows();
    driver_.record(filled(), stream_);
    driver_.wait(staging_.stream, filled());
    kernel_.flush();
    driver_.record(emptied(), staging_.stream);
  } else {
    if (!has_started_) {
      driver_.record(border(), stream_);
      driver_.wait(staging_.stream, border());
    }
    driver_.wait(staging_.stream, emptied());
    kernel_.flush();
    driver_.record(filled(), staging_.stream);
    driver_.wait(stream_, filled());
    move_rows();
    driver_.record(emptied(), stream_);
  }
  has_started_ = true;
  used_bytes_ = 0;
  next_stage_ = (next_stage_ + 1) % num_stages();
}

void StagingSink::move_rows() {
  for (const CopyPiece& row : rows_) batch_.add(row);
  batch_.flush();
  rows_.clear();
}

}  // namespace tiermem
