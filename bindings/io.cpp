// BlockFile and IoEngine for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <cerrno>
#include <chrono>
#include <limits>
#include <optional>
#include <utility>

#include "bindings.h"
#include "tiermem/block_file.h"
#include "tiermem/fault_ops.h"
#include "tiermem/io_engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using tiermem::BlockFile;
using tiermem::IoEngine;
using tiermem::IoResult;
using Numbers = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Faults = std::optional<std::shared_ptr<tiermem::FaultOps>>;

// How often a waiting thread looks for signals such as an interrupt from the keyboard.
constexpr double kSignalCheckS = 0.1;

std::string path_of(const nb::object& path) {
  PyObject* encoded = nullptr;
  if (!PyUnicode_FSConverter(path.ptr(), &encoded)) throw nb::python_error();
  const auto bytes = nb::steal<nb::bytes>(encoded);
  return {bytes.c_str(), bytes.size()};
}

nb::object text_of(const std::string& path) {
  return nb::steal(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

std::uint64_t size_of(std::int64_t size_bytes) {
  if (size_bytes >= 0) return static_cast<std::uint64_t>(size_bytes);
  throw std::invalid_argument("size_bytes=" + std::to_string(size_bytes) +
                              ": must not be negative");
}

// The system calls themselves where no faults are planned.
std::shared_ptr<tiermem::FileOps> ops_with(const Faults& faults) {
  if (faults) return *faults;
  return std::make_shared<tiermem::FileOps>();
}

double seconds_of(std::optional<double> timeout_s) {
  return timeout_s.value_or(std::numeric_limits<double>::infinity());
}

void raise_os_errors(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const tiermem::FileError& e) {
    const nb::object arguments = nb::make_tuple(e.code().value(), e.what(), text_of(e.path()));
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  } catch (const std::system_error& e) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(e.code().value(), e.what()).ptr());
  }
}

std::shared_ptr<BlockFile> open_file(const nb::object& path, std::int64_t size_bytes,
                                     tiermem::OpenMode mode, const Faults& faults) {
  const std::string name = path_of(path);
  const std::uint64_t size = size_of(size_bytes);
  const nb::gil_scoped_release release;
  return BlockFile::open(name, size, mode, ops_with(faults));
}

