// Attention over pages in host memory for Python.
#include "tiermem/cpu_attention.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tiermem;

namespace {

template <class T>
using TableIn = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::size_t at_least_one(const char* name, std::int64_t value) {
  if (value >= 1) return static_cast<std::size_t>(value);
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) +
                              ": must be at least 1");
}

void* pointer(std::int64_t address) {
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

// One long function, for what it takes to name the arguments once.
void attend(CpuAttention& attention, FloatType type, std::int64_t num_kv_heads,
            std::int64_t page_tokens, std::int64_t head_dim, const TableIn<std::int64_t>& slices,
            const std::optional<TableIn<std::int32_t>>& starts,
            const ArrayIn<std::int32_t>& num_pages, const ArrayIn<std::int32_t>& kv_end,
            const ArrayIn<std::int32_t>& row_starts, const ArrayIn<std::int32_t>& q_start,
            std::int64_t q, std::int64_t row_stride, std::int64_t head_stride,
            std::int64_t num_heads, double scale, std::optional<std::int64_t> window,
            std::int64_t out, FloatType out_type, std::int64_t lse,
            std::optional<std::int64_t> page_lse) {
  const KvShape shape{type, at_least_one("num_kv_heads", num_kv_heads),
                      at_least_one("page_tokens", page_tokens), at_least_one("head_dim", head_dim)};
  if (at_least_one("num_heads", num_heads) % shape.num_kv_heads != 0) {
    throw std::invalid_argument("num_heads=" + std::to_string(num_heads) +
                                ": must be a multiple of " + std::to_string(num_kv_heads));
  }
  if (window) at_least_one("window", *window);
  PageTables tables{slices.shape(1),     {slices.data(), slices.size()}, {}, span_of(num_pages),
                    span_of(kv_end), span_of(row_starts),            span_of(q_start)};
  if (starts) tables.starts = {starts->data(), starts->size()};
  const QueryRows queries{pointer(q),  row_stride, head_stride, static_cast<std::size_t>(num_heads),
                          scale, window};
  const nb::gil_scoped_release release;
  attention.attend(shape, tables, queries,
                   {out_type, pointer(out), static_cast<float*>(pointer(lse)),
                    static_cast<float*>(pointer(page_lse.value_or(0)))});
}

}  // namespace

void bind_cpu_attention(nb::module_& module) {
  nb::enum_<FloatType>(module, "FloatType")
      .value("FLOAT16", FloatType::float16)
      .value("BFLOAT16", FloatType::bfloat16)
      .value("FLOAT32", FloatType::float32);
  nb::enum_<AttentionInstructions>(module, "AttentionInstructions")
      .value("AUTO", AttentionInstructions::automatic)
      .value("PORTABLE", AttentionInstructions::portable)
      .value("AVX2", AttentionInstructions::avx2)
      .value("AVX512", AttentionInstructions::avx512)
      .value("AMX", AttentionInstructions::amx);
  module.def("attention_instructions_supported", &attention_instructions_supported,
             "instructions"_a);
  nb::class_<CpuAttention>(module, "CpuAttention")
      .def(
          "__init__",
          [](CpuAttention* self, std::int64_t num_threads, const std::vector<int>& cpus,
             AttentionInstructions instructions, double spin_s) {
            new (self) CpuAttention(at_least_one("num_threads", num_threads), cpus, instructions,
                                    spin_s);
          },
          "num_threads"_a, nb::kw_only(), "cpus"_a = std::vector<int>{},
          "instructions"_a = AttentionInstructions::automatic, "spin_s"_a = 0.0)
      .def_prop_ro("num_threads", &CpuAttention::num_threads)
      .def_prop_ro("instructions", &CpuAttention::instructions)
      .def("attend", &attend, nb::kw_only(), "kv_type"_a, "num_kv_heads"_a, "page_tokens"_a,
           "head_dim"_a, "slices"_a.noconvert(), "starts"_a.none().noconvert(),
           "num_pages"_a.noconvert(), "kv_end"_a.noconvert(), "row_starts"_a.noconvert(),
           "q_start"_a.noconvert(), "q"_a, "row_stride"_a, "head_stride"_a, "num_heads"_a,
           "scale"_a, "window"_a.none(), "out"_a, "out_type"_a, "lse"_a,
           "page_lse"_a.none() = nb::none());
}
