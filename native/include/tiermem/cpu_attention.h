// CpuAttention: attention of query rows over K and V pages in host memory, in place.
//
// A page's layer slice lies as [K, V][kv_head][token][head_dim], without gaps. Operands are widened to
// float32 exactly, products and sums are float32; AMX leaves out what is 2^-16 of a product, and takes an
// infinity in float16 for NaN. Numbers below 2^-126 count as 0. The result depends on the arguments and
// the instructions alone, not on threads or timing: work is cut by its shape, and partial results are
// merged in a fixed order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace tiermem {

enum class FloatType { float16, bfloat16, float32 };

// Which instructions compute it; `automatic` takes the widest that this processor has.
enum class AttentionInstructions { automatic, portable, avx2, avx512, amx };

// True if this build and this processor have them; always true for automatic and portable. For AMX the
// system is asked for leave to use it.
bool attention_instructions_supported(AttentionInstructions instructions) noexcept;

// What a page's layer slice is made of. All at least 1.
struct KvShape {
  FloatType type;
  std::size_t num_kv_heads;
  std::size_t page_tokens;
  std::size_t head_dim;
};

// Which stored tokens each query row may see; B sequences.
//
// The token at offset t of page j of sequence b has position p = starts[b, j] + t; without starts,
// j * page_tokens + t. Row r, with row_starts[b] <= r < row_starts[b + 1], has position
// q_start[b] + r - row_starts[b]. It sees the token if 0 <= p < kv_end[b] and p <= its position and, with
// a window, p > its position - window. What no row sees is never used, so it may hold anything; a page
// in which no row sees a token is not touched, and its address not looked at.
struct PageTables {
  std::size_t max_pages;                     // entries in a row of slices and starts
  std::span<const std::int64_t> slices;      // (B, max_pages): addresses of the pages' layer slices
  std::span<const std::int32_t> starts;      // (B, max_pages), or empty
  std::span<const std::int32_t> num_pages;   // (B): entries that count, at most max_pages
  std::span<const std::int32_t> kv_end;      // (B)
  std::span<const std::int32_t> row_starts;  // (B + 1): ascending from 0
  std::span<const std::int32_t> q_start;     // (B)
};

struct QueryRows {
  const void* data;          // (rows, num_heads, head_dim) of KvShape::type, head_dim contiguous
  std::int64_t row_stride;   // in elements
  std::int64_t head_stride;  // in elements
  std::size_t num_heads;     // a multiple of num_kv_heads; head i reads KV head i / (their ratio)
  double scale;              // of q . k before the softmax; any sign
  std::optional<std::int64_t> window;  // positions that a row sees, its own included; at least 1
};

// Where the result goes; contiguous. A row that sees nothing gets 0 and -infinity.
struct AttentionResult {
  FloatType type;
  void* out;   // (rows, num_heads, head_dim) of type
  float* lse;  // (rows, num_heads): natural logarithm of the sum of exp(score)
  // (rows, num_heads, max_pages), or null: the same over the tokens of each page of the row's sequence
  // alone, -infinity for a page of which the row sees none and past num_pages. A page's share of a row's
  // attention is exp(page_lse - lse), however small.
  float* page_lse = nullptr;
};

struct AttentionKernel;

class CpuAttention {
 public:
  // `num_threads`, `cpus` and `spin_s` as WorkerTeam. Throws what it throws, and std::invalid_argument
  // for instructions that are not supported.
  explicit CpuAttention(std::size_t num_threads, const std::vector<int>& cpus = {},
                        AttentionInstructions instructions = AttentionInstructions::automatic,
                        double spin_s = 0.0);
  // For tests, with a kernel of theirs, which must outlive this.
  CpuAttention(std::size_t num_threads, const AttentionKernel& kernel, double spin_s = 0.0);
  ~CpuAttention();

  std::size_t num_threads() const noexcept;
  AttentionInstructions instructions() const noexcept;

  // Done on return. All memory named is the caller's and must stay as it is until then; several
  // threads may call, one call runs after the other. Keeps its scratch memory for the next call: for
  // head_dim 128 about 5 MiB when it decodes, 70 MiB when it attends long chunks.
  // REQUIRES: what the structures above say. Throws std::invalid_argument for lengths of tables,
  // row_starts or num_pages that break it, and for a page that a row sees with slices = 0; whatever a
  // worker throws. Nothing but the result's memory changes then.
  void attend(const KvShape& shape, const PageTables& tables, const QueryRows& queries,
              const AttentionResult& result);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tiermem
