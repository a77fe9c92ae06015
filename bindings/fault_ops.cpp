// FaultOps for Python: tests of everything above the engine plan its faults with it.
#include "tiermem/fault_ops.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_fault_ops(nb::module_& module) {
  using tiermem::FaultOps;
  nb::enum_<tiermem::FileCall>(module, "FileCall")
      .value("READ", tiermem::FileCall::read)
      .value("WRITE", tiermem::FileCall::write)
      .value("ALLOCATE", tiermem::FileCall::allocate)
      .value("SYNC", tiermem::FileCall::sync);

  nb::class_<FaultOps>(module, "FaultOps", nb::is_final())
      .def(nb::new_([] { return std::make_shared<FaultOps>(); }))
      .def("fail", &FaultOps::fail, "call"_a, "first"_a, "error"_a, "count"_a = 1)
      .def("shorten", &FaultOps::shorten, "call"_a, "first"_a, "num_bytes"_a, "count"_a = 1)
      .def("hold", &FaultOps::hold, "call"_a, "first"_a, "count"_a = 1)
      .def("release", &FaultOps::release)
      .def("wait_held", &FaultOps::wait_held, "count"_a, "timeout_s"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def("num_calls", &FaultOps::num_calls, "call"_a);
}
