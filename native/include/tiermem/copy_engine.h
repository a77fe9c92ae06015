// CopyEngine: gives batches of copies to a GPU's driver, each part by the method chosen for it.
// The host's cost is a few hundred nanoseconds a piece and no Python. One thread uses an engine.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "tiermem/copy_driver.h"
#include "tiermem/copy_plan.h"

namespace tiermem {

enum class CopyDirection : std::uint8_t { HostToDevice, DeviceToHost, DeviceToDevice };
constexpr std::size_t kNumCopyDirections = 3;

// How pieces are moved.
enum class CopyMethod : std::uint8_t {
  Single,  // a driver call each
  Batch,   // the driver's batches, some pieces a call
  Runs,    // runs of host memory by DMA through staging in device memory, spread by a kernel
  Kernel,  // a kernel that reads or writes the pieces where they are, in mapped host memory
};

// Which method moves pieces of 2^i to 2^(i+1) - 1 bytes in runs of 2^j to 2^(j+1) - 1 of them.
struct CopyChoices {
  static constexpr std::size_t kNumSizes = 32;
  static constexpr std::size_t kNumRuns = 8;

  std::array<std::array<CopyMethod, kNumRuns>, kNumSizes> methods{};

  CopyMethod at(std::uint64_t bytes, std::uint64_t count) const;
};

// Staging in device memory for one direction: a ring of stages, and the stream whose kernels
// spread or collect them. Every stage has two events, filled and emptied; one more marks a batch's
// start or end.
struct CopyStaging {
  std::uint64_t address = 0;
  std::uint64_t stage_bytes = 0;
  StreamHandle stream = 0;
  std::vector<EventHandle> events;  // 2 × stages + 1
};

// What the engine may use besides the driver's own copies.
struct CopyParts {
  CopyKernels link;    // pieces between host and device memory
  CopyKernels spread;  // pieces within device memory
  std::array<CopyStaging, 2> staging;  // by direction; without events: none
  std::array<EventHandle, 2> last;     // by direction: behind the newest batch; 0: none
  std::size_t pieces_per_call = 256;
};

// Whose stream it is: the driver refuses batches on default streams, and those of others may be
// under capture.
enum class StreamOwner : std::uint8_t { Device, Other };

class CopyEngine {
 public:
  CopyEngine(const CopyCalls& calls, CopyParts parts);

  // The methods of one direction from now on; `busy`: while the opposite direction has copies in
  // flight. A method that cannot be used where it is chosen is replaced by Batch or Single.
  void choose(CopyDirection direction, bool busy, const CopyChoices& choices);

  // Ascending addresses, on either side, at which memory starts that the driver knows by itself.
  void set_borders(std::vector<std::uint64_t> borders) { borders_ = std::move(borders); }

  // Gives `stream` every kernel once, without pieces: CUDA loads a kernel at its first launch, and
  // waits for the whole GPU then. Raises CopyRefused.
  void warm_up(StreamHandle stream);

  // Gives `stream` the pieces dst[i], src[i], bytes[i], in any order among themselves, behind
  // everything given to it before. Raises CopyRefused; pieces may have been given then, to
  // `stream` and to the staging's stream.
  // REQUIRES: spans of one length; no piece of 0 bytes; no two destinations overlap, and none
  // overlaps a source.
  void submit(CopyDirection direction, std::span<const std::int64_t> dst,
              std::span<const std::int64_t> src, std::span<const std::int64_t> bytes,
              StreamHandle stream, StreamOwner owner);

 private:
  class Submission;

  bool opposite_is_busy(CopyDirection direction) const;

  CopyDriver driver_;
  CopyParts parts_;
  std::array<std::array<CopyChoices, 2>, kNumCopyDirections> choices_{};
  std::vector<std::uint64_t> borders_;
  std::array<std::size_t, 2> next_stage_{};
  KernelTable link_table_;
  KernelTable stage_table_;
};

}  // namespace tiermem
