// tiermem._core: the native core as Python sees it. Argument conversion and error mapping only.
#include <exception>

#include "bindings.h"
#include "tiermem/errors.h"

namespace nb = nanobind;

namespace {

// InvariantError of the core becomes tiermem.errors.InvariantError, which the module keeps.
void map_errors() {
  nb::object python_class = nb::module_::import_("tiermem.errors").attr("InvariantError");
  nb::register_exception_translator(
      [](const std::exception_ptr& thrown, void* python_class) {
        try {
          std::rethrow_exception(thrown);
        } catch (const tiermem::InvariantError& error) {
          PyErr_SetString(static_cast<PyObject*>(python_class), error.what());
        }
      },
      python_class.release().ptr());
}

}  // namespace

NB_MODULE(_core, module) {
  module.doc() =
      "Native core of tiermem: page table, prefix index, file I/O, checksum, copies and launches.";
  // What is still alive when the interpreter exits goes with the process; nobody needs to read about it.
  nb::set_leak_warnings(false);
  map_errors();
  bind_page_table(module);
  bind_prefix_index(module);
  bind_fault_ops(module);
  bind_io(module);
  bind_raw_disk(module);
  bind_checksum(module);
  bind_copies(module);
  bind_kernel_launch(module);
  bind_cpu_attention(module);
  bind_attention_queue(module);
  bind_lmdb_file(module);
}