void bind_block_file(nb::module_& module) {
  nb::enum_<tiermem::OpenMode>(module, "OpenMode")
      .value("READ_ONLY", tiermem::OpenMode::read_only)
      .value("EXISTING", tiermem::OpenMode::existing)
      .value("CREATE", tiermem::OpenMode::create);

  nb::class_<BlockFile>(module, "BlockFile", nb::is_final())
      .def(nb::new_(&open_file), "path"_a, "size_bytes"_a, "mode"_a, nb::kw_only(),
           "faults"_a = nb::none())
      .def_prop_ro("path", [](const BlockFile& file) { return text_of(file.path()); })
      .def_prop_ro("size_bytes", &BlockFile::size_bytes)
      .def_prop_ro("is_direct", &BlockFile::is_direct)
      .def_prop_ro("is_closed", &BlockFile::is_closed)
      .def_prop_ro("allocated_bytes", &BlockFile::allocated_bytes)
      .def("sync", &BlockFile::sync, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "resize",
          [](BlockFile& file, std::int64_t size_bytes) { file.resize(size_of(size_bytes)); },
          "size_bytes"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("close", &BlockFile::close)
      .def("__enter__", [](nb::handle self) { return nb::borrow(self); })
      .def(
          "__exit__", [](BlockFile& file, const nb::args&) { file.close(); }, "exception"_a);
}

std::span<const std::int64_t> view(const Numbers& numbers) {
  return {numbers.data(), numbers.size()};
}

tiermem::Ticket submit(IoEngine& engine, tiermem::IoDirection direction, const BlockFile& file,
                       const Numbers& offsets, const Numbers& addresses, const Numbers& lengths,
                       const std::optional<Numbers>& tail_addresses, std::int64_t tail_length) {
  tiermem::IoBatch batch{.offsets = view(offsets),
                         .addresses = view(addresses),
                         .lengths = view(lengths),
                         .tail_addresses = {},
                         .tail_length = tail_length};
  if (tail_addresses) batch.tail_addresses = view(*tail_addresses);
  const nb::gil_scoped_release release;
  return engine.submit(direction, file, batch);
}

template <tiermem::IoDirection direction>
tiermem::Ticket submit_as(IoEngine& engine, const BlockFile& file, const Numbers& offsets,
                          const Numbers& addresses, const Numbers& lengths,
                          const std::optional<Numbers>& tail_addresses, std::int64_t tail_length) {
  return submit(engine, direction, file, offsets, addresses, lengths, tail_addresses, tail_length);
}

IoResult wait_within(IoEngine& engine, tiermem::Ticket ticket, double timeout_s) {
  const nb::gil_scoped_release release;
  return engine.wait(ticket, timeout_s);
}

IoResult wait(IoEngine& engine, tiermem::Ticket ticket, std::optional<double> timeout_s) {
  using Clock = std::chrono::steady_clock;
  const double total_s = seconds_of(timeout_s);
  const Clock::time_point start = Clock::now();
  double left_s = total_s;
  IoResult result = wait_within(engine, ticket, left_s > kSignalCheckS ? kSignalCheckS : left_s);
  while (result.status == tiermem::IoStatus::pending) {
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    left_s = total_s - std::chrono::duration<double>(Clock::now() - start).count();
    if (left_s <= 0) break;
    result = wait_within(engine, ticket, left_s > kSignalCheckS ? kSignalCheckS : left_s);
  }
  return result;
}

std::unique_ptr<IoEngine> make_engine(tiermem::EngineKind kind, std::int64_t queue_depth,
                                      std::int64_t num_threads, std::int64_t num_rings,
                                      std::int64_t piece_bytes, const Faults& faults) {
  tiermem::IoEngineOptions options;
  options.kind = kind;
  options.queue_depth = queue_depth;
  options.num_threads = num_threads;
  options.num_rings = num_rings;
  options.piece_bytes = piece_bytes;
  if (faults) options.file_ops = *faults;
  return tiermem::make_io_engine(options);
}

void close_or_raise(IoEngine& engine, const nb::args&) {
  const nb::gil_scoped_release release;
  if (engine.close(IoEngine::kDestructorTimeoutS)) return;
  throw std::system_error(ETIMEDOUT, std::generic_category(),
                          "an operation is still in flight; its memory must stay valid");
}

void bind_io_values(nb::module_& module) {
  nb::enum_<tiermem::EngineKind>(module, "EngineKind")
      .value("AUTO", tiermem::EngineKind::automatic)
      .value("IO_URING", tiermem::EngineKind::io_uring)
      .value("THREADS", tiermem::EngineKind::threads);

  nb::enum_<tiermem::IoStatus>(module, "IoStatus")
      .value("PENDING", tiermem::IoStatus::pending)
      .value("OK", tiermem::IoStatus::ok)
      .value("FAILED", tiermem::IoStatus::failed);

  nb::class_<IoResult>(module, "IoResult", nb::is_final())
      .def_ro("status", &IoResult::status)
      .def_ro("errno", &IoResult::error)
      .def_ro("message", &IoResult::message)
      .def("__repr__", [](const IoResult& result) {
        return nb::str("IoResult(status={}, errno={}, message={!r})")
            .format(result.status, result.error, result.message);
      });

  nb::class_<tiermem::IoCounters>(module, "IoCounters", nb::is_final())
      .def_ro("bytes_read", &tiermem::IoCounters::bytes_read)
      .def_ro("bytes_written", &tiermem::IoCounters::bytes_written)
      .def_ro("reads", &tiermem::IoCounters::reads)
      .def_ro("writes", &tiermem::IoCounters::writes)
      .def_ro("errors", &tiermem::IoCounters::errors)
      .def_ro("in_flight", &tiermem::IoCounters::in_flight);
}

void bind_io_engine(nb::module_& module) {
  using tiermem::IoDirection;
  nb::class_<IoEngine>(module, "IoEngine", nb::is_final())
      .def(nb::new_(&make_engine), "kind"_a = tiermem::EngineKind::automatic, "queue_depth"_a = 64,
           "num_threads"_a = 4, "num_rings"_a = 1, "piece_bytes"_a = tiermem::kDefaultPieceBytes,
           nb::kw_only(), "faults"_a = nb::none())
      .def_prop_ro("kind", &IoEngine::kind)
      .def("submit_read", &submit_as<IoDirection::read>, "file"_a, "offsets"_a.noconvert(),
           "addresses"_a.noconvert(), "lengths"_a.noconvert(),
           "tail_addresses"_a.noconvert() = nb::none(), "tail_length"_a = 0)
      .def("submit_write", &submit_as<IoDirection::write>, "file"_a, "offsets"_a.noconvert(),
           "addresses"_a.noconvert(), "lengths"_a.noconvert(),
           "tail_addresses"_a.noconvert() = nb::none(), "tail_length"_a = 0)
      .def("poll", &IoEngine::poll, "ticket"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("wait", &wait, "ticket"_a, "timeout_s"_a = nb::none())
      .def("forget", &IoEngine::forget, "ticket"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "register_memory",
          [](IoEngine& engine, std::int64_t address, std::int64_t num_bytes) {
            const nb::gil_scoped_release release;
            const tiermem::Registration done = engine.register_memory(address, num_bytes);
            return std::make_pair(done.bytes, done.error);
          },
          "address"_a, "num_bytes"_a)
      .def("unregister_memory", &IoEngine::unregister_memory, "address"_a, "num_bytes"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "close",
          [](IoEngine& engine, std::optional<double> timeout_s) {
            return engine.close(seconds_of(timeout_s));
          },
          "timeout_s"_a = IoEngine::kDestructorTimeoutS, nb::call_guard<nb::gil_scoped_release>())
      .def("counters", &IoEngine::counters)
      .def("__enter__", [](nb::handle self) { return nb::borrow(self); })
      .def("__exit__", &close_or_raise, "exception"_a);
}

}  // namespace

void bind_io(nb::module_& module) {
  nb::register_exception_translator(&raise_os_errors);
  bind_block_file(module);
  bind_io_values(module);
  bind_io_engine(module);
}
