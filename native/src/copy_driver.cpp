#include "tiermem/copy_driver.h"

namespace tiermem {

namespace {

constexpr int kNotReady = 600;

// CUmemcpyAttributes. A source is read in stream order, not at the call.
struct BatchAttributes {
  std::uint32_t source_order = 1;  // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
  std::uint32_t hints_and_flags[5] = {};
};
static_assert(sizeof(BatchAttributes) == 24);

template <class... Arguments>
int call(std::uintptr_t function, Arguments... arguments) {
  return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
}

void check(const char* name, int code) {
  if (code != 0) throw CopyRefused(name, code);
}

void* handle(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

}  // namespace

void CopyDriver::copy(const CopyPiece& piece, StreamHandle stream) const {
  check("cuMemcpyAsync", call(calls_.copy, piece.dst, piece.src,
                              static_cast<std::size_t>(piece.bytes), handle(stream)));
}

void CopyDriver::copy_batch(std::span<std::uint64_t> dst, std::span<std::uint64_t> src,
                            std::span<std::uint64_t> bytes, StreamHandle stream) const {
  BatchAttributes attributes;
  std::size_t first_piece = 0;
  check("cuMemcpyBatchAsync",
        call(calls_.copy_batch, dst.data(), src.data(), bytes.data(), dst.size(), &attributes,
             &first_piece, std::size_t{1}, handle(stream)));
}

void CopyDriver::launch(const CopyKernel& kernel, KernelTable& table, StreamHandle stream) const {
  void* parameters[] = {&table};
  void** none = nullptr;
  check("cuLaunchKernel",
        call(calls_.launch, handle(kernel.function), kernel.blocks, 1U, 1U, kernel.threads, 1U, 1U,
             kernel.shared_bytes, handle(stream), static_cast<void**>(parameters), none));
}

void CopyDriver::record(EventHandle event, StreamHandle stream) const {
  check("cuEventRecord", call(calls_.record, handle(event), handle(stream)));
}

void CopyDriver::wait(StreamHandle stream, EventHandle event) const {
  check("cuStreamWaitEvent", call(calls_.wait, handle(stream), handle(event), 0U));
}

bool CopyDriver::is_done(EventHandle event) const {
  const int code = call(calls_.query, handle(event));
  if (code == kNotReady) return false;
  check("cuEventQuery", code);
  return true;
}

}  // namespace tiermem
