// A GPU driver whose streams run in random order: what the copy engine's order of events is tested
// against. Device memory is host memory; a copy runs when a stream gets to it, not when given.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "tiermem/copy_driver.h"

namespace tiermem_test {

class SimulatedDriver {
 public:
  static constexpr int kFailure = 700;

  explicit SimulatedDriver(std::uint64_t seed) : random_(seed) { current() = this; }

  // The simulation that the functions below belong to.
  static SimulatedDriver*& current() {
    static SimulatedDriver* simulation = nullptr;
    return simulation;
  }

  tiermem::CopyCalls calls() const {
    const auto address = [](auto function) { return reinterpret_cast<std::uintptr_t>(function); };
    return {address(&copy),   address(&copy_batch), address(&launch),
            address(&record), address(&query),      address(&wait)};
  }

  // Gives `stream` something of the test's own.
  void give(tiermem::StreamHandle stream, std::function<void()> work) {
    streams_[stream].push_back({std::move(work), nullptr});
  }

  // Runs everything, a random stream's next work at a time. False if streams wait for each other.
  bool run_all() {
    for (;;) {
      std::vector<std::deque<Work>*> able;
      bool any = false;
      for (auto& [handle, queue] : streams_) {
        any |= !queue.empty();
        if (!queue.empty() && (!queue[0].until || *queue[0].until)) able.push_back(&queue);
      }
      if (able.empty()) return !any;
      auto& queue = *able[random_() % able.size()];
      const auto work = std::move(queue[0].run);
      queue.pop_front();
      if (work) work();
    }
  }

  // Refuses copies by DMA that reach over `border` from now on.
  void forbid(std::uint64_t border) { border_ = border; }

  // Lets the call fail that comes after `ahead` others.
  void fail_after(int ahead) { calls_left_ = ahead; }

  std::map<std::string, int> counts;
  std::vector<std::size_t> batch_sizes;

 private:
  using Token = std::shared_ptr<bool>;
  struct Work {
    std::function<void()> run;
    Token until;
  };

  static void move(std::uint64_t dst, std::uint64_t src, std::uint64_t bytes) {
    std::memmove(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
  }

  // 0, or the code of a call that is to fail; then it must do nothing.
  static int begin(const char* name) {
    SimulatedDriver& self = *current();
    ++self.counts[name];
    return self.calls_left_-- == 0 ? kFailure : 0;
  }

  bool reaches_over(std::uint64_t address, std::uint64_t bytes) const {
    return address < border_ && border_ < address + bytes;
  }

  void give_piece(void* stream, std::uint64_t dst, std::uint64_t src, std::uint64_t bytes) {
    give(reinterpret_cast<std::uintptr_t>(stream), [=] { move(dst, src, bytes); });
  }

  static int copy(std::uint64_t dst, std::uint64_t src, std::size_t bytes, void* stream) {
    if (const int code = begin("copy")) return code;
    if (current()->reaches_over(src, bytes)) return kFailure;
    current()->give_piece(stream, dst, src, bytes);
    return 0;
  }

  static int copy_batch(void* dst, void* src, void* bytes, std::size_t count, void*, void*,
                        std::size_t, void* stream) {
    if (const int code = begin("copy_batch")) return code;
    current()->batch_sizes.push_back(count);
    const auto word = [](void* array, std::size_t i) {
      return static_cast<std::uint64_t*>(array)[i];
    };
    for (std::size_t i = 0; i < count; ++i) {
      if (current()->reaches_over(word(src, i), word(bytes, i))) return kFailure;
      current()->give_piece(stream, word(dst, i), word(src, i), word(bytes, i));
    }
    return 0;
  }

  static tiermem::CopyPiece unpacked(const tiermem::KernelPiece& piece) {
    const std::uint64_t address = (std::uint64_t{1} << 56) - 1;
    return {piece.dst_and_low & address, piece.src_and_high & address,
            piece.dst_and_low >> 56 | piece.src_and_high >> 56 << 8};
  }

  // A kernel whose handle is odd is the one for aligned pieces.
  static int launch(void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                    unsigned, void* stream, void** parameters, void**) {
    if (const int code = begin("launch")) return code;
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(kernel) % 2 == 1;
    current()->counts["launch aligned"] += is_aligned;
    const auto& table = *static_cast<const tiermem::KernelTable*>(parameters[0]);
    for (std::size_t i = 0; i < table.count; ++i) {
      const tiermem::CopyPiece piece = unpacked(table.pieces[i]);
      if (is_aligned && (piece.dst | piece.src | piece.bytes) % 16 != 0) return kFailure;
      current()->give_piece(stream, piece.dst, piece.src, piece.bytes);
    }
    return 0;
  }

  static int record(void* event, void* stream) {
    if (const int code = begin("record")) return code;
    auto token = std::make_shared<bool>(false);
    current()->events_[event] = token;
    current()->give(reinterpret_cast<std::uintptr_t>(stream), [token] { *token = true; });
    return 0;
  }

  static int query(void* event) {
    if (const int code = begin("query")) return code;
    const Token token = current()->events_[event];
    return token && !*token ? 600 : 0;
  }

  static int wait(void* stream, void* event, unsigned) {
    if (const int code = begin("wait")) return code;
    current()->streams_[reinterpret_cast<std::uintptr_t>(stream)].push_back(
        {nullptr, current()->events_[event]});
    return 0;
  }

  std::mt19937_64 random_;
  std::map<tiermem::StreamHandle, std::deque<Work>> streams_;
  std::map<void*, Token> events_;
  int calls_left_ = -1;
  std::uint64_t border_ = 0;
};

}  // namespace tiermem_test
