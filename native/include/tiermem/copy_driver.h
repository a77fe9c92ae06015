// CopyDriver: the calls that copies make of a GPU's driver, through addresses of its functions. The
// core links no CUDA; Python looks the functions up and hands their addresses over.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "tiermem/copy_plan.h"

namespace tiermem {

// Handles of the driver: CUstream, CUevent, CUfunction.
using StreamHandle = std::uintptr_t;
using EventHandle = std::uintptr_t;
using KernelHandle = std::uintptr_t;

// Addresses of the driver's functions; 0 for one that it does not have.
struct CopyCalls {
  std::uintptr_t copy = 0;        // cuMemcpyAsync
  std::uintptr_t copy_batch = 0;  // cuMemcpyBatchAsync as of CUDA 13.0; may be 0
  std::uintptr_t launch = 0;      // cuLaunchKernel
  std::uintptr_t record = 0;      // cuEventRecord
  std::uintptr_t query = 0;       // cuEventQuery
  std::uintptr_t wait = 0;        // cuStreamWaitEvent
};

// The driver refused a call: its name and CUDA's code.
class CopyRefused : public std::runtime_error {
 public:
  CopyRefused(const char* call, int code) : std::runtime_error(call), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// A piece of at most 65,535 bytes in two words: the addresses below, and above each of them a byte
// of the size.
struct KernelPiece {
  static constexpr unsigned kAddressBits = 56;

  std::uint64_t dst_and_low = 0;
  std::uint64_t src_and_high = 0;

  static KernelPiece of(const CopyPiece& piece) {
    return {piece.dst | (piece.bytes & 0xFF) << kAddressBits,
            piece.src | piece.bytes >> 8 << kAddressBits};
  }
};

// What the kernel gets: its pieces, as one parameter of at most 32,764 bytes, which the driver
// copies at the launch. So no table lies in memory that would have to outlive the launch.
struct KernelTable {
  static constexpr std::size_t kCapacity = 2040;

  std::uint64_t count = 0;
  std::array<KernelPiece, kCapacity> pieces{};
};
static_assert(sizeof(KernelTable) <= 32764);

// How a kernel is launched.
struct CopyKernel {
  KernelHandle function = 0;  // 0: there is none
  unsigned blocks = 0;
  unsigned threads = 0;
  unsigned shared_bytes = 0;
};

// Two kernels with the same table: one takes any pieces, the other needs addresses and sizes that
// are multiples of 16 and occupies fewer multiprocessors; it may be missing.
struct CopyKernels {
  CopyKernel any;
  CopyKernel aligned;
};

// Every method raises CopyRefused when the driver refuses. Addresses are unified ones: what is host
// and what is device memory the driver sees from them.
class CopyDriver {
 public:
  explicit CopyDriver(const CopyCalls& calls) : calls_(calls) {}

  bool has_batches() const { return calls_.copy_batch != 0; }

  void copy(const CopyPiece& piece, StreamHandle stream) const;

  // The pieces dst[i], src[i], bytes[i] in one call. REQUIRES: has_batches(), and not a default
  // stream, on which the driver does not take batches.
  void copy_batch(std::span<std::uint64_t> dst, std::span<std::uint64_t> src,
                  std::span<std::uint64_t> bytes, StreamHandle stream) const;

  void launch(const CopyKernel& kernel, KernelTable& table, StreamHandle stream) const;

  void record(EventHandle event, StreamHandle stream) const;
  void wait(StreamHandle stream, EventHandle event) const;

  // Whether what `event` stands for has ended; true for one that was never recorded.
  bool is_done(EventHandle event) const;

 private:
  CopyCalls calls_;
};

}  // namespace tiermem
