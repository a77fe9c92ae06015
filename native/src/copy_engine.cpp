#include "tiermem/copy_engine.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <memory>
#include <numeric>
#include <utility>

#include "copy_sinks.h"

namespace tiermem {

namespace {

// Pieces that are ordered and joined at a time, which takes 70 ns each: few at first, so that the
// first bytes move soon after the call, then enough to find long runs.
constexpr std::size_t kFirstWindow = 512;
constexpr std::size_t kWindow = 4096;

constexpr std::size_t index_of(CopyDirection direction) {
  return static_cast<std::size_t>(direction);
}

std::size_t log2_below(std::uint64_t value, std::size_t end) {
  return std::min<std::size_t>(static_cast<std::size_t>(std::bit_width(value)) - 1, end - 1);
}

}  // namespace

CopyMethod CopyChoices::at(std::uint64_t bytes, std::uint64_t count) const {
  return methods[log2_below(bytes, kNumSizes)][log2_below(count, kNumRuns)];
}

// One call of `submit`: its sinks, and the way of each run to one of them.
class CopyEngine::Submission {
 public:
  Submission(CopyEngine& engine, CopyDirection direction, const CopyChoices& choices,
             StreamHandle stream, StreamOwner owner, std::uint64_t total_bytes)
      : driver_(engine.driver_),
        choices_(choices),
        borders_(engine.borders_),
        side_(direction == CopyDirection::HostToDevice ? CopySide::Src : CopySide::Dst),
        stream_(stream),
        owner_(owner),
        has_kernel_(kernels_of(engine, direction).any.function != 0),
        batch_(engine.driver_, engine.parts_.pieces_per_call, stream),
        kernel_(engine.driver_, kernels_of(engine, direction), engine.link_table_, stream,
                KernelSink::kFewUnits) {
    if (direction == CopyDirection::DeviceToDevice || owner == StreamOwner::Other) return;
    const CopyStaging& staging = engine.parts_.staging[index_of(direction)];
    if (staging.events.empty()) return;
    staging_ = std::make_unique<StagingSink>(
        engine.driver_, staging, engine.next_stage_[index_of(direction)], side_,
        engine.parts_.pieces_per_call, engine.parts_.spread, engine.stage_table_, stream,
        total_bytes);
  }

  void add(std::vector<CopyPiece>& window) {
    arrange_pieces(window, side_, borders_);
    runs_.clear();
    find_runs(window, side_, borders_, runs_);
    for (const CopyRun& run : runs_) give(std::span(window).subspan(run.first, run.count));
  }

  void finish() {
    batch_.flush();
    kernel_.flush();
    if (staging_) staging_->finish();
  }

 private:
  static const CopyKernels& kernels_of(const CopyEngine& engine, CopyDirection direction) {
    return direction == CopyDirection::DeviceToDevice ? engine.parts_.spread : engine.parts_.link;
  }

  CopyMethod usable(CopyMethod method, std::uint64_t bytes) const {
    if (method == CopyMethod::Runs && (!staging_ || !staging_->takes(bytes))) {
      method = CopyMethod::Batch;
    }
    if (method == CopyMethod::Kernel && !has_kernel_) method = CopyMethod::Batch;
    if (method == CopyMethod::Batch && owner_ == StreamOwner::Other) method = CopyMethod::Single;
    return method;
  }

  void give(std::span<const CopyPiece> run) {
    const std::uint64_t bytes = run[0].bytes;
    switch (usable(choices_.at(bytes, run.size()), bytes)) {
      case CopyMethod::Single:
        for (const CopyPiece& piece : run) driver_.copy(piece, stream_);
        break;
      case CopyMethod::Batch:
        for (const CopyPiece& piece : run) batch_.add(piece);
        break;
      case CopyMethod::Kernel:
        for (const CopyPiece& piece : run) kernel_.add(piece);
        break;
      case CopyMethod::Runs:
        staging_->add(run);
        break;
    }
  }

  const CopyDriver& driver_;
  const CopyChoices& choices_;
  CopyBorders borders_;
  CopySide side_;
  StreamHandle stream_;
  StreamOwner owner_;
  bool has_kernel_;
  BatchSink batch_;
  KernelSink kernel_;
  std::unique_ptr<StagingSink> staging_;  // none: no runs
  std::vector<CopyRun> runs_;
};

CopyEngine::CopyEngine(const CopyCalls& calls, CopyParts parts)
    : driver_(calls), parts_(std::move(parts)) {}

void CopyEngine::choose(CopyDirection direction, bool busy, const CopyChoices& choices) {
  choices_[index_of(direction)][busy ? 1 : 0] = choices;
}

void CopyEngine::warm_up(StreamHandle stream) {
  link_table_.count = 0;
  for (const CopyKernels& kernels : {parts_.link, parts_.spread}) {
    for (const CopyKernel& kernel : {kernels.any, kernels.aligned}) {
      if (kernel.function != 0) driver_.launch(kernel, link_table_, stream);
    }
  }
}

void CopyEngine::submit(CopyDirection direction, std::span<const std::int64_t> dst,
                        std::span<const std::int64_t> src, std::span<const std::int64_t> bytes,
                        StreamHandle stream, StreamOwner owner) {
  assert(dst.size() == src.size() && dst.size() == bytes.size());
  if (dst.empty()) return;
  const bool is_link = direction != CopyDirection::DeviceToDevice && owner == StreamOwner::Device;
  const bool busy = is_link && opposite_is_busy(direction);
  const auto total_bytes = static_cast<std::uint64_t>(
      std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0}));
  Submission submission(*this, direction, choices_[index_of(direction)][busy ? 1 : 0], stream,
                        owner, total_bytes);
  std::vector<CopyPiece> window;
  window.reserve(std::min(dst.size(), kWindow));
  std::size_t count = kFirstWindow;
  for (std::size_t first = 0; first < dst.size();
       first += count, count = std::min(2 * count, kWindow)) {
    window.clear();
    for (std::size_t i = first; i < std::min(first + count, dst.size()); ++i) {
      window.push_back({static_cast<std::uint64_t>(dst[i]), static_cast<std::uint64_t>(src[i]),
                        static_cast<std::uint64_t>(bytes[i])});
    }
    submission.add(window);
  }
  submission.finish();
  if (is_link && parts_.last[index_of(direction)] != 0) {
    driver_.record(parts_.last[index_of(direction)], stream);
  }
}

bool CopyEngine::opposite_is_busy(CopyDirection direction) const {
  const EventHandle last = parts_.last[1 - index_of(direction)];
  return last != 0 && !driver_.is_done(last);
}

}  // namespace tiermem
